public import KVCore

/// Scissorhands: tokens that mattered keep mattering, so those that were often unimportant lately leave, many at once.
/// arXiv 2305.17118 (NeurIPS 2023).
///
/// Needs: post-RoPE queries of the last `history` tokens. Runs: whenever there are more rows than the buffer holds; then a
/// share of the buffer is dropped at once.
///
/// A row's score is minus the number of queries in the history that gave it less than an even share of their attention,
/// summed over the query heads of a KV head. There is no code by the authors. Choices in places the paper leaves open: the
/// even share counts rows that are cached, so that it stays one after evictions; counts are made anew from stored queries
/// over the rows that are left; every layer has the same buffer (the paper gives later layers more: pass a table).
extension Selection {
  /// - Parameters:
  ///   - buffer: rows that may be held before any leave.
  ///   - drop: share of the buffer dropped at once.
  ///   - history: queries looked back on.
  ///   - recent: newest tokens that always stay.
  public static func scissorhands(
    buffer: Budget = .tokens(1024), drop: Double = 0.5, history: Int = 400, recent: Int = 10
  ) throws(KVError) -> Selection {
    guard drop > 0, drop < 1 else {
      throw KVError(.invalidOption, "scissorhands drops a share above 0 and below 1; got \(drop)")
    }
    guard (1...65_536).contains(history) else {
      throw KVError(.invalidOption, "scissorhands' history must lie in 1...65536 queries; got \(history)")
    }
    let kept = try buffer.scaled(by: 1 - drop)
    try BudgetSplit.validate(sinks: 0, window: recent, budget: kept)
    return Selection(
      spec: StageSpec(
        name: "scissorhands",
        options: [
          SpecOption("buffer", buffer.specValue), SpecOption("drop", .decimal(drop)),
          SpecOption("history", .integer(history)), SpecOption("recent", .integer(recent)),
        ]),
      scorer: LowAttentionCount(window: history), budget: kept, router: TopKRouter(Protection(window: recent)),
      schedule: Schedule(decodeInterval: 1, trigger: buffer))
  }

  /// `scissorhands(buffer=1024,drop=0.5,history=400,recent=10)`.
  public static let scissorhandsMethod = MethodDescription(
    name: "scissorhands", role: .selection, summary: "tokens that were seldom unimportant lately",
    paper: "arXiv 2305.17118",
    options: [
      .init("buffer", "tokens, share of the tokens seen, or bytes held before any row leaves"),
      .init("drop", "share of the buffer dropped at once"),
      .init("history", "queries looked back on"),
      .init("recent", "newest tokens that always stay"),
    ]
  ) { (reader) throws(KVError) in
    let buffer = try reader.budget("buffer", default: .tokens(1024))
    let drop = try reader.double("drop", default: 0.5, in: 0...1)
    let history = try reader.int("history", default: 400, in: 1...65_536)
    let recent = try reader.int("recent", default: 10, in: 0...1_048_576)
    return .selection(try .scissorhands(buffer: buffer, drop: drop, history: history, recent: recent))
  }
}

/// Minus the number of the last queries that gave a row less than an even share of their attention.
public struct LowAttentionCount: Scorer {
  public let window: Int

  public init(window: Int) { self.window = window }

  public var inputs: RequiredInputs { RequiredInputs(windowQueries: window) }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    _ = try layer.windowStatistics(.belowEvenShare, window: window, reduction: .sum, into: &scores)
    for head in 0..<layer.kvHeads {
      for row in 0..<layer.rowCount(head: head) { scores[head, row] = -scores[head, row] }
    }
  }
}
