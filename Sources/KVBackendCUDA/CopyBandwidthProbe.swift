public import KVCore

/// How fast a card copies its own memory, read and written bytes together: what benchmarks divide by.
///
/// ```swift
/// let probe = try CopyBandwidthProbe(backend: .cuda())
/// let bytesPerSecond = probe.measure()
/// ```
public final class CopyBandwidthProbe {
  private let backend: CUDABackend
  private let source: Buffer
  private let target: Buffer
  /// Bytes one copy reads; it writes as many.
  public let byteCount: Int
  /// Copies of one measurement: enough that the call itself does not count.
  private static let copies = 8

  /// Allocates twice `byteCount` on the card.
  ///
  /// - Parameter byteCount: at least 1 MiB; several times the card's second-level cache, or the cache is measured.
  /// - Throws: `unavailable` for a backend that is no card, `invalidOption` for a smaller size, `outOfMemory`.
  public init(backend: Backend, byteCount: Int = 1 << 30) throws(KVError) {
    guard let card = backend.operations as? CUDABackend else {
      throw KVError(.unavailable, "copy bandwidth is measured on a CUDA backend; \(backend.name) is none")
    }
    guard byteCount >= 1 << 20, byteCount <= 1 << 40 else {
      throw KVError(.invalidOption, "the memory to copy must lie in 1 MiB ... 1 TiB; got \(byteCount) bytes")
    }
    self.backend = card
    self.byteCount = byteCount
    source = try card.allocate(byteCount: byteCount, hostVisible: false)
    target = try card.allocate(byteCount: byteCount, hostVisible: false)
    // The first copy pays for the pages.
    card.copy(from: source.base, to: target.base, byteCount: byteCount)
  }

  /// Bytes a second, reads and writes. O(byteCount).
  public func measure() -> Double {
    let clock = ContinuousClock()
    let start = clock.now
    for _ in 0..<Self.copies { backend.session.copy(to: target.base, from: source.base, byteCount) }
    backend.session.synchronize()
    let elapsed = start.duration(to: clock.now)
    let seconds = Double(elapsed.components.seconds) + Double(elapsed.components.attoseconds) * 1e-18
    return Double(2 * Self.copies * byteCount) / seconds
  }
}
