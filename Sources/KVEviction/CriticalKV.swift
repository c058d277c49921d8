public import KVCore

/// CriticalKV: half of the rows by their score, the other half by score and what their values do. arXiv 2502.03805.
///
/// Needs: what the selection it stands behind needs, and values; the output projection of every layer for the published
/// rule. Runs: when that selection does.
///
/// A row that is read little may still move the output far. The first part of a budget goes to the best scores; the rest to
/// the largest (score + epsilon) · ‖W v‖₁, the L1 norm of the value behind the output projection, averaged over the query
/// heads of a KV head. Without projections it is the L1 norm of the value itself.
///
/// Differs from the authors' code: projections are given in code; protected rows count in the first part and are its first;
/// equal scores keep the lower position. It wants scores that are not negative: shares of attention.
extension Selection {
  /// - Parameters:
  ///   - first: share of a head's rows that go by their score alone.
  ///   - epsilon: added to scores before they are multiplied.
  ///   - safe: at least this share of the layer's mean rows a head goes by score alone, where heads differ.
  ///   - projections: output projections of the model; nil: the values as they are.
  /// - Throws: `invalidOption` for numbers out of range; `unsupported` behind a selection without scores.
  public func critical(
    first: Double = 0.5, epsilon: Double = 1e-4, safe: Double = 0, projections: OutputProjections? = nil
  ) throws(KVError) -> Selection {
    let queries = (scorer as? WindowAttention)?.window ?? 1
    let rule = try TwoStageRule(
      first: first, epsilon: epsilon, safe: safe, projections: projections, queries: queries)
    guard scorer != nil else { throw Selection.nothingToScore("critical", self) }
    return try ruled(by: rule, StageSpec(name: "critical", options: rule.options))
  }

  /// `critical(first=0.5)`, behind what scores.
  public static let criticalMethod = MethodDescription(
    name: "critical", role: .modifier, summary: "part of the rows by score times the size of their values",
    paper: "arXiv 2502.03805", options: TwoStageRule.descriptions
  ) { (reader) throws(KVError) in
    let rule = try TwoStageRule.read(&reader)
    return .modifier { (selection) throws(KVError) in
      try selection.critical(first: rule.first, epsilon: rule.epsilon, safe: rule.safe)
    }
  }

  /// SnapKV's scores under the two-stage rule: the row the paper measures.
  public static func criticalKV(
    budget: Budget = .tokens(1024), window: Int = 32, kernel: Int = 7, pooling: Pooling = .max,
    reduction: GroupReduction = .mean, every: Int? = nil, first: Double = 0.5, epsilon: Double = 1e-4,
    safe: Double = 0, projections: OutputProjections? = nil
  ) throws(KVError) -> Selection {
    let rule = try TwoStageRule(
      first: first, epsilon: epsilon, safe: safe, projections: projections, queries: window)
    return try ObservationOptions(
      budget: budget, window: window, kernel: kernel, pooling: pooling, reduction: reduction, every: every
    ).selection(named: "criticalkv", and: rule.options, rule: rule)
  }

  /// `criticalkv(budget=1024)`.
  public static let criticalKVMethod = MethodDescription(
    name: "criticalkv", role: .selection, summary: "snapkv, half of it weighted by the size of the values",
    paper: "arXiv 2502.03805", options: ObservationOptions.descriptions + TwoStageRule.descriptions
  ) { (reader) throws(KVError) in
    let options = try ObservationOptions(budget: .tokens(1024), window: 32, kernel: 7, pooling: .max).read(&reader)
    let rule = try TwoStageRule.read(&reader)
    return .selection(
      try .criticalKV(
        budget: options.budget, window: options.window, kernel: options.kernel, pooling: options.pooling,
        reduction: options.reduction, every: options.every, first: rule.first,
        epsilon: rule.epsilon, safe: rule.safe))
  }
}

/// The best scores first, then the best products of score and value norm.
public struct TwoStageRule: SelectionRule {
  public let first: Double
  public let epsilon: Double
  /// Share of the mean rows of the layer's heads that go by score alone at least: kvpress's CriticalAdaKV has 0.2.
  public let safe: Double
  public let projections: OutputProjections?
  /// Queries that a score is the sum over: epsilon is meant for one.
  public let queries: Int

  public init(
    first: Double = 0.5, epsilon: Double = 1e-4, safe: Double = 0, projections: OutputProjections? = nil,
    queries: Int = 1
  ) throws(KVError) {
    self.queries = queries
    guard (0...1).contains(first), (0...1_048_576).contains(epsilon), (0...1).contains(safe) else {
      throw KVError(
        .invalidOption,
        "the first part and the safe one lie in 0...1 and epsilon in 0...1048576; got \(first), \(safe) and \(epsilon)")
    }
    self.first = first
    self.safe = safe
    self.epsilon = epsilon
    self.projections = projections
  }

  public func validate(_ shape: ModelShape) throws(KVError) { try projections?.validate(shape) }

  public func choose(_ layer: LayerView, scores: ScoreTable, splits: [BudgetSplit], into routing: inout Routing) {
    let mean = splits.reduce(0) { $0 + $1.kept } / max(splits.count, 1)
    for (head, split) in splits.enumerated() where split.chosen > 0 {
      let candidates = split.candidates
      if split.chosen == candidates.count {
        routing.send(head: head, rows: candidates, to: .tier(0))
        continue
      }
      let part = max(Double(split.kept) * first, Double(mean) * safe)
      let stage = Int(part.rounded(.down)) - split.sinks - split.window
      let sure = min(max(0, stage), split.chosen)
      var taken = [Bool](repeating: false, count: candidates.count)
      scores.forEachLargest(sure, head: head, in: candidates) { taken[$0 - candidates.lowerBound] = true }
      let norms = norms(layer, head: head)
      var second = ScoreTable(counts: [candidates.count])
      for row in candidates where !taken[row - candidates.lowerBound] {
        second[0, row - candidates.lowerBound] = (scores[head, row] + Float(epsilon) * Float(queries)) * norms[row]
      }
      // Those of the first stage are in: below everything they take no place of the second.
      for index in taken.indices where taken[index] { second[0, index] = -.infinity }
      second.forEachLargest(split.chosen - sure, head: 0, in: 0..<candidates.count) { taken[$0] = true }
      for (index, isTaken) in taken.enumerated() where isTaken {
        routing[head, candidates.lowerBound + index] = .tier(0)
      }
    }
  }

  /// ‖W v‖₁ of every row, averaged over the query heads of the group; ‖v‖₁ without projections.
  public func norms(_ layer: LayerView, head: Int) -> [Float] {
    guard let matrix = projections?.layers[layer.layer] else { return layer.magnitudes(head: head, .values) }
    let (group, dim) = (layer.shape.group, layer.shape.valueDim)
    let columns = layer.shape.queryHeads * dim
    var total = [Float](repeating: 0, count: layer.rowCount(head: head))
    for member in 0..<group {
      let sums = layer.products(
        head: head, .values, with: matrix, offset: (head * group + member) * dim, stride: columns,
        count: matrix.count / columns, fold: .magnitudes)
      for row in total.indices { total[row] += sums[row] / Float(group) }
    }
    return total
  }
}

extension TwoStageRule {
  var options: [SpecOption] {
    [
      SpecOption("first", .decimal(first)), SpecOption("epsilon", .decimal(epsilon)),
      SpecOption("safe", .decimal(safe)),
      SpecOption("projections", .text(projections == nil ? "none" : "given")),
    ]
  }

  static let descriptions: [MethodDescription.Option] = [
    .init("first", "share of a head's rows that go by their score alone"),
    .init("epsilon", "added to scores before they are multiplied"),
    .init("safe", "share of the layer's mean rows a head that go by score alone at least"),
    .init("projections", "none: values as they are; given ones come from code, not from a text"),
  ]

  static func read(_ reader: inout OptionReader) throws(KVError) -> TwoStageRule {
    let first = try reader.double("first", default: 0.5, in: 0...1)
    let epsilon = try reader.double("epsilon", default: 1e-4, in: 0...1_048_576)
    let safe = try reader.double("safe", default: 0, in: 0...1)
    let projections = try reader.name("projections", default: "none", among: ["none", "given"])
    guard projections == "none" else {
      throw KVError(
        .missingInput, "a text cannot carry output projections: make the policy in code", offset: reader.stage.offset)
    }
    return try TwoStageRule(first: first, epsilon: epsilon, safe: safe)
  }
}
