#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// The running result of attention over some rows for one query: maximum logit, sum of exponentials relative to it,
/// and the values weighted by them.
///
/// Partials over disjoint rows merge into the partial over their union, in any order, which is what lets one cache
/// mix representations. The empty partial is the neutral element.
public struct Partial: Hashable, Sendable {
  /// Largest logit; minus infinity when no row was seen.
  public private(set) var maximum: Float
  /// Sum over rows of exp(logit - maximum).
  public private(set) var denominator: Float
  /// Sum over rows of exp(logit - maximum) * value.
  public private(set) var accumulator: [Float]

  /// Attention over no rows.
  public init(valueDim: Int) {
    maximum = -.infinity
    denominator = 0
    accumulator = Array(repeating: 0, count: valueDim)
  }

  public init(maximum: Float, denominator: Float, accumulator: [Float]) {
    self.maximum = maximum
    self.denominator = denominator
    self.accumulator = accumulator
  }

  /// The partial another implementation left behind as a normalised output and its log-sum-exp.
  public init(output: [Float], logSumExp: Float) {
    maximum = logSumExp
    denominator = logSumExp == -.infinity ? 0 : 1
    accumulator = logSumExp == -.infinity ? Array(repeating: 0, count: output.count) : output
  }

  /// Adds what `other` saw. O(valueDim).
  public mutating func merge(_ other: Partial) {
    precondition(
      accumulator.count == other.accumulator.count,
      "partials of \(accumulator.count) and \(other.accumulator.count) channels do not merge")
    // Minus infinity minus itself is NaN: an empty side never reaches the arithmetic.
    if other.denominator == 0 { return }
    if denominator == 0 {
      self = other
      return
    }
    let top = Swift.max(maximum, other.maximum)
    let mine = expf(maximum - top)
    let theirs = expf(other.maximum - top)
    denominator = denominator * mine + other.denominator * theirs
    for c in accumulator.indices {
      accumulator[c] = accumulator[c] * mine + other.accumulator[c] * theirs
    }
    maximum = top
  }

  /// The attention output; zeros when no row was seen.
  public var output: [Float] {
    denominator == 0 ? accumulator : accumulator.map { $0 / denominator }
  }

  /// maximum + ln(denominator).
  public var logSumExp: Float { denominator == 0 ? -.infinity : maximum + logf(denominator) }
}
