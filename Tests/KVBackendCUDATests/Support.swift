import CCUDAEmulation
import CKVCUDA
import KVBackendCPU
import KVCompression
import KVCore
import Testing

@testable import KVBackendCUDA

/// The backend over kernels that run thread by thread on the CPU.
func emulated() throws(KVError) -> Backend { try emulatedDevice(0) }

/// The same with cuBLAS and cuSOLVER, emulated too.
func emulatedWithLibraries() throws(KVError) -> Backend {
  try emulatedDevice(
    0, libraries: .table(cuda_emulation_libraries().assumingMemoryBound(to: ckv_cuda_libraries.self)))
}

/// - Parameters:
///   - leastSelected: scores from which on rows are chosen on the card; all of them by default.
///   - libraries: none by default, so that tests are the same where some are installed.
func emulatedDevice(
  _ device: Int, leastSelected: Int = 1, libraries: CUDALibraries = .none
) throws(KVError) -> Backend {
  Backend(
    try CUDABackend(
      driver: cuda_emulation_driver().assumingMemoryBound(to: ckv_cuda_driver.self), device: device,
      leastSelected: leastSelected, libraries: libraries))
}

/// One after the other: the emulated card is one, and what is allocated on it is counted.
@Suite(.serialized) enum CUDATests {}
