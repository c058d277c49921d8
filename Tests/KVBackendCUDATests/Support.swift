import CCUDAEmulation
import CKVCUDA
import KVBackendCPU
import KVCompression
import KVCore
import Testing

@testable import KVBackendCUDA

/// The backend over kernels that run thread by thread on the CPU.
func emulated() throws -> Backend { try emulatedDevice(0) }

func emulatedDevice(_ device: Int) throws -> Backend {
  Backend(
    try CUDABackend(driver: cuda_emulation_driver().assumingMemoryBound(to: ckv_cuda_driver.self), device: device))
}

/// One after the other: the emulated card is one, and what is allocated on it is counted.
@Suite(.serialized) enum CUDATests {}
