public import KVCore

/// SnapKV: the last tokens of the prompt show which earlier ones will be read. arXiv 2404.14469 (NeurIPS 2024).
///
/// Needs: post-RoPE queries of the last `window` tokens. Runs: after the prompt; with `every`, again while decoding, which
/// the paper does not do (its cache grows with the answer).
///
/// Attention of the window over the prompt, summed over the window, is reduced over the query heads of a KV head, then
/// pooled over neighbouring tokens so that phrases survive whole. The best rows stay, and the window itself, which counts
/// in the budget.
///
/// Differs from the authors' code: it scores per KV head, not per query head after repeating keys; rows come out in
/// position order; equal scores keep the lower position; a prompt no longer than the budget is left alone.
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept in all, window included.
  ///   - window: prompt tokens that observe; the paper uses 16 to 32, the authors' class 64, their helper 32.
  ///   - kernel: pooled neighbours, odd.
  ///   - reduction: how the query heads of a KV head become one score, before pooling.
  ///   - every: decoded tokens between further selections; nil as published: never.
  /// - Throws: `invalidOption` for an even kernel, a window below 1, or a token budget not larger than the window.
  public static func snapKV(
    budget: Budget = .tokens(2048), window: Int = 32, kernel: Int = 5, pooling: Pooling = .average,
    reduction: GroupReduction = .mean, every: Int? = nil
  ) throws(KVError) -> Selection {
    guard (1...65_536).contains(window) else {
      throw KVError(.invalidOption, "snapkv's window must lie in 1...65536; got \(window)")
    }
    guard kernel >= 1, kernel % 2 == 1, kernel <= 65_535 else {
      throw KVError(.invalidOption, "snapkv's kernel must be odd and at least 1; got \(kernel)")
    }
    try BudgetSplit.validate(sinks: 0, window: window, budget: budget)
    if budget.leaves.contains(.tokens(window)) {
      throw KVError(
        .invalidOption, "a snapkv budget of \(window) tokens leaves none to choose beside a window of \(window)")
    }
    if let every, every < 1 {
      throw KVError(.invalidOption, "selecting every \(every) tokens does not exist; at least 1, or never")
    }
    return Selection(
      spec: StageSpec(
        name: "snapkv",
        options: [
          SpecOption("budget", budget.specValue), SpecOption("window", .integer(window)),
          SpecOption("kernel", .integer(kernel)), SpecOption("pooling", .text(pooling.rawValue)),
          SpecOption("reduction", .text(reduction.rawValue)), SpecOption("every", .integer(every ?? 0)),
        ]),
      scorer: WindowAttention(window: window, kernel: kernel, pooling: pooling, reduction: reduction),
      budget: budget, router: TopKRouter(Protection(window: window)), schedule: Schedule(decodeInterval: every))
  }

  /// `snapkv(budget=2048,window=32,kernel=5,pooling=avg)`.
  public static let snapKVMethod = MethodDescription(
    name: "snapkv", role: .selection, summary: "attention of the prompt's last tokens, pooled",
    paper: "arXiv 2404.14469",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept in all, window included"),
      .init("window", "last tokens whose queries observe, and which always stay"),
      .init("kernel", "neighbouring tokens pooled, odd"),
      .init("pooling", "avg or max"),
      .init("reduction", "query heads of a KV head: mean, max or sum, before pooling"),
      .init("every", "decoded tokens between further selections; 0 for never"),
    ]
  ) { (reader) throws(KVError) in
    let budget = try reader.budget("budget", default: .tokens(2048))
    let window = try reader.int("window", default: 32, in: 1...65_536)
    let kernel = try reader.int("kernel", default: 5, in: 1...65_535)
    let pooling = try reader.name("pooling", default: "avg", among: Pooling.allCases.map(\.rawValue))
    let reduction = try reader.name("reduction", default: "mean", among: GroupReduction.allCases.map(\.rawValue))
    let every = try reader.int("every", default: 0, in: 0...1_048_576)
    return .selection(
      try .snapKV(
        budget: budget, window: window, kernel: kernel, pooling: Pooling(rawValue: pooling) ?? .average,
        reduction: GroupReduction(rawValue: reduction) ?? .mean, every: every == 0 ? nil : every))
  }
}

/// Attention of the last `window` queries, pooled over neighbouring rows. Rows of the window itself score 0: a router
/// protects them.
public struct WindowAttention: Scorer, WindowScorer {
  public let window: Int
  public let kernel: Int
  public let pooling: Pooling
  public let reduction: GroupReduction

  public init(window: Int, kernel: Int, pooling: Pooling, reduction: GroupReduction) {
    self.window = window
    self.kernel = kernel
    self.pooling = pooling
    self.reduction = reduction
  }

  public var inputs: RequiredInputs { RequiredInputs(windowQueries: window) }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    try layer.windowAttention(window: window, reduction: reduction, into: &scores)
    let firstOfWindow = layer.tokensSeen - window
    for head in 0..<layer.kvHeads {
      let count = layer.rowCount(head: head)
      var past = count
      while past > 0, layer.position(head: head, row: past - 1) >= firstOfWindow { past -= 1 }
      scores.pool(head: head, rows: 0..<past, kernel: kernel, pooling)
      for row in past..<count { scores[head, row] = 0 }
    }
  }
}
