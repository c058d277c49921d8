internal import Synchronization

#if canImport(Accelerate)
  internal import Accelerate
#else
  internal import COpenBLAS
#endif

/// Runs `body` while BLAS stays on the thread that calls it, whoever calls it. Sections nest and may overlap on several
/// threads; OpenBLAS gets its number of threads back when the last one ends.
///
/// OpenBLAS has one number of threads for the whole process, and what it computes depends on it to the last bit. The
/// factorisations of this library cut their work into pieces of their own and run in such a section. An engine that
/// uses the same OpenBLAS, on another thread meanwhile, gets the same bits every time by doing its own products in one.
/// Accelerate decides for itself: there `body` is just called.
public func withSerialBLAS<Result: ~Copyable, Failure: Error>(
  _ body: () throws(Failure) -> Result
) throws(Failure) -> Result {
  SerialBLAS.begin()
  defer { SerialBLAS.end() }
  return try body()
}

/// The section itself, and the products done in it.
enum SerialBLAS {
  private static let users = Mutex((count: 0, threads: Int32(1)))

  static func begin() {
    #if !canImport(Accelerate)
      users.withLock { state in
        if state.count == 0 {
          state.threads = openblas_get_num_threads()
          openblas_set_num_threads(1)
        }
        state.count += 1
      }
    #endif
  }

  static func end() {
    #if !canImport(Accelerate)
      users.withLock { state in
        state.count -= 1
        if state.count == 0 { openblas_set_num_threads(state.threads) }
      }
    #endif
  }

  /// c [m][n] = (a or aᵀ)·(b or bᵀ) + beta·c, rows `lda`, `ldb` and `ldc` floats apart.
  static func multiply(
    _ a: UnsafePointer<Float>, _ lda: Int, transposed aT: Bool, _ b: UnsafePointer<Float>, _ ldb: Int,
    transposed bT: Bool, m: Int, n: Int, k: Int, beta: Float = 0, into c: UnsafeMutablePointer<Float>, _ ldc: Int
  ) {
    if m == 0 || n == 0 { return }
    cblas_sgemm(
      CblasRowMajor, aT ? CblasTrans : CblasNoTrans, bT ? CblasTrans : CblasNoTrans, Int32(m), Int32(n), Int32(k), 1, a,
      Int32(lda), b, Int32(ldb), beta, c, Int32(ldc))
  }

  /// The same in f64, added to c.
  static func add(
    _ a: UnsafePointer<Double>, _ lda: Int, transposed aT: Bool, _ b: UnsafePointer<Double>, _ ldb: Int,
    transposed bT: Bool, m: Int, n: Int, k: Int, to c: UnsafeMutablePointer<Double>, _ ldc: Int
  ) {
    if m == 0 || n == 0 || k == 0 { return }
    cblas_dgemm(
      CblasRowMajor, aT ? CblasTrans : CblasNoTrans, bT ? CblasTrans : CblasNoTrans, Int32(m), Int32(n), Int32(k), 1, a,
      Int32(lda), b, Int32(ldb), 1, c, Int32(ldc))
  }
}
