extension KVCache {
  /// Positions of the live rows of a head, ascending: which tokens an attention kernel of the engine's own will see.
  public func rows(layer: Int, head: Int) throws(KVError) -> [Int] {
    let view = try view(layer, head)
    return (0..<view.rowCount(head: head)).map { view.position(head: head, row: $0) }
  }

  /// The live rows of a head as f32: keys [rows, keyDim], values [rows, valueDim], the position and the log bias of
  /// each row (to be added to its logit; 0 unless rows were merged), and the tokens it stands for.
  ///
  /// Decodes whatever the store holds. O(rows · dim).
  public func read(layer: Int, head: Int) throws(KVError) -> HeadContents {
    let view = try view(layer, head)
    let count = view.rowCount(head: head)
    return HeadContents(
      positions: (0..<count).map { view.position(head: head, row: $0) }, keys: view.keys(head: head),
      values: view.values(head: head),
      logBias: (0..<count).map { row in
        let place = view.reference(head: head, row: row)
        return view.segments[Int(place.segment)].logBias(head: head, slot: Int(place.slot))
      }, counts: (0..<count).map { view.count(head: head, row: $0) })
  }

  /// Calls `body` with views of a head's keys and values in the cache's own memory, when it holds them dense, in one
  /// piece and in host memory: no copy. Nil otherwise; use ``read(layer:head:)``.
  ///
  /// - Parameter body: gets keys [1, rows, keyDim] and values [1, rows, valueDim].
  public func withDenseRows<Result>(
    layer: Int, head: Int, _ body: (borrowing TensorView, borrowing TensorView) -> Result
  ) throws(KVError) -> Result? {
    let state = try state(layer)
    try check(head: head, state)
    let holding = state.segments.filter { $0.slotCount(head: head) > 0 }
    guard holding.count == 1, let keys = holding[0].denseRun(head: head, keys: true),
      let values = holding[0].denseRun(head: head, keys: false)
    else { return nil }
    return body(tensor(keys), tensor(values))
  }

  @_lifetime(immortal)
  private func tensor(_ slice: RunSlice) -> TensorView {
    let type = slice.run.encoding.type
    return TensorView(
      unsafeBase: slice.run.base + slice.first * slice.run.dim * type.byteCount, type: type, heads: 1,
      tokens: slice.count, dim: slice.run.dim, headStride: slice.count * slice.run.dim,
      tokenStride: slice.run.dim)
  }

  private func check(head: Int, _ state: LayerState) throws(KVError) {
    guard head >= 0, head < state.shape.kvHeads else {
      throw KVError(
        .shapeMismatch, "head \(head) of a layer of \(state.shape.kvHeads) KV heads", layer: state.layer)
    }
  }

  private func view(_ layer: Int, _ head: Int) throws(KVError) -> LayerView {
    let state = try state(layer)
    try check(head: head, state)
    return LayerView(state, options: attention, backend: backend.operations)
  }
}

/// The rows of one KV head, decoded.
public struct HeadContents: Hashable, Sendable {
  /// Absolute token positions, ascending.
  public var positions: [Int]
  /// [rows, keyDim].
  public var keys: [Float]
  /// [rows, valueDim].
  public var values: [Float]
  /// To be added to the logit of each row.
  public var logBias: [Float]
  /// Tokens each row stands for; 1 unless rows were merged.
  public var counts: [Int]

  /// - Parameter counts: nil: 1 each.
  public init(positions: [Int], keys: [Float], values: [Float], logBias: [Float], counts: [Int]? = nil) {
    self.positions = positions
    self.keys = keys
    self.values = values
    self.logBias = logBias
    self.counts = counts ?? Array(repeating: 1, count: positions.count)
  }
}
