internal import Synchronization

/// Counts the bytes a backend has handed out and not got back. What a cache reports is checked against it.
public final class MemoryMeter: Sendable {
  private let live = Atomic<Int>(0)
  private let highest = Atomic<Int>(0)
  private let count = Atomic<Int>(0)

  package init() {}

  /// Bytes allocated now.
  public var liveBytes: Int { live.load(ordering: .relaxed) }
  /// Most bytes ever allocated at one time since ``resetPeak()``.
  public var peakBytes: Int { highest.load(ordering: .relaxed) }
  /// Allocations made so far: steady-state decoding must not move it.
  public var allocations: Int { count.load(ordering: .relaxed) }

  /// Starts a new peak measurement from what is allocated now.
  public func resetPeak() { highest.store(liveBytes, ordering: .relaxed) }

  package func allocated(_ bytes: Int) {
    let now = live.add(bytes, ordering: .relaxed).newValue
    count.add(1, ordering: .relaxed)
    _ = highest.max(now, ordering: .relaxed)
  }

  package func released(_ bytes: Int) { live.subtract(bytes, ordering: .relaxed) }
}

/// One allocation of a backend: host memory, or device memory that only the backend can read.
///
/// Shared by reference between a cache and its forks. Rows once written are never written again while a buffer is
/// shared, which is what makes sharing it across threads safe.
package final class Buffer: @unchecked Sendable {
  package let base: UnsafeMutableRawPointer
  package let byteCount: Int
  private let meter: MemoryMeter
  private let release: @Sendable (UnsafeMutableRawPointer) -> Void

  package init(
    base: UnsafeMutableRawPointer, byteCount: Int, meter: MemoryMeter,
    release: @escaping @Sendable (UnsafeMutableRawPointer) -> Void
  ) {
    self.base = base
    self.byteCount = byteCount
    self.meter = meter
    self.release = release
    meter.allocated(byteCount)
  }

  deinit {
    meter.released(byteCount)
    release(base)
  }
}
