/// The attention a row has received so far, summed over queries and the heads of its group.
public struct AccumulatedAttention: Scorer {
  public init() {}

  public var inputs: RequiredInputs { RequiredInputs(attentionWeights: true) }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    layer.accumulatedAttention(into: &scores)
  }
}
