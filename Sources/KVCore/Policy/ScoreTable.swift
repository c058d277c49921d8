/// One number per live row of every KV head, rows in position order. Larger means keep.
public struct ScoreTable: Sendable {
  package var values: [Float] = []
  package private(set) var starts: [Int] = [0]

  public init() {}

  /// Zeros for `counts[h]` rows of head h.
  public init(counts: [Int]) { reset(counts: counts) }

  /// Zeros for `counts[h]` rows of head h. Keeps its memory.
  public mutating func reset(counts: [Int]) {
    starts.removeAll(keepingCapacity: true)
    values.removeAll(keepingCapacity: true)
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

  private func index(_ head: Int, _ row: Int) -> Int {
    precondition(row >= 0 && row < rowCount(head: head), "row \(row) of \(rowCount(head: head)) in head \(head)")
    return starts[head] + row
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
