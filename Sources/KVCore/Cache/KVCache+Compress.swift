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

  // MARK: Score, allocate, route, apply

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

  /// What is to become of the rows of one layer.
  private struct LayerPlan {
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

  private func plan(
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
  private func isTriggered(_ state: LayerState) -> Bool {
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

  /// With `moreToCome` gaps are closed inside the memory there is, which the next chunk needs again.
  private func apply(_ plan: LayerPlan, moreToCome: Bool) throws(KVError) {
    let state = plan.state
    if state.phase == .prefill { state.allocation = plan.allocation }
    state.headsAreAlike = false
    let before = plan.rows.max() ?? 0
    guard let routing = plan.routing else {
      state.outcome = .withinBudget(rows: before)
      return
    }
    let view = plan.view ?? LayerView(state, options: attention, backend: backend.operations)
    let eager = state.phase == .prefill
    let (dropped, moves) = departures(routing, view, state)
    do throws(KVError) {
      let leaving = state.segments.indices.filter { dropped[$0].contains { !$0.isEmpty } }
      for index in leaving { try state.segments[index].prepareDrop(dropped[index]) }
      if policy.positions == .rerotate, let rotary = shape.rotary {
        try state.segments[0].turnKeys(turns(routing, view), rotary: rotary)
      }
      try move(moves, in: state) { () throws(KVError) in try merge(routing, view, state) }
      if let memory = routing.memory { state.routerMemory = memory }
      // Only memory that is given back could fail from here on, and then it stays.
      for index in leaving { try state.segments[index].drop(dropped[index]) }
      for index in leaving {
        if moreToCome {
          try state.segments[index].reclaimInPlace()
        } else {
          try state.segments[index].reclaim(eager: eager)
        }
      }
    } catch {
      throw error.at(layer: state.layer)
    }
    if dropped.contains(where: { $0.contains { !$0.isEmpty } }) { state.frozenBelow = state.seen }
    let after = (0..<view.kvHeads).map { state.liveRows(head: $0) }.max() ?? 0
    state.outcome = .compressed(before: before, after: after, at: state.seen)
  }

  /// Slots that leave their tier, `[from][head]`, and where those that are not dropped go, `[from][to][head]`.
  private func departures(
    _ routing: Routing, _ view: LayerView, _ state: LayerState
  ) -> (dropped: [[[Int]]], moves: [[[[Int]]]]) {
    var dropped = state.segments.map { segment in Array(repeating: [Int](), count: segment.kvHeads) }
    var moves = state.segments.map { _ in
      state.segments.map { segment in Array(repeating: [Int](), count: segment.kvHeads) }
    }
    // With one tier only what leaves it is of interest: a few rows of thousands, while decoding.
    let staying: Routing.Outcome? = state.segments.count == 1 ? .tier(0) : nil
    for head in 0..<view.kvHeads {
      routing.forEach(head: head, notIn: staying) { row, outcome in
        let place = view.reference(head: head, row: row)
        let from = Int(place.segment)
        if outcome == .dropped {
          dropped[from][head].append(Int(place.slot))
        } else if Int(outcome.rawValue) != from {
          outcome.precondition(tiers: state.segments.count)
          moves[from][Int(outcome.rawValue)][head].append(Int(place.slot))
          dropped[from][head].append(Int(place.slot))
        }
      }
    }
    return (dropped, moves)
  }

  /// Refuses rows that the tier they go to cannot hold, while every layer is as it was.
  private func checkRanges(_ plan: LayerPlan) throws(KVError) {
    let state = plan.state
    let taken = state.segments.map(\.largestTaken)
    let held = state.segments.map(\.largestHeld)
    func narrows(_ from: Int, _ to: Int) -> Bool {
      taken[to].keys < held[from].keys || taken[to].values < held[from].values
    }
    let tiers = state.segments.indices
    guard let routing = plan.routing, tiers.contains(where: { from in tiers.contains { narrows(from, $0) } })
    else { return }
    let view = plan.view ?? LayerView(state, options: attention, backend: backend.operations)
    let moves = departures(routing, view, state).moves
    for from in tiers {
      for to in tiers where narrows(from, to) {
        for head in moves[from][to].indices {
          do throws(KVError) {
            let slots = moves[from][to][head]
            let rows = state.segments[from].slices(head: head, slots: slots)
            try check(rows.keys, "key", within: taken[to].keys, slots, state.segments[from], head, tier: to)
            try check(rows.values, "value", within: taken[to].values, slots, state.segments[from], head, tier: to)
          } catch {
            throw error.at(layer: state.layer)
          }
        }
      }
    }
  }

  private func check(
    _ slices: [RunSlice], _ what: String, within limit: Float, _ slots: [Int], _ segment: any Segment, _ head: Int,
    tier: Int
  ) throws(KVError) {
    guard let dim = slices.first?.run.dim, !isWithin(limit, slices, dim) else { return }
    // The first row that is beyond: the others may be many.
    var index = 0
    for slice in slices {
      for row in slice.first..<slice.first + slice.count {
        if !isWithin(limit, [RunSlice(run: slice.run, first: row, count: 1)], dim) {
          throw KVError(
            .unrepresentable,
            "a \(what) that goes to store \(tier + 1) of \(policy.tiers.count) is beyond ±\(limit), the largest that "
              + "\(policy.tiers[tier].spec.name) can hold; store rows and metadata there in a wider type",
            head: head, position: segment.position(head: head, slot: slots[index]))
        }
        index += 1
      }
    }
  }

  private func isWithin(_ limit: Float, _ slices: [RunSlice], _ dim: Int) -> Bool {
    var low = [Float](repeating: .infinity, count: dim)
    var high = [Float](repeating: -.infinity, count: dim)
    slices.withUnsafeBufferPointer { slices in
      low.withUnsafeMutableBufferPointer { low in
        high.withUnsafeMutableBufferPointer { high in
          guard let low = low.baseAddress, let high = high.baseAddress else { return }
          backend.operations.channelRange(slices, map: nil, low: low, high: high)
        }
      }
    }
    // A backend without rows leaves the range empty.
    return zip(low, high).allSatisfy { $0 > $1 || max(abs($0), abs($1)) <= limit }
  }

  /// By how much each surviving key becomes later: by the rows behind it that go.
  private func turns(_ routing: Routing, _ view: LayerView) -> [[SlotTurn]] {
    (0..<view.kvHeads).map { head in
      var turns: [SlotTurn] = []
      var gone = 0
      for row in stride(from: view.rowCount(head: head) - 1, through: 0, by: -1) {
        if routing[head, row] == .dropped {
          gone += 1
          continue
        }
        if gone == 0 { continue }
        let slot = Int(view.reference(head: head, row: row).slot)
        if let last = turns.last, last.by == gone {
          // Slots between that are dead already turn along.
          turns[turns.count - 1].slots = slot..<last.slots.upperBound
        } else {
          turns.append(SlotTurn(slots: slot..<slot + 1, by: gone))
        }
      }
      return turns.reversed()
    }
  }

  /// Copies rows into other tiers, `moves[from][to][head]`, and does `then`: all of it, or nothing when either fails.
  private func move(
    _ moves: [[[[Int]]]], in state: LayerState, then: () throws(KVError) -> Void
  ) throws(KVError) {
    let columns = observedColumns(state)
    var done: [(tier: Int, counts: [Int])] = []
    do throws(KVError) {
      for from in state.segments.indices {
        for to in state.segments.indices where moves[from][to].contains(where: { !$0.isEmpty }) {
          try state.segments[to].absorb(from: state.segments[from], slots: moves[from][to], observed: columns)
          done.append((to, moves[from][to].map(\.count)))
        }
      }
      try then()
    } catch {
      for (tier, counts) in done.reversed() { state.segments[tier].retract(counts) }
      throw error
    }
  }

  /// Before any layer changes.
  private func checkTiers(of routing: Routing, in view: LayerView) {
    for head in 0..<view.kvHeads {
      routing.forEach(head: head, notIn: .tier(0)) { _, outcome in
        if outcome != .dropped { outcome.precondition(tiers: view.segments.count) }
      }
    }
  }
}

extension Routing.Outcome {
  /// A router that names a tier there is not is a programmer's mistake.
  fileprivate func precondition(tiers: Int) {
    Swift.precondition(Int(rawValue) < tiers, "a router sent a row to tier \(rawValue) of \(tiers)")
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
