/// Scoring, allocating and routing: what is to become of rows, before the first of them moves.
extension KVCache {
  /// What is to become of the rows of one layer.
  struct LayerPlan {
    let state: LayerState
    let rows: [Int]
    /// Nil: everything fits.
    let routing: Routing?
    let scores: ScoreTable
    /// Nil where many layers are planned: the views of a long prompt's layers together would be large.
    let view: LayerView?
    let allocation: EarlierAllocation
  }

  /// Where a layer stands among those the policy chooses in.
  private func place(of state: LayerState) -> (index: Int, count: Int) {
    var place = (index: 0, count: 0)
    for other in layers where other.shape.cached && selects(other) {
      if other.layer < state.layer { place.index += 1 }
      place.count += 1
    }
    return place
  }

  func plan(
    _ states: [LayerState], room: Int, keepingViews: Bool, cascading: Bool = false
  ) throws(KVError) -> [LayerPlan] {
    let protection = policy.router.protection
    var views: [LayerView] = []
    var requests: [AllocationRequest] = []
    // Where a device chose already, by scores that stayed there.
    var routed: [Routing?] = []
    for state in states {
      let budgets = resolvedBudgets(state, room: room)
      let rows = (0..<state.shape.kvHeads).map { state.liveRows(head: $0) }
      let place = place(of: state)
      let view = LayerView(
        state, options: attention, backend: backend.operations, rotary: shape.rotary, place: place)
      var request = AllocationRequest(
        layer: state.layer, index: place.index, layers: place.count, tokensSeen: state.seen, rows: rows,
        budget: budgets, scores: ScoreTable(counts: rows), protection: protection, earlier: state.allocation)
      request.isScored = state.phase == .prefill || scoresWhileDecoding
      let wanted =
        request.isScored
        && (policy.tiers.count > 1 || policy.router.routesAlways || policy.allocator.needsScores(request))
      if let stored = state.cascade {
        request.scores = stored.table
        views.append(view)
        requests.append(request)
        routed.append(nil)
        continue
      }
      if wanted { try checkObserved(state) }
      if wanted, let windowSelection, rows.contains(where: { $0 > 0 }) {
        let routing: Routing?
        do throws(KVError) {
          routing = try view.route(windowSelection, kept: zip(rows, budgets).map { min($0, $1) })
        } catch {
          throw error.at(layer: state.layer)
        }
        if let routing {
          views.append(view)
          requests.append(request)
          routed.append(routing)
          continue
        }
      }
      if wanted, rows.contains(where: { $0 > 0 }), let scorer = policy.scorer {
        do throws(KVError) {
          try scorer.score(view, into: &request.scores)
        } catch {
          throw error.at(layer: state.layer)
        }
        try request.scores.checkOrdered(layer: state.layer)
        if backend.operations is DryRunBackend, policy.tiers.count > 1 { request.scores.scatterTies() }
      }
      views.append(view)
      requests.append(request)
      routed.append(nil)
    }
    let kept = cascading ? try policy.allocator.cascade(requests) : try policy.allocator.allocate(requests)
    try check(kept, for: requests)
    var plans: [LayerPlan] = []
    for (index, state) in states.enumerated() {
      let rows = requests[index].rows
      var routing: Routing?
      if policy.tiers.count > 1 || policy.router.routesAlways || zip(rows, kept[index]).contains(where: { $0 > $1 }) {
        var outcomes = Routing()
        outcomes.reset(like: requests[index].scores)
        do throws(KVError) {
          if let chosen = routed[index] {
            outcomes = chosen
          } else {
            try policy.router.route(views[index], scores: requests[index].scores, kept: kept[index], into: &outcomes)
          }
          try outcomes.checkMerges(of: views[index])
        } catch {
          throw error.at(layer: state.layer)
        }
        checkTiers(of: outcomes, in: views[index])
        #if KV_INTERNAL_CHECKS
          if policy.tiers.count == 1, policy.router is TopKRouter { outcomes.checkCounts(kept[index]) }
        #endif
        routing = outcomes
      }
      plans.append(
        LayerPlan(
          state: state, rows: rows, routing: routing, scores: cascading ? requests[index].scores : ScoreTable(),
          view: keepingViews ? views[index] : nil,
          allocation: EarlierAllocation(kept: kept[index], budget: requests[index].budget, tokensSeen: state.seen)))
    }
    return plans
  }

  /// Whether some head holds more rows than the schedule lets pass.
  func isTriggered(_ state: LayerState) -> Bool {
    guard let trigger = policy.schedule.trigger else { return true }
    var most = 0
    for head in 0..<state.shape.kvHeads {
      let rows = state.liveRows(head: head)
      if rows > resolve(trigger, state, head: head, tokens: state.seen) { return true }
      most = max(most, rows)
    }
    state.outcome = .withinBudget(rows: most)
    return false
  }

  /// An allocator of a user's own may return anything.
  private func check(_ kept: [[Int]], for requests: [AllocationRequest]) throws(KVError) {
    guard kept.count == requests.count else {
      throw KVError(
        .invalidOption, "the allocator returned counts for \(kept.count) layers; \(requests.count) were asked for")
    }
    for (request, counts) in zip(requests, kept)
    where counts.count != request.rows.count || !zip(counts, request.rows).allSatisfy({ (0...$1).contains($0) }) {
      throw KVError(
        .invalidOption,
        "the allocator must return as many counts as there are KV heads, each at most its rows \(request.rows); got "
          + "\(counts)", layer: request.layer)
    }
  }

  /// With `room`, the budget is the one there will be once that many tokens more have come.
  private func resolvedBudgets(_ state: LayerState, room: Int) -> [Int] {
    let tokens = room > Int.max - state.seen ? Int.max : state.seen + room
    var budgets: [Int] = []
    for head in 0..<state.shape.kvHeads {
      let budget = resolve(policy.budget, state, head: head, tokens: tokens)
      budgets.append(room == 0 ? budget : max(policy.router.protection.sinks, budget - room))
    }
    return budgets
  }

  /// Rows a head may keep. Fractions count tokens seen, not rows left: a budget does not eat itself step by step. Bytes
  /// become as many rows as their stores can hold in them.
  func resolve(_ budget: Budget, _ state: LayerState, head: Int, tokens: Int) -> Int {
    let cached = cachedLayers
    if let share = budget.byteShare(
      layer: state.layer, head: head, layers: cached, kvHeads: state.shape.kvHeads)
    {
      // Captured queries live on only where more choices follow.
      let captured =
        !queriesWhileDecoding
        ? 0 : windowQueries * state.shape.group * state.shape.keyDim * MemoryLayout<Float>.stride
      var low = 1
      var high = max(1, min(tokens, Int(Int32.max)))
      while low < high {
        let middle = (low + high + 1) / 2
        let rows = policy.router.tierRows(kept: middle, of: tokens, layer: state.layer, head: head)
        var bytes = 0
        for (tier, count) in zip(policy.tiers, rows) {
          bytes += tier.factory(layer: state.layer, of: layers.count)
            .bytes(rows: count, layer: state.shape, observed: observer?.columns ?? 0)
        }
        if bytes + captured <= share { low = middle } else { high = middle - 1 }
      }
      return low
    }
    return budget.resolveTokens(
      tokens: tokens, layer: state.layer, head: head, layers: cached, kvHeads: state.shape.kvHeads,
      bytesPerRow: 1)
  }

  func checkObserved(_ state: LayerState) throws(KVError) {
    if observer != nil, !observesAttention(state) {
      throw KVError(
        .missingInput,
        "\(policy.spec) needs observed attention, which its schedule gave up when the prompt was finished; pass every",
        layer: state.layer)
    }
    if observer != nil, state.observedTokens < state.seen {
      throw KVError(
        .missingInput,
        "\(policy.spec) needs the attention weights of every token; those of \(state.seen - state.observedTokens) "
          + "tokens were not observed. Attend through the cache, or call observe(layer:attention:)",
        layer: state.layer)
    }
    if windowQueries > 0 || probes != nil, state.phase == .prefill || !queriesOfPromptsOnly || probes != nil,
      state.observedQueries < state.seen
    {
      throw KVError(
        .missingInput,
        "\(policy.spec) needs the newest queries; those of the last \(state.seen - state.observedQueries) tokens were "
          + "not observed. Attend through the cache, or call observe(layer:queries:)", layer: state.layer)
    }
  }
}

extension Budget {
  /// Bytes one head may use, when that is what the budget says.
  fileprivate func byteShare(layer: Int, head: Int, layers: Int, kvHeads: Int) -> Int? {
    switch kind {
    case .bytes(let count): count / (layers * kvHeads)
    case .perLayer(let table): table[layer].byteShare(layer: layer, head: head, layers: 1, kvHeads: kvHeads)
    case .perHead(let table): table[layer][head].byteShare(layer: layer, head: head, layers: 1, kvHeads: 1)
    default: nil
    }
  }
}
