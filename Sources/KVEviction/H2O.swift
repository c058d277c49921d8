public import KVCore

/// H2O: the tokens that have received most attention so far, and the newest ones. arXiv 2306.14048 (NeurIPS 2023).
///
/// Needs: the attention weights of every token, prompt included. Runs: after the prompt and after every decoded token,
/// each time after that step's attention. This is the authors' "real drop" variant: scores are running sums, what is
/// dropped is gone, a new token starts with the attention it gave itself.
///
/// Differs from the authors' code: scores are summed over the query heads of a KV head (theirs knows no GQA), equal
/// scores keep the lower position.
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept in all; the paper keeps 20 % of the prompt.
  ///   - recentShare: part of the budget for the newest tokens; the paper halves it.
  ///   - every: decoded tokens between evictions; 1 as published, nil never after the prompt.
  ///   - normalised: divides each sum by the queries that could see the row, as kvpress' ObservedAttention does: plain
  ///     sums favour early tokens.
  public static func h2o(
    budget: Budget = .fraction(0.2), recentShare: Double = 0.5, every: Int? = 1, normalised: Bool = false
  ) throws(KVError) -> Selection {
    guard (0...1).contains(recentShare) else {
      throw KVError(.invalidOption, "h2o's recent share must lie in 0...1; got \(recentShare)")
    }
    return try make(
      [SpecOption("budget", budget.specValue), SpecOption("recent_share", .decimal(recentShare))], budget,
      Protection(windowShare: recentShare), every, normalised)
  }

  /// The authors' two numbers: `heavy` tokens by score and `recent` newest ones.
  public static func h2o(
    heavy: Int, recent: Int, every: Int? = 1, normalised: Bool = false
  ) throws(KVError) -> Selection {
    guard heavy >= 0, recent >= 0, heavy <= 1 << 30, recent <= 1 << 30, heavy + recent >= 1 else {
      throw KVError(
        .invalidOption, "h2o keeps at least 1 token, heavy and recent together; got \(heavy) and \(recent)")
    }
    return try make(
      [SpecOption("heavy", .integer(heavy)), SpecOption("recent", .integer(recent))], .tokens(heavy + recent),
      Protection(window: recent), every, normalised)
  }

  private static func make(
    _ options: [SpecOption], _ budget: Budget, _ protection: Protection, _ every: Int?, _ normalised: Bool
  ) throws(KVError) -> Selection {
    try budget.validate()
    if let every, every < 1 {
      throw KVError(.invalidOption, "evicting every \(every) tokens does not exist; at least 1, or never")
    }
    return Selection(
      spec: StageSpec(
        name: "h2o",
        options: options + [
          SpecOption("every", .integer(every ?? 0)), SpecOption("normalised", .bool(normalised)),
        ]),
      scorer: AccumulatedAttention(ageNormalised: normalised), budget: budget, router: TopKRouter(protection),
      schedule: Schedule(decodeInterval: every))
  }

  /// `h2o(budget=0.2)` or `h2o(heavy=4,recent=512)`.
  public static let h2oMethod = MethodDescription(
    name: "h2o", role: .selection, summary: "heavy hitters by accumulated attention, and a recent window",
    paper: "arXiv 2306.14048",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept in all"),
      .init("recent_share", "part of the budget for the newest tokens"),
      .init("heavy", "tokens kept by score, instead of budget; with recent"),
      .init("recent", "newest tokens kept, with heavy"),
      .init("every", "decoded tokens between evictions; 0 for never after the prompt"),
      .init("normalised", "whether sums are divided by the queries that could see the row"),
    ]
  ) { (reader) throws(KVError) in
    let every = try reader.int("every", default: 1, in: 0...1_048_576)
    let interval = every == 0 ? nil : every
    let normalised = try reader.bool("normalised", default: false)
    if reader.has("heavy") || reader.has("recent") {
      guard !reader.has("budget"), !reader.has("recent_share") else {
        throw KVError(
          .invalidOption, "h2o takes heavy and recent, or budget and recent_share, not both",
          offset: reader.stage.offset)
      }
      let heavy = try reader.int("heavy", in: 0...1_073_741_823)
      let recent = try reader.int("recent", in: 0...1_073_741_823)
      return .selection(try .h2o(heavy: heavy, recent: recent, every: interval, normalised: normalised))
    }
    reader.offer("heavy")
    reader.offer("recent")
    let budget = try reader.budget("budget", default: .fraction(0.2))
    let share = try reader.double("recent_share", default: 0.5, in: 0...1)
    return .selection(try .h2o(budget: budget, recentShare: share, every: interval, normalised: normalised))
  }
}
