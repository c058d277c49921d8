/// Queries of the tokens that may become probes, as f32 [probes][queryHeads][keyDim], positions ascending. Forks share
/// the memory until one of them writes.
struct ProbeStore {
  /// The first token whose query was not passed over.
  private(set) var first: Int
  private(set) var positions = Column<Int32>()
  private(set) var rows = Column<Float>()
  let queryHeads: Int
  let keyDim: Int

  init(first: Int, shape: LayerShape) {
    self.first = first
    queryHeads = shape.queryHeads
    keyDim = shape.keyDim
  }

  private var width: Int { queryHeads * keyDim }
  var held: [Int] { positions.withSpan { $0.map { Int($0) } } }

  /// Takes in the queries of the newest tokens, `tokens`, that may become probes of `range`.
  mutating func capture(
    _ queries: borrowing TensorView, tokens: Range<Int>, range: Range<Int>, _ probes: ProbeQueries, marked: Set<Int>,
    backend: any ComputeBackend
  ) throws(KVError) {
    let taken = tokens.filter { probes.mayBecome($0, of: range, marked: marked) }
    try discard(keeping: { probes.mayBecome($0, of: range, marked: marked) }, adding: taken.count, backend: backend)
    try positions.reserve(taken.count, backend: backend)
    // Room for whole queries, as many as there is room for positions.
    try rows.reserve(positions.capacity * width - rows.count, backend: backend)
    if taken.isEmpty { return }
    let base = UnsafeMutableRawPointer(rows.extend(by: taken.count * width))
    var targets: [WriteTarget] = []
    for (index, position) in taken.enumerated() {
      positions.append(Int32(position))
      for head in 0..<queryHeads {
        let run = RowRun(
          encoding: .dense(.f32), dim: keyDim, capacity: 1, base: base + (index * width + head * keyDim) * 4)
        targets.append(
          WriteTarget(
            head: head, token: position - tokens.lowerBound, slice: RunSlice(run: run, first: 0, count: 1),
            range: .window))
      }
    }
    _ = backend.write(queries, to: targets)
  }

  /// Gives up what can no longer become a probe, when there is no room and half would go.
  private mutating func discard(
    keeping wanted: (Int) -> Bool, adding: Int, backend: any ComputeBackend
  ) throws(KVError) {
    guard positions.count + adding > positions.capacity, positions.count > 0 else { return }
    let kept = held.indices.filter { wanted(Int(positions[$0])) }
    guard kept.count * 2 <= positions.count else { return }
    var (fewer, packed) = (Column<Int32>(), Column<Float>())
    try fewer.reserve(kept.count + adding, backend: backend)
    try packed.reserve((kept.count + adding) * width, backend: backend)
    for index in kept {
      fewer.append(positions[index])
      let target = packed.extend(by: width)
      if let source = rows.base { target.update(from: source + index * width, count: width) }
    }
    (positions, rows) = (fewer, packed)
  }

  /// The queries of some tokens that are held, [queryHeads][count][keyDim].
  func queries(of wanted: [Int]) -> [Float] {
    let index = Dictionary(uniqueKeysWithValues: held.enumerated().map { ($1, $0) })
    var result = [Float](repeating: 0, count: wanted.count * width)
    guard let base = rows.base else { return result }
    result.withUnsafeMutableBufferPointer { buffer in
      guard let target = buffer.baseAddress else { return }
      for (i, position) in wanted.enumerated() {
        guard let row = index[position] else { preconditionFailure("the query of token \(position) is not held") }
        for head in 0..<queryHeads {
          (target + (head * wanted.count + i) * keyDim).update(
            from: base + row * width + head * keyDim, count: keyDim)
        }
      }
    }
    return result
  }

  func tally(into tally: inout ByteTally) {
    for buffer in [positions.buffer, rows.buffer] {
      if let buffer { tally.add(buffer, kind: \.state) }
    }
  }

  // MARK: Saving

  func encode(to writer: inout ByteWriter) {
    writer.count(first)
    writer.count(positions.count)
    writer.count(positions.capacity)
    positions.withSpan { writer.array(Array($0)) }
    rows.withSpan { writer.array(Array($0)) }
  }

  init(from reader: inout ByteReader, seen: Int, shape: LayerShape, backend: any ComputeBackend) throws(KVError) {
    self.init(first: try reader.count("the first token with a query", in: 0...seen), shape: shape)
    let count = try reader.count("probe queries", in: 0...seen)
    let capacity = try reader.count("room for probe queries", in: count...max(count, 2 * seen + 64))
    let tokens = try reader.array(of: Int32.self, count: count, "tokens of probe queries")
    guard zip(tokens, tokens.dropFirst()).allSatisfy(<), tokens.allSatisfy({ $0 >= 0 && $0 < seen }) else {
      throw reader.corrupt("expected ascending tokens of probe queries below \(seen)")
    }
    let numbers = try reader.array(of: Float.self, count: count * width, "channels of probe queries")
    guard numbers.allSatisfy(\.isFinite) else { throw reader.corrupt("expected finite probe queries") }
    try positions.reserve(capacity, backend: backend)
    try rows.reserve(capacity * width, backend: backend)
    for token in tokens { positions.append(token) }
    for number in numbers { rows.append(number) }
  }
}
