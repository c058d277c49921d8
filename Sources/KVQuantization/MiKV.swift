public import KVCore

/// MiKV: what an eviction policy would keep stays in many bits, what it would drop is stored in few. arXiv 2402.18096.
///
/// Needs: the attention weights of every token, prompt included; for the balancer of the coarse store the queries of the
/// prompt. Runs: after the prompt and after every decoded token, each time after that step's attention.
///
/// Importance is H2O's: the attention a token has received so far, and the newest tokens. The important share of the
/// tokens held lies in the first store, the rest in the second; a token that fell behind moves there and never returns.
///
/// There is no code of the authors'. The share is of the current length, enforced when it is exceeded; scores are summed
/// over the query heads of a KV head, as are the queries' magnitudes the balancer takes the largest of.
extension Selection {
  /// - Parameters:
  ///   - important: share of the rows in the first store; the paper has 0.2 to 0.5.
  ///   - recentShare: part of these for the newest tokens; half, as in H2O.
  ///   - every: decoded tokens between choices; nil: never after the prompt.
  /// - Throws: `invalidOption` for numbers outside these.
  public static func miKV(
    important: Double = 0.2, recentShare: Double = 0.5, every: Int? = 1
  ) throws(KVError) -> Selection {
    guard (0...1).contains(important), (0...1).contains(recentShare), every ?? 1 >= 1 else {
      throw KVError(
        .invalidOption,
        "mikv needs shares of 0...1 and an interval of at least 1, or never; got \(important), \(recentShare) and "
          + "\(every ?? 0)")
    }
    var selection = Selection(
      spec: StageSpec(
        name: "mikv",
        options: [
          SpecOption("important", .decimal(important)), SpecOption("recent_share", .decimal(recentShare)),
          SpecOption("every", .integer(every ?? 0)),
        ]),
      scorer: AccumulatedAttention(), budget: .unlimited,
      router: ShareRouter(
        shares: try TierShares([important, 1 - important]), first: Protection(windowShare: recentShare)),
      schedule: Schedule(decodeInterval: every))
    selection.stores = [.dense(.f16), try Store.perToken().balanced()]
    return selection
  }

  /// `mikv(important=0.2)+f16+pertoken(bits=2)+balanced`.
  public static let miKVMethod = MethodDescription(
    name: "mikv", role: .selection,
    summary: "heavy hitters and newest tokens in the first store, the others in a coarse one",
    paper: "arXiv 2402.18096",
    options: [
      .init("important", "share of the rows in the first store"),
      .init("recent_share", "part of these for the newest tokens"),
      .init("every", "decoded tokens between choices; 0 for never after the prompt"),
    ]
  ) { (reader) throws(KVError) in
    let important = try reader.double("important", default: 0.2, in: 0...1)
    let share = try reader.double("recent_share", default: 0.5, in: 0...1)
    let every = try reader.int("every", default: 1, in: 0...1_048_576)
    return .selection(try .miKV(important: important, recentShare: share, every: every == 0 ? nil : every))
  }
}
