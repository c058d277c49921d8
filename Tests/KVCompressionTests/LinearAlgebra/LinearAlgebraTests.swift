import KVBackendCPU
import KVCore
import Testing

@Suite struct LinearAlgebraTests {
  /// Values in -1 ..< 1, the same every run.
  private func numbers(_ count: Int, seed: UInt64) -> [Float] {
    var state = seed
    return (0..<count).map { _ in
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return Float(Int64(bitPattern: state) >> 40) / Float(1 << 23)
    }
  }

  @Test func productAgreesWithTheDefinition() {
    let (rows, columns, width) = (5, 7, 3)
    let a = numbers(rows * columns, seed: 1)
    let b = numbers(columns * width, seed: 2)
    let result = LinearAlgebra.product(a, b, rows: rows, columns: columns, width: width)
    let transposed = (0..<width * columns).map { b[$0 % columns * width + $0 / columns] }
    let other = LinearAlgebra.product(a, transposed, rows: rows, columns: columns, width: width, transposed: true)
    for i in 0..<rows {
      for j in 0..<width {
        let exact = (0..<columns).reduce(0.0) { $0 + Double(a[i * columns + $1]) * Double(b[$1 * width + j]) }
        #expect(abs(Double(result[i * width + j]) - exact) < 1e-6)
        #expect(abs(Double(other[i * width + j]) - exact) < 1e-6)
      }
    }
  }

  @Test(arguments: [(9, 4), (4, 4), (40, 17), (3, 8)])
  func eigenvaluesOfTheGramMatrixAreSquaredSingularValues(shape: (Int, Int)) throws {
    let (rows, columns) = shape
    let x = numbers(rows * columns, seed: 3)
    let singular = try LinearAlgebra.singularValues(x, rows: rows, columns: columns)
    let eigen = try LinearAlgebra.symmetricEigen(
      LinearAlgebra.gram(x, rows: rows, columns: columns), size: columns)
    #expect(zip(eigen.values, eigen.values.dropFirst()).allSatisfy { $0 >= $1 })
    for (index, value) in singular.enumerated() {
      #expect(abs(max(eigen.values[index], 0).squareRoot() - Double(value)) < 1e-5)
    }
    for i in 0..<columns {
      for j in 0..<columns {
        let dot = (0..<columns).reduce(0.0) { $0 + eigen.vectors[i * columns + $1] * eigen.vectors[j * columns + $1] }
        #expect(abs(dot - (i == j ? 1 : 0)) < 1e-10)
      }
    }
  }

  @Test func lowRankIsOptimalAndReportsItsError() throws {
    let (rows, columns) = (60, 12)
    let x = numbers(rows * columns, seed: 4)
    let singular = try LinearAlgebra.singularValues(x, rows: rows, columns: columns).map(Double.init)
    for rank in [1, 5, 12, 20] {
      let (latents, basis, error) = try LinearAlgebra.lowRank(x, rows: rows, columns: columns, rank: rank)
      let kept = min(rank, columns)
      let restored = LinearAlgebra.product(latents, basis, rows: rows, columns: kept, width: columns)
      let squared = zip(x, restored).reduce(0.0) { $0 + Double($1.0 - $1.1) * Double($1.0 - $1.1) }
      let optimal = singular.dropFirst(kept).reduce(0.0) { $0 + $1 * $1 }
      let norm = singular.reduce(0.0) { $0 + $1 * $1 }
      #expect(abs(squared.squareRoot() - optimal.squareRoot()) < 1e-5)
      #expect(abs(error - (optimal / norm).squareRoot()) < 1e-6)
    }
  }

  @Test func refusesWhatIsNotANumber() {
    #expect(throws: KVError.self) { try LinearAlgebra.symmetricEigen([.nan], size: 1) }
    #expect(throws: KVError.self) { try LinearAlgebra.singularValues([.infinity], rows: 1, columns: 1) }
  }

  @Test func emptyAndConstantMatricesHaveAnAnswer() throws {
    #expect(try LinearAlgebra.lowRank([0, 0, 0, 0], rows: 2, columns: 2, rank: 1).relativeError == 0)
    let ones = try LinearAlgebra.lowRank([1, 1, 1, 1, 1, 1], rows: 3, columns: 2, rank: 1)
    #expect(ones.relativeError < 1e-6)
    #expect(LinearAlgebra.product([], [], rows: 0, columns: 0, width: 4).isEmpty)
  }
}
