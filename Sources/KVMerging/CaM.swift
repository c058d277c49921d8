public import KVCore

/// CaM: a token that falls out of the recent window leaves its value, in parts, to the tokens behind it. ICML 2024.
///
/// Needs: attention weights, or with `attention` the newest queries. Runs: after the prompt (or from the first decoded
/// token on) and after every decoded token. Keys are never touched; the logits get no bias.
///
/// The first tokens and the newest stay. A token that must go has the probability p = its attention / the mean attention of
/// the `merge` tokens behind it, at most 1; with that probability each of them gets its value divided by their number.
///
/// Differs from the authors' code: attention and draws are per KV head (theirs knows no grouped queries); the memory of
/// dropped tokens is freed (theirs are masked); the window behind a token ends where the cache ends, and its value is
/// divided by the rows there are; the number of tokens kept is a share of the tokens seen, or fixed by `start` and
/// `recent`, not a share of the prompt alone.
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept in all; the authors keep 10 % of the prompt at each end.
  ///   - startShare: part of the budget for the first tokens.
  ///   - merge: rows that a value is divided between.
  ///   - prominence: whose attention decides, against what, and whether it is drawn.
  ///   - candidates: of tokens that go at one time only the newest is merged, as in the authors' code.
  ///   - afterPrompt: whether the prompt is cut when it ends; else with the first decoded token.
  public static func cam(
    budget: Budget = .fraction(0.2), startShare: Double = 0.5, merge: Int = 32,
    prominence: Prominence = Prominence(attention: .accumulated, mode: .random(seed: 0)),
    candidates: MergeRule.Candidates = .newest(1),
    afterPrompt: Bool = true, positions: PositionPolicy = .keep, every: Int = 1
  ) throws(KVError) -> Selection {
    guard (0...1).contains(startShare) else {
      throw KVError(.invalidOption, "cam's share for the first tokens must lie in 0...1; got \(startShare)")
    }
    return try makeCaM(
      [SpecOption("budget", budget.specValue), SpecOption("start_share", .decimal(startShare))], budget,
      Protection(windowShare: 1 - startShare), merge, prominence, candidates, afterPrompt, positions, every)
  }

  /// The authors' two numbers: `start` first tokens and `recent` newest ones.
  public static func cam(
    start: Int, recent: Int, merge: Int = 32,
    prominence: Prominence = Prominence(attention: .accumulated, mode: .random(seed: 0)),
    candidates: MergeRule.Candidates = .newest(1),
    afterPrompt: Bool = true, positions: PositionPolicy = .keep, every: Int = 1
  ) throws(KVError) -> Selection {
    guard start >= 0, recent >= 0, start <= 1 << 30, recent <= 1 << 30, start + recent >= 1 else {
      throw KVError(
        .invalidOption, "cam keeps at least 1 token, first and newest together; got \(start) and \(recent)")
    }
    return try makeCaM(
      [SpecOption("start", .integer(start)), SpecOption("recent", .integer(recent))], .tokens(start + recent),
      Protection(window: recent), merge, prominence, candidates, afterPrompt, positions, every)
  }

  private static func makeCaM(
    _ options: [SpecOption], _ budget: Budget, _ protection: Protection, _ merge: Int, _ prominence: Prominence,
    _ candidates: MergeRule.Candidates, _ afterPrompt: Bool, _ positions: PositionPolicy, _ every: Int
  ) throws(KVError) -> Selection {
    try budget.validate()
    guard every >= 1 else {
      throw KVError(.invalidOption, "cam drops tokens after every 1 or more decoded ones; got \(every)")
    }
    let rule = MergeRule(
      targets: .next(merge), gate: .open, update: .add, weights: .prominence(prominence), logCount: false,
      candidates: candidates)
    try rule.validate()
    return Selection(
      spec: StageSpec(
        name: "cam",
        options: options + [SpecOption("merge", .integer(merge))] + prominence.options + candidates.options + [
          SpecOption("prompt", .bool(afterPrompt)),
          SpecOption("positions", .text(positions.rawValue)), SpecOption("every", .integer(every)),
        ]),
      // Without scores all are equal, and of equal rows the first stay: those of the start.
      scorer: nil, budget: budget, router: MergingRouter(TopKRouter(protection), rule: rule),
      schedule: Schedule(afterPrefill: afterPrompt, decodeInterval: every), positions: positions)
  }

  /// `cam(budget=0.2)` or `cam(start=4,recent=512,merge=16)`.
  public static let camMethod = MethodDescription(
    name: "cam", role: .selection, summary: "values of dropped tokens go to the tokens behind them",
    paper: "ICML 2024",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept in all"),
      .init("start_share", "part of the budget for the first tokens"),
      .init("start", "first tokens kept, instead of budget; with recent"),
      .init("recent", "newest tokens kept, with start"),
      .init("merge", "rows a value is divided between"),
      .init("attention", "newest queries whose attention counts, 0 for all so far"),
      .init("reference", "attention is compared with: followers (their mean), later (mean), largest"),
      .init("mode", "random draw or expectation"),
      .init("seed", "seed of the draw"),
      .init("which", "of the tokens dropped at one time: newest, best by score, or all"),
      .init("number", "how many of them, for newest and best"),
      .init("prompt", "whether the prompt is cut when it ends, or with the first decoded token"),
      .init("positions", "keep: true distances; slot: distances counted in cached rows"),
      .init("every", "decoded tokens between evictions"),
    ]
  ) { (reader) throws(KVError) in
    let pair = reader.has("start") || reader.has("recent")
    guard !pair || !(reader.has("budget") || reader.has("start_share")) else {
      throw KVError(
        .invalidOption, "cam takes start and recent, or budget and start_share, not both", offset: reader.stage.offset)
    }
    var numbers = (start: 0, recent: 0)
    var budget = Budget.fraction(0.2)
    var share = 0.5
    if pair {
      numbers.start = try reader.int("start", in: 0...1_073_741_823)
      numbers.recent = try reader.int("recent", in: 0...1_073_741_823)
    } else {
      budget = try reader.budget("budget", default: .fraction(0.2))
      share = try reader.double("start_share", default: 0.5, in: 0...1)
      reader.offer("start")
      reader.offer("recent")
    }
    let merge = try reader.int("merge", default: 32, in: 1...65_536)
    let prominence = try Prominence(from: &reader, attention: 0, mode: "random")
    let candidates = try MergeRule.Candidates(from: &reader, which: "newest")
    let prompt = try reader.bool("prompt", default: true)
    let positions = try reader.name("positions", default: "keep", among: ["keep", "slot"])
    let every = try reader.int("every", default: 1, in: 1...1_048_576)
    let policy = PositionPolicy(rawValue: positions) ?? .keep
    return .selection(
      pair
        ? try .cam(
          start: numbers.start, recent: numbers.recent, merge: merge, prominence: prominence,
          candidates: candidates, afterPrompt: prompt, positions: policy, every: every)
        : try .cam(
          budget: budget, startShare: share, merge: merge, prominence: prominence, candidates: candidates,
          afterPrompt: prompt, positions: policy, every: every))
  }
}
