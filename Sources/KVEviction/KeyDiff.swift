public import KVCore

/// KeyDiff: the tokens whose keys point away from the others. arXiv 2504.15364.
///
/// Needs: keys and values only. Runs: after the prompt; with `every`, while decoding too. The paper's form chooses block by
/// block while the prompt comes in: `keydiff(...)+blocks`.
///
/// Differs from the authors' code: equal scores keep the lower position; a key of length zero has similarity 0.
extension Selection {
  /// - Parameters:
  ///   - sinks: first tokens that always stay; none as published.
  ///   - recent: newest tokens that always stay; none as published.
  public static func keyDiff(
    budget: Budget = .fraction(0.5), sinks: Int = 0, recent: Int = 0, every: Int? = nil
  ) throws(KVError) -> Selection {
    try RowOptions(budget: budget, sinks: sinks, recent: recent, every: every)
      .selection(named: "keydiff", scorer: KeyDissimilarity())
  }

  /// `keydiff(budget=0.5)`.
  public static let keyDiffMethod = MethodDescription(
    name: "keydiff", role: .selection, summary: "the tokens whose keys point away from the mean direction",
    paper: "arXiv 2504.15364", options: RowOptions.descriptions
  ) { (reader) throws(KVError) in
    let options = try RowOptions().read(&reader)
    return .selection(try options.selection(named: "keydiff", scorer: KeyDissimilarity()))
  }
}

/// Minus the cosine of the key with the mean of all keys' directions.
public struct KeyDissimilarity: Scorer {
  public init() {}

  public var inputs: RequiredInputs { .none }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    for head in 0..<layer.kvHeads {
      let count = layer.rowCount(head: head)
      if count == 0 { continue }
      let lengths = layer.squaredLengths(head: head, .keys).map { $0.squareRoot() }
      let anchor = layer.weightedSum(
        head: head, .keys, weights: lengths.map { 1 / (max($0, 1e-12) * Float(count)) })
      let size = anchor.reduce(0) { $0 + $1 * $1 }.squareRoot()
      let products = layer.products(head: head, .keys, with: anchor)
      scores.set(head: head, zip(products, lengths).map { -$0 / max($1 * size, 1e-8) })
    }
  }
}
