public import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// CAKE: layers whose attention is spread and shifts get more of one budget; rows are scored by the mean and the variance
/// of the last queries' attention. arXiv 2503.12491 (ICLR 2025).
///
/// Needs: post-RoPE queries of the last `window` tokens of the prompt, and the attention weights of decoded tokens. Runs:
/// after the prompt, over all layers together, and after every decoded token, on the attention of that token alone.
///
/// Differs from the authors' code: the cascade, in which earlier layers give rows up while later ones run, is the engine's
/// choice, by ``KVCache/finishPrefill(layer:)``; rows are in position order, so that decoding pools neighbours of the text;
/// statistics are f32 throughout; equal scores keep the lower position.
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept on average over the layers, window included.
  ///   - window: prompt tokens that observe, and newest tokens that always stay; at least 2.
  ///   - gamma: weight of the variance.
  ///   - tau1: the entropy of a layer counts to the power 1/tau1.
  ///   - tau2: its variance to the power 1/tau2. The authors search both per model and budget.
  ///   - kernel: pooled neighbours, odd.
  ///   - cascade: whether layers may finish one by one; false: all are compared once.
  ///   - every: decoded tokens between evictions; 1 as published, nil never after the prompt.
  public static func cake(
    budget: Budget = .tokens(1024), window: Int = 32, gamma: Double = 200, tau1: Double = 1, tau2: Double = 1,
    kernel: Int = 5, cascade: Bool = true, every: Int? = 1
  ) throws(KVError) -> Selection {
    guard (2...65_536).contains(window) else {
      throw KVError(.invalidOption, "cake's window must lie in 2...65536: a variance needs two; got \(window)")
    }
    guard kernel >= 1, kernel % 2 == 1, kernel <= 65_535 else {
      throw KVError(.invalidOption, "cake's kernel must be odd and at least 1; got \(kernel)")
    }
    guard gamma >= 0, gamma.isFinite, tau1 > 0, tau2 > 0 else {
      throw KVError(
        .invalidOption, "cake's gamma is 0 or more, tau1 and tau2 are above 0; got \(gamma), \(tau1) and \(tau2)")
    }
    try BudgetSplit.validate(sinks: 0, window: window, budget: budget)
    if let every, every < 1 {
      throw KVError(.invalidOption, "evicting every \(every) tokens does not exist; at least 1, or never")
    }
    return Selection(
      spec: StageSpec(
        name: "cake",
        options: [
          SpecOption("budget", budget.specValue), SpecOption("window", .integer(window)),
          SpecOption("gamma", .decimal(gamma)), SpecOption("tau1", .decimal(tau1)), SpecOption("tau2", .decimal(tau2)),
          SpecOption("kernel", .integer(kernel)), SpecOption("cascade", .bool(cascade)),
          SpecOption("every", .integer(every ?? 0)),
        ]),
      scorer: ShiftingAttention(window: window, gamma: Float(gamma), kernel: kernel, decodes: every != nil),
      budget: budget, allocator: LayerPreference(window: window, tau1: tau1, tau2: tau2, cascades: cascade),
      router: TopKRouter(Protection(window: window)), schedule: Schedule(decodeInterval: every))
  }

  /// `cake(budget=1024,window=32)`.
  public static let cakeMethod = MethodDescription(
    name: "cake", role: .selection, summary: "mean and variance of window attention, budgets by entropy and variance",
    paper: "arXiv 2503.12491",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept on average over the layers, window included"),
      .init("window", "last tokens whose queries observe, and which always stay"),
      .init("gamma", "weight of the variance in a row's score"),
      .init("tau1", "the entropy of a layer counts to the power 1/tau1"),
      .init("tau2", "the variance of a layer counts to the power 1/tau2"),
      .init("kernel", "neighbouring tokens pooled, odd"),
      .init("cascade", "whether layers may finish their prompts one by one"),
      .init("every", "decoded tokens between evictions; 0 for never after the prompt"),
    ]
  ) { (reader) throws(KVError) in
    let budget = try reader.budget("budget", default: .tokens(1024))
    let window = try reader.int("window", default: 32, in: 2...65_536)
    let gamma = try reader.double("gamma", default: 200, in: 0...1e9)
    let tau1 = try reader.double("tau1", default: 1, in: 0...1e9)
    let tau2 = try reader.double("tau2", default: 1, in: 0...1e9)
    let kernel = try reader.int("kernel", default: 5, in: 1...65_535)
    let cascade = try reader.bool("cascade", default: true)
    let every = try reader.int("every", default: 1, in: 0...1_048_576)
    return .selection(
      try .cake(
        budget: budget, window: window, gamma: gamma, tau1: tau1, tau2: tau2, kernel: kernel,
        cascade: cascade, every: every == 0 ? nil : every))
  }
}

/// CAKE's scores. Of a prompt: the mean of the window's attention plus `gamma` times its variance, pooled; the entropy and
/// the variance of the whole layer are its measures. While decoding: the attention of the newest step, pooled.
public struct ShiftingAttention: Scorer {
  public let window: Int
  public let gamma: Float
  public let kernel: Int
  /// Whether rows carry the attention of the newest decode step.
  public let decodes: Bool

  public init(window: Int, gamma: Float, kernel: Int, decodes: Bool = true) {
    self.window = window
    self.gamma = gamma
    self.kernel = kernel
    self.decodes = decodes
  }

  public var inputs: RequiredInputs {
    RequiredInputs(
      windowQueries: window, queriesWhileDecoding: !decodes,
      observer: decodes ? LatestAttention(promptQueries: 0, decodeQueries: .max) : nil)
  }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    if layer.isPrompt || !decodes {
      let totals = try layer.windowStatistics(
        .meanVariance(gamma: gamma), window: window, reduction: .mean, totals: true, into: &scores)
      scores.measures = [totals.entropy, totals.variance]
    } else {
      layer.observed(into: &scores)
    }
    let share = layer.isPrompt || !decodes ? 1 : 1 / Float(layer.shape.group)
    for head in 0..<layer.kvHeads {
      let count = layer.rowCount(head: head)
      let past = max(0, count - window)
      if share != 1 { for row in 0..<past { scores[head, row] *= share } }
      scores.pool(head: head, rows: 0..<past, kernel: kernel, .average)
      for row in past..<count { scores[head, row] = 0 }
    }
  }
}

/// CAKE's budgets: layers share the rows beyond their windows by entropy^(1/tau1) · variance^(1/tau2).
public struct LayerPreference: Allocator {
  public let window: Int
  public let tau1: Double
  public let tau2: Double
  public let cascades: Bool

  public init(window: Int, tau1: Double, tau2: Double, cascades: Bool = true) {
    self.window = window
    self.tau1 = tau1
    self.tau2 = tau2
    self.cascades = cascades
  }

  public var spansLayers: Bool { true }

  public func needsScores(_ request: AllocationRequest) -> Bool { true }

  public func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    allocate(requests, layers: requests.count)
  }

  /// What all layers will have, among those there are so far.
  public func cascade(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    allocate(requests, layers: requests.first?.layers ?? 0)
  }

  private func allocate(_ requests: [AllocationRequest], layers: Int) -> [[Int]] {
    if requests.contains(where: { $0.scores.measures.count < 2 }) { return requests.map(later) }
    // As in the authors' code, a prompt only a window longer than the budget is left alone.
    if requests.allSatisfy({ request in
      zip(request.rows, request.budget).allSatisfy { $0 <= $1 + window }
    }) {
      return requests.map(\.rows)
    }
    let past = requests.reduce(0) { $0 + max(0, ($1.budget.max() ?? 0) - window) }
    let total = past * layers / max(requests.count, 1)
    let cap = requests.reduce(0) { max($0, ($1.rows.max() ?? 0) - window) }
    let budgets = LayerPreference.share(total, by: requests.map(preference), cap: max(0, cap))
    return zip(requests, budgets).map { request, past in request.rows.map { min($0, max(past, 0) + window) } }
  }

  /// How much a layer wants.
  func preference(_ request: AllocationRequest) -> Double {
    preference(entropy: request.scores.measures[0], variance: request.scores.measures[1])
  }

  public func preference(entropy: Double, variance: Double) -> Double {
    pow(max(entropy, 0), 1 / tau1) * pow(max(variance, 0), 1 / tau2)
  }

  /// While decoding a layer has what the prompt gave it, or its budget when nothing had to go then.
  private func later(_ request: AllocationRequest) -> [Int] {
    request.rows.indices.map { head in
      guard let earlier = request.earlier, earlier.kept[head] < earlier.tokensSeen else {
        return min(request.rows[head], request.budget[head])
      }
      // A budget that grows with the tokens grows a layer's part as well.
      let part = earlier.kept[head] * request.budget[head] / max(1, earlier.budget[head])
      return min(request.rows[head], max(1, part))
    }
  }

  /// Divides `total` rows in proportion, none above `cap` but for what evening out leaves; see the page.
  public static func share(_ total: Int, by preferences: [Double], cap: Int) -> [Int] {
    let sum = preferences.reduce(0, +)
    var shares = preferences.map {
      sum > 0 ? Int($0 / sum * Double(total)) : total / max(1, preferences.count)
    }
    // What is above the cap goes evenly to those below it, the remainder to the first.
    let excess = shares.reduce(0) { $0 + max(0, $1 - cap) }
    let open = shares.indices.filter { shares[$0] < cap }
    for index in shares.indices { shares[index] = min(shares[index], cap) }
    spread(excess, over: open, in: &shares)
    // Rounding lost rows, or evening out gained some.
    let difference = total - shares.reduce(0, +)
    if difference > 0 {
      spread(difference, over: shares.indices.filter { shares[$0] < cap }, in: &shares)
    } else if difference < 0 {
      spread(difference, over: shares.indices.filter { shares[$0] > 1 }, in: &shares)
    }
    return shares.map { min($0, cap) }
  }

  private static func spread(_ rows: Int, over places: [Int], in shares: inout [Int]) {
    if places.isEmpty { return }
    let (each, rest) = abs(rows).quotientAndRemainder(dividingBy: places.count)
    for (number, place) in places.enumerated() {
      shares[place] += rows.signum() * (each + (number < rest ? 1 : 0))
    }
  }
}
