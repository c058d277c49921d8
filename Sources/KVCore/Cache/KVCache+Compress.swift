extension KVCache {
  /// Says that the prompt is complete: the policy chooses and stores, layer by layer.
  ///
  /// - Throws: `missingInput` when a declared input did not arrive; the cache is unchanged then.
  public func finishPrefill() throws(KVError) {
    let waiting = layers.filter { $0.shape.cached && $0.phase == .prefill }
    try compress(waiting, when: policy.schedule.afterPrefill, calibrates: true)
    try enterDecode(waiting)
  }

  private func enterDecode(_ waiting: [LayerState]) throws(KVError) {
    for state in waiting {
      try enterDecode(state)
      try join(groupsOf: state)
    }
  }

  /// The same for one layer, as soon as its part of the prompt is attended, so that no more than one layer is ever held
  /// in full. Policies whose budgets span layers must cascade (``Allocator/cascades``): layers that are finished already
  /// then give rows up to this one, and decoding begins when all are finished. Others need ``finishPrefill()``.
  public func finishPrefill(layer: Int) throws(KVError) {
    let state = try state(layer)
    guard state.phase == .prefill else {
      throw KVError(.wrongPhase, "this layer's prompt is already finished", layer: layer)
    }
    if policy.allocator.spansLayers, policy.schedule.afterPrefill, selects(state) {
      guard policy.allocator.cascades, policy.schedule.trigger == nil else {
        throw KVError(
          .unsupported, "\(policy.spec) shares its budget between layers: call finishPrefill()", layer: layer)
      }
      return try cascade(state)
    }
    try compress([state], when: policy.schedule.afterPrefill, calibrates: true)
    try enterDecode(state)
    try join(groupsOf: state)
  }

  /// Says that another prompt follows (the next turn): tokens are again kept until ``finishPrefill()``.
  public func beginPrefill() {
    for state in layers where state.shape.cached && state.phase == .decode {
      state.phase = .prefill
      // What was not recorded while decoding begins with this prompt.
      if !queriesWhileDecoding {
        state.promptStart = state.seen
        state.observedQueries = state.seen
      }
      if !observesWhileDecoding { state.observedTokens = state.seen }
    }
  }

  /// Lets the policy choose now, whatever its schedule says, down to its budget.
  public func compress() throws(KVError) {
    try compress(layers.filter { $0.shape.cached }, when: true, asked: true)
    for state in layers where state.shape.cached { try settle(state) }
  }

  /// Drops enough rows that `tokens` more fit the budget (StreamingLLM's room for a coming turn).
  public func makeRoom(for tokens: Int) throws(KVError) {
    guard tokens >= 0 else { throw KVError(.invalidOption, "room for \(tokens) tokens does not exist") }
    try compress(layers.filter { $0.shape.cached }, when: true, room: tokens, asked: true)
  }

  /// Formats whose numbers come from a whole prompt get them from its first one, before rows go to other tiers.
  private func calibrate(_ state: LayerState) throws(KVError) {
    let wanted = state.segments.contains(where: \.wantsQueries)
    if wanted, state.seen > 0, state.queryPeaks == nil {
      throw KVError(
        .missingInput,
        "\(policy.spec) needs the queries of the prompt, which were not observed. Attend through the cache, or call "
          + "observe(layer:queries:)", layer: state.layer)
    }
    let peaks = wanted ? state.queryPeaks?.peaks : nil
    do throws(KVError) {
      for segment in state.segments where try segment.calibrate(over: state.segments, queries: peaks) {
        // What later tokens told cannot be untold.
        state.frozenBelow = state.seen
      }
    } catch {
      throw error.at(layer: state.layer)
    }
  }

  /// Finishes a layer while others have yet to come: those before it give rows up.
  private func cascade(_ state: LayerState) throws(KVError) {
    guard state.cascade == nil else {
      throw KVError(.wrongPhase, "this layer's prompt is already finished", layer: state.layer)
    }
    let chosen = layers.filter { $0.cascade != nil || $0 === state }
    let plans = try plan(chosen, room: 0, keepingViews: false, cascading: true)
    var scores: [CascadedScores] = []
    for plan in plans {
      scores.append(try CascadedScores(plan.scores, routing: plan.routing, backend: backend.operations))
    }
    for plan in plans { try checkRanges(plan) }
    try calibrate(state)
    for (plan, scores) in zip(plans, scores) {
      try apply(plan, moreToCome: false)
      plan.state.cascade = scores
      plan.state.chosenTokens = plan.state.seen
    }
    if !queriesWhileDecoding { state.queryWindow = nil }
    let waiting = layers.filter { $0.shape.cached && $0.phase == .prefill }
    if waiting.allSatisfy({ $0.cascade != nil }) { try enterDecode(waiting) }
  }

  private func enterDecode(_ state: LayerState) throws(KVError) {
    state.cascade = nil
    try settle(state, .prompt)
    state.queryPeaks = nil
    state.phase = .decode
    // Whoever attends elsewhere may not have said so: the prompt is behind us all the same.
    state.settledTokens = state.seen
    state.decodedSinceCompression = 0
    state.settledTokens = state.seen
    // Weights that the observer would not have looked at are not missing.
    if observer?.observedQueries(prompt: true) == 0 { state.observedTokens = state.seen }
    // What only the prompt needed is freed.
    if !queriesWhileDecoding { state.queryWindow = nil }
    if !observesWhileDecoding {
      state.probeStore = nil
      state.markedProbes = []
      for segment in state.segments { segment.forgetObserved() }
    }
    if state.outcome == .waiting || state.outcome == .untouched {
      state.outcome = state.shape.slidingWindow.map { .slidingWindow($0) } ?? .storedOnly
    }
    debugCheck(state)
  }

  /// What happens after the attention of new tokens.
  package func maintain(_ state: LayerState) throws(KVError) {
    let fresh = state.seen - state.settledTokens
    state.settledTokens = state.seen
    if let window = state.shape.slidingWindow { try forget(before: state.seen - window + 1, state) }
    switch state.phase {
    case .prefill:
      if policy.schedule.afterPrefillChunks {
        try compress([state], when: true, moreToCome: true)
        try settle(state)
      }
    case .decode:
      var batch = Batch.open
      if let interval = policy.schedule.decodeInterval {
        state.decodedSinceCompression += fresh
        if state.decodedSinceCompression >= interval {
          if try !evictInPlace(state), selects(state), isTriggered(state) { try compress([state], when: true) }
          state.decodedSinceCompression = 0
          batch = .every(interval)
        }
      }
      try settle(state, batch)
      try join(groupsOf: state)
    }
    debugCheck(state)
  }

  /// What is known of rows that wait for others to be encoded with.
  private enum Batch {
    /// More may come.
    case open
    /// The prompt is complete.
    case prompt
    /// The policy has just chosen, as after every so many tokens.
    case every(Int)
  }

  private func settle(_ state: LayerState, _ batch: Batch = .open) throws(KVError) {
    do throws(KVError) {
      for segment in state.segments {
        switch batch {
        case .open: try segment.settle()
        case .prompt: try segment.settleBatch(interval: nil)
        case .every(let interval): try segment.settleBatch(interval: interval)
        }
      }
    } catch {
      throw error.at(layer: state.layer)
    }
  }

  /// Sliding-window layers lose what no later query can see.
  private func forget(before position: Int, _ state: LayerState) throws(KVError) {
    for segment in state.segments {
      var slots: [[Int]] = []
      var any = false
      for head in 0..<segment.kvHeads {
        var gone: [Int] = []
        for slot in 0..<segment.slotCount(head: head) {
          if segment.position(head: head, slot: slot) >= position {
            if slot >= segment.sortedFrom(head: head) { break }
          } else if segment.isLive(head: head, slot: slot) {
            gone.append(slot)
          }
        }
        any = any || !gone.isEmpty
        slots.append(gone)
      }
      if !any { continue }
      try segment.drop(slots)
      try segment.reclaim(eager: false)
      state.frozenBelow = state.seen
    }
  }

  private func compress(
    _ states: [LayerState], when due: Bool, room: Int = 0, asked: Bool = false, calibrates: Bool = false,
    moreToCome: Bool = false
  ) throws(KVError) {
    let chosen = due ? states.filter { selects($0) && (asked || isTriggered($0)) } : []
    if chosen.isEmpty, !calibrates { return }
    // Every layer is planned before the first byte of any changes.
    var plans: [LayerPlan] = []
    if policy.allocator.spansLayers, !chosen.isEmpty {
      plans = try plan(chosen, room: room, keepingViews: chosen.count == 1)
    } else {
      for state in chosen { plans += try plan([state], room: room, keepingViews: chosen.count == 1) }
    }
    for plan in plans { try checkRanges(plan) }
    if calibrates { for state in states { try calibrate(state) } }
    for plan in plans {
      try apply(plan, moreToCome: moreToCome)
      plan.state.chosenTokens = plan.state.seen
      // Probes are of the tokens to come.
      if plan.state.probeStore != nil {
        plan.state.probeStore = ProbeStore(first: plan.state.seen, shape: plan.state.shape)
        plan.state.markedProbes = []
      }
    }
  }
}
