package import KVCompression

/// Which processor caches live on.
package enum BackendChoice: String, Sendable, Hashable, CaseIterable {
  case cpu
  /// With products of bf16.
  case cpuBF16 = "cpu-bf16"
  /// The first NVIDIA card.
  case cuda

  /// - Parameter threads: of the CPU; nil: the cores there are.
  /// - Throws: `unavailable`, saying what was looked for.
  package func backend(threads: Int? = nil) throws(KVError) -> Backend {
    switch self {
    case .cpu: try .cpu(threads: threads)
    case .cpuBF16: try .cpu(threads: threads, products: .bf16)
    case .cuda: try .cuda()
    }
  }

  /// How far its attention may be from that of the portable kernels, in relation to its length. Outputs of random values
  /// mostly cancel, what rounding weights to eight bits costs does not.
  var tolerance: Double { self == .cpuBF16 ? 0x1p-5 : 1e-4 }

  /// What its benchmark divides by.
  func probe(_ backend: Backend) throws(KVError) -> any BandwidthProbe {
    switch self {
    case .cpu, .cpuBF16: try ReadBandwidthProbe(backend: backend)
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
