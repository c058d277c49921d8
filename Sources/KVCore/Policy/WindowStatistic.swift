/// What the softmax rows of the last queries say of a cached row, one number per query head before the heads of a group
/// are reduced. The rows of a window of 1 are the last row itself.
public enum WindowStatistic: Sendable, Hashable {
  /// Summed over the queries (SnapKV).
  case sum
  /// The mean over the queries plus `gamma` times their variance, which divides by one less than the queries (CAKE).
  case meanVariance(gamma: Float)
  /// The largest over the queries.
  case max
  /// How many queries gave the row less than its even share, 1 / the live rows they see (Scissorhands). Queries that do
  /// not see the row do not count.
  case belowEvenShare
}

/// What the softmax rows of the last queries say of a layer as a whole. Only rows older than the window count.
public struct WindowTotals: Sendable, Hashable {
  /// The sum of -p ln(p + 1e-10) over query heads, queries and rows.
  public var entropy: Double
  /// The sum over query heads and rows of the variance over the queries, which divides by one less than the queries; 0
  /// for a window of one.
  public var variance: Double

  public init(entropy: Double = 0, variance: Double = 0) {
    self.entropy = entropy
    self.variance = variance
  }
}
