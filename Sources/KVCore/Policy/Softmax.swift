#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// exp(x - maximum) over its sum, in place. In f64: scores of many rows are compared by their last digits.
package func softmax(_ values: inout [Float]) {
  guard let top = values.max(), top.isFinite else { return }
  var total = 0.0
  let powers = values.map { (value) -> Double in
    let power = exp(Double(value) - Double(top))
    total += power
    return power
  }
  for (index, power) in powers.enumerated() { values[index] = Float(power / total) }
}
