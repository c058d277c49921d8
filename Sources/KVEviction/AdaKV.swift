public import KVCore

/// Ada-KV: the heads of a layer compete for its rows, each with a floor. arXiv 2407.11550 (NeurIPS 2025).
///
/// Needs: what the selection it stands behind needs. Runs: when that selection does.
///
/// Heads whose scores are spread keep more rows than heads that look at little. The heads of a layer hold different
/// numbers of rows then, and the bytes of those not held are free.
///
/// Differs from the authors' code: it follows any scorer; scores are per KV head; equal scores go to the lower position,
/// then to the lower head, where theirs are left to the sort; budgets above the rows of a head go to its neighbours.
extension Selection {
  /// - Parameters:
  ///   - floor: share of a uniform budget that every head keeps, 0...1. The authors recommend 0.2.
  ///   - form: the authors' rule or kvpress's.
  /// - Throws: `invalidOption` for a floor outside 0...1; `unsupported` behind a selection without scores.
  public func adaKV(floor: Double = 0.2, form: AdaKVAllocator.Form = .official) throws(KVError) -> Selection {
    let allocator = try AdaKVAllocator(floor: floor, form: form)
    let spec = StageSpec(name: "adakv", options: allocator.options)
    guard scorer != nil else { throw Selection.nothingToScore("adakv", self) }
    return modified(by: spec) { $0.allocator = $0.allocator.over(allocator) }
  }

  /// `adakv(floor=0.2)`, behind what scores.
  public static let adaKVMethod = MethodDescription(
    name: "adakv", role: .modifier, summary: "the heads of a layer compete for its rows", paper: "arXiv 2407.11550",
    options: AdaKVAllocator.descriptions
  ) { (reader) throws(KVError) in
    let (floor, form) = try AdaKVAllocator.read(&reader)
    return .modifier { (selection) throws(KVError) in try selection.adaKV(floor: floor, form: form) }
  }

  static func nothingToScore(_ name: String, _ selection: Selection) -> KVError {
    KVError(
      .unsupported,
      "\(name) needs scores to choose by; \(selection.spec?.name ?? "a text without a selection") makes none. Write one "
        + "that does on its left, as in snapkv+\(name)")
  }
}

/// Shares the rows of a layer between its heads: Ada-KV.
public struct AdaKVAllocator: Allocator {
  public enum Form: String, Sendable, Hashable, CaseIterable {
    /// Counts of the joint best, shrunk by 1 - floor and raised by the floor, rounded per head: the sum may differ from
    /// the budget by half a row a head, and loses what the floor's rounding does.
    case official
    /// The best `floor` of each head stay, the rest is joint: the sum is the budget.
    case kvpress
  }

  public let floor: Double
  public let form: Form

  public init(floor: Double = 0.2, form: Form = .official) throws(KVError) {
    guard (0...1).contains(floor) else {
      throw KVError(.invalidOption, "adakv's floor must lie in 0...1; got \(floor)")
    }
    self.floor = floor
    self.form = form
  }

  public func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] { requests.map(rows) }

  private func rows(_ request: AllocationRequest) -> [Int] {
    let heads = request.rows.indices
    let total = min(request.budget.reduce(0, +), request.rows.reduce(0, +))
    if request.rows.reduce(0, +) <= request.budget.reduce(0, +) { return request.rows }
    let splits = heads.map {
      request.protection.split(kept: min(request.budget[$0], request.rows[$0]), of: request.rows[$0])
    }
    let candidates = splits.map(\.candidates)
    let protected = splits.map { $0.sinks + $0.window }
    let free = max(0, total - protected.reduce(0, +))
    switch form {
    case .official:
      let won = jointly(free, candidates, request.scores)
      return heads.map { head in
        let base = Double(request.budget[head] - protected[head])
        let share = Double(won[head]) * (1 - floor) + (base * floor).rounded(.towardZero)
        let kept = protected[head] + max(0, Int(share.rounded(.toNearestOrEven)))
        return min(request.rows[head], max(1, kept))
      }
    case .kvpress:
      // The safe rows are the best of each head; what is left is joint among those behind them.
      var safe = heads.map { head in
        max(
          0,
          min(
            Int((Double(request.budget[head]) * floor).rounded(.towardZero)) - protected[head], candidates[head].count))
      }
      if safe.reduce(0, +) > free { safe = heads.map { _ in 0 } }
      let won = jointly(free - safe.reduce(0, +), candidates, request.scores, behind: safe)
      return fed(heads.map { protected[$0] + safe[$0] + won[$0] }, request.rows)
    }
  }

  /// Attention over nothing has no value: a head that won no row gets one from the head that has most.
  private func fed(_ kept: [Int], _ rows: [Int]) -> [Int] {
    var kept = kept
    for head in kept.indices where kept[head] == 0 && rows[head] > 0 {
      guard let richest = kept.indices.max(by: { kept[$0] < kept[$1] }), kept[richest] > 1 else { break }
      kept[richest] -= 1
      kept[head] = 1
    }
    return kept
  }

  /// How many of the `count` best candidates of all heads belong to each; the first `behind` of a head's own ranking do
  /// not take part. Equal scores: the lower row, then the lower head.
  private func jointly(
    _ count: Int, _ candidates: [Range<Int>], _ scores: ScoreTable, behind: [Int]? = nil
  ) -> [Int] {
    var won = candidates.map { _ in 0 }
    if count <= 0 { return won }
    // Entries are (score, row, head) in three lists: the ranking of one list of floats decides all but ties.
    var values: [Float] = []
    var places: [(row: Int, head: Int)] = []
    for (head, range) in candidates.enumerated() {
      var taken = Set<Int>()
      if let behind, behind[head] > 0 {
        scores.forEachLargest(behind[head], head: head, in: range) { taken.insert($0) }
      }
      for row in range where !taken.contains(row) {
        values.append(scores[head, row])
        places.append((row, head))
      }
    }
    if count >= values.count {
      for place in places { won[place.head] += 1 }
      return won
    }
    guard let threshold = values[...].largest(rank: count) else { return won }
    var left = count
    var equal: [(row: Int, head: Int)] = []
    for (value, place) in zip(values, places) where value >= threshold {
      if value > threshold {
        won[place.head] += 1
        left -= 1
      } else {
        equal.append(place)
      }
    }
    equal.sort { $0.row != $1.row ? $0.row < $1.row : $0.head < $1.head }
    for place in equal.prefix(left) { won[place.head] += 1 }
    return won
  }
}

extension AdaKVAllocator {
  var options: [SpecOption] { [SpecOption("floor", .decimal(floor)), SpecOption("form", .text(form.rawValue))] }

  static let descriptions: [MethodDescription.Option] = [
    .init("floor", "share of a uniform budget that every head keeps"),
    .init("form", "official: shrunk counts and a floor, rounded per head; kvpress: the sum is the budget"),
  ]

  static func read(_ reader: inout OptionReader) throws(KVError) -> (floor: Double, form: Form) {
    let floor = try reader.double("floor", default: 0.2, in: 0...1)
    let form = try reader.name("form", default: Form.official.rawValue, among: Form.allCases.map(\.rawValue))
    return (floor, Form(rawValue: form) ?? .official)
  }
}
