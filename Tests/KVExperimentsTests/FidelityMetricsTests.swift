import Foundation
import KVCore
import KVExperiments
import Testing

@Suite struct FidelityMetricsTests {
  private func near(
    _ a: Double, _ b: Double, _ tolerance: Double = 1e-12,
    sourceLocation: SourceLocation = #_sourceLocation
  ) {
    #expect(abs(a - b) <= tolerance, "\(a) is not \(b)", sourceLocation: sourceLocation)
  }

  @Test func errorsOfVectors() throws {
    let x: [Float] = [3, 4]
    near(try FidelityMetrics.relativeFrobenius(x, reference: [3.0, 4.0]), 0)
    near(try FidelityMetrics.relativeFrobenius(x, reference: [0.0, 5.0]), 10.0.squareRoot() / 5)
    near(try FidelityMetrics.relativeMeanSquaredError([2.0], reference: [1.0]), 1)
    #expect(try FidelityMetrics.relativeFrobenius([1.0], reference: [0.0]) == .infinity)
    #expect(try FidelityMetrics.relativeFrobenius([0.0], reference: [0.0]) == 0)
    #expect(try FidelityMetrics.relativeFrobenius([Double](), reference: [Double]()) == 0)
    near(try FidelityMetrics.cosine([1.0, 0], reference: [1.0, 1]), 0.5.squareRoot())
    near(try FidelityMetrics.cosine([-2.0, 0], reference: [1.0, 0]), -1)
    #expect(try FidelityMetrics.cosine([0.0], reference: [0.0]) == 1)
    #expect(try FidelityMetrics.cosine([0.0], reference: [1.0]) == 0)
    expectError(.shapeMismatch, "1", "2") { try FidelityMetrics.cosine([0.0], reference: [1.0, 2]) }
  }

  @Test func errorsOfRows() throws {
    let errors = try FidelityMetrics.rowErrors([1.0, 0, 0, 3], reference: [1.0, 0, 0, 2], rowLength: 2)
    #expect(errors.rows == 2)
    near(errors.largestRowError, 0.5)
    near(errors.rowErrors.mean, 0.25)
    near(errors.relativeFrobenius, (1.0 / 5).squareRoot())
    near(errors.meanSquaredError, 0.25)
    near(errors.rowCosines.least, 1)
    expectError(.shapeMismatch, "rows of 3") { try FidelityMetrics.rowErrors([1.0], reference: [1.0], rowLength: 3) }
    expectError(.shapeMismatch) { try FidelityMetrics.rowErrors([1.0], reference: [1.0], rowLength: 0) }
    let one = try HeadTensor(heads: 1, tokens: 2, dim: 2, elements: [1, 2, 3, 4])
    #expect(try FidelityMetrics.reconstruction(one, reference: one).relativeFrobenius == 0)
    expectError(.shapeMismatch, "[1, 2, 2]") {
      try FidelityMetrics.reconstruction(
        one, reference: HeadTensor(heads: 2, tokens: 1, dim: 2, elements: [1, 2, 3, 4]))
    }
  }

  @Test func divergenceOfDistributions() throws {
    let p = [0.1, 0.2, 0.7]
    #expect(try FidelityMetrics.klDivergence(p, reference: p) == 0)
    near(try FidelityMetrics.klDivergence([0.5, 0.5], reference: [1, 0]), log(2))
    near(try FidelityMetrics.klDivergence([0.25, 0.75], reference: [0.5, 0.5]), 0.5 * log(4.0 / 3))
    near(try FidelityMetrics.klDivergence([1, 3], reference: [5, 5]), 0.5 * log(4.0 / 3))
    #expect(try FidelityMetrics.klDivergence([1, 0], reference: [0.5, 0.5]) == .infinity)
    for bad in [[0.0, 0], [1, -1], [.nan, 1], [.infinity, 1]] {
      expectError(.invalidOption, "weights") { try FidelityMetrics.klDivergence(bad, reference: [1, 1]) }
      expectError(.invalidOption, "weights") { try FidelityMetrics.klDivergence([1, 1], reference: bad) }
    }
    expectError(.shapeMismatch) { try FidelityMetrics.klDivergence([1], reference: [0.5, 0.5]) }
  }

  @Test func divergenceOfLogits() throws {
    let logits: [Float] = [1, -2, 0.5, 800]
    #expect(try FidelityMetrics.klDivergence(logits: logits, reference: logits) == 0)
    near(try FidelityMetrics.klDivergence(logits: logits.map { $0 + 64 }, reference: logits), 0)
    near(try FidelityMetrics.klDivergence(logits: [0, log(3.0)], reference: [7.0, 7]), 0.5 * log(4.0 / 3))
    // Far beyond the range of exp: the tails still count.
    near(try FidelityMetrics.klDivergence(logits: [0.0, 5000], reference: [5000.0, 0]), 5000)
    #expect(try FidelityMetrics.klDivergence(logits: [0, -Double.infinity], reference: [0, 0]) == .infinity)
    near(try FidelityMetrics.klDivergence(logits: [0.0, 0], reference: [0, -.infinity]), log(2))
    expectError(.nonFinite) { try FidelityMetrics.klDivergence(logits: [Double.nan], reference: [0]) }
    expectError(.nonFinite) { try FidelityMetrics.klDivergence(logits: [Double](), reference: []) }
    expectError(.nonFinite) { try FidelityMetrics.klDivergence(logits: [0], reference: [-Double.infinity]) }
    // Agrees with the divergence of the softmaxes, and is never negative.
    var random = SeededGenerator(seed: 3)
    for _ in 0..<200 {
      let (a, b) = ((0..<5).map { _ in random.normal() }, (0..<5).map { _ in random.normal() })
      let direct = try FidelityMetrics.klDivergence(a.map { exp($0) }, reference: b.map { exp($0) })
      near(try FidelityMetrics.klDivergence(logits: a, reference: b), direct)
      #expect(direct >= 0)
    }
  }

  @Test func recallOfMass() throws {
    near(try FidelityMetrics.massRecall(weights: [1, 2, 5], kept: [2, 0]), 0.75)
    near(try FidelityMetrics.massRecall(weights: [1, 2, 5], kept: [2, 2]), 0.625)
    #expect(try FidelityMetrics.massRecall(weights: [1, 2, 5], kept: []) == 0)
    #expect(try FidelityMetrics.massRecall(weights: [1, 2, 5], kept: 0..<3) == 1)
    expectError(.shapeMismatch, "position 3") { try FidelityMetrics.massRecall(weights: [1, 2, 5], kept: [3]) }
    expectError(.invalidOption) { try FidelityMetrics.massRecall(weights: [0, 0], kept: [0]) }
    near(try FidelityMetrics.topOverlap([5, 4, 3, 2], reference: [5, 1, 4, 2], k: 2), 0.5)
    near(try FidelityMetrics.topOverlap([1, 1, 1], reference: [3, 2, 1], k: 2), 1)
    near(try FidelityMetrics.topOverlap([1, 2], reference: [2, 1], k: 9), 1)
    expectError(.invalidOption, "k must") { try FidelityMetrics.topOverlap([1], reference: [1], k: 0) }
    expectError(.nonFinite) { try FidelityMetrics.topOverlap([.nan], reference: [1], k: 1) }
  }

  @Test func likelihoodAndSize() throws {
    near(try FidelityMetrics.perplexity(negativeLogLikelihoods: [log(2), log(8)]), 4)
    #expect(try FidelityMetrics.perplexity(negativeLogLikelihoods: [1, .infinity, 2]) == .infinity)
    expectError(.invalidOption) { try FidelityMetrics.perplexity(negativeLogLikelihoods: []) }
    expectError(.nonFinite) { try FidelityMetrics.perplexity(negativeLogLikelihoods: [.nan]) }
    #expect(try FidelityMetrics.bitsPerElement(bytes: 10, elements: 32) == 2.5)
    #expect(try FidelityMetrics.compressionRatio(bytes: 10, elements: 32) == 6.4)
    expectError(.invalidOption) { try FidelityMetrics.bitsPerElement(bytes: 1, elements: 0) }
    expectError(.invalidOption) { try FidelityMetrics.bitsPerElement(bytes: -1, elements: 1) }
  }

  @Test func welford() {
    var empty = MeanAccumulator()
    #expect(empty.mean.isNaN && empty.variance.isNaN && empty.count == 0)
    empty.merge(MeanAccumulator())
    #expect(empty.count == 0)
    var random = SeededGenerator(seed: 4)
    // A large offset, where the sum of squares would lose everything.
    let values = (0..<1000).map { _ in 1e9 + random.normal() }
    let mean = values.reduce(0) { $0 + ($1 - 1e9) } / 1000
    let variance = values.reduce(0) { $0 + ($1 - 1e9 - mean) * ($1 - 1e9 - mean) } / 999
    for split in [0, 1, 500, 1000] {
      var (a, b) = (MeanAccumulator(), MeanAccumulator())
      for value in values[..<split] { a.add(value) }
      for value in values[split...] { b.add(value) }
      a.merge(b)
      #expect(a.count == 1000)
      near(a.mean - 1e9, mean, 1e-6)
      near(a.variance, variance, 1e-6)
      near(a.standardError, (variance / 1000).squareRoot(), 1e-6)
      #expect(a.least == values.min() && a.greatest == values.max())
    }
    var infinite = MeanAccumulator()
    for value in [1, .infinity, 2] { infinite.add(value) }
    #expect(infinite.mean == .infinity && infinite.variance.isNaN && infinite.least == 1)
  }

  @Test func rowAccumulatorsMerge() throws {
    var random = SeededGenerator(seed: 6)
    var (whole, one, two) = (RowErrorAccumulator(), RowErrorAccumulator(), RowErrorAccumulator())
    for index in 0..<40 {
      let x = (0..<6).map { _ in random.normal() }
      let r = x.map { Float($0 + 0.1 * random.normal()) }
      try whole.add(x, reference: r)
      if index < 13 { try one.add(x, reference: r) } else { try two.add(x, reference: r) }
    }
    one.merge(two)
    #expect(one.rows == 40 && one.largestRowError == whole.largestRowError)
    near(one.relativeFrobenius, whole.relativeFrobenius)
    near(one.meanSquaredError, whole.meanSquaredError)
    near(one.rowCosines.mean, whole.rowCosines.mean)
  }
}
