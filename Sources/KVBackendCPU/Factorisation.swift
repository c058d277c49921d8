internal import CKVKernels
internal import KVCore
internal import Synchronization

#if canImport(Accelerate)
  internal import Accelerate
#else
  internal import COpenBLAS
#endif

/// One matrix on its way to a basis. Rows come in blocks, so that what is needed beside them does not grow with them.
///
/// | rows T, columns n, rank r | how | cost |
/// |---|---|---|
/// | T < n, T ≤ 1024 | Gram matrix of the rows | T²n |
/// | n ≤ 1024, or r > n/4 | Gram matrix of the columns | Tn², and 9n³ for its eigenvectors |
/// | else | a sketch of 6r rows, power iterations on it, `passes` passes over the rows | 6Tnr a pass |
///
/// Sums over tokens run over at most 1024 of them in f32 and on in f64; the Gram matrix is made again in f64 where the
/// rank reaches into what f32 cannot tell from 0. The range finder squares singular values in f32: directions below 1e-3
/// of the strongest are found roughly, which is less than rounding latents to f16 costs.
struct Factorisation {
  let backend: CPUBackend
  let matrix: RowMatrix
  let rank: Int
  let options: FactorOptions
  let isParallel: Bool
  let width: Int
  let height: Int
  private let scratch: CountedScratch

  init(_ matrix: RowMatrix, rank: Int, _ options: FactorOptions, _ backend: CPUBackend, isParallel: Bool) {
    self.backend = backend
    self.matrix = matrix
    self.options = options
    self.isParallel = isParallel
    scratch = CountedScratch(backend.meter)
    width = matrix.width
    height = matrix.height
    self.rank = max(0, min(rank, height, width))
  }

  func run() -> Result<Factors, KVError> {
    defer { scratch.removeAll() }
    do throws(KVError) {
      let mean = options.centred ? columnMeans() : []
      let reader = RowReader(matrix, mean: mean, backend: backend)
      var factors =
        switch FactorRoute(height: height, width: width, rank: rank, options.algorithm) {
        case .gramOfRows: try gramOfRows(reader)
        case .gramOfColumns: try gramOfColumns(reader)
        case .randomised: try randomised(reader)
        }
      factors.fixSigns()
      options.progress?(1)
      return .success(factors)
    } catch {
      return .failure(error)
    }
  }

  // MARK: Blocks of rows

  private var blockRows: Int { FactorRoute.blockRows(height: height, width: width) }

  /// Calls `body` with every block of rows.
  private func forEachBlock(
    _ reader: RowReader, done: Double, share: Double, _ body: (UnsafeMutablePointer<Float>, Range<Int>) -> Void
  ) {
    let block = min(blockRows, max(height, 1))
    let memory = UnsafeMutablePointer<Float>.allocate(capacity: max(block * width, 1))
    scratch.add(floats: block * width)
    defer {
      memory.deallocate()
      scratch.remove(floats: block * width)
    }
    for first in stride(from: 0, to: height, by: block) {
      let range = first..<min(first + block, height)
      reader.load(range, into: memory, isParallel: isParallel)
      body(memory, range)
      options.progress?(done + share * Double(range.upperBound) / Double(height))
    }
  }

  private func each(_ items: Int, _ body: (_ worker: Int, _ item: Int) -> Void) {
    if isParallel {
      backend.parallel(items, body)
    } else {
      for item in 0..<items { body(0, item) }
    }
  }

  private func columnMeans() -> [Float] {
    let reader = RowReader(matrix, backend: backend)
    var sums = [Double](repeating: 0, count: width)
    forEachBlock(reader, done: 0, share: 0) { x, range in
      for row in 0..<range.count {
        for c in 0..<width { sums[c] += Double(x[row * width + c]) }
      }
    }
    return sums.map { Float($0 / Double(max(height, 1))) }
  }

  // MARK: Gram matrix of the columns

  /// Columns of one tile of the Gram matrix.
  private static let tile = 256
  /// Rows that are held in f64 at a time.
  private static let widened = 256

  private func gramOfColumns(_ reader: RowReader) throws(KVError) -> Factors {
    let wide = width <= Self.tile
    var (values, vectors) = try eigen(gram(reader, wide: wide, done: 0, share: 0.7), size: width)
    if !wide, rank > 0, values[rank - 1] < 1e-6 * values[0] {
      // What f32 sums leave of small directions is noise: once more, in f64.
      vectors = []
      scratch.remove(doubles: width * width)
      (values, vectors) = try eigen(gram(reader, wide: true, done: 0.7, share: 0.2), size: width)
    }
    options.progress?(0.9)
    scratch.add(floats: rank * width)
    let basis = [Float](unsafeUninitializedCapacity: rank * width) { buffer, filled in
      // LAPACK's vectors ascend.
      for i in 0..<rank {
        for c in 0..<width { buffer[i * width + c] = Float(vectors[(width - 1 - i) * width + c]) }
      }
      filled = rank * width
    }
    return Factors(rank: rank, width: width, basis: basis, mean: reader.mean, squares: values)
  }

  /// xᵀx, the upper triangle of tiles. `wide`: products in f64.
  private func gram(_ reader: RowReader, wide: Bool, done: Double, share: Double) -> [Double] {
    let n = width
    let tile = Self.tile
    let tiles = (n + tile - 1) / tile
    let pairs = (0..<tiles).flatMap { i in (i..<tiles).map { (i, $0) } }
    var gram = [Double](repeating: 0, count: n * n)
    scratch.add(doubles: n * n)
    gram.withUnsafeMutableBufferPointer { buffer in
      guard let gram = buffer.baseAddress else { return }
      let widened = wide ? UnsafeMutablePointer<Double>.allocate(capacity: Self.widened * n) : nil
      if wide { scratch.add(doubles: Self.widened * n) }
      defer {
        widened?.deallocate()
        if wide { scratch.remove(doubles: Self.widened * n) }
      }
      forEachBlock(reader, done: done, share: share) { x, range in
        let piece = wide ? Self.widened : 1024
        for first in stride(from: 0, to: range.count, by: piece) {
          let rows = min(piece, range.count - first)
          let x = x + first * n
          if let widened { for i in 0..<rows * n { widened[i] = Double(x[i]) } }
          each(pairs.count) { _, item in
            let (i, j) = pairs[item]
            let (a, b) = (i * tile, j * tile)
            let (m, k) = (min(tile, n - a), min(tile, n - b))
            let target = gram + a * n + b
            if let widened {
              SerialBLAS.add(
                widened + a, n, transposed: true, widened + b, n, transposed: false, m: m, n: k, k: rows, to: target, n)
              return
            }
            withUnsafeTemporaryAllocation(of: Float.self, capacity: m * k) { scratch in
              guard let scratch = scratch.baseAddress else { return }
              SerialBLAS.multiply(
                x + a, n, transposed: true, x + b, n, transposed: false, m: m, n: k, k: rows, into: scratch, k)
              for row in 0..<m {
                for c in 0..<k { target[row * n + c] += Double(scratch[row * k + c]) }
              }
            }
          }
        }
      }
      for i in 0..<n { for j in 0..<i { gram[i * n + j] = gram[j * n + i] } }
    }
    return gram
  }

  /// Eigenvalues, largest first, and LAPACK's eigenvectors: row n - 1 - i belongs to value i.
  private func eigen(_ matrix: consuming [Double], size n: Int) throws(KVError) -> ([Double], [Double]) {
    var vectors = matrix
    // What LAPACK's dsyevd works in.
    scratch.add(doubles: 2 * n * n)
    defer { scratch.remove(doubles: 2 * n * n) }
    let values = try LinearAlgebra.symmetricEigenvalues(replacing: &vectors, size: n)
    return (values, vectors)
  }

  // MARK: Gram matrix of the rows

  private func gramOfRows(_ reader: RowReader) throws(KVError) -> Factors {
    let (m, n) = (height, width)
    let x = UnsafeMutablePointer<Float>.allocate(capacity: max(m * n, 1))
    defer { x.deallocate() }
    scratch.add(floats: m * n + rank * (m + n))
    scratch.add(doubles: m * m)
    reader.load(0..<m, into: x, isParallel: isParallel)
    let gram = gramOfVectors(x, m)
    options.progress?(0.5)
    let (values, vectors) = try eigen(gram, size: m)
    var weights = [Float](repeating: 0, count: rank * m)
    for i in 0..<rank { for c in 0..<m { weights[i * m + c] = Float(vectors[(m - 1 - i) * m + c]) } }
    var basis = [Float](repeating: 0, count: rank * n)
    SerialBLAS.multiply(
      weights, m, transposed: false, x, n, transposed: false, m: rank, n: n, k: m, into: &basis, n)
    _ = try orthonormalise(&basis, vectors: rank)
    return Factors(rank: rank, width: n, basis: basis, mean: reader.mean, squares: values)
  }

  // MARK: Randomised

  private func randomised(_ reader: RowReader) throws(KVError) -> Factors {
    let n = width
    let finder = RangeFinder(height: height, width: width, rank: rank, options)
    let (l, sketchRows) = (finder.vectors, finder.sketchRows)
    var sketch = [Float](repeating: 0, count: sketchRows * n)
    scratch.add(floats: sketchRows * (n + l) + l * n)
    let energy = fill(&sketch, finder, reader, share: options.passes == 0 ? 0.8 : 0.2)

    // The directions of the sketch, by power iterations from random ones.
    var basis = finder.normals(l * n)
    _ = try orthonormalise(&basis, vectors: l)
    var strengths = [Double](repeating: 0, count: l)
    for _ in 0..<3 {
      var products = [Float](repeating: 0, count: sketchRows * l)
      product(of: sketch, rows: sketchRows, with: basis, l, into: &products)
      multiplyBack(products, rows: sketchRows, sketch, l, into: &basis)
      strengths = try orthonormalise(&basis, vectors: l)
    }
    sketch = []
    scratch.remove(floats: sketchRows * (n + l))
    // All rows.
    for pass in 0..<options.passes {
      let before = basis
      basis = [Float](repeating: 0, count: l * n)
      let products = min(blockRows, height) * l
      scratch.add(floats: l * n + products)
      defer { scratch.remove(floats: l * n + products) }
      let share = 0.75 / Double(options.passes)
      basis.withUnsafeMutableBufferPointer { target in
        guard let target = target.baseAddress else { return }
        let products = UnsafeMutablePointer<Float>.allocate(capacity: max(products, 1))
        defer { products.deallocate() }
        forEachBlock(reader, done: 0.2 + share * Double(pass), share: share) { x, range in
          product(of: x, rows: range.count, with: before, l, into: products)
          multiplyBack(products, rows: range.count, x, l, beta: 1, into: target)
        }
      }
      strengths = try orthonormalise(&basis, vectors: l)
    }
    basis.removeLast((l - rank) * n)
    return Factors(
      rank: rank, width: n, basis: basis, mean: reader.mean,
      singularValues: strengths[..<rank].map { $0.squareRoot() }, energy: energy)
  }

  /// Every row, with a sign, added to a row of the sketch; the rows themselves where there are no more of them. Returns
  /// the sum of the squares of all elements.
  private func fill(
    _ sketch: inout [Float], _ finder: RangeFinder, _ reader: RowReader, share: Double
  ) -> Double {
    let n = width
    let copies = finder.sketchRows == height
    let strip = 256
    let strips = (n + strip - 1) / strip
    var energies = [Double](repeating: 0, count: strips)
    sketch.withUnsafeMutableBufferPointer { sketch in
      energies.withUnsafeMutableBufferPointer { energies in
        guard let sketch = sketch.baseAddress, let energies = energies.baseAddress else { return }
        forEachBlock(reader, done: 0, share: share) { x, range in
          each(strips) { _, item in
            let first = item * strip
            let count = min(strip, n - first)
            for row in 0..<range.count {
              let source = x + row * n + first
              let (target, sign) =
                copies ? (range.lowerBound + row, 1) : finder.place(row: range.lowerBound + row)
              backend.kernels.pointee.axpy!(sketch + target * n + first, source, sign, count)
              energies[item] += Double(backend.kernels.pointee.dot!(source, source, count))
            }
          }
        }
      }
    }
    return energies.reduce(0, +)
  }

  /// x·basisᵀ, [rows][l].
  private func product(
    of x: UnsafePointer<Float>, rows: Int, with basis: [Float], _ l: Int, into target: UnsafeMutablePointer<Float>
  ) {
    let n = width
    each((rows + 255) / 256) { _, item in
      let first = item * 256
      SerialBLAS.multiply(
        x + first * n, n, transposed: false, basis, n, transposed: true, m: min(256, rows - first), n: l, k: n,
        into: target + first * l, l)
    }
  }

  /// productsᵀ·x, [l][n], plus `beta` times what is there.
  private func multiplyBack(
    _ products: UnsafePointer<Float>, rows: Int, _ x: UnsafePointer<Float>, _ l: Int, beta: Float = 0,
    into target: UnsafeMutablePointer<Float>
  ) {
    let n = width
    each((n + 255) / 256) { _, item in
      let first = item * 256
      SerialBLAS.multiply(
        products, l, transposed: true, x + first, n, transposed: false, m: l, n: min(256, n - first), k: rows,
        beta: beta, into: target + first, n)
    }
  }

  // MARK: Orthonormal rows

  /// Replaces rows by orthonormal ones of the same span, that of the largest singular value first; zeros where there is
  /// no direction left. Returns the singular values.
  private func orthonormalise(_ rows: inout [Float], vectors l: Int) throws(KVError) -> [Double] {
    let n = width
    // The Gram matrix, weights and a copy of the rows.
    scratch.add(doubles: 3 * l * l)
    scratch.add(floats: l * l + l * n)
    defer {
      scratch.remove(doubles: 3 * l * l)
      scratch.remove(floats: l * l + l * n)
    }
    var (values, vectors) = try eigen(gramOfVectors(rows, l), size: l)
    let strongest = max(values.first ?? 0, 0)
    var weights = [Float](repeating: 0, count: l * l)
    // Beyond this a direction is rounding.
    for i in 0..<l where values[i] > 1e-13 * strongest && values[i] > 0 {
      let scale = 1 / values[i].squareRoot()
      for c in 0..<l { weights[i * l + c] = Float(vectors[(l - 1 - i) * l + c] * scale) }
    }
    let strengths = values.map { max($0, 0).squareRoot() }
    combine(&rows, weights, l)

    // The nearest orthonormal rows, in the same order.
    (values, vectors) = try eigen(gramOfVectors(rows, l), size: l)
    weights = [Float](repeating: 0, count: l * l)
    var scaled = vectors
    for i in 0..<l {
      let scale = values[l - 1 - i] > 1e-3 ? 1 / values[l - 1 - i].squareRoot().squareRoot() : 0
      for c in 0..<l { scaled[i * l + c] *= scale }
    }
    var inverse = [Double](repeating: 0, count: l * l)
    SerialBLAS.add(scaled, l, transposed: true, scaled, l, transposed: false, m: l, n: l, k: l, to: &inverse, l)
    for i in weights.indices { weights[i] = Float(inverse[i]) }
    combine(&rows, weights, l)
    precondition(rows.count == l * n, "\(rows.count) elements for \(l) rows of \(n)")
    return strengths
  }

  /// The products of l rows with each other.
  private func gramOfVectors(_ rows: UnsafePointer<Float>, _ l: Int) -> [Double] {
    let n = width
    var gram = [Double](repeating: 0, count: l * l)
    let strip = 512
    withUnsafeTemporaryAllocation(of: Double.self, capacity: max(l * min(strip, n), 1)) { wide in
      guard let wide = wide.baseAddress else { return }
      for first in stride(from: 0, to: n, by: strip) {
        let count = min(strip, n - first)
        for row in 0..<l { for c in 0..<count { wide[row * count + c] = Double(rows[row * n + first + c]) } }
        SerialBLAS.add(
          wide, count, transposed: false, wide, count, transposed: true, m: l, n: l, k: count, to: &gram, l)
      }
    }
    return gram
  }

  /// rows = weights·rows.
  private func combine(_ rows: inout [Float], _ weights: [Float], _ l: Int) {
    let n = width
    let source = rows
    rows.withUnsafeMutableBufferPointer { buffer in
      guard let target = buffer.baseAddress else { return }
      each((n + 255) / 256) { _, item in
        let first = item * 256
        source.withUnsafeBufferPointer { source in
          guard let source = source.baseAddress else { return }
          SerialBLAS.multiply(
            weights, l, transposed: false, source + first, n, transposed: false, m: l, n: min(256, n - first), k: l,
            into: target + first, n)
        }
      }
    }
  }
}

/// Memory of a factorisation beside the cache, counted where the cache's is: it is there at the peak.
private final class CountedScratch: Sendable {
  private let meter: MemoryMeter
  private let held = Atomic<Int>(0)

  init(_ meter: MemoryMeter) { self.meter = meter }

  func add(floats: Int) { add(floats * MemoryLayout<Float>.stride) }
  func add(doubles: Int) { add(doubles * MemoryLayout<Double>.stride) }
  func remove(floats: Int) { add(-floats * MemoryLayout<Float>.stride) }
  func remove(doubles: Int) { add(-doubles * MemoryLayout<Double>.stride) }
  func removeAll() { add(-held.load(ordering: .relaxed)) }

  private func add(_ bytes: Int) {
    held.add(bytes, ordering: .relaxed)
    if bytes >= 0 { meter.allocated(bytes) } else { meter.released(-bytes) }
  }
}
