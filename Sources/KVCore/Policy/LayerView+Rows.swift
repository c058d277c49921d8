/// Rows compared with one another, in one call of the backend each.
extension LayerView {
  /// Tokens a row stands for; 1 unless rows were merged into it.
  public func count(head: Int, row: Int) -> Int {
    let place = reference(head: head, row: row)
    return segments[Int(place.segment)].count(head: head, slot: Int(place.slot))
  }

  /// What is added to a row's logit.
  public func logBias(head: Int, row: Int) -> Float {
    let place = reference(head: head, row: row)
    return segments[Int(place.segment)].logBias(head: head, slot: Int(place.slot))
  }

  /// Which side of a row.
  public enum Side: Sendable { case keys, values }

  /// Cosines of pairs of rows, in -1...1; 0 where a row is zero. O(rows · dim) to decode and O(pairs · dim).
  public func cosines(head: Int, _ side: Side = .keys, of first: [Int], and second: [Int]) -> [Float] {
    compare(head: head, side, first, second, .cosine)
  }

  /// Squared distances of pairs of rows.
  public func squaredDistances(head: Int, _ side: Side = .keys, of first: [Int], and second: [Int]) -> [Float] {
    compare(head: head, side, first, second, .squaredDistance)
  }

  /// Lengths of rows.
  public func lengths(head: Int, _ side: Side, of rows: [Int]) -> [Float] {
    compare(head: head, side, rows, rows, .dot).map { $0.squareRoot() }
  }

  /// For every row of `rows` (ascending) the row among `others` (ascending, not empty) whose key has the largest cosine,
  /// the lowest of equal ones. O(rows · others · keyDim), in tiles on all threads.
  public func nearestKeys(head: Int, of rows: [Int], among others: [Int]) -> (rows: [Int], cosines: [Float]) {
    if rows.isEmpty || others.isEmpty { return ([], []) }
    var result = NearestRows()
    backend.nearest(
      NearestRequest(
        sources: slices(head: head, rows: rows, .keys), targets: slices(head: head, rows: others, .keys),
        dim: shape.keyDim), into: &result)
    return (result.targets.map { others[$0] }, result.cosines)
  }

  private func compare(
    head: Int, _ side: Side, _ first: [Int], _ second: [Int], _ measure: RowMeasure
  ) -> [Float] {
    precondition(first.count == second.count, "\(first.count) rows and \(second.count) others make no pairs")
    if first.isEmpty { return [] }
    // Only rows that are named are decoded.
    var number = [Int32](repeating: -1, count: rowCount(head: head))
    for row in first { number[row] = 0 }
    for row in second { number[row] = 0 }
    var named: [Int] = []
    for row in number.indices where number[row] == 0 {
      number[row] = Int32(named.count)
      named.append(row)
    }
    let request = RowComparison(
      rows: slices(head: head, rows: named, side), dim: side == .keys ? shape.keyDim : shape.valueDim,
      first: first.map { UInt32(number[$0]) }, second: second.map { UInt32(number[$0]) }, measure: measure)
    return [Float](unsafeUninitializedCapacity: first.count) { buffer, initialized in
      initialized = first.count
      if let base = buffer.baseAddress { backend.compare(request, into: base) }
    }
  }

  /// Where some rows lie, in the order given.
  package func slices(head: Int, rows: [Int], _ side: Side) -> [RunSlice] {
    var result: [RunSlice] = []
    var slots: [Int] = []
    var index = 0
    while index < rows.count {
      let segment = reference(head: head, row: rows[index]).segment
      slots.removeAll(keepingCapacity: true)
      while index < rows.count {
        let place = reference(head: head, row: rows[index])
        if place.segment != segment { break }
        slots.append(Int(place.slot))
        index += 1
      }
      let both = segments[Int(segment)].slices(head: head, slots: slots)
      result += side == .keys ? both.keys : both.values
    }
    return result
  }
}
