/// Rotary embedding in the half-split layout: channel c turns with channel c + d/2 by position · theta^(−2c/d).
///
/// Private to the generators; the library's own rotation is the core's. Angles are computed in f64 here.
struct HalfSplitRotation {
  private let frequencies: [Double]

  /// - Parameter theta: the base; nil for no rotation at all.
  init(dim: Int, theta: Double?) {
    guard let theta else {
      frequencies = []
      return
    }
    let logTheta = PortableMath.log(theta)
    frequencies = (0..<dim / 2).map { PortableMath.exp(-2 * Double($0) / Double(dim) * logTheta) }
  }

  /// Turns one row, in place.
  func apply(_ row: inout [Double], position: Int) {
    let half = frequencies.count
    for c in 0..<half {
      let turn = PortableMath.sinCos(Double(position) * frequencies[c])
      let (a, b) = (row[c], row[c + half])
      row[c] = a * turn.cos - b * turn.sin
      row[c + half] = a * turn.sin + b * turn.cos
    }
  }
}
