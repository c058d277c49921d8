package import CKVCUDA
internal import KVCore

/// Where matrices on the card are multiplied and taken apart.
package enum CUDALibraries {
  /// cuBLAS and cuSOLVER, looked for when they are needed first.
  case installed
  case table(UnsafePointer<ckv_cuda_libraries>)
  case none

  /// The functions, or why there are none.
  func find() -> (functions: UnsafePointer<ckv_cuda_libraries>?, reason: String) {
    switch self {
    case .none: return (nil, "cuBLAS and cuSOLVER are not asked for")
    case .table(let functions): return (functions, "")
    case .installed:
      var why: UnsafePointer<CChar>?
      let functions = ckv_cuda_load_libraries(&why)
      return (functions, why.map { String(cString: $0) } ?? "")
    }
  }
}

/// cuBLAS and cuSOLVER in the context and on the stream of a session. Their handles serve one thread at a time: that of
/// `CUDABackend.exclusively`.
///
/// Matrices here are row by row, as everywhere in the library: a product is asked for as that of the transposed factors
/// in the other order.
final class CUDAAlgebra: Sendable {
  private let session: CUDASession
  /// A table of functions in static memory, and handles that the libraries allow on any thread.
  nonisolated(unsafe) private let functions: UnsafePointer<ckv_cuda_libraries>
  nonisolated(unsafe) private let blas: UnsafeMutableRawPointer
  nonisolated(unsafe) private let solver: UnsafeMutableRawPointer

  init(_ functions: UnsafePointer<ckv_cuda_libraries>, _ session: CUDASession) throws(KVError) {
    self.functions = functions
    self.session = session
    let table = functions.pointee
    var blas: UnsafeMutableRawPointer?
    var solver: UnsafeMutableRawPointer?
    do throws(KVError) {
      try CUDAAlgebra.call("cublasCreate_v2", .blas, session) { table.blas_create(&blas) }
      try CUDAAlgebra.call("cublasSetStream_v2", .blas, session) { table.blas_stream(blas, session.stream) }
      try CUDAAlgebra.call("cusolverDnCreate", .solver, session) { table.solver_create(&solver) }
      try CUDAAlgebra.call("cusolverDnSetStream", .solver, session) { table.solver_stream(solver, session.stream) }
      guard let blas, let solver else {
        throw KVError(.unavailable, "CUDA: \(String(cString: table.names)) made no handles")
      }
      self.blas = blas
      self.solver = solver
    } catch {
      CUDAAlgebra.close(table, blas, solver, session)
      throw error
    }
  }

  deinit { CUDAAlgebra.close(functions.pointee, blas, solver, session) }

  private static func close(
    _ table: ckv_cuda_libraries, _ blas: UnsafeMutableRawPointer?, _ solver: UnsafeMutableRawPointer?,
    _ session: CUDASession
  ) {
    // Handles of a lost context are lost with it.
    if let solver { try? call("cusolverDnDestroy", .solver, session) { table.solver_destroy(solver) } }
    if let blas { try? call("cublasDestroy_v2", .blas, session) { table.blas_destroy(blas) } }
  }

  private enum Library { case blas, solver }

  private static func call(
    _ name: String, _ library: Library, _ session: CUDASession, _ body: () -> Int32
  ) throws(KVError) {
    let status = try session.inContext(body)
    if status == 0 { return }
    let (text, full) =
      library == .blas
      ? (ckv_cuda_blas_status(status), CKV_CUDA_BLAS_OUT_OF_MEMORY)
      : (ckv_cuda_solver_status(status), CKV_CUDA_SOLVER_OUT_OF_MEMORY)
    let known = text.map { String(cString: $0) } ?? "a status"
    throw KVError(
      Int(status) == Int(full) ? .outOfMemory : .unavailable, "CUDA: \(name) gave \(known) (\(status))")
  }

  /// c [m][n] = (a or aᵀ)·(b or bᵀ) + beta·c, rows `lda`, `ldb` and `ldc` floats apart.
  func multiply(
    _ a: UnsafePointer<Float>, _ lda: Int, transposed aT: Bool, _ b: UnsafePointer<Float>, _ ldb: Int,
    transposed bT: Bool, m: Int, n: Int, k: Int, beta: Float = 0, into c: UnsafeMutablePointer<Float>, _ ldc: Int
  ) throws(KVError) {
    if m == 0 || n == 0 { return }
    var (one, beta) = (Float(1), beta)
    try CUDAAlgebra.call("cublasSgemm_v2", .blas, session) {
      functions.pointee.sgemm(
        blas, CUDAAlgebra.operation(bT), CUDAAlgebra.operation(aT), Int32(n), Int32(m), Int32(k), &one, b, Int32(ldb),
        a, Int32(lda), &beta, c, Int32(ldc))
    }
  }

  /// The same in f64.
  func multiply(
    _ a: UnsafePointer<Double>, _ lda: Int, transposed aT: Bool, _ b: UnsafePointer<Double>, _ ldb: Int,
    transposed bT: Bool, m: Int, n: Int, k: Int, into c: UnsafeMutablePointer<Double>, _ ldc: Int
  ) throws(KVError) {
    if m == 0 || n == 0 { return }
    var (one, zero) = (1.0, 0.0)
    try CUDAAlgebra.call("cublasDgemm_v2", .blas, session) {
      functions.pointee.dgemm(
        blas, CUDAAlgebra.operation(bT), CUDAAlgebra.operation(aT), Int32(n), Int32(m), Int32(k), &one, b, Int32(ldb),
        a, Int32(lda), &zero, c, Int32(ldc))
    }
  }

  /// The triangle of xᵀx [columns][columns] that `eigen` reads, x [rows][columns], in f64. `fresh`: nothing is there yet.
  func gramOfColumns(
    _ x: UnsafePointer<Double>, rows: Int, columns: Int, fresh: Bool, into gram: UnsafeMutablePointer<Double>
  ) throws(KVError) {
    try addGram(x, CKV_CUDA_AS_IT_IS, size: columns, sums: rows, stride: columns, fresh: fresh, into: gram)
  }

  /// That of xxᵀ [rows][rows].
  func gramOfRows(
    _ x: UnsafePointer<Double>, rows: Int, columns: Int, fresh: Bool, into gram: UnsafeMutablePointer<Double>
  ) throws(KVError) {
    try addGram(x, CKV_CUDA_TRANSPOSED, size: rows, sums: columns, stride: columns, fresh: fresh, into: gram)
  }

  private func addGram(
    _ x: UnsafePointer<Double>, _ operation: Int, size: Int, sums: Int, stride: Int, fresh: Bool,
    into gram: UnsafeMutablePointer<Double>
  ) throws(KVError) {
    if size == 0 { return }
    var (one, beta) = (1.0, fresh ? 0.0 : 1.0)
    try CUDAAlgebra.call("cublasDsyrk_v2", .blas, session) {
      functions.pointee.dsyrk(
        blas, CUDAAlgebra.triangle, Int32(operation), Int32(size), Int32(sums), &one, x, Int32(stride), &beta, gram,
        Int32(size))
    }
  }

  /// Doubles of memory that `eigen` works in.
  func eigenSize(
    _ matrix: UnsafePointer<Double>, _ values: UnsafePointer<Double>, size: Int
  ) throws(KVError) -> Int {
    var count: Int32 = 0
    try CUDAAlgebra.call("cusolverDnDsyevd_bufferSize", .solver, session) {
      functions.pointee.dsyevd_size(
        solver, Int32(CKV_CUDA_VECTORS), CUDAAlgebra.triangle, Int32(size), matrix, Int32(size), values, &count)
    }
    return Int(count)
  }

  /// Replaces a symmetric matrix by its eigenvectors, a row each, of ascending values.
  func eigen(
    _ matrix: UnsafeMutablePointer<Double>, size: Int, values: UnsafeMutablePointer<Double>,
    work: UnsafeMutablePointer<Double>, _ count: Int, info: UnsafeMutablePointer<Int32>
  ) throws(KVError) {
    try CUDAAlgebra.call("cusolverDnDsyevd", .solver, session) {
      functions.pointee.dsyevd(
        solver, Int32(CKV_CUDA_VECTORS), CUDAAlgebra.triangle, Int32(size), matrix, Int32(size), values, work,
        Int32(count), info)
    }
  }

  private static let triangle = Int32(CKV_CUDA_LOWER)

  private static func operation(_ transposed: Bool) -> Int32 {
    Int32(transposed ? CKV_CUDA_TRANSPOSED : CKV_CUDA_AS_IT_IS)
  }
}
