/// The largest magnitude of every channel of the queries of a prompt, per KV head over its query heads: what keys are
/// balanced against.
struct QueryPeaks {
  /// [kvHeads][keyDim].
  private(set) var values = Column<Float>()
  /// Tokens whose queries were seen.
  private(set) var tokens = 0
  private let kvHeads: Int
  private let dim: Int

  init(_ shape: LayerShape, backend: any ComputeBackend) throws(KVError) {
    kvHeads = shape.kvHeads
    dim = shape.keyDim
    try values.reserve(kvHeads * dim, backend: backend)
    values.append(repeating: 0, count: kvHeads * dim)
  }

  /// Takes in the queries of the next tokens.
  mutating func add(_ queries: borrowing TensorView, backend: any ComputeBackend) throws(KVError) {
    try values.makeUnique(backend: backend)
    let block = 256
    let scratch = try backend.allocate(
      byteCount: block * dim * MemoryLayout<Float>.stride, hostVisible: false)
    let rows = RowRun(encoding: .dense(.f32), dim: dim, capacity: block, base: scratch.base)
    let group = queries.heads / kvHeads
    for head in 0..<queries.heads {
      var low = [Float](repeating: .infinity, count: dim)
      var high = [Float](repeating: -.infinity, count: dim)
      for first in stride(from: 0, to: queries.tokens, by: block) {
        let slice = RunSlice(run: rows, first: 0, count: min(block, queries.tokens - first))
        _ = backend.write(queries, to: [WriteTarget(head: head, token: first, slice: slice, range: .window)])
        low.withUnsafeMutableBufferPointer { low in
          high.withUnsafeMutableBufferPointer { high in
            guard let low = low.baseAddress, let high = high.baseAddress else { return }
            withUnsafePointer(to: slice) {
              backend.channelRange(UnsafeBufferPointer(start: $0, count: 1), map: nil, low: low, high: high)
            }
          }
        }
      }
      for channel in 0..<dim where low[channel] <= high[channel] {
        let place = head / group * dim + channel
        values.set(place, max(values[place], abs(low[channel]), abs(high[channel])))
      }
    }
    tokens += queries.tokens
    withExtendedLifetime(scratch) {}
  }

  /// Per KV head.
  var peaks: [[Float]] {
    (0..<kvHeads).map { head in (0..<dim).map { values[head * dim + $0] } }
  }

  func encode(to writer: inout ByteWriter) {
    writer.count(tokens)
    writer.array((0..<values.count).map { values[$0] })
  }

  init(
    from reader: inout ByteReader, seen: Int, shape: LayerShape, backend: any ComputeBackend
  ) throws(KVError) {
    try self.init(shape, backend: backend)
    tokens = try reader.count("tokens whose queries were seen", in: 0...seen)
    let saved = try reader.array(of: Float.self, count: values.count, "magnitudes of queries")
    guard saved.allSatisfy({ $0 >= 0 && $0.isFinite }) else {
      throw reader.corrupt("expected finite magnitudes of queries, 0 or more")
    }
    for (index, value) in saved.enumerated() { values.set(index, value) }
  }
}
