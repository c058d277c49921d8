public import KVCore

/// A threshold instead of a count, behind any selection: `h2o(budget=unlimited)+threshold(mass=0.95)`.
///
/// Needs: what the selection it stands behind needs. Runs: when that selection does. The budget of the selection is an upper
/// bound then.
extension Selection {
  /// Rows whose score reaches `score` stay.
  public func threshold(score: Double) throws(KVError) -> Selection {
    try thresholded(.score(score), SpecOption("score", .decimal(score)))
  }

  /// The fewest rows stay that hold this share of a head's scores, which must not be negative.
  public func threshold(mass: Double) throws(KVError) -> Selection {
    try thresholded(.mass(mass), SpecOption("mass", .decimal(mass)))
  }

  private func thresholded(_ limit: ThresholdAllocator.Limit, _ option: SpecOption) throws(KVError) -> Selection {
    let allocator = try ThresholdAllocator(limit)
    guard scorer != nil else { throw Selection.nothingToScore("threshold", self) }
    return modified(by: StageSpec(name: "threshold", options: [option])) { $0.allocator = allocator }
  }

  /// `threshold(mass=0.95)` or `threshold(score=0.001)`, behind what scores.
  public static let thresholdMethod = MethodDescription(
    name: "threshold", role: .modifier, summary: "rows above a threshold, however many",
    options: [
      .init("mass", "share of a head's scores that the rows kept hold"),
      .init("score", "smallest score kept, instead of mass"),
    ]
  ) { (reader) throws(KVError) in
    guard !(reader.has("mass") && reader.has("score")) else {
      throw KVError(.invalidOption, "threshold takes mass or score, not both", offset: reader.stage.offset)
    }
    if reader.has("score") {
      reader.offer("mass")
      let score = try reader.double("score")
      return .modifier { (selection) throws(KVError) in try selection.threshold(score: score) }
    }
    reader.offer("score")
    let mass = try reader.double("mass", default: 0.95, in: 0...1)
    return .modifier { (selection) throws(KVError) in try selection.threshold(mass: mass) }
  }
}

/// As many rows as reach a threshold, beyond the protected ones and within the budget.
public struct ThresholdAllocator: Allocator {
  public enum Limit: Sendable, Hashable {
    /// Rows of at least this score.
    case score(Double)
    /// The fewest rows with this share of a head's scores.
    case mass(Double)
  }

  public let limit: Limit

  public init(_ limit: Limit) throws(KVError) {
    switch limit {
    case .score(let value):
      guard value.isFinite else { throw KVError(.invalidOption, "a threshold must be finite; got \(value)") }
    case .mass(let share):
      guard (0...1).contains(share) else {
        throw KVError(.invalidOption, "a share of the scores lies in 0...1; got \(share)")
      }
    }
    self.limit = limit
  }

  public func needsScores(_ request: AllocationRequest) -> Bool {
    request.rows.indices.contains { request.rows[$0] > request.protectedRows(head: $0) }
  }

  public func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    requests.map { request in
      request.rows.indices.map { head in
        let rows = request.rows[head]
        let budget = min(request.budget[head], rows)
        let split = request.protection.split(kept: budget, of: rows)
        let candidates = split.candidates.map { request.scores[head, $0] }
        let least = split.sinks + split.window + reaching(candidates, request, head, split)
        // Attention over nothing has no value: one row stays.
        return min(budget, max(least, min(1, rows)))
      }
    }
  }

  private func reaching(
    _ candidates: [Float], _ request: AllocationRequest, _ head: Int, _ split: BudgetSplit
  ) -> Int {
    switch limit {
    case .score(let value): return candidates.reduce(0) { $0 + (Double($1) >= value ? 1 : 0) }
    case .mass(let share):
      var total = 0.0
      var held = 0.0
      for row in 0..<split.tokens {
        let score = max(0, Double(request.scores[head, row]))
        total += score
        if !split.candidates.contains(row) { held += score }
      }
      var count = 0
      for score in candidates.sorted(by: >) {
        if held >= share * total { break }
        held += max(0, Double(score))
        count += 1
      }
      return count
    }
  }
}
