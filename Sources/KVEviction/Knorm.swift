public import KVCore

/// Knorm: the tokens whose keys are shortest. arXiv 2406.11430 (EMNLP 2024).
///
/// Needs: keys and values only. Runs: after the prompt; with `every`, while decoding too.
///
/// Short keys go with high attention in models that keep their attention sinks in few channels.
///
/// Differs from the authors' code: equal lengths keep the lower position; survivors stay in position order.
extension Selection {
  /// - Parameters:
  ///   - sinks: first tokens that always stay; none as published.
  ///   - recent: newest tokens that always stay; none as published.
  public static func knorm(
    budget: Budget = .fraction(0.5), sinks: Int = 0, recent: Int = 0, every: Int? = nil
  ) throws(KVError) -> Selection {
    try RowOptions(budget: budget, sinks: sinks, recent: recent, every: every)
      .selection(named: "knorm", scorer: KeyLength())
  }

  /// `knorm(budget=0.5)`.
  public static let knormMethod = MethodDescription(
    name: "knorm", role: .selection, summary: "the tokens whose keys are shortest", paper: "arXiv 2406.11430",
    options: RowOptions.descriptions
  ) { (reader) throws(KVError) in
    let options = try RowOptions().read(&reader)
    return .selection(try options.selection(named: "knorm", scorer: KeyLength()))
  }
}

/// Minus the length of the key.
public struct KeyLength: Scorer {
  public init() {}

  public var inputs: RequiredInputs { .none }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    for head in 0..<layer.kvHeads {
      scores.set(head: head, layer.squaredLengths(head: head, .keys)) { -$0.squareRoot() }
    }
  }
}
