/// A scorer whose score of a row is a function of what the observer keeps with that row, and of its position. Decoding
/// then evicts in place: no view of the layer is made, nothing is sorted, nothing allocated.
public protocol RowScorer: Scorer {
  /// Whether all heads of a layer share one score per row, the mean over the heads that hold it (TOVA).
  var sharedByHeads: Bool { get }
  /// The observed column that is the score as it stands, where one is.
  var scoreColumn: Int? { get }
  /// Scores the slots of one KV head in one tier. What dead slots get does not matter.
  func score(_ rows: ObservedRows, into scores: UnsafeMutableBufferPointer<Float>)
}

extension RowScorer {
  public var sharedByHeads: Bool { false }
  public var scoreColumn: Int? { nil }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    layer.score(rows: self, into: &scores)
    if sharedByHeads { layer.shareByHeads(&scores) }
  }
}

extension LayerView {
  /// Scores from the observed columns, slot by slot, brought into row order.
  fileprivate func score(rows scorer: some RowScorer, into scores: inout ScoreTable) {
    for head in 0..<kvHeads {
      let slots = segments.map { segment in
        let columns = segment.observed(head: head)
        return [Float](unsafeUninitializedCapacity: columns.count) { buffer, filled in
          buffer.initialize(repeating: 0)
          filled = columns.count
          scorer.score(observedRows(columns), into: buffer)
        }
      }
      for row in 0..<rowCount(head: head) {
        let place = reference(head: head, row: row)
        scores[head, row] = slots[Int(place.segment)][Int(place.slot)]
      }
    }
  }

  private func observedRows(_ columns: ObservedColumns) -> ObservedRows {
    ObservedRows(
      columns, weights: UnsafeBufferPointer(start: nil, count: 0), queries: 0, group: shape.group,
      tokensSeen: tokensSeen, decodedTokens: decodedTokens, prompt: false)
  }

  /// Every row gets the mean over the heads that hold its token.
  package func shareByHeads(_ scores: inout ScoreTable) {
    if kvHeads < 2 { return }
    let alike = (1..<kvHeads).allSatisfy { head in
      rowCount(head: head) == rowCount(head: 0)
        && (0..<rowCount(head: 0)).allSatisfy { position(head: head, row: $0) == position(head: 0, row: $0) }
    }
    if alike {
      for row in 0..<rowCount(head: 0) {
        var sum: Float = 0
        for head in 0..<kvHeads { sum += scores[head, row] }
        for head in 0..<kvHeads { scores[head, row] = sum / Float(kvHeads) }
      }
      return
    }
    var sums = [Float](repeating: 0, count: tokensSeen)
    var holders = [Float](repeating: 0, count: tokensSeen)
    for head in 0..<kvHeads {
      for row in 0..<rowCount(head: head) {
        sums[position(head: head, row: row)] += scores[head, row]
        holders[position(head: head, row: row)] += 1
      }
    }
    for head in 0..<kvHeads {
      for row in 0..<rowCount(head: head) {
        let position = position(head: head, row: row)
        scores[head, row] = sums[position] / holders[position]
      }
    }
  }
}
