internal import Foundation
public import KVCore

/// Full attention in f64, one row at a time, written to be read: what faster attention is compared with.
///
/// Query head h reads KV head h / (queryHeads / kvHeads). A slot (row of the keys) has a position per KV head; with
/// positions given, slots may be any surviving tokens in any order, and heads may hold different ones.
///
/// ```
/// logit(q, s) = softcap(scale · q·k_s) + logBias_s        where softcap(x) = cap · tanh(x / cap)
/// visible(q, s) ⇔ (not causal or position_s <= position_q) and position_s > position_q − slidingWindow
/// ```
public struct AttentionReference: Hashable, Sendable {
  /// What q·k is multiplied by. Nil: 1/√dim.
  public var scale: Double?
  /// Whether a query sees its own position and earlier ones only.
  public var causal: Bool
  /// A query at position p sees positions after p − slidingWindow only. Nil: all.
  public var slidingWindow: Int?
  /// Bound of the logits before the bias. Nil: none.
  public var softcap: Double?

  public init(scale: Double? = nil, causal: Bool = true, slidingWindow: Int? = nil, softcap: Double? = nil) {
    self.scale = scale
    self.causal = causal
    self.slidingWindow = slidingWindow
    self.softcap = softcap
  }

  /// What one query head's query sees.
  public struct Row: Sendable {
    public let queryHead: Int
    /// Row of the queries.
    public let query: Int
    /// One weight a slot; 0 for slots out of sight. They add to 1, or all are 0 when nothing is visible.
    public let weights: [Double]
    /// Natural logarithm of the sum of exp(logit); −∞ when nothing is visible.
    public let logSumExp: Double
  }

  /// Outputs, log-sum-exps and weights of all queries.
  public struct Result: Sendable {
    public let queryHeads: Int
    public let queryTokens: Int
    public let slots: Int
    public let valueDim: Int
    /// [queryHeads, queryTokens, valueDim]; 0 for a query that sees nothing.
    public internal(set) var outputs: [Double] = []
    /// [queryHeads, queryTokens]
    public internal(set) var logSumExps: [Double] = []
    /// [queryHeads, queryTokens, slots]; empty unless asked for.
    public internal(set) var weights: [Double] = []

    /// The output of one query.
    public func output(head: Int, query: Int) -> ArraySlice<Double> {
      let start = (head * queryTokens + query) * valueDim
      return outputs[start..<start + valueDim]
    }

    /// The weights of one query; only when they were asked for.
    public func weights(head: Int, query: Int) -> ArraySlice<Double> {
      let start = (head * queryTokens + query) * slots
      return weights[start..<start + slots]
    }
  }

  /// Attention of `queries` [queryHeads, Tq, d] over `keys` [kvHeads, slots, d] and `values` [kvHeads, slots, dv].
  ///
  /// - Parameters:
  ///   - queryPositions: position of every query row. Nil: the last Tq of the slots.
  ///   - keyPositions: position of every slot, per KV head. Nil: 0, 1, 2 …
  ///   - logBias: added to a slot's logits, in nats, per KV head: log n for a slot that stands for n tokens, −∞ for a
  ///     slot that is padding. Nil: none.
  ///   - keepWeights: whether the result holds the weights too, Tq · slots numbers a query head.
  /// - Throws: `shapeMismatch` that names what does not fit; `invalidOption` for a scale, softcap or window out of
  ///   range or a bias that is NaN or +∞; `nonFinite` for a logit that is not a number.
  /// - Complexity: O(queryHeads · Tq · slots · (d + dv)).
  public func attend(
    queries: HeadTensor, keys: HeadTensor, values: HeadTensor, queryPositions: [Int]? = nil,
    keyPositions: [[Int]]? = nil, logBias: [[Double]]? = nil, keepWeights: Bool = false
  ) throws(KVError) -> Result {
    guard values.heads == keys.heads, values.tokens == keys.tokens else {
      throw KVError(.shapeMismatch, "values of shape \(values.shape) do not belong to keys of shape \(keys.shape)")
    }
    var result = Result(
      queryHeads: queries.heads, queryTokens: queries.tokens, slots: keys.tokens, valueDim: values.dim)
    result.outputs.reserveCapacity(queries.heads * queries.tokens * values.dim)
    let group = keys.heads == 0 ? 1 : max(1, queries.heads / keys.heads)
    try forEachRow(
      queries: queries, keys: keys, queryPositions: queryPositions, keyPositions: keyPositions, logBias: logBias
    ) { row in
      var output = [Double](repeating: 0, count: values.dim)
      for (slot, weight) in row.weights.enumerated() where weight > 0 {
        let value = values.row(head: row.queryHead / group, token: slot)
        for (c, x) in value.enumerated() { output[c] += weight * Double(x) }
      }
      result.outputs += output
      result.logSumExps.append(row.logSumExp)
      if keepWeights { result.weights += row.weights }
    }
    return result
  }

  /// Calls `body` with the weights of every query head and query, head by head, and keeps none of them: for statistics
  /// over contexts whose weights do not fit memory. Parameters and errors are those of `attend`.
  ///
  /// - Complexity: O(queryHeads · Tq · slots · d) time, O(slots) memory.
  public func forEachRow(
    queries: HeadTensor, keys: HeadTensor, queryPositions: [Int]? = nil, keyPositions: [[Int]]? = nil,
    logBias: [[Double]]? = nil, _ body: (Row) -> Void
  ) throws(KVError) {
    try validate(queries, keys, queryPositions, keyPositions, logBias)
    if queries.heads == 0 || queries.tokens == 0 { return }
    let group = queries.heads / keys.heads
    let scale = self.scale ?? 1 / Double(keys.dim).squareRoot()
    let firstPosition = keys.tokens - queries.tokens
    for queryHead in 0..<queries.heads {
      let head = queryHead / group
      for query in 0..<queries.tokens {
        let position = queryPositions?[query] ?? firstPosition + query
        let row = queries.row(head: queryHead, token: query)
        var logits = [Double](repeating: -.infinity, count: keys.tokens)
        for slot in 0..<keys.tokens {
          let at = keyPositions?[head][slot] ?? slot
          if causal, at > position { continue }
          if let slidingWindow, position.subtractingReportingOverflow(at).partialValue >= slidingWindow { continue }
          var logit = scale * dotProduct(row, keys.row(head: head, token: slot))
          if let softcap { logit = softcap * tanh(logit / softcap) }
          logit += logBias?[head][slot] ?? 0
          guard !logit.isNaN, logit < .infinity else {
            throw KVError(
              .nonFinite, "the logit of query \(query) of query head \(queryHead) and slot \(slot) is \(logit)",
              head: head, position: at)
          }
          logits[slot] = logit
        }
        let (weights, logSumExp) = softmax(logits)
        body(Row(queryHead: queryHead, query: query, weights: weights, logSumExp: logSumExp))
      }
    }
  }

  /// Attention that every slot receives from all queries, added up: [queryHeads][slots]. Parameters and errors are
  /// those of `attend`.
  public func columnSums(
    queries: HeadTensor, keys: HeadTensor, queryPositions: [Int]? = nil, keyPositions: [[Int]]? = nil,
    logBias: [[Double]]? = nil
  ) throws(KVError) -> [[Double]] {
    var sums = Array(repeating: [Double](repeating: 0, count: keys.tokens), count: queries.heads)
    try forEachRow(
      queries: queries, keys: keys, queryPositions: queryPositions, keyPositions: keyPositions, logBias: logBias
    ) { row in
      for (slot, weight) in row.weights.enumerated() { sums[row.queryHead][slot] += weight }
    }
    return sums
  }

  private func validate(
    _ queries: HeadTensor, _ keys: HeadTensor, _ queryPositions: [Int]?, _ keyPositions: [[Int]]?,
    _ logBias: [[Double]]?
  ) throws(KVError) {
    for (value, name) in [(scale, "scale"), (softcap, "softcap"), (slidingWindow.map { Double($0) }, "slidingWindow")] {
      guard let value else { continue }
      guard value.isFinite, value > 0 else {
        throw KVError(.invalidOption, "\(name) must be a positive finite number; got \(value)")
      }
    }
    guard queries.dim == keys.dim, keys.heads >= 1, queries.heads % keys.heads == 0 else {
      throw KVError(
        .shapeMismatch,
        "queries of shape \(queries.shape) cannot attend to keys of shape \(keys.shape): the channels "
          + "must agree and the query heads be a multiple of the KV heads")
    }
    guard queryPositions?.count ?? queries.tokens == queries.tokens else {
      throw KVError(
        .shapeMismatch, "\(queryPositions?.count ?? 0) query positions for \(queries.tokens) queries")
    }
    guard queryPositions != nil || queries.tokens <= keys.tokens else {
      throw KVError(
        .shapeMismatch, "\(queries.tokens) queries are more than the \(keys.tokens) slots; say their positions")
    }
    if let keyPositions, keyPositions.map(\.count) != Array(repeating: keys.tokens, count: keys.heads) {
      throw KVError(
        .shapeMismatch,
        "key positions must be \(keys.tokens) for each of \(keys.heads) KV heads; got "
          + "\(keyPositions.map(\.count))")
    }
    guard let logBias else { return }
    guard logBias.map(\.count) == Array(repeating: keys.tokens, count: keys.heads) else {
      throw KVError(
        .shapeMismatch,
        "log biases must be \(keys.tokens) for each of \(keys.heads) KV heads; got "
          + "\(logBias.map(\.count))")
    }
    guard logBias.allSatisfy({ $0.allSatisfy { $0 < .infinity } }) else {
      throw KVError(.invalidOption, "a log bias must be finite or −∞")
    }
  }
}

private func dotProduct(_ a: ArraySlice<Float>, _ b: ArraySlice<Float>) -> Double {
  a.withUnsafeBufferPointer { a in
    b.withUnsafeBufferPointer { b in
      var sum = 0.0
      for c in 0..<min(a.count, b.count) { sum += Double(a[c]) * Double(b[c]) }
      return sum
    }
  }
}

/// Weights and log-sum-exp of logits of which any may be −∞.
func softmax(_ logits: [Double]) -> (weights: [Double], logSumExp: Double) {
  let largest = logits.max() ?? -.infinity
  guard largest > -.infinity else { return ([Double](repeating: 0, count: logits.count), -.infinity) }
  var weights = logits.map { exp($0 - largest) }
  let sum = weights.reduce(0, +)
  for index in weights.indices { weights[index] /= sum }
  return (weights, largest + log(sum))
}
