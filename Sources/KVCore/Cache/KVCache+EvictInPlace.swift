/// What decoding needs to evict without a plan: found once, when the cache is made.
package struct InPlaceEviction {
  let scorer: any RowScorer
  let protection: Protection

  /// Nil for a policy that moves rows between tiers, lets heads compete, chooses by a rule, turns keys or scores by more than observed columns.
  init?(_ policy: any CompressionPolicy) {
    guard policy.tiers.count == 1, let scorer = policy.scorer as? any RowScorer,
      policy.allocator is UniformAllocator, let router = policy.router as? TopKRouter, router.others == .dropped,
      router.rule == nil, policy.positions != .rerotate
    else { return nil }
    self.scorer = scorer
    protection = router.protection
  }
}

/// Decoding in steady state: every head is some rows over its budget. The lowest scores are found in the columns and their
/// slots marked dead: no view, no plan, no allocation; memory is compacted every so many rows.
extension KVCache {
  /// Rows over the budget up to which looking for the lowest one by one is worth it.
  private static let fewRows = 8

  /// Drops what is over the budget in place. False when that takes a plan; nothing has changed then.
  func evictInPlace(_ state: LayerState) throws(KVError) -> Bool {
    guard let inPlace, state.segments.count == 1, selects(state), state.segments[0].dropsInPlace else { return false }
    let segment = state.segments[0]
    let heads = state.shape.kvHeads
    let trigger = policy.schedule.trigger
    var excess = 0
    var before = 0
    for head in 0..<heads {
      let live = segment.liveCount(head: head)
      before = max(before, live)
      if let trigger, live <= resolve(trigger, state, head: head, tokens: state.seen) { continue }
      excess = max(excess, live - resolve(policy.budget, state, head: head, tokens: state.seen))
    }
    if inPlace.scorer.sharedByHeads {
      if !state.headsAreAlike { state.headsAreAlike = headsAreAlike(segment) }
      if !state.headsAreAlike { return false }
    }
    if excess <= 0 {
      state.outcome = .withinBudget(rows: before)
      state.chosenTokens = state.seen
      return true
    }
    try checkObserved(state)
    try segment.prepareDrop()
    // All scores and every head's lowest first: a NaN is found before any head loses a row.
    let victims = victims.values(of: Victims.self, count: heads)
    var isObserved = true
    for head in 0..<heads {
      victims[head] = Victims(columns: segment.observed(head: head))
      if victims[head].columns.base == nil { isObserved = false }
    }
    let scores = score(inPlace.scorer, state, segment, isObserved: isObserved)
    for head in 0..<heads {
      let columns = victims[head].columns
      let excess = self.excess(of: head, state, columns.live)
      let slots = unprotected(columns, kept: columns.live - excess)
      let lowest = try self.lowest(of: columns, scores(columns, head), among: slots, state, head)
      victims[head].excess = excess
      (victims[head].first, victims[head].end, victims[head].lowest) = (slots.lowerBound, slots.upperBound, lowest)
    }
    for head in 0..<heads {
      let own = victims[head]
      let columns = own.columns
      // Budgets of their own make heads differ.
      if head > 0, segment.liveCount(head: 0) != columns.live - own.excess { state.headsAreAlike = false }
      if own.excess > 0 {
        drop(
          own.excess, head, segment, scores: scores(columns, head), among: own.first..<own.end, lowest: own.lowest)
      }
    }
    do throws(KVError) {
      try segment.reclaim(eager: false)
    } catch {
      throw error.at(layer: state.layer)
    }
    state.frozenBelow = state.seen
    state.chosenTokens = state.seen
    var after = 0
    for head in 0..<heads { after = max(after, segment.liveCount(head: head)) }
    state.outcome = .compressed(before: before, after: after, at: state.seen)
    return true
  }

  /// Whether all heads hold the same slots, dead or alive.
  func headsAreAlike(_ segment: any Segment) -> Bool {
    let first = segment.observed(head: 0)
    for head in 1..<max(segment.kvHeads, 1) {
      let other = segment.observed(head: head)
      guard other.count == first.count, other.live == first.live else { return false }
      for slot in 0..<first.count
      where other.position(slot) != first.position(slot) || other.isLive(slot) != first.isLive(slot) { return false }
    }
    return true
  }

  /// What a head loses: `excess` rows of the slots `first ..< end`, and which goes first, -1 where all are dead.
  private struct Victims: BitwiseCopyable {
    var columns: ObservedColumns
    var excess = 0
    var first = 0
    var end = 0
    var lowest = -1
  }

  /// Rows of a head to drop.
  private func excess(of head: Int, _ state: LayerState, _ live: Int) -> Int {
    if let trigger = policy.schedule.trigger {
      if live <= resolve(trigger, state, head: head, tokens: state.seen) { return 0 }
    }
    return max(0, live - resolve(policy.budget, state, head: head, tokens: state.seen))
  }

  /// Slots of a head that nothing protects.
  private func unprotected(_ columns: ObservedColumns, kept: Int) -> Range<Int> {
    guard let inPlace else { return 0..<0 }
    let split = inPlace.protection.split(kept: kept, of: columns.live)
    let first = columns.slot(ofRow: split.sinks, backend.operations)
    return first..<max(first, columns.slot(ofRowFromEnd: split.window, backend.operations))
  }

  /// The slot with the lowest score among some, -1 where all are dead. Looks at the scores of the others too.
  private func lowest(
    of columns: ObservedColumns, _ scores: UnsafePointer<Float>, among slots: Range<Int>, _ state: LayerState,
    _ head: Int
  ) throws(KVError) -> Int {
    func lowest(_ part: Range<Int>) throws(KVError) -> Int {
      let index = backend.operations.lowest(
        scores + part.lowerBound,
        bias: part.lowerBound < columns.deadEnd ? columns.bias.map { $0 + part.lowerBound } : nil, count: part.count)
      if index == -2 { throw KVError(.nonFinite, "the score of a row is NaN", layer: state.layer, head: head) }
      return index < 0 ? -1 : part.lowerBound + index
    }
    _ = try lowest(0..<slots.lowerBound)
    _ = try lowest(slots.upperBound..<columns.count)
    return try lowest(slots)
  }

  /// Where the scores of the slots of a head lie.
  private enum Scores {
    /// All heads after one another, each padded to whole vectors.
    case memory(UnsafeMutablePointer<Float>, stride: Int)
    case column(Int)

    func callAsFunction(_ columns: ObservedColumns, _ head: Int) -> UnsafePointer<Float> {
      switch self {
      case .memory(let base, let stride): UnsafePointer(base + head * stride)
      case .column(let index): UnsafePointer(columns.base.unsafelyUnwrapped + index * columns.stride)
      }
    }
  }

  /// Scores of all slots of all heads, in reused memory or where they lie.
  private func score(
    _ scorer: some RowScorer, _ state: LayerState, _ segment: any Segment, isObserved: Bool
  ) -> Scores {
    let heads = segment.kvHeads
    if let column = scorer.scoreColumn, !scorer.sharedByHeads, isObserved { return .column(column) }
    var stride = 0
    for head in 0..<heads { stride = max(stride, KVCache.padded(segment.slotCount(head: head))) }
    let scores = stepWeights.floats(heads * stride)
    for head in 0..<heads {
      let columns = segment.observed(head: head)
      let own = scores + head * stride
      scorer.score(
        ObservedRows(
          columns, weights: UnsafeBufferPointer(start: nil, count: 0), queries: 0, group: state.shape.group,
          tokensSeen: state.seen, decodedTokens: state.decodedTokens, prompt: false),
        into: UnsafeMutableBufferPointer(start: own, count: columns.count))
      if scorer.sharedByHeads, head > 0 {
        for slot in 0..<columns.count { scores[slot] += own[slot] }
      }
    }
    // The mean and the sum over the heads choose alike; every head reads the first one's.
    return .memory(scores, stride: scorer.sharedByHeads ? 0 : stride)
  }

  /// Marks the `excess` lowest rows dead, among slots that are not protected.
  private func drop(
    _ excess: Int, _ head: Int, _ segment: any Segment, scores: UnsafePointer<Float>, among slots: Range<Int>,
    lowest: Int
  ) {
    if excess > KVCache.fewRows { return drop(excess, head, segment, scores: scores, among: slots) }
    var next = lowest
    for dropped in 1...excess {
      if next < 0 { return }
      segment.drop(head: head, slot: next)
      if dropped == excess { return }
      // Dropping may have given the head its first log bias.
      let bias = segment.observed(head: head).bias
      let index = backend.operations.lowest(
        scores + slots.lowerBound, bias: bias.map { $0 + slots.lowerBound }, count: slots.count)
      next = index < 0 ? -1 : slots.lowerBound + index
    }
  }

  /// The same for many rows: a threshold instead of one search each. Of equal scores the later go.
  private func drop(
    _ excess: Int, _ head: Int, _ segment: any Segment, scores: UnsafePointer<Float>, among slots: Range<Int>
  ) {
    let live = candidates.floats(slots.count)
    var count = 0
    for slot in slots where segment.isLive(head: head, slot: slot) {
      live[count] = scores[slot]
      count += 1
    }
    if count == 0 { return }
    let threshold = nthSmallest(min(excess, count), of: live, count: count)
    var equal = min(excess, count)
    for slot in slots where segment.isLive(head: head, slot: slot) && scores[slot] < threshold { equal -= 1 }
    for slot in slots.reversed() where segment.isLive(head: head, slot: slot) {
      if scores[slot] == threshold, equal > 0 {
        equal -= 1
        segment.drop(head: head, slot: slot)
      } else if scores[slot] < threshold {
        segment.drop(head: head, slot: slot)
      }
    }
  }
}

extension ObservedColumns {
  private func dead(_ range: Range<Int>, _ backend: any ComputeBackend) -> Int {
    guard let bias, range.lowerBound < min(range.upperBound, deadEnd) else { return 0 }
    return backend.hidden(bias + range.lowerBound, count: min(range.upperBound, deadEnd) - range.lowerBound)
  }

  /// The slot where the first `rows` live rows end.
  fileprivate func slot(ofRow rows: Int, _ backend: any ComputeBackend) -> Int {
    var slot = rows
    var counted = 0
    var missing = dead(0..<min(slot, count), backend)
    while missing > 0, slot < count {
      counted = slot
      slot = min(slot + missing, count)
      missing = dead(counted..<slot, backend)
    }
    return min(slot, count)
  }

  /// The slot where the last `rows` live rows begin.
  fileprivate func slot(ofRowFromEnd rows: Int, _ backend: any ComputeBackend) -> Int {
    var slot = max(count - rows, 0)
    var counted = count
    var missing = dead(slot..<counted, backend)
    while missing > 0, slot > 0 {
      counted = slot
      slot = max(slot - missing, 0)
      missing = dead(slot..<counted, backend)
    }
    return slot
  }
}
