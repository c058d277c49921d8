internal import CKVCUDA
internal import KVBackendCPU
internal import KVCore

/// One matrix on the card on its way to a basis: the routes of the CPU's `Factorisation`, with Gram matrices summed in f64
/// from the start.
///
/// Nothing of a cache changes here: whatever fails, memory or a library, is thrown.
struct CUDAFactorisation {
  let backend: CUDABackend
  let algebra: CUDAAlgebra
  let options: FactorOptions
  private let workspace: CUDAWorkspace
  private let matrix: CUDAMatrix
  private let mean: [Float]
  private let rank: Int

  private var session: CUDASession { backend.session }
  private var width: Int { matrix.width }
  private var height: Int { matrix.height }
  private var blockRows: Int { min(FactorRoute.blockRows(height: height, width: width), height) }
  /// Rows, or columns of rows, that are held in f64 at a time.
  private static let widened = 1024

  init(
    _ matrix: RowMatrix, rank: Int, _ options: FactorOptions, _ algebra: CUDAAlgebra, _ backend: CUDABackend
  ) throws(KVError) {
    self.backend = backend
    self.algebra = algebra
    self.options = options
    self.rank = max(0, min(rank, matrix.height, matrix.width))
    workspace = CUDAWorkspace(backend)
    var own = try CUDAMatrix(matrix, workspace, backend)
    mean = options.centred ? try CUDAFactorisation.means(own) : []
    try own.subtract(mean)
    self.matrix = own
  }

  func run() throws(KVError) -> Factors {
    defer { withExtendedLifetime(workspace) {} }
    var factors =
      switch FactorRoute(height: height, width: width, rank: rank, options.algorithm) {
      case .gramOfRows: try gramOfRows()
      case .gramOfColumns: try gramOfColumns()
      case .randomised: try randomised()
      }
    factors.fixSigns()
    options.progress?(1)
    return factors
  }

  // MARK: Blocks of rows

  /// Calls `body` with every block of rows, in memory of the card that the next one takes.
  private func forEachBlock(
    done: Double, share: Double, _ body: (UnsafeMutablePointer<Float>, Range<Int>) throws(KVError) -> Void
  ) throws(KVError) {
    let rows = try workspace.take(blockRows * width, of: Float.self)
    try CUDAFactorisation.forEachBlock(of: matrix, rows: blockRows, in: rows) { range throws(KVError) in
      try body(rows, range)
      options.progress?(done + share * Double(range.upperBound) / Double(height))
    }
    workspace.giveBack(rows)
  }

  private static func forEachBlock(
    of matrix: CUDAMatrix, rows: Int, in memory: UnsafeMutablePointer<Float>,
    _ body: (Range<Int>) throws(KVError) -> Void
  ) throws(KVError) {
    for first in stride(from: 0, to: matrix.height, by: max(rows, 1)) {
      let range = first..<min(first + rows, matrix.height)
      try matrix.backend.exclusively { scratch throws(KVError) in try matrix.load(range, into: memory, &scratch) }
      try body(range)
    }
  }

  private static func means(_ matrix: CUDAMatrix) throws(KVError) -> [Float] {
    let rows = min(FactorRoute.blockRows(height: matrix.height, width: matrix.width), matrix.height)
    let memory = try matrix.workspace.take(rows * matrix.width, of: Float.self)
    let sums = try matrix.workspace.take(matrix.width, of: Double.self)
    try forEachBlock(of: matrix, rows: rows, in: memory) { range throws(KVError) in
      addColumns(of: memory, range, squares: false, to: sums, matrix)
    }
    let result: [Double] = try matrix.backend.fetch(sums, matrix.height == 0 ? 0 : matrix.width)
    matrix.workspace.giveBack(memory)
    matrix.workspace.giveBack(sums)
    if matrix.height == 0 { return [Float](repeating: 0, count: matrix.width) }
    return result.map { Float($0 / Double(matrix.height)) }
  }

  private static func addColumns(
    of rows: UnsafeMutablePointer<Float>, _ range: Range<Int>, squares: Bool, to sums: UnsafeMutablePointer<Double>,
    _ matrix: CUDAMatrix
  ) {
    matrix.backend.session.launch(
      .columnSums, x: gridBlocks(matrix.width), rows, UInt32(range.count), UInt32(matrix.width),
      UInt32(squares ? 1 : 0), UInt32(range.lowerBound == 0 ? 1 : 0), sums)
  }

  private func widen(
    _ rows: UnsafePointer<Float>, stride: Int, rows count: Int, columns: Int, to wide: UnsafeMutablePointer<Double>
  ) {
    session.launch(
      .widen, x: gridBlocks(count * columns), rows, UInt64(stride), UInt32(count), UInt32(columns), wide)
  }

  // MARK: Gram matrices

  private func gramOfColumns() throws(KVError) -> Factors {
    let gram = try workspace.take(width * width, of: Double.self)
    let piece = min(CUDAFactorisation.widened, blockRows)
    let wide = try workspace.take(piece * width, of: Double.self)
    try forEachBlock(done: 0, share: 0.7) { x, range throws(KVError) in
      for first in stride(from: 0, to: range.count, by: piece) {
        let rows = min(piece, range.count - first)
        widen(x + first * width, stride: width, rows: rows, columns: width, to: wide)
        try backend.exclusively { _ throws(KVError) in
          try algebra.gramOfColumns(
            wide, rows: rows, columns: width, fresh: range.lowerBound + first == 0, into: gram)
        }
      }
    }
    workspace.giveBack(wide)
    let values = try eigen(gram, size: width)
    options.progress?(0.9)
    // Vectors of the largest values are the last.
    let basis = try workspace.take(rank * width, of: Float.self)
    narrow(gram + (width - rank) * width, rows: rank, columns: width, flips: true, to: basis)
    return try factors(basis, squares: values)
  }

  private func gramOfRows() throws(KVError) -> Factors {
    let x = try workspace.take(height * width, of: Float.self)
    try backend.exclusively { scratch throws(KVError) in try matrix.load(0..<height, into: x, &scratch) }
    let gram = try workspace.take(height * height, of: Double.self)
    try self.gram(of: x, rows: height, into: gram)
    options.progress?(0.5)
    let values = try eigen(gram, size: height)
    let weights = try workspace.take(rank * height, of: Float.self)
    narrow(gram + (height - rank) * height, rows: rank, columns: height, flips: true, to: weights)
    var basis = try workspace.take(rank * width, of: Float.self)
    try product(weights, rows: rank, height, with: x, width, into: basis)
    _ = try orthonormalise(&basis, vectors: rank)
    return try factors(basis, squares: values)
  }

  /// The Gram matrix of f32 rows, in strips of columns.
  private func gram(
    of x: UnsafePointer<Float>, rows: Int, into gram: UnsafeMutablePointer<Double>
  ) throws(KVError) {
    let strip = min(CUDAFactorisation.widened, width)
    let wide = try workspace.take(rows * strip, of: Double.self)
    for first in stride(from: 0, to: width, by: strip) {
      let columns = min(strip, width - first)
      widen(x + first, stride: width, rows: rows, columns: columns, to: wide)
      try backend.exclusively { _ throws(KVError) in
        try algebra.gramOfRows(wide, rows: rows, columns: columns, fresh: first == 0, into: gram)
      }
    }
    workspace.giveBack(wide)
  }

  /// Replaces a symmetric matrix, of which a triangle is there, by its eigenvectors, and returns their values: largest
  /// last.
  private func eigen(_ matrix: UnsafeMutablePointer<Double>, size: Int) throws(KVError) -> [Double] {
    if size == 0 { return [] }
    let values = try workspace.take(size, of: Double.self)
    let info = try workspace.take(1, of: Int32.self)
    var count = 0
    try backend.exclusively { _ throws(KVError) in count = try algebra.eigenSize(matrix, values, size: size) }
    let work = try workspace.take(count, of: Double.self)
    try backend.exclusively { _ throws(KVError) in
      try algebra.eigen(matrix, size: size, values: values, work: work, count, info: info)
    }
    let found: [Double] = try backend.fetch(values, size)
    let code: [Int32] = try backend.fetch(info, 1)
    workspace.giveBack(work)
    workspace.giveBack(info)
    workspace.giveBack(values)
    guard code[0] == 0 else {
      throw KVError(.nonFinite, "the eigenvalue iteration did not converge (cusolverDnDsyevd info \(code[0]))")
    }
    guard found.allSatisfy(\.isFinite) else {
      throw KVError(.nonFinite, "a matrix of \(size) x \(size) to factor holds NaN or infinity")
    }
    return found
  }

  private func narrow(
    _ numbers: UnsafePointer<Double>, rows: Int, columns: Int, flips: Bool, to target: UnsafeMutablePointer<Float>
  ) {
    if rows * columns == 0 { return }
    session.launch(
      .narrow, x: gridBlocks(rows * columns), numbers, UInt32(rows), UInt32(columns), UInt32(flips ? 1 : 0), target)
  }

  /// a [rows][k] times b [k][columns].
  private func product(
    _ a: UnsafePointer<Float>, rows: Int, _ k: Int, with b: UnsafePointer<Float>, _ columns: Int,
    into target: UnsafeMutablePointer<Float>
  ) throws(KVError) {
    try backend.exclusively { _ throws(KVError) in
      try algebra.multiply(
        a, k, transposed: false, b, columns, transposed: false, m: rows, n: columns, k: k, into: target, columns)
    }
  }

  /// The basis as the host keeps it. `squares`: of all singular values, largest last.
  private func factors(_ basis: UnsafeMutablePointer<Float>, squares: [Double]) throws(KVError) -> Factors {
    let rows: [Float] = try backend.fetch(basis, rank * width)
    return Factors(rank: rank, width: width, basis: rows, mean: mean, squares: squares.reversed())
  }

  // MARK: Randomised

  private func randomised() throws(KVError) -> Factors {
    let finder = RangeFinder(height: height, width: width, rank: rank, options)
    let (l, sketchRows) = (finder.vectors, finder.sketchRows)
    let sketch = try workspace.take(sketchRows * width, of: Float.self)
    let energies = try workspace.take(width, of: Double.self)
    session.launch(
      .zeroRows, x: gridBlocks(sketchRows * width), sketch, UInt64(width), UInt32(sketchRows), UInt32(width))
    try forEachBlock(done: 0, share: options.passes == 0 ? 0.8 : 0.2) { x, range throws(KVError) in
      CUDAFactorisation.addColumns(of: x, range, squares: true, to: energies, matrix)
      if sketchRows == height {
        session.copy(to: sketch + range.lowerBound * width, from: x, range.count * width * 4)
      } else {
        session.launch(
          .sketch, x: gridBlocks(width), x, UInt32(range.count), UInt32(width), UInt64(range.lowerBound), options.seed,
          UInt32(sketchRows), sketch)
      }
    }
    let energy = (try backend.fetch(energies, width) as [Double]).reduce(0, +)

    // The directions of the sketch, by power iterations from random ones.
    var basis = try workspace.take(l * width, of: Float.self)
    let random = finder.normals(l * width)
    session.copy(to: basis, from: random, random.count * 4)
    let products = try workspace.take(max(sketchRows, blockRows) * l, of: Float.self)
    _ = try orthonormalise(&basis, vectors: l)
    var strengths = [Double](repeating: 0, count: l)
    for _ in 0..<3 {
      try iterate(sketch, rows: sketchRows, basis, l, products, fresh: true, into: basis)
      strengths = try orthonormalise(&basis, vectors: l)
    }
    workspace.giveBack(sketch)
    // All rows.
    for pass in 0..<options.passes {
      let next = try workspace.take(l * width, of: Float.self)
      let share = 0.75 / Double(options.passes)
      try forEachBlock(done: 0.2 + share * Double(pass), share: share) { x, range throws(KVError) in
        try iterate(x, rows: range.count, basis, l, products, fresh: range.lowerBound == 0, into: next)
      }
      workspace.giveBack(basis)
      basis = next
      strengths = try orthonormalise(&basis, vectors: l)
    }
    let rows: [Float] = try backend.fetch(basis, rank * width)
    return Factors(
      rank: rank, width: width, basis: rows, mean: mean, singularValues: strengths[..<rank].map { $0.squareRoot() },
      energy: energy)
  }

  /// target [l][n] = (x·basisᵀ)ᵀ·x, added to what is there unless it is fresh.
  private func iterate(
    _ x: UnsafePointer<Float>, rows: Int, _ basis: UnsafePointer<Float>, _ l: Int,
    _ products: UnsafeMutablePointer<Float>, fresh: Bool, into target: UnsafeMutablePointer<Float>
  ) throws(KVError) {
    let n = width
    try backend.exclusively { _ throws(KVError) in
      try algebra.multiply(
        x, n, transposed: false, basis, n, transposed: true, m: rows, n: l, k: n, into: products, l)
      try algebra.multiply(
        products, l, transposed: true, x, n, transposed: false, m: l, n: n, k: rows, beta: fresh ? 0 : 1, into: target,
        n)
    }
  }

  // MARK: Orthonormal rows

  /// Replaces rows by orthonormal ones of the same span, that of the largest singular value first; zeros where there is
  /// no direction left. Returns the singular values.
  private func orthonormalise(
    _ rows: inout UnsafeMutablePointer<Float>, vectors l: Int
  ) throws(KVError) -> [Double] {
    if l == 0 { return [] }
    let n = width
    let gram = try workspace.take(l * l, of: Double.self)
    let weights = try workspace.take(l * l, of: Float.self)
    let combined = try workspace.take(l * n, of: Float.self)
    try self.gram(of: rows, rows: l, into: gram)
    var values = try eigen(gram, size: l)
    let strongest = max(values[l - 1], 0)
    // Beyond this a direction is rounding.
    try scale(gram, size: l, by: values.map { $0 > 1e-13 * strongest && $0 > 0 ? 1 / $0.squareRoot() : 0 })
    let strengths = values.reversed().map { max($0, 0).squareRoot() }
    narrow(gram, rows: l, columns: l, flips: true, to: weights)
    try product(weights, rows: l, l, with: rows, n, into: combined)

    // The nearest orthonormal rows, in the same order.
    try self.gram(of: combined, rows: l, into: gram)
    values = try eigen(gram, size: l)
    try scale(gram, size: l, by: values.map { $0 > 1e-3 ? 1 / $0.squareRoot().squareRoot() : 0 })
    let inverse = try workspace.take(l * l, of: Double.self)
    try backend.exclusively { _ throws(KVError) in
      try algebra.multiply(gram, l, transposed: true, gram, l, transposed: false, m: l, n: l, k: l, into: inverse, l)
    }
    narrow(inverse, rows: l, columns: l, flips: false, to: weights)
    try product(weights, rows: l, l, with: combined, n, into: rows)
    workspace.giveBack(gram)
    workspace.giveBack(weights)
    workspace.giveBack(combined)
    workspace.giveBack(inverse)
    return strengths
  }

  /// Multiplies rows of a square matrix.
  private func scale(
    _ rows: UnsafeMutablePointer<Double>, size: Int, by factors: [Double]
  ) throws(KVError) {
    try backend.exclusively { scratch throws(KVError) in
      let list = try scratch.ring.bytes(size * 8, session)
      list.assumingMemoryBound(to: Double.self).update(from: factors, count: size)
      session.launch(.scaleWide, x: gridBlocks(size * size), rows, UInt32(size), UInt32(size), list)
    }
  }
}

extension CUDABackend {
  /// Copies numbers of the card to an array and waits for them. Throws what went wrong on the way to them.
  func fetch<Element: BitwiseCopyable>(_ source: UnsafePointer<Element>, _ count: Int) throws(KVError) -> [Element] {
    var result: [Element] = []
    if count > 0 {
      result = [Element](unsafeUninitializedCapacity: count) { buffer, filled in
        if let base = buffer.baseAddress {
          session.copy(to: base, from: source, count * MemoryLayout<Element>.stride)
          session.synchronize()
        }
        filled = count
      }
    }
    try session.surviving()
    return result
  }
}
