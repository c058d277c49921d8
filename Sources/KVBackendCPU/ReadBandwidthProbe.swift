internal import CKVKernels
public import KVCore

/// How fast this machine reads memory with the threads and kernels of a CPU backend: what benchmarks divide by.
///
/// ```swift
/// let probe = try ReadBandwidthProbe(backend: .cpu(threads: 1))
/// let bytesPerSecond = probe.measure()
/// ```
public final class ReadBandwidthProbe {
  private let backend: CPUBackend
  private let base: UnsafeMutableRawPointer
  /// Bytes one measurement reads.
  public let byteCount: Int
  /// Depends on what was read, so that reading cannot be skipped.
  public private(set) var checksum: UInt64 = 0

  /// Allocates and fills the memory that is read.
  ///
  /// - Parameter byteCount: at least 1 MiB, rounded up to whole pieces; several times the last-level cache, or the cache
  ///   is measured.
  /// - Throws: `unavailable` for a backend that is not a CPU, `invalidOption` for a smaller size.
  public init(backend: Backend, byteCount: Int = 256 << 20) throws(KVError) {
    guard let cpu = backend.operations as? CPUBackend else {
      throw KVError(.unavailable, "read bandwidth is measured on a CPU backend; \(backend.name) is none")
    }
    guard byteCount >= 1 << 20, byteCount <= 1 << 40 else {
      throw KVError(.invalidOption, "the memory to read must lie in 1 MiB ... 1 TiB; got \(byteCount) bytes")
    }
    self.backend = cpu
    self.byteCount = (byteCount + Self.piece - 1) / Self.piece * Self.piece
    base = UnsafeMutableRawPointer.allocate(byteCount: self.byteCount, alignment: 4096)
    // Written, so that every page is its own: pages that were never written share one page of zeros.
    let words = base.bindMemory(to: UInt64.self, capacity: self.byteCount / 8)
    for index in 0..<self.byteCount / 8 { words[index] = UInt64(truncatingIfNeeded: index) }
  }

  deinit { base.deallocate() }

  /// Bytes a second of one pass over the memory. O(byteCount).
  public func measure() -> Double {
    let pieces = byteCount / Self.piece
    // What the kernel returns must be used, and workers may not share a sum.
    return withUnsafeTemporaryAllocation(of: UInt64.self, capacity: pieces) { sums in
      nonisolated(unsafe) let sums = sums
      nonisolated(unsafe) let base = self.base
      let clock = ContinuousClock()
      let start = clock.now
      backend.parallel(pieces) { _, piece in
        sums[piece] = backend.kernels.pointee.read_memory!(base + piece * Self.piece, Self.piece)
      }
      let elapsed = start.duration(to: clock.now)
      for piece in 0..<pieces { checksum &+= sums[piece] }
      let seconds = Double(elapsed.components.seconds) + Double(elapsed.components.attoseconds) * 1e-18
      return Double(byteCount) / seconds
    }
  }

  /// Bytes of one piece of work.
  private static let piece = 1 << 20
}
