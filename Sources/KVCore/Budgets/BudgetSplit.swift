/// Where the rows of a budget go: the first tokens, the latest tokens, and what is left for the scorer.
///
/// ```
/// token 0 ......................................................... tokens - 1
/// [ sinks ]        candidates: the scorer picks `chosen`            [ window ]
/// ```
///
/// The sum is `min(tokens, budget)`, nothing overlaps, and no part shrinks when the budget grows.
public struct BudgetSplit: Hashable, Sendable {
  /// Rows present.
  public let tokens: Int
  /// Protected rows at the start.
  public let sinks: Int
  /// Protected rows at the end.
  public let window: Int
  /// Rows the scorer may keep between them.
  public let chosen: Int

  /// Rows kept in all.
  public var kept: Int { sinks + window + chosen }
  public var sinkRange: Range<Int> { 0..<sinks }
  public var windowRange: Range<Int> { tokens - window..<tokens }
  /// Rows the scorer chooses from. In a split that was cut, `chosen` is 0 and all of them go.
  public var candidates: Range<Int> { sinks..<tokens - window }
  /// Nothing is dropped.
  public var keepsEverything: Bool { kept == tokens }

  /// Divides a budget. Total and deterministic; negative arguments count as 0.
  ///
  /// The sinks are the first `min(sinks, tokens)` tokens, the window the latest `min(window, tokens - sinks)`, and the
  /// scorer gets the rest. Where the budget is smaller than sinks plus window (a fraction of a short prompt; other
  /// budgets are refused by ``validate(sinks:window:budget:)``), the protected set is cut in this order:
  ///
  /// 1. the window, from its oldest token, down to the newest one;
  /// 2. then the sinks, from the last, down to none;
  /// 3. the newest token goes last.
  ///
  /// So sinks outlive the window, as attention without its first tokens fails at once (StreamingLLM) while a short
  /// window only loses detail; but the newest token, which the next query follows, outlives them all.
  public static func resolve(budgetTokens: Int, tokens: Int, sinks: Int, window: Int) -> BudgetSplit {
    let present = max(tokens, 0)
    let total = min(max(budgetTokens, 0), present)
    let allSinks = min(max(sinks, 0), present)
    let allWindow = min(max(window, 0), present - allSinks)
    let newest = min(allWindow, total, 1)
    let keptSinks = min(allSinks, total - newest)
    let keptWindow = min(allWindow, total - keptSinks)
    return BudgetSplit(
      tokens: present, sinks: keptSinks, window: keptWindow, chosen: total - keptSinks - keptWindow)
  }

  /// Whether a policy with these numbers can keep its promises. Called when a policy is made.
  ///
  /// Token budgets must hold the protected rows. Fractions and bytes depend on the prompt and are cut at run time.
  ///
  /// - Throws: `invalidOption` for negative sinks or window, a budget that means nothing, and a token budget (also one
  ///   in a table) below `sinks + window`.
  public static func validate(sinks: Int, window: Int, budget: Budget) throws(KVError) {
    guard sinks >= 0, window >= 0 else {
      throw KVError(.invalidOption, "sinks and window must not be negative; got \(sinks) sinks, window \(window)")
    }
    try budget.validate()
    let (protected, overflow) = sinks.addingReportingOverflow(window)
    for leaf in budget.leaves {
      guard case .tokens(let count) = leaf.kind, overflow || count < protected else { continue }
      throw KVError(
        .invalidOption,
        "a budget of \(count) tokens cannot hold \(sinks) sinks and a window of \(window); raise the budget or lower "
          + "them")
    }
  }
}
