/// Pooling of scores over neighbouring rows: stride 1, same length out.
public enum Pooling: String, Sendable, Hashable, CaseIterable {
  /// Divides by the kernel always: positions beyond the ends count as 0, so that the ends are damped.
  case average = "avg"
  /// Positions beyond the ends do not count.
  case max
}

extension ScoreTable {
  /// Replaces the scores of some rows of a head by their pooled values. `kernel` is odd. O(rows · kernel).
  public mutating func pool(head: Int, rows: Range<Int>, kernel: Int, _ pooling: Pooling) {
    precondition(kernel % 2 == 1 && kernel > 0, "pooling kernel \(kernel) must be odd")
    if kernel == 1 || rows.isEmpty { return }
    let start = range(head: head).lowerBound + rows.lowerBound
    let source = Array(values[start..<start + rows.count])
    let reach = kernel / 2
    for i in source.indices {
      let window = Swift.max(0, i - reach)...Swift.min(source.count - 1, i + reach)
      switch pooling {
      case .average: values[start + i] = source[window].reduce(0, +) / Float(kernel)
      case .max: values[start + i] = source[window].reduce(-.infinity) { Swift.max($0, $1) }
      }
    }
  }
}
