package import KVCore

#if canImport(Accelerate)
  internal import Accelerate
#else
  internal import COpenBLAS
#endif

/// Dense matrices through BLAS and LAPACK (OpenBLAS and LAPACKE on Linux, Accelerate on Apple), for methods that factor a
/// cache. Row-major, one row per token.
///
/// Attention itself does not go through BLAS: the kernels' own blocked product reads f16 and codes directly and is faster
/// than converting a tile for `sgemm` (Docs/notes.md has the measurement).
package enum LinearAlgebra {
  /// a [rows, columns] times b [columns, width], or times the transpose of b [width, columns].
  package static func product(
    _ a: [Float], _ b: [Float], rows: Int, columns: Int, width: Int, transposed: Bool = false
  ) -> [Float] {
    precondition(a.count == rows * columns && b.count == columns * width, "matrix sizes do not fit their shapes")
    var result = [Float](repeating: 0, count: rows * width)
    if result.isEmpty || columns == 0 { return result }
    withSerialBLAS {
      cblas_sgemm(
        CblasRowMajor, CblasNoTrans, transposed ? CblasTrans : CblasNoTrans, Int32(rows), Int32(width), Int32(columns),
        1, a, Int32(columns), b, Int32(transposed ? columns : width), 0, &result, Int32(width))
    }
    return result
  }

  /// aᵀa in f64: [columns, columns]. Sums of squares of f16-sized entries lose the small singular values in f32.
  package static func gram(_ a: [Float], rows: Int, columns: Int) -> [Double] {
    precondition(a.count == rows * columns, "\(a.count) elements for \(rows) x \(columns)")
    var result = [Double](repeating: 0, count: columns * columns)
    if rows == 0 || columns == 0 { return result }
    // A block of rows at a time, so that the widened copy stays small.
    let block = 1024
    for start in stride(from: 0, to: rows, by: block) {
      let count = min(block, rows - start)
      let wide = a[start * columns..<(start + count) * columns].map(Double.init)
      addGram(wide, rows: count, columns: columns, to: &result)
    }
    for i in 0..<columns { for j in 0..<i { result[i * columns + j] = result[j * columns + i] } }
    return result
  }

  /// Adds aᵀa to the upper triangle of `gram` [columns, columns].
  package static func addGram(_ a: [Double], rows: Int, columns: Int, to gram: inout [Double]) {
    precondition(a.count == rows * columns && gram.count == columns * columns, "matrix sizes do not fit their shapes")
    if rows == 0 || columns == 0 { return }
    withSerialBLAS {
      cblas_dsyrk(
        CblasRowMajor, CblasUpper, CblasTrans, Int32(columns), Int32(rows), 1, a, Int32(columns), 1, &gram,
        Int32(columns))
    }
  }

  /// a [rows, columns] times b [columns, width], or times the transpose of b [width, columns], in f64.
  package static func product64(
    _ a: [Double], _ b: [Double], rows: Int, columns: Int, width: Int, transposed: Bool = false
  ) -> [Double] {
    precondition(a.count == rows * columns && b.count == columns * width, "matrix sizes do not fit their shapes")
    var result = [Double](repeating: 0, count: rows * width)
    if result.isEmpty || columns == 0 { return result }
    withSerialBLAS {
      cblas_dgemm(
        CblasRowMajor, CblasNoTrans, transposed ? CblasTrans : CblasNoTrans, Int32(rows), Int32(width), Int32(columns),
        1, a, Int32(columns), b, Int32(transposed ? columns : width), 0, &result, Int32(width))
    }
    return result
  }

  /// Eigenvalues, largest first, and orthonormal eigenvectors (row i belongs to value i) of a symmetric matrix. The sign of
  /// a vector is fixed: its entry of largest magnitude is positive.
  ///
  /// - Throws: `nonFinite` when the matrix holds NaN or infinity, or the iteration does not converge.
  package static func symmetricEigen(
    _ matrix: [Double], size n: Int
  ) throws(KVError) -> (values: [Double], vectors: [Double]) {
    if n == 0 { return ([], []) }
    var work = matrix
    let values = try symmetricEigenvalues(replacing: &work, size: n)
    // LAPACK is column-major and ascending: column j of its result is row j of ours.
    var vectors = [Double](repeating: 0, count: n * n)
    for i in 0..<n {
      let source = (n - 1 - i) * n
      var largest = 0
      for c in 0..<n where abs(work[source + c]) > abs(work[source + largest]) { largest = c }
      let sign: Double = work[source + largest] < 0 ? -1 : 1
      for c in 0..<n { vectors[i * n + c] = sign * work[source + c] }
    }
    return (values, vectors)
  }

  /// Eigenvalues of a symmetric matrix, largest first. The matrix is replaced by LAPACK's eigenvectors, which ascend: row
  /// n - 1 - i belongs to value i.
  package static func symmetricEigenvalues(
    replacing matrix: inout [Double], size n: Int
  ) throws(KVError) -> [Double] {
    precondition(matrix.count == n * n, "\(matrix.count) elements for \(n) x \(n)")
    guard matrix.allSatisfy(\.isFinite) else {
      throw KVError(.nonFinite, "a matrix of \(n) x \(n) to factor holds NaN or infinity")
    }
    if n == 0 { return [] }
    var values = [Double](repeating: 0, count: n)
    let info = withSerialBLAS { dsyevd(n, &matrix, &values) }
    guard info == 0 else {
      throw KVError(.nonFinite, "the eigenvalue iteration did not converge (LAPACK info \(info))")
    }
    return values.reversed()
  }

  /// Singular values of a [rows, columns] matrix, largest first. O(rows · columns · min(rows, columns)): the oracle for
  /// cheaper factorisations.
  package static func singularValues(_ a: [Float], rows: Int, columns: Int) throws(KVError) -> [Float] {
    precondition(a.count == rows * columns, "\(a.count) elements for \(rows) x \(columns)")
    guard a.allSatisfy(\.isFinite) else {
      throw KVError(.nonFinite, "a matrix of \(rows) x \(columns) to factor holds NaN or infinity")
    }
    if a.isEmpty { return [] }
    var work = a
    var values = [Float](repeating: 0, count: min(rows, columns))
    let info = withSerialBLAS { sgesddValues(rows: columns, columns: rows, &work, &values) }
    guard info == 0 else {
      throw KVError(.nonFinite, "the singular value iteration did not converge (LAPACK info \(info))")
    }
    return values
  }

  /// A rank-`rank` approximation x ≈ latents · basis through the Gram matrix: basis [rank, columns] orthonormal rows,
  /// latents [rows, rank], and the error relative to the norm of x. Optimal to rounding.
  package static func lowRank(
    _ x: [Float], rows: Int, columns: Int, rank: Int
  ) throws(KVError) -> (latents: [Float], basis: [Float], relativeError: Double) {
    let rank = min(rank, rows, columns)
    let (values, vectors) = try symmetricEigen(gram(x, rows: rows, columns: columns), size: columns)
    let basis = vectors[..<(rank * columns)].map(Float.init)
    let total = values.reduce(0) { $0 + max($1, 0) }
    let kept = values[..<rank].reduce(0) { $0 + max($1, 0) }
    let latents = product(x, basis, rows: rows, columns: columns, width: rank, transposed: true)
    return (latents, basis, total == 0 ? 0 : (max(0, total - kept) / total).squareRoot())
  }
}

#if canImport(Accelerate)
  private func dsyevd(_ n: Int, _ matrix: inout [Double], _ values: inout [Double]) -> Int {
    var jobz = Int8(UInt8(ascii: "V"))
    var uplo = Int8(UInt8(ascii: "U"))
    var size = __CLPK_integer(n)
    var lda = size
    var workSize: __CLPK_integer = -1
    var integerSize: __CLPK_integer = -1
    var best = 0.0
    var bestInteger: __CLPK_integer = 0
    var info: __CLPK_integer = 0
    dsyevd_(
      &jobz, &uplo, &size, &matrix, &lda, &values, &best, &workSize, &bestInteger, &integerSize, &info)
    workSize = __CLPK_integer(best)
    integerSize = bestInteger
    var work = [Double](repeating: 0, count: Int(workSize))
    var integers = [__CLPK_integer](repeating: 0, count: Int(integerSize))
    dsyevd_(
      &jobz, &uplo, &size, &matrix, &lda, &values, &work, &workSize, &integers, &integerSize, &info)
    return Int(info)
  }

  private func sgesddValues(rows: Int, columns: Int, _ matrix: inout [Float], _ values: inout [Float]) -> Int {
    var jobz = Int8(UInt8(ascii: "N"))
    var m = __CLPK_integer(rows)
    var n = __CLPK_integer(columns)
    var lda = m
    var one: __CLPK_integer = 1
    var oneMore: __CLPK_integer = 1
    var workSize: __CLPK_integer = -1
    var integers = [__CLPK_integer](repeating: 0, count: 8 * min(rows, columns))
    var best: Float = 0
    var unused: Float = 0
    var info: __CLPK_integer = 0
    sgesdd_(
      &jobz, &m, &n, &matrix, &lda, &values, &unused, &one, &unused, &oneMore, &best, &workSize, &integers, &info)
    workSize = __CLPK_integer(best)
    var work = [Float](repeating: 0, count: Int(workSize))
    sgesdd_(
      &jobz, &m, &n, &matrix, &lda, &values, &unused, &one, &unused, &oneMore, &work, &workSize, &integers, &info)
    return Int(info)
  }
#else
  private func dsyevd(_ n: Int, _ matrix: inout [Double], _ values: inout [Double]) -> Int {
    Int(
      LAPACKE_dsyevd(
        LAPACK_COL_MAJOR, Int8(UInt8(ascii: "V")), Int8(UInt8(ascii: "U")), Int32(n), &matrix, Int32(n), &values))
  }

  private func sgesddValues(rows: Int, columns: Int, _ matrix: inout [Float], _ values: inout [Float]) -> Int {
    var unused: Float = 0
    var other: Float = 0
    return Int(
      LAPACKE_sgesdd(
        LAPACK_COL_MAJOR, Int8(UInt8(ascii: "N")), Int32(rows), Int32(columns), &matrix, Int32(rows), &values, &unused,
        1, &other, 1))
  }
#endif
