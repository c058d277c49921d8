public import KVCore

/// TOVA: the cache is a state of fixed size, and what the newest token attends to least leaves. arXiv 2401.06104 (EMNLP
/// 2024).
///
/// Needs: the attention weights of the newest query. Runs: after the prompt and after every decoded token, each time after
/// that step's attention.
///
/// A row's score is the attention of the newest query alone, averaged over all query heads of the layer: all heads keep
/// the same tokens. Nothing is protected, neither the first tokens (they stay because they are read) nor the newest.
///
/// Differs from the authors' code: equal scores keep the lower position; `recent` protects newest tokens, which theirs
/// does not do (kvpress protects one).
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept; the paper sweeps 64 to 2048 of 4096.
  ///   - recent: newest tokens that always stay; 0 as published, 1 as in kvpress.
  ///   - every: decoded tokens between evictions; 1 as published, nil never after the prompt.
  public static func tova(
    budget: Budget = .tokens(512), recent: Int = 0, every: Int? = 1
  ) throws(KVError) -> Selection {
    try BudgetSplit.validate(sinks: 0, window: recent, budget: budget)
    if let every, every < 1 {
      throw KVError(.invalidOption, "evicting every \(every) tokens does not exist; at least 1, or never")
    }
    return Selection(
      spec: StageSpec(
        name: "tova",
        options: [
          SpecOption("budget", budget.specValue), SpecOption("recent", .integer(recent)),
          SpecOption("every", .integer(every ?? 0)),
        ]),
      scorer: NewestAttention(), budget: budget, router: TopKRouter(Protection(window: recent)),
      schedule: Schedule(decodeInterval: every))
  }

  /// `tova(budget=512)`.
  public static let tovaMethod = MethodDescription(
    name: "tova", role: .selection, summary: "what the newest token attends to, the same for all heads",
    paper: "arXiv 2401.06104",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept in all"),
      .init("recent", "newest tokens that always stay"),
      .init("every", "decoded tokens between evictions; 0 for never after the prompt"),
    ]
  ) { (reader) throws(KVError) in
    let budget = try reader.budget("budget", default: .tokens(512))
    let recent = try reader.int("recent", default: 0, in: 0...1_048_576)
    let every = try reader.int("every", default: 1, in: 0...1_048_576)
    return .selection(try .tova(budget: budget, recent: recent, every: every == 0 ? nil : every))
  }
}

/// The attention of the newest query, averaged over the query heads of the layer: one score for all heads.
public struct NewestAttention: RowScorer {
  public init() {}

  public var inputs: RequiredInputs { RequiredInputs(observer: LatestAttention()) }
  public var sharedByHeads: Bool { true }

  public func score(_ rows: ObservedRows, into scores: UnsafeMutableBufferPointer<Float>) {
    let latest = rows.column(0)
    if latest.baseAddress == nil { return scores.update(repeating: 0) }
    let share = 1 / Float(rows.group)
    for slot in 0..<rows.count { scores[slot] = latest[slot] * share }
  }
}
