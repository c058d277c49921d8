extension RotaryEmbedding {
  /// Replaces rows of `headDim` channels before their embedding by the mean of what they would be at all of `positions`,
  /// attention factor included. The caller has checked `requireStatic()`. O(positions · pairs + rows · rotaryDim).
  package func turn(_ rows: inout [Float], byMeanOf positions: Range<Int>) {
    precondition(rows.count % headDim == 0, "\(rows.count) numbers are no rows of \(headDim)")
    if positions.isEmpty || rows.isEmpty { return }
    let split = layout.kind == .halfSplit
    for pair in 0..<pairs {
      var (cosines, sines) = (0.0, 0.0)
      for position in positions {
        let (cosine, sine) = cosineAndSine(pair: pair, from: 0, to: position)
        cosines += Double(cosine)
        sines += Double(sine)
      }
      let factor = Double(attentionFactor) / Double(positions.count)
      let (cosine, sine) = (Float(cosines * factor), Float(sines * factor))
      let first = split ? pair : 2 * pair
      let second = split ? first + pairs : first + 1
      for start in stride(from: 0, to: rows.count, by: headDim) {
        let (x, y) = (rows[start + first], rows[start + second])
        rows[start + first] = x * cosine - y * sine
        rows[start + second] = y * cosine + x * sine
      }
    }
  }
}
