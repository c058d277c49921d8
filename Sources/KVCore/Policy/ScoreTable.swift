/// One number per live row of every KV head, rows in position order. Larger means keep.
public struct ScoreTable: Sendable {
  package var values: [Float] = []
  package private(set) var starts: [Int] = [0]
  /// What the scorer tells an allocator about the layer as a whole, such as how spread its attention is. Empty at first.
  public var measures: [Double] = []

  public init() {}

  /// Zeros for `counts[h]` rows of head h.
  public init(counts: [Int]) { reset(counts: counts) }

  /// Zeros for `counts[h]` rows of head h. Keeps its memory.
  public mutating func reset(counts: [Int]) {
    starts.removeAll(keepingCapacity: true)
    values.removeAll(keepingCapacity: true)
    measures.removeAll(keepingCapacity: true)
    var total = 0
    starts.append(0)
    for count in counts {
      total += count
      starts.append(total)
    }
    values.append(contentsOf: repeatElement(0, count: total))
  }

  public var headCount: Int { starts.count - 1 }
  public func rowCount(head: Int) -> Int { starts[head + 1] - starts[head] }
  package func range(head: Int) -> Range<Int> { starts[head]..<starts[head + 1] }

  public subscript(head: Int, row: Int) -> Float {
    get { values[index(head, row)] }
    set { values[index(head, row)] = newValue }
  }

  /// Sets all scores of a head.
  public mutating func set(head: Int, _ scores: [Float]) {
    precondition(scores.count == rowCount(head: head), "\(scores.count) scores for \(rowCount(head: head)) rows")
    values.replaceSubrange(range(head: head), with: scores)
  }

  /// Sets all scores of a head to what `transform` makes of numbers.
  public mutating func set(head: Int, _ numbers: [Float], _ transform: (Float) -> Float) {
    precondition(numbers.count == rowCount(head: head), "\(numbers.count) scores for \(rowCount(head: head)) rows")
    let start = starts[head]
    for (row, number) in numbers.enumerated() { values[start + row] = transform(number) }
  }

  private func index(_ head: Int, _ row: Int) -> Int {
    precondition(row >= 0 && row < rowCount(head: head), "row \(row) of \(rowCount(head: head)) in head \(head)")
    return starts[head] + row
  }

  /// A dry run knows no scores. Equal ones would leave whole runs of rows in each tier, whose positions cost nothing; in
  /// numbers without an order rows lie as they do in a cache that is used.
  package mutating func scatterTies() {
    for head in 0..<headCount {
      let range = range(head: head)
      guard let first = values[range].first, values[range].allSatisfy({ $0 == first }) else { continue }
      for (row, index) in range.enumerated() {
        values[index] = Float((UInt32(truncatingIfNeeded: row &+ 1) &* 0x9E37_79B1) >> 8)
      }
    }
  }

  /// A NaN score would sort anywhere: refuse it, with its place.
  package func checkOrdered(layer: Int) throws(KVError) {
    // A sum is NaN when a term is; infinities of both signs make one too, and are then looked at one by one.
    if !values.withUnsafeBufferPointer({ $0.reduce(0, +) }).isNaN { return }
    for head in 0..<headCount {
      for row in range(head: head) where values[row].isNaN {
        throw KVError(
          .nonFinite, "the score of row \(row - starts[head]) is NaN", layer: layer, head: head)
      }
    }
  }
}
