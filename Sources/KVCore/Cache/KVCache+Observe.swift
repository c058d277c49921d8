extension KVCache {
  /// Reports queries to the policy, for engines with attention of their own. Call it after `append`, for every append
  /// whose queries the policy needs.
  ///
  /// - Parameter queries: [queryHeads, n, keyDim], post-RoPE, of the n tokens just appended.
  public func observe(layer: Int, queries: borrowing TensorView) throws(KVError) {
    let state = try state(layer)
    try checkQueries(queries, state)
    if capturesQueries(state) || capturesProbes(state) { try capture(queries, state) }
    try notePeaks(of: queries, state)
  }

  /// Names the tokens whose queries a policy with special probes looks at (``ProbeQueries/Strategy/special``): positions,
  /// before these tokens are attended. Those of earlier calls stay.
  public func markProbes(_ positions: [Int]) {
    for state in layers where state.shape.cached { state.markedProbes.formUnion(positions) }
  }

  /// Reports attention weights to the policy, for engines with attention of their own.
  ///
  /// - Parameter weights: per KV head, the weight each live row received in this step; rows in position order, as
  ///   ``rows(layer:head:)`` lists them. Over the query heads of the group and the queries since the last report (of
  ///   these the newest that ``AttentionObserver/observedQueries(prompt:)`` asks for), the sum or the maximum:
  ///   ``AttentionObserver/reduction`` of the policy's `inputs.observer`.
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
    guard observesAttention(state), let observer else { return }
    for segment in state.segments { try segment.prepareObserved() }
    // The engine reports what follows the last report.
    let queries = state.seen - min(state.observedTokens, state.seen)
    if observedQueries(of: max(queries, 1), state) > 0 {
      let step = clearedStepWeights(state)
      scatter(weights, state, into: step)
      let observed = observedQueries(of: queries, state)
      if sumsInPlace { fold(observer, state, queries: observed) } else { fold(state, queries: observed) }
    }
    state.observedTokens = state.seen
    state.frozenBelow = state.seen
  }

  // MARK: Folding

  /// Slots of one head in the weights of a step: whole vectors.
  static func padded(_ slots: Int) -> Int { (slots + 15) / 16 * 16 }

  /// Of the `tokens` newest queries, how many the observer looks at.
  func observedQueries(of tokens: Int, _ state: LayerState) -> Int {
    guard let observer else { return 0 }
    return max(0, min(tokens, observer.observedQueries(prompt: state.phase == .prefill)))
  }

  /// A weight of 0 for every slot of every head and segment, in the order head, segment, slot.
  func clearedStepWeights(_ state: LayerState) -> UnsafeMutablePointer<Float> {
    var total = 0
    for head in 0..<state.shape.kvHeads {
      for segment in state.segments { total += KVCache.padded(segment.slotCount(head: head)) }
    }
    let weights = stepWeights.floats(total)
    weights.update(repeating: 0, count: total)
    return weights
  }

  /// Weights of live rows in position order to the slots they lie in.
  private func scatter(_ weights: [[Float]], _ state: LayerState, into step: UnsafeMutablePointer<Float>) {
    let view = LayerView(state, options: attention, backend: backend.operations)
    var starts: [Int] = []
    var start = 0
    for head in weights.indices {
      starts.removeAll(keepingCapacity: true)
      for segment in state.segments {
        starts.append(start)
        start += KVCache.padded(segment.slotCount(head: head))
      }
      for row in weights[head].indices {
        let place = view.reference(head: head, row: row)
        step[starts[Int(place.segment)] + Int(place.slot)] = weights[head][row]
      }
    }
  }

  /// Lets the observer take in the weights of a step.
  func fold(_ state: LayerState, queries: Int) {
    guard queries > 0, let observer else { return }
    fold(observer, state, queries: queries)
  }

  private func fold(_ observer: some AttentionObserver, _ state: LayerState, queries: Int) {
    var total = 0
    for head in 0..<state.shape.kvHeads {
      for segment in state.segments { total += KVCache.padded(segment.slotCount(head: head)) }
    }
    // The same size as when the step began: nothing is moved.
    var weights = stepWeights.floats(total)
    if observer.sharedByHeads { share(weights, observer.reduction, state) }
    for head in 0..<state.shape.kvHeads {
      for segment in state.segments {
        let columns = segment.observed(head: head)
        if columns.base != nil, columns.count > 0 {
          observer.fold(
            ObservedRows(
              columns, weights: UnsafeBufferPointer(start: weights, count: columns.count), queries: queries,
              group: state.shape.group, tokensSeen: state.seen, decodedTokens: state.decodedTokens,
              prompt: state.phase == .prefill))
        }
        weights += KVCache.padded(columns.count)
      }
    }
  }

  /// Gives every head what all heads received, where they hold the same slots.
  private func share(_ weights: UnsafeMutablePointer<Float>, _ reduction: AttentionReduction, _ state: LayerState) {
    guard state.shape.kvHeads > 1, state.segments.allSatisfy(headsAreAlike) else { return }
    let count = state.segments.reduce(0) { $0 + KVCache.padded($1.slotCount(head: 0)) }
    for head in 1..<state.shape.kvHeads {
      let own = weights + head * count
      switch reduction {
      case .sum: for slot in 0..<count { weights[slot] += own[slot] }
      case .max: for slot in 0..<count { weights[slot] = max(weights[slot], own[slot]) }
      }
    }
    for head in 1..<state.shape.kvHeads { (weights + head * count).update(from: weights, count: count) }
  }

  /// Lets the policy act on what was appended, for engines with attention of their own: call it after their attention
  /// and after `observe`. Engines that attend through the cache never need it.
  ///
  /// - Throws: `missingInput` when the policy's inputs for these tokens were not observed.
  public func commit(layer: Int) throws(KVError) { try maintain(state(layer)) }
}
