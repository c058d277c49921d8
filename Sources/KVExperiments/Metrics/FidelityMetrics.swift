internal import Foundation
public import KVCore

/// How far a compressed cache is from the full one. Every comparison names the measured side first and the reference
/// second; all arithmetic is f64.
public enum FidelityMetrics {
  // MARK: Vectors and tensors

  /// ‖x − r‖ / ‖r‖ over all elements. 0 when both are 0; +∞ when only the reference is.
  ///
  /// - Throws: `shapeMismatch` when the counts differ.
  public static func relativeFrobenius<A: Collection, B: Collection>(
    _ x: A, reference: B
  ) throws(KVError) -> Double
  where A.Element: BinaryFloatingPoint, B.Element: BinaryFloatingPoint {
    var accumulator = RowErrorAccumulator()
    try accumulator.add(x, reference: reference)
    return accumulator.relativeFrobenius
  }

  /// ‖x − r‖² / ‖r‖² over all elements: the mean squared error against the mean square of the reference.
  ///
  /// - Throws: `shapeMismatch` when the counts differ.
  public static func relativeMeanSquaredError<A: Collection, B: Collection>(
    _ x: A, reference: B
  ) throws(KVError) -> Double
  where A.Element: BinaryFloatingPoint, B.Element: BinaryFloatingPoint {
    let error = try relativeFrobenius(x, reference: reference)
    return error * error
  }

  /// Cosine of the angle between x and r as single vectors. 1 when both are 0, 0 when one is.
  ///
  /// - Throws: `shapeMismatch` when the counts differ.
  public static func cosine<A: Collection, B: Collection>(_ x: A, reference: B) throws(KVError) -> Double
  where A.Element: BinaryFloatingPoint, B.Element: BinaryFloatingPoint {
    var accumulator = RowErrorAccumulator()
    try accumulator.add(x, reference: reference)
    return accumulator.rowCosines.mean
  }

  /// Errors of rows of `rowLength` elements: largest and mean relative error of a row, cosines, Frobenius.
  ///
  /// - Throws: `shapeMismatch` when the counts differ or are no whole number of rows.
  public static func rowErrors<Element: BinaryFloatingPoint, Reference: BinaryFloatingPoint>(
    _ x: [Element], reference: [Reference], rowLength: Int
  ) throws(KVError) -> RowErrorAccumulator {
    try checkSameCount(x.count, reference.count)
    guard rowLength >= 1, x.count % rowLength == 0 else {
      throw KVError(.shapeMismatch, "\(x.count) elements are no whole number of rows of \(rowLength)")
    }
    var accumulator = RowErrorAccumulator()
    for start in stride(from: 0, to: x.count, by: rowLength) {
      try accumulator.add(x[start..<start + rowLength], reference: reference[start..<start + rowLength])
    }
    return accumulator
  }

  /// Reconstruction error of keys or values, row by row.
  ///
  /// - Throws: `shapeMismatch` when the shapes differ.
  public static func reconstruction(_ x: HeadTensor, reference: HeadTensor) throws(KVError) -> RowErrorAccumulator {
    guard x.shape == reference.shape else {
      throw KVError(.shapeMismatch, "a tensor of shape \(x.shape) cannot be compared with one of \(reference.shape)")
    }
    return try rowErrors(x.elements, reference: reference.elements, rowLength: x.dim)
  }

  // MARK: Distributions

  /// KL(r ‖ x) in nats: what is lost by using x in place of the reference r. Both are normalised first. +∞ when x is
  /// 0 where r is not.
  ///
  /// - Throws: `shapeMismatch` when the counts differ; `invalidOption` when a number is negative, NaN or infinite, or a
  ///   side adds to 0.
  public static func klDivergence(_ x: [Double], reference: [Double]) throws(KVError) -> Double {
    try checkSameCount(x.count, reference.count)
    let (total, referenceTotal) = (try mass(x), try mass(reference))
    var sum = 0.0
    for (x, r) in zip(x, reference) where r > 0 {
      if x == 0 { return .infinity }
      let p = r / referenceTotal
      sum += p * (log(p) - log(x / total))
    }
    return max(0, sum)
  }

  /// KL(softmax(r) ‖ softmax(x)) in nats of two logit vectors, without overflow at any size of logits. −∞ is a logit of
  /// probability 0.
  ///
  /// - Throws: `shapeMismatch` when the counts differ or are 0; `nonFinite` for NaN, +∞ or a side of −∞ only.
  public static func klDivergence<Logit: BinaryFloatingPoint>(
    logits: [Logit], reference: [Logit]
  ) throws(KVError) -> Double {
    try checkSameCount(logits.count, reference.count)
    let (x, r) = (logits.map { Double($0) }, reference.map { Double($0) })
    for side in [x, r] {
      guard side.allSatisfy({ $0 < .infinity }), side.contains(where: { $0 > -.infinity }) else {
        throw KVError(.nonFinite, "logits must be finite or −∞, and not all −∞")
      }
    }
    let normaliser = softmax(x).logSumExp
    let (weights, referenceNormaliser) = softmax(r)
    var sum = 0.0
    for index in weights.indices where weights[index] > 0 {
      if x[index] == -.infinity { return .infinity }
      sum += weights[index] * ((r[index] - referenceNormaliser) - (x[index] - normaliser))
    }
    return max(0, sum)
  }

  /// Share of the attention mass that falls on the kept positions: 1 when everything that matters was kept. A position
  /// given twice counts once.
  ///
  /// - Throws: `shapeMismatch` for a position outside the weights; `invalidOption` when a weight is negative or not
  ///   finite, or all are 0.
  public static func massRecall(weights: [Double], kept: some Sequence<Int>) throws(KVError) -> Double {
    let total = try mass(weights)
    var held = 0.0
    for position in Set(kept).sorted() {
      guard weights.indices.contains(position) else {
        throw KVError(.shapeMismatch, "position \(position) lies outside the \(weights.count) weights")
      }
      held += weights[position]
    }
    return min(1, held / total)
  }

  /// Share of the reference's k greatest entries that are among the k greatest of x; of equal entries, the lower
  /// position is the greater.
  ///
  /// - Parameter k: at least 1; no more than there are entries is used.
  /// - Throws: `shapeMismatch` when the counts differ or are 0, `invalidOption` for k below 1, `nonFinite` for NaN.
  public static func topOverlap(_ x: [Double], reference: [Double], k: Int) throws(KVError) -> Double {
    try checkSameCount(x.count, reference.count)
    guard k >= 1, !x.isEmpty else {
      throw KVError(.invalidOption, "the top \(k) of \(x.count) entries cannot be compared; k must be at least 1")
    }
    guard !x.contains(where: \.isNaN), !reference.contains(where: \.isNaN) else {
      throw KVError(.nonFinite, "entries that are NaN have no order")
    }
    let count = min(k, x.count)
    return Double(top(x, count).intersection(top(reference, count)).count) / Double(count)
  }

  // MARK: Likelihood and size

  /// exp of the mean negative log likelihood, in nats a token. +∞ where that overflows.
  ///
  /// - Throws: `invalidOption` without any number, `nonFinite` for NaN.
  public static func perplexity(negativeLogLikelihoods: [Double]) throws(KVError) -> Double {
    guard !negativeLogLikelihoods.isEmpty else {
      throw KVError(.invalidOption, "a perplexity needs the likelihood of at least one token")
    }
    guard !negativeLogLikelihoods.contains(where: \.isNaN) else {
      throw KVError(.nonFinite, "a negative log likelihood is NaN")
    }
    var accumulator = MeanAccumulator()
    for value in negativeLogLikelihoods { accumulator.add(value) }
    return exp(accumulator.mean)
  }

  /// Bits that one element of the uncompressed tensor takes in storage.
  ///
  /// - Throws: `invalidOption` for negative bytes or no elements.
  public static func bitsPerElement(bytes: Int, elements: Int) throws(KVError) -> Double {
    guard bytes >= 0, elements >= 1 else {
      throw KVError(.invalidOption, "\(bytes) bytes for \(elements) elements give no bits an element")
    }
    return Double(bytes) * 8 / Double(elements)
  }

  /// How many times smaller than 2 bytes an element (f16) the storage is. +∞ for no bytes.
  ///
  /// - Throws: as ``bitsPerElement(bytes:elements:)``.
  public static func compressionRatio(bytes: Int, elements: Int) throws(KVError) -> Double {
    16 / (try bitsPerElement(bytes: bytes, elements: elements))
  }

  private static func mass(_ weights: [Double]) throws(KVError) -> Double {
    let total = weights.reduce(0, +)
    guard weights.allSatisfy({ $0 >= 0 && $0 < .infinity }), total > 0, total < .infinity else {
      throw KVError(.invalidOption, "weights must be finite, not negative, and not all 0; they add to \(total)")
    }
    return total
  }

  private static func top(_ values: [Double], _ k: Int) -> Set<Int> {
    Set(values.indices.sorted { values[$0] != values[$1] ? values[$0] > values[$1] : $0 < $1 }.prefix(k))
  }
}
