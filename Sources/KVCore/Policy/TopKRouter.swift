/// Sinks and the newest window always; of the rest the rows with the largest scores. What is not kept is dropped, or
/// goes to a second tier.
///
/// Equal scores: the lower position wins. O(rows) per head plus sorting what is kept.
public struct TopKRouter: Router {
  public var protection: Protection
  /// Where the rows go that are not kept.
  public var others: Routing.Outcome
  /// Which rows between sinks and window stay. Nil: those with the largest scores, each head for itself.
  public var rule: (any SelectionRule)?

  public init(
    _ protection: Protection = Protection(), others: Routing.Outcome = .dropped, rule: (any SelectionRule)? = nil
  ) {
    self.protection = protection
    self.others = others
    self.rule = rule
  }

  public func validate(_ shape: ModelShape) throws(KVError) { try rule?.validate(shape) }

  public var readsScoresWhileDecoding: Bool { rule?.readsScoresWhileDecoding ?? true }

  public var tierCount: Int { others == .dropped ? 1 : Int(others.rawValue) + 1 }

  public func tierRows(kept: Int, of tokens: Int, layer: Int, head: Int) -> [Int] {
    var rows = [Int](repeating: 0, count: tierCount)
    rows[0] = kept
    if tierCount > 1 { rows[tierCount - 1] += max(0, tokens - kept) }
    return rows
  }

  public func route(_ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing) {
    let splits = (0..<scores.headCount).map { protection.split(kept: kept[$0], of: scores.rowCount(head: $0)) }
    if rule == nil, selectsElsewhere(layer, scores, splits, into: &routing) { return }
    for (head, split) in splits.enumerated() {
      let middle = split.candidates
      routing.send(head: head, rows: split.sinkRange, to: .tier(0))
      routing.send(head: head, rows: middle, to: others)
      routing.send(head: head, rows: split.windowRange, to: .tier(0))
      if rule != nil { continue }
      let start = scores.range(head: head).lowerBound
      let candidates = scores.values[start + middle.lowerBound..<start + middle.upperBound]
      if candidates.count - split.chosen == 1, let lowest = lastOfSmallest(candidates) {
        // Decoding drops one row a step: everything stays but the smallest, of equal ones the latest.
        routing.send(head: head, rows: middle, to: .tier(0))
        routing[head, middle.lowerBound + lowest] = others
        continue
      }
      selectLargest(split.chosen, of: candidates) { offset in
        routing[head, middle.lowerBound + offset] = .tier(0)
      }
    }
    rule?.choose(layer, scores: scores, splits: splits, into: &routing)
  }
}

extension TopKRouter {
  /// The same choice by the backend, where that is worth a call. False: it was not made.
  private func selectsElsewhere(
    _ layer: LayerView, _ scores: ScoreTable, _ splits: [BudgetSplit], into routing: inout Routing
  ) -> Bool {
    guard layer.backend.selectsRows(of: splits.reduce(0) { $0 + $1.candidates.count }) else { return false }
    let chosen = scores.values.withUnsafeBufferPointer { values -> [UInt32]? in
      guard let base = values.baseAddress else { return nil }
      let choices = splits.enumerated().compactMap { head, split -> RowChoice? in
        if split.chosen == 0 { return nil }
        let first = split.candidates.lowerBound
        return RowChoice(
          scores: base + scores.range(head: head).lowerBound + first, count: split.candidates.count,
          take: split.chosen, offset: first)
      }
      return choices.isEmpty ? [] : layer.backend.selectLargest(choices)
    }
    guard let chosen else { return false }
    send(splits, chosen, others: others, into: &routing)
    return true
  }

  /// Sinks, window and what was chosen, head after head, to tier 0.
  func send(_ splits: [BudgetSplit], _ chosen: [UInt32], others: Routing.Outcome, into routing: inout Routing) {
    var next = 0
    for (head, split) in splits.enumerated() {
      routing.send(head: head, rows: split.sinkRange, to: .tier(0))
      routing.send(head: head, rows: split.candidates, to: others)
      routing.send(head: head, rows: split.windowRange, to: .tier(0))
      for index in next..<next + split.chosen { routing[head, Int(chosen[index])] = .tier(0) }
      next += split.chosen
    }
  }
}

/// Which of the rows between sinks and window stay, where that is not simply the best of each head.
public protocol SelectionRule: Sendable {
  /// Refuses models it has no numbers for. Called once, by the cache.
  func validate(_ shape: ModelShape) throws(KVError)
  /// Whether it looks at scores after the prompt.
  var readsScoresWhileDecoding: Bool { get }
  /// Sends exactly `splits[h].chosen` of the candidates of head h to tier 0; they arrive sent elsewhere. Cannot fail.
  func choose(_ layer: LayerView, scores: ScoreTable, splits: [BudgetSplit], into routing: inout Routing)
}

extension SelectionRule {
  public var readsScoresWhileDecoding: Bool { true }
  public func validate(_ shape: ModelShape) throws(KVError) {}
}

extension Selection {
  /// The same selection with another rule for the rows between sinks and window.
  ///
  /// - Throws: `unsupported` where the selection routes by itself and asks no score.
  public func ruled(by rule: any SelectionRule, _ modifier: StageSpec) throws(KVError) -> Selection {
    guard var router = router as? TopKRouter else {
      throw KVError(
        .unsupported,
        "\(modifier.name) chooses by scores; \(spec?.description ?? "a text without a selection") has none to choose by"
      )
    }
    router.rule = rule
    let changed = router
    return modified(by: modifier) { $0.router = changed }
  }
}

/// Offset of the smallest value, the last of equal ones.
func lastOfSmallest(_ values: ArraySlice<Float>) -> Int? {
  values.withUnsafeBufferPointer { buffer in
    guard var smallest = buffer.first else { return nil }
    // Two passes: the minimum alone is a vector loop.
    for value in buffer { smallest = value < smallest ? value : smallest }
    return buffer.lastIndex(of: smallest)
  }
}

/// Calls `take` with the offsets of the `count` largest values; of equal ones the earliest.
///
/// O(n) by repeated partition around a pivot, without recursion; the order of the calls is ascending.
package func selectLargest(_ count: Int, of values: ArraySlice<Float>, take: (Int) -> Void) {
  let n = values.count
  if count >= n {
    for offset in 0..<n { take(offset) }
    return
  }
  if count <= 0 { return }
  let threshold = nthLargest(count, of: values)
  // Everything above the threshold is in; of its equals the earliest, as many as are left.
  var equal = count
  for value in values where value > threshold { equal -= 1 }
  for (offset, value) in values.enumerated() {
    if value > threshold {
      take(offset)
    } else if value == threshold, equal > 0 {
      equal -= 1
      take(offset)
    }
  }
}

extension ScoreTable {
  /// Calls `take` with the rows of the `count` largest scores of a head within `rows`; of equal ones the earliest.
  /// Ascending. O(rows).
  public func forEachLargest(_ count: Int, head: Int, in rows: Range<Int>, take: (Int) -> Void) {
    let start = range(head: head).lowerBound
    precondition(rows.lowerBound >= 0 && rows.upperBound <= rowCount(head: head), "rows \(rows) of head \(head)")
    selectLargest(count, of: values[start + rows.lowerBound..<start + rows.upperBound]) { take(rows.lowerBound + $0) }
  }
}

extension ArraySlice<Float> {
  /// The value that is `rank`-th when sorted descending, 1-based; nil when there is none. O(count).
  package func largest(rank: Int) -> Float? {
    indices.isEmpty || rank < 1 || rank > count ? nil : nthLargest(rank, of: self)
  }
}

/// The value that is `rank`-th when sorted descending, 1-based.
private func nthLargest(_ rank: Int, of values: ArraySlice<Float>) -> Float {
  var work = Array(values)
  return work.withUnsafeMutableBufferPointer { work in
    // Not empty: a rank is at least 1, and at most the count.
    nthSmallest(work.count - rank + 1, of: work.baseAddress.unsafelyUnwrapped, count: work.count)
  }
}

/// The value that is `rank`-th when sorted ascending, 1-based. Reorders `work`.
func nthSmallest(_ rank: Int, of work: UnsafeMutablePointer<Float>, count: Int) -> Float {
  var low = 0
  var high = count - 1
  while low < high {
    let pivot = medianOfThree(work[low], work[(low + high) / 2], work[high])
    var i = low
    var j = high
    while i <= j {
      while work[i] < pivot { i += 1 }
      while work[j] > pivot { j -= 1 }
      if i <= j {
        (work[i], work[j]) = (work[j], work[i])
        i += 1
        j -= 1
      }
    }
    if rank - 1 <= j {
      high = j
    } else if rank - 1 >= i {
      low = i
    } else {
      break
    }
  }
  return work[rank - 1]
}

private func medianOfThree(_ a: Float, _ b: Float, _ c: Float) -> Float {
  max(min(a, b), min(max(a, b), c))
}
