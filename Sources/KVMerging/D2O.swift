public import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// D2O: heavy hitters with budgets per layer; what is dropped and still resembles something kept is merged into it. arXiv
/// 2406.13035 (ICLR 2025).
///
/// Needs: the attention weights of every token, prompt included. Runs: after the prompt (or with the first decoded token, as
/// the authors do) and after every decoded token.
///
/// Layers whose attention is flat (small variance of what tokens received) get more rows; the first two and the last are
/// never compressed. Inside a layer the first tokens, the newest, and those with most attention stay. A dropped token goes
/// into the kept one whose key has the largest cosine, if that is at least a threshold that follows the mean cosine.
///
/// Differs from the authors' code by default: rows, scores and thresholds' tests are per KV head (theirs repeats keys to
/// query heads, and averages the test over heads); the kept key stays and the log of the count is its bias; weights are the
/// paper's. `update=official,gate=mean,keys=average,bias=none,start=step` is their rule.
extension Selection {
  /// - Parameters:
  ///   - heavy: tokens kept by attention: a share of the prompt below 1, else tokens.
  ///   - recent: newest tokens kept, likewise; both shares, or both tokens.
  ///   - sinks: first tokens that stay, among the heavy ones.
  ///   - rule: how what is dropped merges.
  ///   - atFirstStep: the prompt is cut after the first decoded token, as in the authors' code; for sizes in tokens.
  public static func d2o(
    heavy: Double = 0.1, recent: Double = 0.1, sinks: Int = 4, layers: D2OLayers = D2OLayers(),
    rule: MergeRule = .d2o, atFirstStep: Bool = false, every: Int = 1
  ) throws(KVError) -> Selection {
    let shares = heavy < 1 && recent < 1
    guard heavy >= 0, recent >= 0, heavy + recent > 0, heavy + recent <= 1_073_741_823,
      shares ? heavy + recent <= 1 : (heavy == 0 || heavy >= 1) && (recent == 0 || recent >= 1)
    else {
      throw KVError(
        .invalidOption,
        "d2o keeps two shares of the prompt that are at most 1 together, or two numbers of tokens; got \(heavy) and "
          + "\(recent)")
    }
    guard every >= 1 else {
      throw KVError(.invalidOption, "d2o drops tokens after every 1 or more decoded ones; got \(every)")
    }
    guard !atFirstStep || (!shares && !layers.usesVariance) else {
      throw KVError(
        .invalidOption,
        "with start=step d2o takes heavy and recent in tokens, and layers=uniform: shares and variances "
          + "are those of the prompt when it ends")
    }
    guard layers.skippedFirst >= 0, layers.skippedLast >= 0 else {
      throw KVError(
        .invalidOption, "d2o leaves 0 or more layers alone; got \(layers.skippedFirst) and \(layers.skippedLast)")
    }
    try rule.validate()
    let budget: Budget = shares ? .fraction(heavy + recent) : .tokens(Int(heavy) + Int(recent))
    let protection =
      shares
      ? Protection(sinks: sinks, windowShare: recent / (heavy + recent))
      : Protection(sinks: sinks, window: Int(recent))
    try BudgetSplit.validate(sinks: protection.sinks, window: protection.window, budget: budget)
    return Selection(
      spec: StageSpec(
        name: "d2o",
        options: [
          SpecOption("heavy", .decimal(heavy)), SpecOption("recent", .decimal(recent)),
          SpecOption("sinks", .integer(sinks)),
        ] + layers.spec + rule.d2oSpec + [
          SpecOption("start", .text(atFirstStep ? "step" : "prompt")), SpecOption("every", .integer(every)),
        ]),
      scorer: ReceivedAttention(attention: .accumulated), budget: budget,
      allocator: D2OAllocator(share: shares ? heavy + recent : nil, layers: layers),
      router: MergingRouter(TopKRouter(protection), rule: rule),
      schedule: Schedule(afterPrefill: !atFirstStep, decodeInterval: every))
  }

  /// `d2o`, `d2o(heavy=0.2,recent=0.1)`.
  public static let d2oMethod = MethodDescription(
    name: "d2o", role: .selection, summary: "heavy hitters per layer, and merging of what resembles something kept",
    paper: "arXiv 2406.13035",
    options: [
      .init("heavy", "tokens kept by attention: share of the prompt below 1, else tokens"),
      .init("recent", "newest tokens kept, likewise"),
      .init("sinks", "first tokens that stay, among the heavy ones"),
      .init("layers", "variance: more rows where attention is flat; uniform"),
      .init("skip_first", "first layers that are never compressed"),
      .init("skip_last", "last layers that are never compressed"),
      .init("alpha", "weight of the earlier threshold"),
      .init("beta", "weight of the new mean cosine"),
      .init("update", "paper: weights e to the cosine; official: sums over 1 + their number"),
      .init("gate", "head: each row is tested; mean: the mean over heads of their n-th dropped rows"),
      .init("keys", "keep, average or rotate"),
      .init("bias", "log_count or none"),
      .init("start", "prompt: cut when it ends; step: with the first decoded token"),
      .init("every", "decoded tokens between evictions"),
    ]
  ) { (reader) throws(KVError) in
    let heavy = try reader.double("heavy", default: 0.1, in: 0...1_073_741_823)
    let recent = try reader.double("recent", default: 0.1, in: 0...1_073_741_823)
    let sinks = try reader.int("sinks", default: 4, in: 0...1_048_576)
    var layers = D2OLayers()
    layers.usesVariance =
      try reader.name("layers", default: "variance", among: ["variance", "uniform"]) == "variance"
    layers.skippedFirst = try reader.int("skip_first", default: 2, in: 0...65_536)
    layers.skippedLast = try reader.int("skip_last", default: 1, in: 0...65_536)
    let alpha = try reader.double("alpha", default: 0.5, in: 0...1)
    let beta = try reader.double("beta", default: 0.5, in: 0...1)
    let official = try reader.name("update", default: "paper", among: ["paper", "official"]) == "official"
    let averaged = try reader.name("gate", default: "head", among: ["head", "mean"]) == "mean"
    let keys = try reader.name("keys", default: "keep", among: MergedKey.allCases.map(\.rawValue))
    let bias = try reader.name("bias", default: "log_count", among: ["log_count", "none"])
    let start = try reader.name("start", default: "prompt", among: ["prompt", "step"])
    let every = try reader.int("every", default: 1, in: 1...1_048_576)
    return .selection(
      try .d2o(
        heavy: heavy, recent: recent, sinks: sinks, layers: layers,
        rule: MergeRule(
          gate: .movingAverage(old: alpha, new: beta, averaged: averaged), update: official ? .damped : .weighted,
          weights: official ? .cosine : .exponential, key: MergedKey(rawValue: keys) ?? .keep,
          logCount: bias == "log_count"), atFirstStep: start == "step", every: every))
  }
}

extension MergeRule {
  /// The paper's weights and threshold, keys kept, log counts.
  public static let d2o = MergeRule(
    gate: .movingAverage(old: 0.5, new: 0.5, averaged: false), update: .weighted, weights: .exponential)

  fileprivate var d2oSpec: [SpecOption] {
    var result: [SpecOption] = []
    if case .movingAverage(let old, let new, let averaged) = gate {
      result = [
        SpecOption("alpha", .decimal(old)), SpecOption("beta", .decimal(new)),
        SpecOption("update", .text(update == .damped ? "official" : "paper")),
        SpecOption("gate", .text(averaged ? "mean" : "head")),
      ]
    }
    return result + [
      SpecOption("keys", .text(key.rawValue)), SpecOption("bias", .text(logCount ? "log_count" : "none")),
    ]
  }
}

/// Which layers D2O compresses, and how much.
public struct D2OLayers: Sendable, Hashable {
  /// More rows where attention is flat; else all layers alike.
  public var usesVariance = true
  /// Layers at either end that are never compressed.
  public var skippedFirst = 2
  public var skippedLast = 1

  public init() {}

  fileprivate var spec: [SpecOption] {
    [
      SpecOption("layers", .text(usesVariance ? "variance" : "uniform")),
      SpecOption("skip_first", .integer(skippedFirst)), SpecOption("skip_last", .integer(skippedLast)),
    ]
  }

  func skips(_ request: AllocationRequest) -> Bool {
    request.index < skippedFirst || request.index >= request.layers - skippedLast
  }

  /// How flat the attention of a layer is, in 0...1 and smaller for flatter: the mean over heads of the variance of what
  /// tokens received, scaled to the heads' range. `sums[head][token]`.
  static func normalisedVariance(_ sums: [[Float]]) -> Double {
    let variances = sums.map { head -> Double in
      if head.count < 2 { return 0 }
      let mean = head.reduce(0) { $0 + Double($1) } / Double(head.count)
      return head.reduce(0) { $0 + (Double($1) - mean) * (Double($1) - mean) } / Double(head.count - 1)
    }
    guard let low = variances.min(), let high = variances.max() else { return 0 }
    return variances.reduce(0) { $0 + ($1 - low) / (high - low + 1e-6) } / Double(variances.count)
  }

  /// The share of its prompt each layer keeps, from the normalised variances: softmax of their negatives, times the share
  /// of all layers together, in 0.01...1.
  static func shares(_ variances: [Double], total: Double) -> [Double] {
    let weights = variances.map { exp(-$0) }
    let sum = weights.reduce(0, +)
    return weights.map { min(max($0 / sum * Double(variances.count) * total, 0.01), 1) }
  }
}

/// Rows per layer: fixed when the prompt ends.
struct D2OAllocator: Allocator {
  /// Of the prompt; nil: the budget is in tokens.
  let share: Double?
  let layers: D2OLayers

  var spansLayers: Bool { layers.usesVariance }

  func needsScores(_ request: AllocationRequest) -> Bool {
    // All layers together decide at the end of the prompt.
    if request.earlier == nil, spansLayers { return true }
    return zip(request.rows, kept(request, share: share)).contains { $0 > $1 }
  }

  func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    guard spansLayers, requests.allSatisfy({ $0.earlier == nil }) else {
      return requests.map { kept($0, share: share) }
    }
    let variances = requests.map { request in
      D2OLayers.normalisedVariance(
        request.rows.indices.map { head in (0..<request.rows[head]).map { request.scores[head, $0] } })
    }
    let total = share ?? 1
    let shares = D2OLayers.shares(variances, total: total)
    return zip(requests, shares).map { request, own in
      // Sizes in tokens are stretched as shares are.
      share == nil ? stretched(request, by: own) : kept(request, share: own)
    }
  }

  private func kept(_ request: AllocationRequest, share: Double?) -> [Int] {
    if layers.skips(request) { return request.rows }
    if let earlier = request.earlier { return zip(request.rows, earlier.kept).map { min($0, max($1, 1)) } }
    guard let share else { return zip(request.rows, request.budget).map { min($0, $1) } }
    return request.rows.map { min($0, max(1, Int(share * Double(request.tokensSeen)))) }
  }

  private func stretched(_ request: AllocationRequest, by factor: Double) -> [Int] {
    if layers.skips(request) { return request.rows }
    return zip(request.rows, request.budget).map { min($0, max(1, Int(factor * Double($1)))) }
  }
}
