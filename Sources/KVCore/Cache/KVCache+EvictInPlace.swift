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
    if inPlace.scorer.sharedByHeads, !headsAreAlike(segment) { return false }
    if excess <= 0 {
      state.outcome = .withinBudget(rows: before)
      state.chosenTokens = state.seen
      return true
    }
    try checkObserved(state)
    try segment.prepareDrop()
    // All scores first: a NaN is found before any head loses a row.
    let scores = try score(inPlace.scorer, state, segment)
    var start = 0
    for head in 0..<heads {
      let columns = segment.observed(head: head)
      let budget = resolve(policy.budget, state, head: head, tokens: state.seen)
      let triggered = trigger.map { columns.live > resolve($0, state, head: head, tokens: state.seen) } ?? true
      if triggered, columns.live > budget {
        drop(columns.live - budget, head, segment, scores: scores + start, protection: inPlace.protection)
      }
      start += KVCache.padded(columns.count)
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

  /// Scores of all slots of all heads, each head padded to whole vectors, in reused memory.
  private func score(
    _ scorer: some RowScorer, _ state: LayerState, _ segment: any Segment
  ) throws(KVError) -> UnsafeMutablePointer<Float> {
    var total = 0
    for head in 0..<segment.kvHeads { total += KVCache.padded(segment.slotCount(head: head)) }
    let scores = stepWeights.floats(total)
    var start = 0
    for head in 0..<segment.kvHeads {
      let columns = segment.observed(head: head)
      scorer.score(
        ObservedRows(
          columns, weights: UnsafeBufferPointer(start: nil, count: 0), queries: 0, group: state.shape.group,
          tokensSeen: state.seen, decodedTokens: state.decodedTokens, prompt: false),
        into: UnsafeMutableBufferPointer(start: scores + start, count: columns.count))
      if scorer.sharedByHeads, head > 0 {
        for slot in 0..<columns.count { scores[slot] += scores[start + slot] }
      }
      start += KVCache.padded(columns.count)
    }
    if scorer.sharedByHeads {
      // The mean and the sum over the heads choose alike; every head reads the first one's.
      start = 0
      for head in 0..<segment.kvHeads {
        let count = segment.slotCount(head: head)
        if head > 0 { (scores + start).update(from: scores, count: count) }
        start += KVCache.padded(count)
      }
    }
    start = 0
    for head in 0..<segment.kvHeads {
      let columns = segment.observed(head: head)
      if backend.operations.lowest(scores + start, bias: columns.bias, count: columns.count) == -2 {
        throw KVError(.nonFinite, "the score of a row is NaN", layer: state.layer, head: head)
      }
      start += KVCache.padded(columns.count)
    }
    return scores
  }

  /// Marks the `excess` lowest rows dead, among those that are not protected.
  private func drop(
    _ excess: Int, _ head: Int, _ segment: any Segment, scores: UnsafeMutablePointer<Float>, protection: Protection
  ) {
    let columns = segment.observed(head: head)
    let split = protection.split(kept: columns.live - excess, of: columns.live)
    let first = columns.slot(ofRow: split.sinks)
    let end = columns.slot(ofRowFromEnd: split.window)
    if excess > KVCache.fewRows {
      return drop(excess, head, segment, scores: scores, among: first..<end)
    }
    for _ in 0..<excess {
      // Dropping may give the head its first log bias.
      let bias = segment.observed(head: head).bias
      let index = backend.operations.lowest(
        scores + first, bias: bias.map { $0 + first }, count: end - first)
      if index < 0 { return }
      segment.drop(head: head, slot: first + index)
    }
  }

  /// The same for many rows: a threshold instead of one search each. Of equal scores the later go.
  private func drop(
    _ excess: Int, _ head: Int, _ segment: any Segment, scores: UnsafeMutablePointer<Float>, among slots: Range<Int>
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
  /// Dead slots of a range. One vector loop.
  private func dead(_ range: Range<Int>) -> Int {
    guard let bias else { return 0 }
    var count: Int32 = 0
    for slot in range { count &+= bias[slot] == -.infinity ? 1 : 0 }
    return Int(count)
  }

  /// The slot where the first `rows` live rows end.
  fileprivate func slot(ofRow rows: Int) -> Int {
    var slot = rows
    var counted = 0
    var missing = dead(0..<min(slot, count))
    while missing > 0, slot < count {
      counted = slot
      slot = min(slot + missing, count)
      missing = dead(counted..<slot)
    }
    return min(slot, count)
  }

  /// The slot where the last `rows` live rows begin.
  fileprivate func slot(ofRowFromEnd rows: Int) -> Int {
    var slot = max(count - rows, 0)
    var counted = count
    var missing = dead(slot..<counted)
    while missing > 0, slot > 0 {
      counted = slot
      slot = max(slot - missing, 0)
      missing = dead(slot..<counted)
    }
    return slot
  }
}
