public import KVCore

/// PrefixKV: every layer keeps the tokens that hold the same share of its attention. arXiv 2412.03409 (NeurIPS 2025).
///
/// Needs: the attention weights of every token of the prompt; nothing while decoding. Runs: after the prompt, all layers together; then after every
/// decoded token.
///
/// The tokens of each layer are sorted by the attention they received; one share p is sought by bisection so that keeping,
/// in every layer, the tokens that make up p of its attention meets the budget. Layers that look at little keep little.
/// While decoding, layers grow at their own rate: the oldest rows are frozen, the newest slide.
///
/// Differs from the authors' code: p is sought for the prompt itself, where theirs is calibrated on samples and read from a
/// file (pass `keep`); the bisection is bounded; equal scores keep the lower position.
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept per layer in the mean; a share is that of the tokens seen, also while decoding.
  ///   - sinks: first tokens that always stay, besides the newest one.
  ///   - tolerance: rows of all layers by which the bisection may miss.
  ///   - keep: calibrated shares kept, one a layer, instead of the bisection.
  ///   - distance: where, behind the rows of the prompt, a decoded token pushes another out; counted from their end.
  public static func prefixKV(
    budget: Budget = .fraction(0.5), sinks: Int = 1, tolerance: Int = 5, keep: [Double] = [], distance: Int = -25,
    every: Int? = 1
  ) throws(KVError) -> Selection {
    try BudgetSplit.validate(sinks: sinks, window: 1, budget: budget)
    if let every, every < 1 {
      throw KVError(.invalidOption, "selecting every \(every) tokens does not exist; at least 1, or never")
    }
    let allocator = try PrefixAllocator(tolerance: tolerance, share: budget.share, keep: keep)
    return Selection(
      spec: StageSpec(
        name: "prefixkv",
        options: [
          SpecOption("budget", budget.specValue), SpecOption("sinks", .integer(sinks)),
          SpecOption("every", .integer(every ?? 0)), SpecOption("distance", .integer(distance)),
        ] + allocator.options),
      scorer: SharedScores(AccumulatedAttention()), budget: budget, allocator: allocator,
      router: TopKRouter(Protection(sinks: sinks, window: 1), rule: FrozenPrefixRule(distance: distance)),
      schedule: Schedule(decodeInterval: every))
  }

  /// `prefixkv(budget=0.5)`.
  public static let prefixKVMethod = MethodDescription(
    name: "prefixkv", role: .selection, summary: "the same share of attention kept in every layer",
    paper: "arXiv 2412.03409",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept per layer in the mean"),
      .init("sinks", "first tokens that always stay; the newest does too"),
      .init("every", "decoded tokens between evictions; 0 for never after the prompt"),
      .init("distance", "where decoded tokens push others out, from the end of the prompt's rows"),
    ] + PrefixAllocator.descriptions
  ) { (reader) throws(KVError) in
    let budget = try reader.budget("budget", default: .fraction(0.5))
    let sinks = try reader.int("sinks", default: 1, in: 0...1_048_576)
    let every = try reader.int("every", default: 1, in: 0...1_048_576)
    let distance = try reader.int("distance", default: -25, in: -1_048_576...0)
    let (tolerance, keep) = try PrefixAllocator.read(&reader)
    return .selection(
      try .prefixKV(
        budget: budget, sinks: sinks, tolerance: tolerance, keep: keep, distance: distance,
        every: every == 0 ? nil : every))
  }

  /// Budgets over layers by the share of scores they keep, behind any selection whose scores are not negative.
  ///
  /// - Throws: `unsupported` behind a selection without scores.
  public func prefix(tolerance: Int = 0, keep: [Double] = []) throws(KVError) -> Selection {
    let layers = try PrefixAllocator(tolerance: tolerance, share: budget.share, keep: keep)
    guard scorer != nil else { throw Selection.nothingToScore("prefix", self) }
    return modified(by: StageSpec(name: "prefix", options: layers.options)) {
      $0.allocator = $0.allocator.under(layers)
    }
  }

  /// `prefix(tolerance=0)`, behind what scores.
  public static let prefixMethod = MethodDescription(
    name: "prefix", role: .modifier, summary: "the same share of the scores kept in every layer",
    paper: "arXiv 2412.03409", options: PrefixAllocator.descriptions
  ) { (reader) throws(KVError) in
    let (tolerance, keep) = try PrefixAllocator.read(&reader, tolerance: 0)
    return .modifier { (selection) throws(KVError) in try selection.prefix(tolerance: tolerance, keep: keep) }
  }
}

/// Budgets over layers such that each keeps rows with the same share of its scores.
public struct PrefixAllocator: LayerAllocator {
  /// Rows of all layers by which the bisection may miss.
  public let tolerance: Int
  /// The budget as a share of the tokens seen, where it is one: targets are not rounded then, and layers grow.
  public let share: Double?
  /// Shares kept, one a layer: calibrated, instead of the bisection.
  public let keep: [Double]
  public var heads: any Allocator

  public init(
    tolerance: Int = 5, share: Double? = nil, keep: [Double] = [], heads: any Allocator = UniformAllocator()
  ) throws(KVError) {
    guard (0...1_048_576).contains(tolerance) else {
      throw KVError(.invalidOption, "the tolerance of a bisection must lie in 0...1048576; got \(tolerance)")
    }
    if let wrong = keep.first(where: { !($0 >= 0 && $0 <= 1) }) {
      throw KVError(.invalidOption, "shares kept lie in 0...1; got \(wrong)")
    }
    self.tolerance = tolerance
    self.share = share
    self.keep = keep
    self.heads = heads
  }

  public var spansLayers: Bool { keep.isEmpty }
  /// Layers keep what the prompt gave them.
  public var readsScoresWhileDecoding: Bool { heads.readsScoresWhileDecoding }

  public func validate(_ shape: ModelShape) throws(KVError) {
    try heads.validate(shape)
    let layers = shape.layers.reduce(0) { $0 + ($1.cached && $1.slidingWindow == nil ? 1 : 0) }
    guard keep.isEmpty || keep.count == layers else {
      throw KVError(
        .shapeMismatch, "shares kept for the \(layers) layers that choose expected; got \(keep.count)")
    }
  }

  public func needsScores(_ request: AllocationRequest) -> Bool { request.rows.contains { $0 > 0 } }

  public func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    guard let first = requests.first else { return [] }
    let counts: [Int?]
    if !keep.isEmpty {
      counts = requests.map { request in
        // The authors round what they drop.
        let tokens = request.tokensSeen
        return tokens - Int(((1 - keep[request.index]) * Double(tokens)).rounded(.toNearestOrEven))
      }
    } else if requests.count == first.layers, requests.allSatisfy({ $0.isScored || $0.earlier == nil }) {
      counts = compared(requests)
    } else {
      counts = requests.map { _ in nil }
    }
    return try heads.allocate(
      zip(requests, counts).map { request, count in
        var changed = request
        for head in request.rows.indices {
          if let earlier = request.earlier,
            count == nil || (1..<request.tokensSeen).contains(earlier.tokensSeen) && !keep.isEmpty
          {
            changed.budget[head] = grown(earlier, head, request)
          } else if let count {
            changed.budget[head] = count
          }
          changed.budget[head] = max(changed.budget[head], min(request.rows[head], request.protectedRows(head: head)))
        }
        return changed
      })
  }

  /// A layer by itself keeps what it got when all were compared; with a share for a budget it grows with the tokens seen.
  /// A prompt of which all fitted compared nothing.
  private func grown(_ earlier: EarlierAllocation, _ head: Int, _ request: AllocationRequest) -> Int {
    if keep.isEmpty, earlier.tokensSeen <= earlier.budget[head] { return request.budget[head] }
    guard share != nil || !keep.isEmpty, earlier.tokensSeen > 0 else { return earlier.kept[head] }
    let kept = Double(earlier.kept[head]) / Double(earlier.tokensSeen) * Double(request.tokensSeen)
    // A product within rounding of an integer is that integer.
    return Int((kept - kept * 0x1p-50).rounded(.up))
  }

  // MARK: Comparing layers

  /// Rows every layer keeps.
  private func compared(_ requests: [AllocationRequest]) -> [Int] {
    let target = requests.reduce(0.0) { total, request in
      let mean = Double(request.budget.reduce(0, +)) / Double(max(request.budget.count, 1))
      let kept = share.map { $0 * Double(request.tokensSeen) } ?? mean
      return total + max(0, Double(longest(request)) - kept)
    }
    let drops = drops(
      curves: requests.map(curve), protect: requests.map { $0.protection.sinks + $0.protection.window }, target: target)
    return zip(requests, drops).map { longest($0) - $1 }
  }

  private func longest(_ request: AllocationRequest) -> Int { request.rows.max() ?? 0 }

  /// Rows to drop per layer, from the share of the scores that the best rows of each make up.
  public func drops(curves: [[Double]], protect: [Int], target: Double) -> [Int] {
    if target <= 0 { return curves.map { _ in 0 } }
    var (low, high) = (0.0, 1.0)
    var drops: [Int] = []
    // A step function may jump over any tolerance: after these steps p is as near as f64 tells apart.
    for _ in 0..<60 {
      let middle = (low + high) / 2
      drops = zip(curves, protect).map { PrefixAllocator.drop($0, share: middle, protect: $1) }
      let off = Double(drops.reduce(0, +)) - target
      if abs(off) < Double(max(tolerance, 1)) { break }
      if off < 0 { high = middle } else { low = middle }
    }
    let sum = drops.reduce(0, +)
    if sum > 0, Double(sum) != target {
      for index in drops.indices {
        let scaled = Int(Double(drops[index]) * target / Double(sum))
        drops[index] = min(scaled, max(0, curves[index].count - protect[index]))
      }
    }
    return drops
  }

  /// Rows of a layer to drop so that the rest, the best ones, make up `share` of the scores.
  public static func drop(_ curve: [Double], share: Double, protect: Int) -> Int {
    var low = 0
    var high = curve.count
    while low < high {
      let middle = (low + high) / 2
      if curve[middle] < share { low = middle + 1 } else { high = middle }
    }
    return max(0, curve.count - low - 1 - protect)
  }

  /// Cumulative shares of the scores of a layer, best first; of several heads the mean of equal ranks.
  private func curve(_ request: AllocationRequest) -> [Double] {
    var ranked = [Double](repeating: 0, count: longest(request))
    for head in request.rows.indices {
      let own = (0..<request.rows[head]).map { Double(max(0, request.scores[head, $0])) }.sorted(by: >)
      for (rank, score) in own.enumerated() { ranked[rank] += score }
    }
    return PrefixAllocator.cumulative(ranked)
  }

  /// Shares of the sum up to each number. Without any score, every number counts the same.
  public static func cumulative(_ sorted: [Double]) -> [Double] {
    let total = sorted.reduce(0, +)
    var sum = 0.0
    return sorted.map { score in
      sum += total > 0 ? score / total : 1 / Double(sorted.count)
      return sum
    }
  }
}

/// After the prompt the best rows; while decoding, rows up to a slot are frozen and the rest slides.
public struct FrozenPrefixRule: SelectionRule {
  public let distance: Int
  public var readsScoresWhileDecoding: Bool { false }

  public init(distance: Int = -25) { self.distance = distance }

  /// The slot where rows are dropped while decoding, for a prompt that left `kept`.
  public func cut(kept: Int) -> Int { kept + distance < 1 ? kept / 2 : kept + distance }

  public func choose(_ layer: LayerView, scores: ScoreTable, splits: [BudgetSplit], into routing: inout Routing) {
    for (head, split) in splits.enumerated() where split.chosen > 0 {
      guard layer.isDecoding, let earlier = layer.earlier else {
        scores.forEachLargest(split.chosen, head: head, in: split.candidates) { routing[head, $0] = .tier(0) }
        continue
      }
      let frozen = max(split.sinks, min(cut(kept: earlier.kept[head]), split.kept - split.window))
      let newest = split.tokens - (split.kept - frozen)
      routing.send(head: head, rows: split.sinks..<max(split.sinks, frozen), to: .tier(0))
      routing.send(head: head, rows: (newest..<split.tokens).clamped(to: split.candidates), to: .tier(0))
    }
  }
}

extension PrefixAllocator {
  var options: [SpecOption] {
    [
      SpecOption("tolerance", .integer(tolerance)), SpecOption("keep", .list(keep.map(SpecValue.decimal))),
    ]
  }

  static let descriptions: [MethodDescription.Option] = [
    .init("tolerance", "rows of all layers by which the bisection may miss"),
    .init("keep", "calibrated shares kept, one a layer, instead of the bisection"),
  ]

  static func read(_ reader: inout OptionReader, tolerance: Int = 5) throws(KVError) -> (Int, [Double]) {
    (
      try reader.int("tolerance", default: tolerance, in: 0...1_048_576),
      try reader.doubleList("keep", default: [], in: 0...1)
    )
  }
}

extension Budget {
  /// The share of the tokens seen that it stands for, if that is what it is.
  var share: Double? { if case .fraction(let share) = kind { share } else { nil } }
}
