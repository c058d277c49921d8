public import KVCore

/// Mean, variance, least and greatest of a stream of numbers, by Welford's rule: one pass, no cancellation.
public struct MeanAccumulator: Hashable, Sendable {
  public private(set) var count = 0
  /// NaN before the first number.
  public var mean: Double { count == 0 ? .nan : runningMean }
  /// +∞ before the first number.
  public private(set) var least = Double.infinity
  /// −∞ before the first number.
  public private(set) var greatest = -Double.infinity
  private var runningMean = 0.0
  private var squares = 0.0

  public init() {}

  /// O(1).
  public mutating func add(_ value: Double) {
    count += 1
    least = min(least, value)
    greatest = max(greatest, value)
    guard value.isFinite, runningMean.isFinite else {
      // Infinities make the mean infinite (or NaN, of both signs) and leave no variance.
      runningMean += value
      squares = .nan
      return
    }
    let before = value - runningMean
    runningMean += before / Double(count)
    squares += before * (value - runningMean)
  }

  /// As if every number of `other` had been added; equal to that up to rounding. O(1).
  public mutating func merge(_ other: MeanAccumulator) {
    if other.count == 0 { return }
    if runningMean.isFinite, other.runningMean.isFinite {
      let total = Double(count + other.count)
      let distance = other.runningMean - runningMean
      squares += other.squares + distance * distance * Double(count) * Double(other.count) / total
      runningMean += distance * Double(other.count) / total
    } else {
      runningMean += other.runningMean
      squares = .nan
    }
    count += other.count
    least = min(least, other.least)
    greatest = max(greatest, other.greatest)
  }

  /// Unbiased, divided by count − 1; NaN below two numbers.
  public var variance: Double { count < 2 ? .nan : squares / Double(count - 1) }
  /// NaN below two numbers.
  public var standardDeviation: Double { variance.squareRoot() }
  /// Standard deviation of the mean, if the numbers are independent; NaN below two numbers.
  public var standardError: Double { (variance / Double(count)).squareRoot() }
}

/// How far rows are from reference rows, over a stream of them: attention outputs query by query, keys token by token.
public struct RowErrorAccumulator: Hashable, Sendable {
  /// Rows so far.
  public var rows: Int { rowErrors.count }
  /// Relative error ‖x − r‖ / ‖r‖ of every row; a row whose reference is 0 counts as 0 when x is 0 too, else as +∞.
  public private(set) var rowErrors = MeanAccumulator()
  /// Cosine of every row with its reference; rows of which one side is 0 count as 1 when both are, else as 0.
  public private(set) var rowCosines = MeanAccumulator()
  private var errorSquares = 0.0
  private var referenceSquares = 0.0
  private var elements = 0

  public init() {}

  /// - Throws: `shapeMismatch` when the rows differ in length.
  /// - Complexity: O(channels).
  public mutating func add<A: Collection, B: Collection>(_ row: A, reference: B) throws(KVError)
  where A.Element: BinaryFloatingPoint, B.Element: BinaryFloatingPoint {
    try checkSameCount(row.count, reference.count)
    var (error, square, other, product) = (0.0, 0.0, 0.0, 0.0)
    for (x, r) in zip(row, reference) {
      let (x, r) = (Double(x), Double(r))
      error += (x - r) * (x - r)
      square += r * r
      other += x * x
      product += x * r
    }
    errorSquares += error
    referenceSquares += square
    elements += row.count
    rowErrors.add(relativeNorm(error, square))
    rowCosines.add(cosineOf(product, other, square))
  }

  /// As if every row of `other` had been added. O(1).
  public mutating func merge(_ other: RowErrorAccumulator) {
    rowErrors.merge(other.rowErrors)
    rowCosines.merge(other.rowCosines)
    errorSquares += other.errorSquares
    referenceSquares += other.referenceSquares
    elements += other.elements
  }

  /// ‖X − R‖ / ‖R‖ over all rows; 0 before the first.
  public var relativeFrobenius: Double { relativeNorm(errorSquares, referenceSquares) }
  /// Mean of (x − r)² over all elements; NaN before the first.
  public var meanSquaredError: Double { errorSquares / Double(elements) }
  /// Greatest relative error of a row; 0 before the first.
  public var largestRowError: Double { max(0, rowErrors.greatest) }
}

/// Root of the quotient of two sums of squares; 0 / 0 is no error.
func relativeNorm(_ error: Double, _ reference: Double) -> Double {
  error == 0 ? 0 : (error / reference).squareRoot()
}

func cosineOf(_ product: Double, _ a: Double, _ b: Double) -> Double {
  if a == 0 || b == 0 { return a == b ? 1 : 0 }
  return max(-1, min(1, product / (a.squareRoot() * b.squareRoot())))
}

func checkSameCount(_ count: Int, _ reference: Int) throws(KVError) {
  guard count == reference else {
    throw KVError(.shapeMismatch, "\(count) elements cannot be compared with \(reference) of the reference")
  }
}
