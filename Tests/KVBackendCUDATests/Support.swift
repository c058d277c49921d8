import CCUDAEmulation
import CKVCUDA
import KVBackendCPU
import KVCompression
import KVCore
import Testing

@testable import KVBackendCUDA

/// The backend over kernels that run thread by thread on the CPU.
func emulated() throws(KVError) -> Backend { try emulatedDevice(0) }

/// - Parameter leastSelected: scores from which on rows are chosen on the card; all of them by default.
func emulatedDevice(_ device: Int, leastSelected: Int = 1) throws(KVError) -> Backend {
  Backend(
    try CUDABackend(
      driver: cuda_emulation_driver().assumingMemoryBound(to: ckv_cuda_driver.self), device: device,
      leastSelected: leastSelected))
}

/// One after the other: the emulated card is one, and what is allocated on it is counted.
@Suite(.serialized) enum CUDATests {}
