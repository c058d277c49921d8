/// Numbers for all rows of a head, read in tiles by the backend: nothing is decoded as a whole.
extension LayerView {
  /// What becomes of the products of a row with several vectors.
  public enum Fold: Sendable { case sum, squares, magnitudes }

  /// Sums of squares of the rows of a head. O(rows · dim).
  public func squaredLengths(head: Int, _ side: Side) -> [Float] { scan(head, side, .squares) }

  /// Sums of magnitudes of the rows of a head. O(rows · dim).
  public func magnitudes(head: Int, _ side: Side) -> [Float] { scan(head, side, .absolutes) }

  /// Products of every row of a head with `count` vectors, folded into one number a row. Vector j is
  /// `vectors[offset + j * stride ..< offset + j * stride + dim]`. O(rows · dim · count).
  public func products(
    head: Int, _ side: Side, with vectors: [Float], offset: Int = 0, stride: Int? = nil, count: Int = 1,
    fold: Fold = .sum
  ) -> [Float] {
    let dim = side == .keys ? shape.keyDim : shape.valueDim
    let stride = stride ?? dim
    precondition(
      count > 0 && offset >= 0 && stride >= 0 && offset + (count - 1) * stride + dim <= vectors.count,
      "\(count) vectors of \(dim) numbers, \(stride) apart from \(offset) on, in \(vectors.count)")
    let folded: RowScan.Fold = fold == .sum ? .plain : fold == .squares ? .squares : .absolutes
    return scan(head, side, .products(with: vectors, offset: offset, stride: stride, count: count, fold: folded))
  }

  /// The sum of a head's rows, each times its weight. O(rows · dim).
  public func weightedSum(head: Int, _ side: Side, weights: [Float]) -> [Float] {
    precondition(weights.count == rowCount(head: head), "\(weights.count) weights for \(rowCount(head: head)) rows")
    let dim = side == .keys ? shape.keyDim : shape.valueDim
    var sums = [Float](repeating: 0, count: dim)
    weights.withUnsafeBufferPointer { weights in
      sums.withUnsafeMutableBufferPointer { sums in
        guard let from = weights.baseAddress, let to = sums.baseAddress else { return }
        backend.addRows(slices(head: head, rows: Array(0..<weights.count), side), dim: dim, weights: from, to: to)
      }
    }
    return sums
  }

  /// Smallest and largest element of every channel of some rows of a head; ±infinity for none. O(rows · dim).
  public func channelRange(head: Int, _ side: Side, rows: Range<Int>) -> (low: [Float], high: [Float]) {
    backend.channelRange(
      slices(head: head, rows: Array(rows), side), dim: side == .keys ? shape.keyDim : shape.valueDim)
  }

  /// Standard deviation over the channels of some rows after every channel was scaled: (x - low) · inverse.
  public func spread(
    head: Int, _ side: Side, rows: Range<Int>, low: [Float], inverse: [Float]
  ) -> [Float] {
    scan(head, side, .spread(low: low, inverse: inverse), rows: rows)
  }

  private func scan(_ head: Int, _ side: Side, _ quantity: RowScan.Quantity, rows: Range<Int>? = nil) -> [Float] {
    let rows = rows ?? 0..<rowCount(head: head)
    let request = RowScan(
      rows: slices(head: head, rows: Array(rows), side), dim: side == .keys ? shape.keyDim : shape.valueDim,
      quantity: quantity)
    return [Float](unsafeUninitializedCapacity: rows.count) { buffer, initialized in
      initialized = rows.count
      if let base = buffer.baseAddress, !rows.isEmpty { backend.scan(request, into: base) }
    }
  }

  /// The factor on q·k.
  public var attentionScale: Float { options.scale ?? 1 / Float(shape.keyDim).squareRoot() }

  /// The newest captured queries as they came, oldest first: [queryHeads][count][keyDim], at most `wanted`. They are
  /// those of the positions `tokensSeen - count ..< tokensSeen`.
  ///
  /// - Throws: `missingInput` when none were observed.
  public func newestQueries(_ wanted: Int) throws(KVError) -> (queries: [Float], count: Int) {
    let count = min(wanted, observableTokens, queryWindow?.count ?? 0)
    guard let queryWindow, count > 0 else {
      throw KVError(
        .missingInput,
        "needs the queries of the last \(wanted) tokens; none were observed. Attend through the cache, or call "
          + "observe(layer:queries:) for every append", layer: layer)
    }
    return (queryWindow.newest(count), count)
  }
}
