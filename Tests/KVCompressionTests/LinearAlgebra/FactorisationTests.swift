import KVBackendCPU
import KVCore
import Testing

/// Bases from cached rows, against the full singular value decomposition.
@Suite struct FactorisationTests {
  /// A matrix with memory of its own, in column blocks of `dim`.
  final class Held {
    let elements: [Float]
    let rows: Int
    let width: Int
    private var memory: [UnsafeMutablePointer<Float>] = []
    private(set) var matrix: RowMatrix

    init(
      _ elements: [Float], rows: Int, width: Int, dim: Int, rotary: RotaryEmbedding? = nil, positions: [Int32]? = nil
    ) {
      self.elements = elements
      self.rows = rows
      self.width = width
      matrix = RowMatrix(rows: rows, columns: [])
      for first in stride(from: 0, to: width, by: dim) {
        let count = min(dim, width - first)
        let block = UnsafeMutablePointer<Float>.allocate(capacity: max(rows * count, 1))
        for row in 0..<rows { for c in 0..<count { block[row * count + c] = elements[row * width + first + c] } }
        memory.append(block)
        let run = RowRun(encoding: .dense(.f32), dim: count, capacity: rows, base: block)
        // Two slices, so that blocks of rows cross their seam.
        let cut = rows / 3
        matrix.columns.append(
          RowMatrix.Columns(
            slices: [RunSlice(run: run, first: 0, count: cut), RunSlice(run: run, first: cut, count: rows - cut)],
            dim: count, positions: positions, rotary: rotary))
      }
    }

    deinit { for block in memory { block.deallocate() } }
  }

  /// Sums of products with weights that fall like 1/(i + 1)^decay.
  static func matrix(_ rows: Int, _ width: Int, directions: Int, decay: Double, seed: UInt64) -> [Float] {
    var dice = Dice(seed)
    let left = dice.normals(rows * directions)
    var right = dice.normals(directions * width)
    for i in 0..<directions {
      var weight = 1.0
      for _ in 0..<Int(decay * 2) { weight /= Double(i + 1).squareRoot() }
      for c in 0..<width { right[i * width + c] *= Float(weight) }
    }
    return LinearAlgebra.product(left, right, rows: rows, columns: directions, width: width)
  }

  static func residual(_ held: Held, _ factors: Factors) -> Double {
    let x = held.elements
    let a = LinearAlgebra.product(
      x, factors.basis, rows: held.rows, columns: held.width, width: factors.rank, transposed: true)
    let back = LinearAlgebra.product(a, factors.basis, rows: held.rows, columns: factors.rank, width: held.width)
    return zip(x, back).reduce(0.0) { $0 + Double($1.0 - $1.1) * Double($1.0 - $1.1) }.squareRoot()
  }

  /// Rows of length 1, or 0 where there was no direction left, at right angles.
  static func checkOrthonormal(_ factors: Factors) {
    for i in 0..<factors.rank {
      for j in i..<factors.rank {
        var dot = 0.0
        for c in 0..<factors.width {
          dot += Double(factors.basis[i * factors.width + c]) * Double(factors.basis[j * factors.width + c])
        }
        let right = abs(dot) < 1e-5 || i == j && abs(dot - 1) < 1e-5
        check(right, "rows \(i) and \(j) of the basis: \(dot)")
      }
    }
  }

  @Test func errorIsTheTailOfTheSpectrum() throws {
    let backend = try CPUBackend(threads: 2)
    withEvery("shape", in: [(120, 40), (40, 130), (32, 32), (5, 9), (1, 4), (9, 1)]) { shape in
      withEvery("decay", in: [0.0, 1, 2]) { decay in
        let (rows, width) = shape
        let held = Held(
          Self.matrix(rows, width, directions: min(rows, width), decay: decay, seed: 5), rows: rows, width: width,
          dim: 37)
        let singular = try LinearAlgebra.singularValues(held.elements, rows: rows, columns: width).map(Double.init)
        withEvery("rank", in: [1, 3, min(rows, width) / 2, min(rows, width), 1000]) { rank in
          for (algorithm, slack) in [(FactorOptions.Algorithm.automatic, 1.0001), (.gram, 1.0001), (.randomised, 1.05)]
          {
            var options = FactorOptions()
            options.algorithm = algorithm
            let factors = try backend.factor([held.matrix], ranks: [rank], options: options)[0]
            let kept = min(rank, rows, width)
            check(factors.rank == kept && factors.basis.count == kept * width, "rank \(factors.rank)")
            let optimal = singular.dropFirst(kept).reduce(0) { $0 + $1 * $1 }.squareRoot()
            let error = Self.residual(held, factors)
            // The range finder squares singular values in f32: below 1e-3 of the largest it sees little.
            let floor = algorithm == .randomised ? 3e-3 : 1e-5
            check(
              error <= optimal * slack + floor * (singular.first ?? 0), "\(algorithm): \(error), optimal \(optimal)")
            Self.checkOrthonormal(factors)
            if algorithm == .gram {
              let norm = singular.reduce(0) { $0 + $1 * $1 }.squareRoot()
              check(abs(factors.relativeError - optimal / norm) < 1e-3, "relative error \(factors.relativeError)")
            }
          }
        }
      }
    }
  }

  /// Above 1024 columns a small share of them goes through the range finder.
  @Test func largeWidthsAreWithinOnePercent() throws {
    let (rows, width, rank) = (700, 1100, 64)
    let held = Held(
      Self.matrix(rows, width, directions: 500, decay: 0.5, seed: 6), rows: rows, width: width, dim: 128)
    let backend = try CPUBackend(threads: 2)
    let found = try backend.factor([held.matrix], ranks: [rank], options: FactorOptions())[0]
    var options = FactorOptions()
    options.algorithm = .gram
    let best = try backend.factor([held.matrix], ranks: [rank], options: options)[0]
    let ratio = Self.residual(held, found) / Self.residual(held, best)
    #expect(ratio < 1.01 && ratio > 0.9999, "\(ratio) of the best")
    Self.checkOrthonormal(found)
  }

  @Test func zeroConstantAndRankDeficientMatrices() throws {
    let backend = try CPUBackend(threads: 1)
    withEvery("algorithm", in: [FactorOptions.Algorithm.automatic, .gram, .randomised]) { algorithm in
      var options = FactorOptions()
      options.algorithm = algorithm
      let zero = Held(Array(repeating: 0, count: 30 * 8), rows: 30, width: 8, dim: 8)
      let none = try backend.factor([zero.matrix], ranks: [3], options: options)[0]
      check(none.rank == 3 && none.basis.allSatisfy(\.isFinite) && none.relativeError == 0, "\(none)")
      let constant = Held(Array(repeating: 2.5, count: 30 * 8), rows: 30, width: 8, dim: 8)
      check(Self.residual(constant, try backend.factor([constant.matrix], ranks: [1], options: options)[0]) < 1e-4, "")
      let three = Held(Self.matrix(50, 20, directions: 3, decay: 0, seed: 7), rows: 50, width: 20, dim: 10)
      let factors = try backend.factor([three.matrix], ranks: [5], options: options)[0]
      check(Self.residual(three, factors) < 1e-3, "rank 5 of a matrix of rank 3: \(Self.residual(three, factors))")
      check(factors.basis.allSatisfy(\.isFinite), "not finite")
    }
    #expect(throws: KVError.self) {
      let bad = Held([.nan, 1, 2, 3], rows: 2, width: 2, dim: 2)
      _ = try backend.factor([bad.matrix], ranks: [1], options: FactorOptions())
    }
  }

  @Test func sameBitsAtAnyThreadCount() throws {
    withEvery("width", in: [48, 300]) { width in
      withEvery("algorithm", in: [FactorOptions.Algorithm.gram, .randomised]) { algorithm in
        var options = FactorOptions()
        options.algorithm = algorithm
        options.seed = 3
        let held = Held(
          Self.matrix(900, width, directions: 40, decay: 1, seed: 8), rows: 900, width: width, dim: 16)
        let results = try [1, 2, 3].map { threads in
          try CPUBackend(threads: threads).factor([held.matrix, held.matrix], ranks: [9, 4], options: options)
        }
        for other in results.dropFirst() {
          for (a, b) in zip(results[0], other) { checkSame(a.basis, b.basis, "basis of width \(width)") }
        }
      }
    }
  }

  /// Rotated rows are read back as they were before, wherever their positions are.
  @Test(arguments: [RotaryEmbedding.Layout.halfSplit, .interleaved])
  func rowsAreTurnedBack(layout: RotaryEmbedding.Layout) throws {
    let (rows, dim, rank) = (700, 12, 2)
    let rotary = try RotaryEmbedding(headDim: dim, rotaryDim: 8, layout: layout, angleProduct: .f64)
    let plain = Self.matrix(rows, dim, directions: 2, decay: 0, seed: 9)
    let positions = (0..<Int32(rows)).map { (row: Int32) -> Int32 in row < 300 ? row : row < 500 ? 3 * row : 900 * row }
    var turned = plain
    var span = turned.mutableSpan
    try rotary.rotate(&span, stride: dim, positions: positions.span)
    let held = Held(turned, rows: rows, width: dim, dim: dim, rotary: rotary, positions: positions)
    let backend = try CPUBackend(threads: 1)
    let factors = try backend.factor([held.matrix], ranks: [rank], options: FactorOptions())[0]
    #expect(factors.relativeError < 1e-4, "two directions before rotation, \(factors.relativeError) left")

    let latents = UnsafeMutablePointer<Float>.allocate(capacity: rows * rank)
    let basis = UnsafeMutablePointer<Float>.allocate(capacity: rank * dim)
    defer {
      latents.deallocate()
      basis.deallocate()
    }
    for i in 0..<rank * dim { basis[i] = factors.basis[i] }
    let slice = RunSlice(
      run: RowRun(encoding: .dense(.f32), dim: rank, capacity: rows, base: latents), first: 0, count: rows)
    let result = backend.project([
      Projection(matrix: held.matrix, encoder: factors.basis, mean: [], targets: [slice])
    ])[0]
    #expect(abs(result.energy - result.kept) < 1e-4 * result.energy)
    var back = [Float](repeating: 0, count: rows * dim)
    back.withUnsafeMutableBufferPointer {
      backend.restore(
        [slice], basis: RowRun(encoding: .dense(.f32), dim: dim, capacity: rank, base: basis), mean: nil,
        positions: positions, rotary: rotary, into: $0.baseAddress!)
    }
    let worst = zip(back, turned).map { abs($0 - $1) }.max() ?? 0
    #expect(worst < 1e-4, "restored and turned again: off by \(worst)")
  }

  /// Rows that stand before the others count like them.
  @Test func leadingRows() throws {
    let (rows, width) = (40, 10)
    let all = Self.matrix(rows, width, directions: 10, decay: 1, seed: 10)
    let held = Held(Array(all[(15 * width)...]), rows: rows - 15, width: width, dim: 4)
    var matrix = held.matrix
    matrix.leading = Array(all[..<(15 * width)])
    let backend = try CPUBackend(threads: 1)
    let whole = Held(all, rows: rows, width: width, dim: 4)
    let a = try backend.factor([matrix], ranks: [4], options: FactorOptions())[0]
    let b = try backend.factor([whole.matrix], ranks: [4], options: FactorOptions())[0]
    #expect(zip(a.basis, b.basis).allSatisfy { abs($0 - $1) < 1e-5 })
    #expect(abs(a.relativeError - b.relativeError) < 1e-9)
  }

  @Test func progressAscendsToOne() throws {
    let held = Held(Self.matrix(3000, 300, directions: 20, decay: 1, seed: 11), rows: 3000, width: 300, dim: 300)
    for algorithm in [FactorOptions.Algorithm.gram, .randomised] {
      let log = Progress()
      var options = FactorOptions()
      options.algorithm = algorithm
      options.progress = { log.append($0) }
      _ = try CPUBackend(threads: 1).factor([held.matrix], ranks: [4], options: options)
      let shares = log.shares
      #expect(shares.count > 2 && shares.last == 1 && zip(shares, shares.dropFirst()).allSatisfy { $0 <= $1 })
    }
  }

  private final class Progress: @unchecked Sendable {
    private(set) var shares: [Double] = []
    func append(_ share: Double) { shares.append(share) }
  }
}
