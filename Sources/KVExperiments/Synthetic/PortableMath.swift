/// Logarithm, exponential and sine from + − × ÷ and square root alone, which IEEE 754 rounds the same everywhere.
/// A platform's own `log` and `cos` differ in their last bits, and synthetic data must not.
enum PortableMath {
  static let ln2 = 0.693147180559945309417232121458

  /// For finite x > 0; within a few ulps.
  static func log(_ x: Double) -> Double {
    var significand = x.significand
    var exponent = Double(x.exponent)
    if significand > 1.4142135623730951 {
      significand /= 2
      exponent += 1
    }
    // log m = 2 artanh((m − 1) / (m + 1)); the argument is below 0.172, so 12 terms reach below 1e-18.
    let r = (significand - 1) / (significand + 1)
    let square = r * r
    var sum = 0.0
    for k in stride(from: 23, through: 1, by: -2) { sum = sum * square + 1 / Double(k) }
    return 2 * r * sum + exponent * ln2
  }

  /// For |x| < 700.
  static func exp(_ x: Double) -> Double {
    let n = (x / ln2).rounded(.toNearestOrEven)
    let r = x - n * ln2
    var sum = 1.0
    for k in stride(from: 16, through: 1, by: -1) { sum = 1 + r / Double(k) * sum }
    return Double(sign: .plus, exponent: Int(n), significand: 1) * sum
  }

  /// Sine and cosine of x radians; absolute error below 1e-9 for |x| below 1e6, near 1e-15 for small x.
  static func sinCos(_ x: Double) -> (sin: Double, cos: Double) {
    // π/2 in two parts, so that the reduction loses nothing for the positions a cache has.
    let n = (x * 0.6366197723675814).rounded(.toNearestOrEven)
    let r = (x - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11
    let square = r * r
    var sine = 1.0
    for k in stride(from: 18, through: 2, by: -2) { sine = 1 - square / Double(k * (k + 1)) * sine }
    sine *= r
    var cosine = 1.0
    for k in stride(from: 17, through: 1, by: -2) { cosine = 1 - square / Double(k * (k + 1)) * cosine }
    switch Int(n) & 3 {
    case 0: return (sine, cosine)
    case 1: return (cosine, -sine)
    case 2: return (-sine, -cosine)
    default: return (-cosine, sine)
    }
  }
}
