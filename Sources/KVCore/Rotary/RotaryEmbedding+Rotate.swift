extension RotaryEmbedding {
  /// Turns a row as the engine does when it caches a key at `position`, attention factor included.
  ///
  /// - Parameter row: the `headDim` channels of one head, in f32.
  /// - Throws: `shapeMismatch` for another channel count, `unsupported` for an unresolved dynamic scaling.
  /// - Complexity: O(rotaryDim).
  public func rotate(_ row: inout MutableSpan<Float>, position: Int) throws(KVError) {
    try check(row: row.count)
    turn(&row, at: 0, from: 0, to: position, factor: attentionFactor, divisor: 1)
  }

  /// Undoes ``rotate(_:position:)``: the key before its embedding, to f32 rounding.
  ///
  /// - Throws: as ``rotate(_:position:)``.
  /// - Complexity: O(rotaryDim).
  public func unrotate(_ row: inout MutableSpan<Float>, position: Int) throws(KVError) {
    try check(row: row.count)
    turn(&row, at: 0, from: position, to: 0, factor: 1, divisor: attentionFactor)
  }

  /// Turns a key that was cached at position `from` into the key of position `to`. Values never change.
  ///
  /// A pure rotation: the attention factor is in the key already and stays. The angle is the difference, in f64, of
  /// the two angles the engine would have used; so the result is what the engine would have cached at `to`, to f32
  /// rounding, also far out where a f32 angle is off by hundredths of a radian. Moving by 0 changes no bit.
  ///
  /// Rounding adds up over a chain of moves of keys stored in 16 bits: move from the original instead.
  ///
  /// - Throws: as ``rotate(_:position:)``.
  /// - Complexity: O(rotaryDim).
  public func move(_ row: inout MutableSpan<Float>, from: Int, to: Int) throws(KVError) {
    try check(row: row.count)
    if from != to { turn(&row, at: 0, from: from, to: to, factor: 1, divisor: 1) }
  }

  /// Turns many rows: row i starts at element `i * stride` and belongs to `positions[i]`.
  ///
  /// - Throws: `shapeMismatch` when the stride is below `headDim` or the last row does not fit; `unsupported` for an
  ///   unresolved dynamic scaling. Nothing has changed then.
  /// - Complexity: O(rows * rotaryDim).
  public func rotate(
    _ rows: inout MutableSpan<Float>, stride: Int, positions: Span<Int32>
  ) throws(KVError) {
    try check(count: rows.count, rows: positions.count, stride: stride)
    for index in positions.indices {
      turn(&rows, at: index * stride, from: 0, to: Int(positions[index]), factor: attentionFactor, divisor: 1)
    }
  }

  /// Undoes the many-rows form of `rotate`. Throws and costs as that does.
  public func unrotate(
    _ rows: inout MutableSpan<Float>, stride: Int, positions: Span<Int32>
  ) throws(KVError) {
    try check(count: rows.count, rows: positions.count, stride: stride)
    for index in positions.indices {
      turn(&rows, at: index * stride, from: Int(positions[index]), to: 0, factor: 1, divisor: attentionFactor)
    }
  }

  /// Moves many rows: row i from `from[i]` to `to[i]`. Throws and costs as the many-rows form of `rotate`.
  public func move(
    _ rows: inout MutableSpan<Float>, stride: Int, from: Span<Int32>, to: Span<Int32>
  ) throws(KVError) {
    try check(count: rows.count, rows: from.count, stride: stride)
    guard from.count == to.count else {
      throw KVError(.shapeMismatch, "moving rows needs as many new positions as old; got \(to.count) and \(from.count)")
    }
    for index in from.indices where from[index] != to[index] {
      turn(&rows, at: index * stride, from: Int(from[index]), to: Int(to[index]), factor: 1, divisor: 1)
    }
  }

  private func check(row count: Int) throws(KVError) {
    try requireStatic()
    guard count == headDim else {
      throw KVError(.shapeMismatch, "expected one row of \(headDim) channels; got \(count) elements")
    }
  }

  private func check(count: Int, rows: Int, stride: Int) throws(KVError) {
    try requireStatic()
    if rows == 0 { return }
    let (skipped, overflow) = (rows - 1).multipliedReportingOverflow(by: stride)
    guard stride >= headDim, !overflow, skipped <= count - headDim else {
      throw KVError(
        .shapeMismatch,
        "expected \(rows) rows of \(headDim) channels, \(stride) elements apart; got \(count) elements")
    }
  }

  /// Turns the row at `start` by angle(to) - angle(from); position 0 has angle 0, so this is all three operations.
  private func turn(
    _ row: inout MutableSpan<Float>, at start: Int, from: Int, to: Int, factor: Float, divisor: Float
  ) {
    let half = pairs
    let split = layout.kind == .halfSplit
    for pair in 0..<half {
      let (cosine, sine) = cosineAndSine(pair: pair, from: from, to: to)
      let c = cosine * factor
      let s = sine * factor
      let first = start + (split ? pair : 2 * pair)
      let second = split ? first + half : first + 1
      let x = row[first]
      let y = row[second]
      row[first] = (x * c - y * s) / divisor
      row[second] = (y * c + x * s) / divisor
    }
  }
}
