/// Newer tokens matter more.
public struct Recency: Scorer {
  public init() {}

  public var inputs: RequiredInputs { .none }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    for head in 0..<layer.kvHeads {
      for row in 0..<layer.rowCount(head: head) {
        // Exact below 2^24 tokens; beyond, neighbours tie.
        scores[head, row] = Float(layer.position(head: head, row: row))
      }
    }
  }
}
