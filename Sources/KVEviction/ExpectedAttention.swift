public import KVCore

/// Expected attention: how much attention queries that have not come yet will give a token. arXiv 2510.00636.
///
/// Needs: post-RoPE queries of the last `queries` tokens, or statistics of the model's queries; the rotary embedding, unless
/// the model has none. Runs: after the prompt; with `every`, while decoding too.
///
/// Queries before their rotation are taken for normally distributed: with mean μ and covariance Σ, rotated by the mean
/// rotation R of the next `future` positions, the expected weight of a key is the softmax of k·Rμ·s + s²/2 · kᵀRΣRᵀk, with
/// the attention scale s. It is averaged over the query heads of a KV head and multiplied by the length of the value.
///
/// Differs from the authors' code: mean and covariance are those of the last `queries` tokens, not of all tokens of the
/// prompt (pass 65536 for all); no softcap; equal scores keep the lower position.
extension Selection {
  /// - Parameters:
  ///   - sinks: first tokens that always stay, and whose queries do not count.
  ///   - queries: newest tokens whose queries are taken for the distribution.
  ///   - future: positions the rotation is averaged over.
  ///   - covariance: whether the spread of the queries counts, not only their mean.
  ///   - valueLength: whether weights are multiplied by the length of the value.
  ///   - epsilon: added to the weights before that.
  ///   - rotary: false for models that do not rotate.
  ///   - statistics: calibrated mean and covariance; no query is captured then.
  public static func expectedAttention(
    budget: Budget = .fraction(0.5), sinks: Int = 4, recent: Int = 0, every: Int? = nil, queries: Int = 512,
    future: Int = 512, covariance: Bool = true, valueLength: Bool = true, epsilon: Double = 0, rotary: Bool = true,
    statistics: QueryStatistics? = nil
  ) throws(KVError) -> Selection {
    guard (1...65_536).contains(queries), (1...65_536).contains(future), epsilon >= 0, epsilon <= 1_048_576 else {
      throw KVError(
        .invalidOption,
        "expected attention takes 1...65536 queries and future positions and an epsilon in 0...1048576; got \(queries), "
          + "\(future) and \(epsilon)")
    }
    return try RowOptions(budget: budget, sinks: sinks, recent: recent, every: every).selection(
      named: "expected",
      and: [
        SpecOption("queries", .integer(queries)), SpecOption("future", .integer(future)),
        SpecOption("covariance", .bool(covariance)), SpecOption("value_length", .bool(valueLength)),
        SpecOption("epsilon", .decimal(epsilon)), SpecOption("rotary", .bool(rotary)),
        SpecOption("statistics", .text(statistics == nil ? "captured" : "given")),
      ],
      scorer: ExpectedAttention(
        sinks: sinks, queries: queries, future: future, covariance: covariance, valueLength: valueLength,
        epsilon: Float(epsilon), rotary: rotary, statistics: statistics))
  }

  /// `expected(budget=0.5,queries=512)`.
  public static let expectedAttentionMethod = MethodDescription(
    name: "expected", aliases: ["expectedattention"], role: .selection,
    summary: "attention expected from queries to come", paper: "arXiv 2510.00636",
    options: RowOptions.descriptions + [
      .init("queries", "newest tokens whose queries are taken for the distribution"),
      .init("future", "positions to come that the rotation is averaged over"),
      .init("covariance", "whether the spread of the queries counts"),
      .init("value_length", "whether weights are multiplied by the length of the value"),
      .init("epsilon", "added to the weights before that"), .init("rotary", "false for models that do not rotate"),
      .init("statistics", "captured; given ones come from code, not from a text"),
    ]
  ) { (reader) throws(KVError) in
    let options = try RowOptions(sinks: 4).read(&reader)
    let queries = try reader.int("queries", default: 512, in: 1...65_536)
    let future = try reader.int("future", default: 512, in: 1...65_536)
    let covariance = try reader.bool("covariance", default: true)
    let length = try reader.bool("value_length", default: true)
    let epsilon = try reader.double("epsilon", default: 0, in: 0...1_048_576)
    let rotary = try reader.bool("rotary", default: true)
    let statistics = try reader.name("statistics", default: "captured", among: ["captured", "given"])
    guard statistics == "captured" else {
      throw KVError(
        .missingInput, "a text cannot carry query statistics: make the policy with Selection.expectedAttention",
        offset: reader.stage.offset)
    }
    return .selection(
      try .expectedAttention(
        budget: options.budget, sinks: options.sinks, recent: options.recent, every: options.every, queries: queries,
        future: future, covariance: covariance, valueLength: length, epsilon: epsilon, rotary: rotary))
  }
}

/// The attention expected from queries that are distributed as those seen.
public struct ExpectedAttention: Scorer {
  public let sinks: Int
  public let queries: Int
  public let future: Int
  public let covariance: Bool
  public let valueLength: Bool
  public let epsilon: Float
  public let rotary: Bool
  public let statistics: QueryStatistics?

  public init(
    sinks: Int = 4, queries: Int = 512, future: Int = 512, covariance: Bool = true, valueLength: Bool = true,
    epsilon: Float = 0, rotary: Bool = true, statistics: QueryStatistics? = nil
  ) {
    self.sinks = sinks
    self.queries = queries
    self.future = future
    self.covariance = covariance
    self.valueLength = valueLength
    self.epsilon = epsilon
    self.rotary = rotary
    self.statistics = statistics
  }

  public var inputs: RequiredInputs { statistics == nil ? RequiredInputs(windowQueries: queries) : .none }

  public func validate(_ shape: ModelShape) throws(KVError) {
    try statistics?.validate(shape)
    if !rotary { return }
    guard let embedding = shape.rotary else {
      throw KVError(
        .missingInput,
        "expected attention turns queries to positions to come; give ModelShape the rotary embedding, or pass "
          + "rotary=false for a model without one")
    }
    try embedding.requireStatic()
  }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    let shape = layer.shape
    let captured = statistics == nil ? try layer.newestQueries(queries) : nil
    for head in 0..<shape.kvHeads {
      let count = layer.rowCount(head: head)
      let first = min(sinks, count)
      var total = [Float](repeating: 0, count: count - first)
      for member in 0..<shape.group {
        let expected = try expectation(layer, queryHead: head * shape.group + member, captured)
        var logits = Array(layer.products(head: head, .keys, with: expected.mean)[first...])
        if expected.factors > 0 {
          let spread = layer.products(
            head: head, .keys, with: expected.spread, count: expected.factors, fold: .squares)
          for index in logits.indices { logits[index] += spread[first + index] / 2 }
        }
        softmax(&logits)
        for index in logits.indices { total[index] += logits[index] / Float(shape.group) }
      }
      if valueLength {
        let squares = layer.squaredLengths(head: head, .values)
        for index in total.indices { total[index] = (total[index] + epsilon) * squares[first + index].squareRoot() }
      }
      // Sinks are protected by the router; here they only must not be lower than the rest.
      let top = total.max() ?? 0
      for row in 0..<count { scores[head, row] = row < first ? top : total[row - first] }
    }
  }

  /// Rμ·s, and vectors f with Σ (f·k)² = s² kᵀRΣRᵀk.
  private func expectation(
    _ layer: LayerView, queryHead: Int, _ captured: (queries: [Float], count: Int)?
  ) throws(KVError) -> (mean: [Float], spread: [Float], factors: Int) {
    let dim = layer.shape.keyDim
    var mean: [Float]
    var spread: [Float] = []
    if let captured {
      let rows = try rowsBeforeRotation(layer, queryHead, captured)
      let count = rows.count / dim
      mean = (0..<dim).map { channel in
        Float((0..<count).reduce(0.0) { $0 + Double(rows[$1 * dim + channel]) } / Double(count))
      }
      if covariance {
        let root = 1 / Float(count).squareRoot()
        let centred = rows.indices.map { (rows[$0] - mean[$0 % dim]) * root }
        spread = count <= dim ? centred : Covariance.factor(Covariance.gram(centred, dim: dim), dim: dim)
      }
    } else {
      guard let own = statistics?.layers[layer.layer] else {
        throw KVError(.missingInput, "query statistics for every layer expected; this one has none", layer: layer.layer)
      }
      mean = Array(own.mean[queryHead * dim..<(queryHead + 1) * dim])
      if covariance, !own.covariance.isEmpty {
        spread = Covariance.factor(
          own.covariance[queryHead * dim * dim..<(queryHead + 1) * dim * dim].map(Double.init), dim: dim)
      }
    }
    let scale = layer.attentionScale
    for index in mean.indices { mean[index] *= scale }
    for index in spread.indices { spread[index] *= scale }
    if rotary, let embedding = layer.rotary {
      embedding.turn(&mean, byMeanOf: layer.tokensSeen..<layer.tokensSeen + future)
      embedding.turn(&spread, byMeanOf: layer.tokensSeen..<layer.tokensSeen + future)
    }
    return (mean, spread, spread.count / dim)
  }

  /// Captured queries of a head behind the sinks, turned back to position 0.
  private func rowsBeforeRotation(
    _ layer: LayerView, _ queryHead: Int, _ captured: (queries: [Float], count: Int)
  ) throws(KVError) -> [Float] {
    let dim = layer.shape.keyDim
    let position = layer.tokensSeen - captured.count
    // Of a prompt that is hardly longer than its sinks the last query counts.
    let skipped = min(max(0, sinks - position), captured.count - 1)
    let start = (queryHead * captured.count + skipped) * dim
    var rows = Array(captured.queries[start..<(queryHead + 1) * captured.count * dim])
    guard rotary, let embedding = layer.rotary else { return rows }
    let positions = (position + skipped..<layer.tokensSeen).map { Int32($0) }
    var span = rows.mutableSpan
    try embedding.unrotate(&span, stride: dim, positions: positions.span)
    return rows
  }
}

/// Covariances and their square roots.
package enum Covariance {
  /// Σ x xᵀ over rows of `dim` numbers.
  package static func gram(_ rows: [Float], dim: Int) -> [Double] {
    var result = [Double](repeating: 0, count: dim * dim)
    for start in stride(from: 0, to: rows.count, by: dim) {
      for i in 0..<dim {
        let x = Double(rows[start + i])
        for j in 0...i { result[i * dim + j] += x * Double(rows[start + j]) }
      }
    }
    for i in 0..<dim { for j in 0..<i { result[j * dim + i] = result[i * dim + j] } }
    return result
  }

  /// Rows f with Σ f fᵀ = `matrix`, which is symmetric and has no negative eigenvalue: the columns of its Cholesky factor.
  /// A pivot that is nothing but rounding counts as zero.
  package static func factor(_ matrix: [Double], dim: Int) -> [Float] {
    var lower = matrix
    let largest = (0..<dim).reduce(0.0) { max($0, matrix[$1 * dim + $1]) }
    for j in 0..<dim {
      let pivot = lower[j * dim + j]
      guard pivot > largest * 1e-12 else {
        for i in j..<dim { lower[i * dim + j] = 0 }
        continue
      }
      let root = pivot.squareRoot()
      for i in j..<dim { lower[i * dim + j] /= root }
      for i in j + 1..<max(j + 1, dim) {
        let x = lower[i * dim + j]
        for k in j + 1...i { lower[i * dim + k] -= x * lower[k * dim + j] }
      }
    }
    var rows = [Float](repeating: 0, count: dim * dim)
    for j in 0..<dim { for i in j..<dim { rows[j * dim + i] = Float(lower[i * dim + j]) } }
    return rows
  }
}
