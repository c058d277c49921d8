/// The attention a row has received so far, summed over queries and the heads of its group; or its mean over the queries
/// that could see the row and the heads of the group, so that age does not count.
public struct AccumulatedAttention: RowScorer {
  /// Divides by the queries that could see the row.
  public let ageNormalised: Bool

  public init(ageNormalised: Bool = false) { self.ageNormalised = ageNormalised }

  public var inputs: RequiredInputs { RequiredInputs(observer: AttentionSum()) }

  public var scoreColumn: Int? { ageNormalised ? nil : 0 }

  public func score(_ rows: ObservedRows, into scores: UnsafeMutableBufferPointer<Float>) {
    let sums = rows.column(0)
    if sums.baseAddress == nil {
      scores.update(repeating: 0)
    } else if ageNormalised {
      for slot in 0..<rows.count {
        scores[slot] = sums[slot] / Float(rows.group * (rows.tokensSeen - rows.position(slot)))
      }
    } else {
      for slot in 0..<rows.count { scores[slot] = sums[slot] }
    }
  }
}
