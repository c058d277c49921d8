/// What the slots of one KV head carry beside their rows, in the order the rows arrived.
///
/// ```
/// slot        0   1   2   …
/// positions   0   1   5   …    Int32, implicit while consecutive
/// bias        0   0  -∞   …    Float, absent while all are 0; minus infinity: the slot is dead
/// observed   .5  .2   0   …    Float, some a slot, absent unless the policy observes attention
/// count       1   3   1   …    UInt32, tokens a slot stands for, absent while all are 1
/// ```
package struct SlotColumns {
  package var positions = PositionColumn()
  package var bias: Column<Float>?
  package var observed: Column<Float>?
  package var counts: Column<UInt32>?
  package var dead = 0 { didSet { deadEnd = dead == 0 ? 0 : .max } }
  /// No slot from this one on is dead.
  package private(set) var deadEnd = 0
  /// Whether a log bias may be other than 0 and minus infinity.
  package var weighs = false

  package init() {}

  package var count: Int { positions.count }
  package var live: Int { count - dead }
  package func isLive(_ slot: Int) -> Bool { bias.map { $0[slot] != -.infinity } ?? true }
  package func logBias(_ slot: Int) -> Float { bias.map { $0[slot] } ?? 0 }
  /// Tokens a slot stands for.
  package func tokens(_ slot: Int) -> Int { counts.map { Int($0[slot]) } ?? 1 }

  // MARK: Appending

  /// Room for `added` more slots in every column but the positions; columns are made when first needed, `observed`
  /// numbers a slot.
  package mutating func reserve(
    _ added: Int, biased: Bool = false, observed width: Int, counted: Bool = false, backend: any ComputeBackend
  ) throws(KVError) {
    try SlotColumns.reserve(&bias, added, slots: count, wanted: biased, of: 0, width: 1, backend: backend)
    if biased { weighs = true }
    try SlotColumns.reserve(&observed, added, slots: count, wanted: width > 0, of: 0, width: width, backend: backend)
    try SlotColumns.reserve(&counts, added, slots: count, wanted: counted, of: 1, width: 1, backend: backend)
  }

  private static func reserve<Element: BitwiseCopyable>(
    _ column: inout Column<Element>?, _ added: Int, slots: Int, wanted: Bool, of value: Element, width: Int,
    backend: any ComputeBackend
  ) throws(KVError) {
    if column != nil {
      try column!.reserve(added, backend: backend)
    } else if wanted {
      var fresh = Column<Element>(width: width)
      try fresh.reserve(slots + added, backend: backend)
      fresh.append(repeating: value, count: slots)
      column = fresh
    }
  }

  /// Room for the tokens `next` and those after.
  package mutating func reserve(
    next: Int, adding: Int, observed width: Int, backend: any ComputeBackend
  ) throws(KVError) {
    try positions.reserve(next: next, adding: adding, backend: backend)
    try reserve(adding, observed: width, backend: backend)
  }

  /// Appends tokens that follow those there are, into reserved room.
  package mutating func append(next: Int, adding: Int, observed values: [Float]) {
    positions.append(next: next, adding: adding)
    bias?.append(repeating: 0, count: adding)
    if values.isEmpty {
      observed?.append(repeating: 0, count: adding)
    } else {
      observed?.append(planes: values, count: adding)
    }
    counts?.append(repeating: 1, count: adding)
  }

  /// Room for slots of another segment.
  package mutating func reserve(
    _ slots: [Int], of other: any Segment, head: Int, observed width: Int, backend: any ComputeBackend
  ) throws(KVError) {
    if slots.isEmpty { return }
    let biased = slots.contains { other.logBias(head: head, slot: $0) != 0 }
    let counted = slots.contains { other.count(head: head, slot: $0) != 1 }
    try reserve(slots.count, biased: biased, observed: width, counted: counted, backend: backend)
    try positions.reserve(slots.map { other.position(head: head, slot: $0) }, backend: backend)
  }

  /// Appends slots of another segment, into reserved room.
  package mutating func append(_ slots: [Int], of other: any Segment, head: Int) {
    if slots.isEmpty { return }
    let source = other.observed(head: head)
    let first = count
    positions.append(slots.map { other.position(head: head, slot: $0) })
    observed?.append(repeating: 0, count: slots.count)
    let planes = observed?.width ?? 0
    for (offset, slot) in slots.enumerated() {
      bias?.append(other.logBias(head: head, slot: slot))
      counts?.append(UInt32(other.count(head: head, slot: slot)))
      for plane in 0..<planes {
        observed?.set(first + offset, plane: plane, source.value(column: plane, slot: slot))
      }
    }
  }

  // MARK: Removing

  /// Memory in which slots can be marked dead.
  package mutating func prepareDrop(backend: any ComputeBackend) throws(KVError) {
    if bias == nil {
      try SlotColumns.reserve(&bias, 0, slots: count, wanted: true, of: 0, width: 1, backend: backend)
    } else {
      try bias!.makeUnique(backend: backend)
    }
  }

  /// Marks a slot dead. Only after `prepareDrop`.
  package mutating func drop(_ slot: Int) {
    if bias![slot] == -.infinity { return }
    bias!.set(slot, -.infinity)
    let end = max(deadEnd, slot + 1)
    dead += 1
    deadEnd = end
  }

  package mutating func removeLast(_ removed: Int) {
    for slot in count - removed..<count where !isLive(slot) { dead -= 1 }
    positions.removeLast(removed)
    bias?.removeLast(removed)
    observed?.removeLast(removed)
    counts?.removeLast(removed)
  }

  /// The columns of the slots `kept` alone; those that say nothing any more are absent.
  package func gathered(_ kept: [Int], backend: any ComputeBackend) throws(KVError) -> SlotColumns {
    var result = SlotColumns()
    result.positions = try positions.gathered(kept, backend: backend)
    if dead > 0 {
      let lost = kept.count { !isLive($0) }
      if lost > 0 { result.dead = lost }
    }
    result.weighs = weighs
    if let bias, weighs || result.dead > 0, kept.contains(where: { bias[$0] != 0 }) {
      result.bias = try bias.gathered(kept, backend: backend)
    }
    if let observed { result.observed = try observed.gathered(kept, backend: backend) }
    if let counts, kept.contains(where: { counts[$0] != 1 }) {
      result.counts = try counts.gathered(kept, backend: backend)
    }
    return result
  }

  /// The first `kept` slots, and behind them one for each of `sources`: a slot there was, or a dead one in its place.
  func spread(
    keeping kept: Int, _ sources: [(position: Int, slot: Int?)], backend: any ComputeBackend
  ) throws(KVError) -> SlotColumns {
    var result = try gathered(Array(0..<kept), backend: backend)
    let slots = sources.compactMap(\.slot)
    try result.positions.reserve(sources.map(\.position), backend: backend)
    try result.reserve(
      sources.count, biased: slots.count < sources.count || slots.contains { logBias($0) != 0 },
      observed: observed?.width ?? 0, counted: slots.contains { tokens($0) != 1 }, backend: backend)
    result.positions.append(sources.map(\.position))
    result.observed?.append(repeating: 0, count: sources.count)
    for (index, source) in sources.enumerated() {
      result.bias?.append(source.slot.map { logBias($0) } ?? -.infinity)
      result.counts?.append(UInt32(source.slot.map { tokens($0) } ?? 1))
      if source.slot.map({ !isLive($0) }) ?? true { result.dead += 1 }
      guard let slot = source.slot, let observed else { continue }
      for plane in 0..<observed.width {
        result.observed?.set(kept + index, plane: plane, observed.base![plane * observed.capacity + slot])
      }
    }
    return result
  }

  /// Whether there is much more memory than the slots that live need: that is better given back.
  var isRoomy: Bool {
    let most = Column<Float>.roomiest(live)
    return [bias?.capacity ?? 0, observed?.capacity ?? 0, positions.explicit?.capacity ?? 0].contains { $0 > most }
  }

  /// Moves live slots down over dead ones, in every column but the biases. These are returned: they tell which rows to
  /// move, before `endCompaction`.
  mutating func beginCompaction(backend: any ComputeBackend) throws(KVError) -> UnsafePointer<Float>? {
    guard bias != nil else { return nil }
    try bias!.makeUnique(backend: backend)
    guard let marks = bias!.base.map({ UnsafePointer($0) }) else { return nil }
    try observed?.makeUnique(backend: backend)
    try counts?.makeUnique(backend: backend)
    if positions.explicit == nil {
      // Consecutive positions with gaps are written down for the first time.
      positions = try positions.gathered((0..<count).filter { marks[$0] != -.infinity }, backend: backend)
    } else {
      try positions.compact(without: marks, backend: backend)
    }
    observed?.compact(without: marks)
    counts?.compact(without: marks)
    return marks
  }

  mutating func endCompaction() {
    if let marks = bias?.base.map({ UnsafePointer($0) }) { bias!.compact(without: marks) }
    dead = 0
  }

  // MARK: Observed attention

  package mutating func forgetObserved() { observed = nil }
  package mutating func makeObservedUnique(backend: any ComputeBackend) throws(KVError) {
    if observed != nil { try observed!.makeUnique(backend: backend) }
  }

  package var observedColumns: ObservedColumns {
    ObservedColumns(
      base: observed?.base, stride: observed?.capacity ?? 0, width: observed?.width ?? 0, count: count, live: live,
      bias: dead > 0 ? bias?.base.map { UnsafePointer($0) } : nil, deadEnd: deadEnd,
      positions: positions.explicit?.base.map { UnsafePointer($0) }, firstPosition: positions.first)
  }

  // MARK: Reading

  package func appendLive(to slots: inout ContiguousArray<Int32>) {
    guard dead > 0, let bias = bias?.base else {
      slots.append(contentsOf: 0..<Int32(count))
      return
    }
    for slot in 0..<count where bias[slot] != -.infinity { slots.append(Int32(slot)) }
  }

  package func enterLive(
    as segment: Int32, in table: UnsafeMutableBufferPointer<LayerView.RowReference>
  ) {
    let bias = dead > 0 ? bias?.base : nil
    let explicit = positions.explicit?.base
    let first = positions.first
    for slot in 0..<count {
      if let bias, bias[slot] == -.infinity { continue }
      table[explicit.map { Int($0[slot]) } ?? first + slot] =
        LayerView.RowReference(segment: segment, slot: Int32(slot))
    }
  }

  /// Enters what an attention plan wants to know of some slots beside their rows.
  package func carry(_ slots: Range<Int>, to work: inout RowsWork) {
    work.positions = positions.explicit?.base.map { UnsafePointer($0) + slots.lowerBound }
    work.firstPosition = positions.first + slots.lowerBound
    // Marks of dead slots that are no more say nothing: attention need not read them.
    work.bias = dead > 0 || weighs ? bias?.base.map { UnsafePointer($0) + slots.lowerBound } : nil
    work.score = observed?.base.map { $0 + slots.lowerBound }
    work.sortedFrom = max(0, min(positions.sortedFrom, slots.upperBound) - slots.lowerBound)
    work.highest = positions.highest
  }

  // MARK: Life cycle

  package func tally(into tally: inout ByteTally) {
    if let buffer = positions.explicit?.buffer { tally.add(buffer, kind: \.index) }
    if let buffer = bias?.buffer { tally.add(buffer, kind: \.metadata) }
    if let buffer = observed?.buffer { tally.add(buffer, kind: \.state) }
    if let buffer = counts?.buffer { tally.add(buffer, kind: \.metadata) }
  }

  package func checkInvariants() {
    checkOrder()
    let counted = (0..<count).count { !isLive($0) }
    precondition((0..<count).allSatisfy { $0 < deadEnd || isLive($0) }, "a dead slot behind slot \(deadEnd)")
    precondition(counted == dead, "\(counted) dead slots, counter says \(dead)")
    precondition(bias.map { $0.count == count } ?? true, "one bias per slot")
    precondition(
      weighs || (0..<count).allSatisfy { logBias($0) == 0 || logBias($0) == -.infinity }, "log biases are marks alone")
    precondition(observed.map { $0.count == count } ?? true, "observed numbers of every slot")
    precondition(counts.map { $0.count == count } ?? true, "one count per slot")
  }

  private func checkOrder() {
    var (sortedFrom, highest, maximum) = (0, -1, -1)
    for slot in 0..<count {
      let position = positions[slot]
      if position <= maximum { (sortedFrom, highest) = (slot + 1, maximum) }
      maximum = max(maximum, position)
    }
    precondition(
      sortedFrom == positions.sortedFrom && highest == positions.highest && maximum == positions.maximum,
      "in order from slot \(sortedFrom) on, behind position \(highest); noted are \(positions.sortedFrom) and "
        + "\(positions.highest)")
    if positions.isAscending { return }
    let alive = (0..<count).filter { isLive($0) }.map { positions[$0] }
    precondition(Set(alive).count == alive.count, "a live row per position")
  }
}

// MARK: - Saved caches

extension SlotColumns {
  /// Slots, dead slots, positions, log biases and observed attention; counts are apart, where older files have them.
  func encode(to writer: inout ByteWriter) {
    writer.count(count)
    writer.count(dead)
    positions.encode(to: &writer)
    writer.bool(bias != nil)
    bias?.encode(to: &writer)
    writer.bool(observed != nil)
    if let observed {
      writer.count(observed.width)
      observed.encode(to: &writer)
    }
  }

  func encodeCounts(to writer: inout ByteWriter) {
    writer.bool(counts != nil)
    counts?.encode(to: &writer)
  }

  init(from reader: inout ByteReader, tokensSeen: Int, backend: any ComputeBackend) throws(KVError) {
    self.init()
    let slots = try reader.count("slots", in: 0...tokensSeen)
    dead = try reader.count("dead slots", in: 0...slots)
    // Initialisers do not tell observers.
    deadEnd = dead == 0 ? 0 : .max
    positions = try PositionColumn(from: &reader, count: slots, tokensSeen: tokensSeen, backend: backend)
    var (hidden, weighed) = (0, false)
    if try reader.bool("whether there are log biases") {
      bias = try Column<Float>(from: &reader, count: slots, "log biases", backend: backend) { value in
        if value == -.infinity { hidden += 1 } else if value != 0 { weighed = true }
        return value < .infinity
      }
    }
    weighs = weighed
    guard hidden == dead else {
      throw reader.corrupt("expected \(dead) dead slots, those with a log bias of minus infinity; found \(hidden)")
    }
    if try reader.bool("whether there is observed attention") {
      let width = try reader.count("observed columns", in: 1...AttentionLimits.columns)
      observed = try Column<Float>(from: &reader, width: width, count: slots, "observed numbers", backend: backend) {
        $0.isFinite
      }
    }
  }

  mutating func decodeCounts(
    from reader: inout ByteReader, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) {
    guard try reader.bool("whether there are token counts") else { return }
    counts = try Column<UInt32>(from: &reader, count: count, "token counts", backend: backend) { tokens in
      tokens >= 1 && tokens <= tokensSeen
    }
  }
}
