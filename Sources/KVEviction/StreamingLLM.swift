public import KVCore

/// StreamingLLM: the first few tokens and the newest ones, nothing between. arXiv 2309.17453 (ICLR 2024).
///
/// Needs: keys and values. Runs: after the prompt and after every decoded token.
///
/// Positions: the authors number rows inside the cache (`slot`, the default, needs the rotary embedding in `ModelShape`);
/// most ports keep true positions (`keep`). The two give different numbers. Slot distances are made by turning the query
/// back over the gap, so stored keys are never rewritten; `rerotate` turns the keys of the first tokens instead, once for
/// every token that leaves.
extension Selection {
  /// - Parameters:
  ///   - sinks: tokens kept at the start; 4, or 1 for models trained with a sink token.
  ///   - recent: newest tokens kept.
  ///   - budget: instead of `recent`: everything the budget allows beyond the sinks.
  /// - Throws: `invalidOption` for negative numbers or a window of no token.
  public static func streamingLLM(
    sinks: Int = 4, recent: Int = 512, budget: Budget? = nil, positions: PositionPolicy = .slot
  ) throws(KVError) -> Selection {
    guard sinks >= 0, recent >= 1, recent <= 1 << 30, sinks <= 1 << 30 else {
      throw KVError(
        .invalidOption, "streaming needs 0 or more sinks and at least 1 recent token; got \(sinks) and \(recent)")
    }
    let size: [SpecOption] =
      budget.map { [SpecOption("budget", $0.specValue)] }
      ?? [SpecOption("recent", .integer(recent))]
    return Selection(
      spec: StageSpec(
        name: "streaming",
        options: [SpecOption("sinks", .integer(sinks))] + size + [SpecOption("positions", .text(positions.rawValue))]),
      scorer: nil, budget: budget ?? .tokens(sinks + recent), router: SinkWindowRouter(sinks: sinks),
      schedule: Schedule(decodeInterval: 1), positions: positions)
  }

  /// `streaming(sinks=4,recent=512)`.
  public static let streamingLLMMethod = MethodDescription(
    name: "streaming", aliases: ["streamingllm"], role: .selection,
    summary: "attention sinks and a sliding window", paper: "arXiv 2309.17453",
    options: [
      .init("sinks", "first tokens that always stay"), .init("recent", "newest tokens that stay"),
      .init("budget", "tokens, share or bytes kept in all, instead of recent"),
      .init(
        "positions", "slot: distances counted in cached rows; rerotate: the same by turned keys; keep: true distances"),
    ]
  ) { (reader) throws(KVError) in
    let sinks = try reader.int("sinks", default: 4, in: 0...1_048_576)
    guard !(reader.has("budget") && reader.has("recent")) else {
      throw KVError(
        .invalidOption, "streaming takes recent or budget, not both", offset: reader.stage.offset)
    }
    let budget = reader.has("budget") ? try reader.budget("budget") : nil
    if budget == nil { reader.offer("budget") }
    let recent = try reader.int("recent", default: 512, in: 1...1_073_741_823)
    let positions = try reader.name("positions", default: "slot", among: PositionPolicy.allCases.map(\.rawValue))
    return .selection(
      try .streamingLLM(
        sinks: sinks, recent: recent, budget: budget, positions: PositionPolicy(rawValue: positions) ?? .slot))
  }
}

/// Sinks first, then as many of the newest rows as fit; no score is asked.
struct SinkWindowRouter: Router {
  let protection: Protection

  init(sinks: Int) { protection = Protection(sinks: sinks) }

  func route(_ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing) {
    for head in 0..<scores.headCount {
      let count = scores.rowCount(head: head)
      let sinks = min(protection.sinks, kept[head])
      for row in 0..<count where row < sinks || row >= count - (kept[head] - sinks) {
        routing[head, row] = .tier(0)
      }
    }
  }
}
