package import KVCompression

/// Which processor caches live on.
package enum BackendChoice: String, Sendable, Hashable, CaseIterable {
  case cpu
  /// The first NVIDIA card.
  case cuda

  /// - Parameter threads: of the CPU; nil: the cores there are.
  /// - Throws: `unavailable`, saying what was looked for.
  package func backend(threads: Int? = nil) throws(KVError) -> Backend {
    switch self {
    case .cpu: try .cpu(threads: threads)
    case .cuda: try .cuda()
    }
  }

  /// What its benchmark divides by.
  func probe(_ backend: Backend) throws(KVError) -> any BandwidthProbe {
    switch self {
    case .cpu: try ReadBandwidthProbe(backend: backend)
    case .cuda: try CopyBandwidthProbe(backend: backend)
    }
  }
}

/// Bytes a second that memory gives.
protocol BandwidthProbe: AnyObject {
  func measure() -> Double
}

extension ReadBandwidthProbe: BandwidthProbe {}
extension CopyBandwidthProbe: BandwidthProbe {}
