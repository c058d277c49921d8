#if canImport(Darwin)
  internal import Darwin
#elseif canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#endif

/// Cosines and sines for kernels: row i holds the `pairs` values of position i.
///
/// ```
/// cosines[i * pairs + p], sines[i * pairs + p]
/// halfSplit:   out[p] = x[p] cos - x[p + pairs] sin,  out[p + pairs] = x[p + pairs] cos + x[p] sin
/// ```
package struct RotaryTable: Sendable {
  package var pairs: Int
  package var cosines: [Float]
  package var sines: [Float]
}

extension RotaryEmbedding {
  /// Turns one row of `headDim` channels from one position to another, in place, for backends that keep rows in memory of
  /// their own. The caller has checked `requireStatic()`.
  package func move(row: UnsafeMutablePointer<Float>, from: Int, to: Int) {
    let split = layout == .halfSplit
    for pair in 0..<pairs {
      let (cosine, sine) = cosineAndSine(pair: pair, from: from, to: to)
      let first = split ? pair : 2 * pair
      let second = split ? first + pairs : first + 1
      let x = row[first]
      let y = row[second]
      row[first] = x * cosine - y * sine
      row[second] = y * cosine + x * sine
    }
  }

  /// The table of a set of positions.
  ///
  /// - Parameter scaled: whether the attention factor is multiplied in (to rotate) or left out (to un-rotate: use -sin
  ///   and divide by the factor).
  /// - Complexity: O(positions * rotaryDim).
  package func table(positions: Span<Int32>, scaled: Bool) throws(KVError) -> RotaryTable {
    try requireStatic()
    var table = emptyTable(rows: positions.count)
    let factor = scaled ? attentionFactor : 1
    for index in positions.indices {
      appendRow(to: &table, from: 0, to: Int(positions[index]), factor: factor)
    }
    return table
  }

  /// The table that moves a key at `from[i]` to `to[i]`: a pure rotation.
  package func moveTable(from: Span<Int32>, to: Span<Int32>) throws(KVError) -> RotaryTable {
    try requireStatic()
    guard from.count == to.count else {
      throw KVError(.shapeMismatch, "moving rows needs as many new positions as old; got \(to.count) and \(from.count)")
    }
    var table = emptyTable(rows: from.count)
    for index in from.indices {
      appendRow(to: &table, from: Int(from[index]), to: Int(to[index]), factor: 1)
    }
    return table
  }

  private func emptyTable(rows: Int) -> RotaryTable {
    var table = RotaryTable(pairs: pairs, cosines: [], sines: [])
    table.cosines.reserveCapacity(rows * pairs)
    table.sines.reserveCapacity(rows * pairs)
    return table
  }

  private func appendRow(to table: inout RotaryTable, from: Int, to: Int, factor: Float) {
    for pair in 0..<pairs {
      let (cosine, sine) = cosineAndSine(pair: pair, from: from, to: to)
      table.cosines.append(cosine * factor)
      table.sines.append(sine * factor)
    }
  }

  /// Cosine and sine of angle(to) - angle(from), each rounded to f32 once.
  func cosineAndSine(pair: Int, from: Int, to: Int) -> (Float, Float) {
    let angle = angle(position: to, pair: pair) - angle(position: from, pair: pair)
    return (Float(cos(angle)), Float(sin(angle)))
  }

  /// The angle, in radians, that the engine used for a position.
  private func angle(position: Int, pair: Int) -> Double {
    let frequency = inverseFrequencies[pair]
    return switch angleProduct.kind {
    case .f32: Double(Float(position) * frequency)
    case .f64: Double(position) * Double(frequency)
    }
  }
}
