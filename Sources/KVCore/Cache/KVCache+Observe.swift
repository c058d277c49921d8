extension KVCache {
  /// Reports queries to the policy, for engines with attention of their own. Call it after `append`, for every append
  /// whose queries the policy needs.
  ///
  /// - Parameter queries: [queryHeads, n, keyDim], post-RoPE, of the n tokens just appended.
  public func observe(layer: Int, queries: borrowing TensorView) throws(KVError) {
    let state = try state(layer)
    try checkQueries(queries, state)
    if capturesQueries(state) { try capture(queries, state) }
  }

  /// Reports attention weights to the policy, for engines with attention of their own.
  ///
  /// - Parameter weights: per KV head, the weight each live row received in this step, summed over the new queries and
  ///   the query heads of the group; rows in position order, as ``rows(layer:head:)`` lists them.
  /// - Throws: `shapeMismatch` when a head's count is not its live rows, `nonFinite`; nothing is changed then.
  public func observe(layer: Int, attention weights: [[Float]]) throws(KVError) {
    let state = try state(layer)
    guard weights.count == state.shape.kvHeads else {
      throw KVError(
        .shapeMismatch, "weights for \(state.shape.kvHeads) KV heads expected; got \(weights.count)", layer: layer)
    }
    for (head, row) in weights.enumerated() {
      guard row.count == state.liveRows(head: head) else {
        throw KVError(
          .shapeMismatch, "weights for \(state.liveRows(head: head)) rows expected; got \(row.count)",
          layer: layer, head: head)
      }
      if let index = row.firstIndex(where: { !$0.isFinite }) {
        throw KVError(.nonFinite, "the weight of row \(index) is NaN or infinite", layer: layer, head: head)
      }
    }
    guard tracksScores(state) else { return }
    for segment in state.segments { try segment.prepareScores() }
    let view = LayerView(state, options: attention, backend: backend.operations)
    for head in weights.indices {
      var added: [[(slot: Int, weight: Float)]] = Array(repeating: [], count: state.segments.count)
      for (row, weight) in weights[head].enumerated() {
        let place = view.reference(head: head, row: row)
        added[Int(place.segment)].append((Int(place.slot), weight))
      }
      for (segment, own) in zip(state.segments, added) { segment.addScores(head: head, own) }
    }
    state.observedTokens = state.seen
    state.frozenBelow = state.seen
  }

  /// Lets the policy act on what was appended, for engines with attention of their own: call it after their attention
  /// and after `observe`. Engines that attend through the cache never need it.
  ///
  /// - Throws: `missingInput` when the policy's inputs for these tokens were not observed.
  public func commit(layer: Int) throws(KVError) { try maintain(state(layer)) }
}
