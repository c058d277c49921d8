internal import CKVCUDA
internal import KVCore
internal import Synchronization

/// One context and stream of one card, its kernels, and the driver's errors as ours.
///
/// Work is queued on the stream in the order of the calls; `synchronize` waits for it.
final class CUDASession: Sendable {
  /// A table of functions in static memory, and a handle that the driver allows on any thread.
  nonisolated(unsafe) private let driver: UnsafePointer<ckv_cuda_driver>
  nonisolated(unsafe) private let handle: UnsafeMutableRawPointer
  nonisolated(unsafe) private let kernels: [CUDAKernel: UnsafeMutableRawPointer]
  let card: String
  let capability: Int
  /// The first error of a call that had nobody to tell. A card's context is lost after one; later calls say so.
  private let failure = Mutex<KVError?>(nil)

  init(
    _ driver: UnsafePointer<ckv_cuda_driver>, device: Int, context: UnsafeMutableRawPointer?,
    stream: UnsafeMutableRawPointer?
  ) throws(KVError) {
    self.driver = driver
    var handle: UnsafeMutableRawPointer?
    try CUDASession.check(
      driver, driver.pointee.open(Int32(device), context, stream, &handle), "opening device \(device)")
    guard let handle else { throw KVError(.unavailable, "the CUDA driver opened device \(device) without a context") }
    self.handle = handle

    var kernels: [CUDAKernel: UnsafeMutableRawPointer] = [:]
    var capability: Int32 = 0
    var memory = 0
    var name = [CChar](repeating: 0, count: 256)
    do throws(KVError) {
      try CUDASession.check(
        driver, driver.pointee.describe(handle, &name, name.count, &capability, &memory), "describing the card")
      guard capability >= 80 else {
        throw KVError(
          .unavailable,
          "kernels are built for compute capability 8.0 and later; device \(device) has \(Double(capability) / 10)")
      }
      for (module, members) in CUDAKernel.modules {
        guard let text = ckv_cuda_ptx(module) else {
          throw KVError(.unavailable, "this build carries no CUDA module \(module)")
        }
        var loaded: UnsafeMutableRawPointer?
        try CUDASession.check(driver, driver.pointee.load(handle, text, &loaded), "loading the module \(module)")
        for kernel in members {
          var function: UnsafeMutableRawPointer?
          try CUDASession.check(
            driver, driver.pointee.function(handle, loaded, kernel.rawValue, &function), "finding \(kernel.rawValue)")
          kernels[kernel] = function
        }
      }
    } catch {
      driver.pointee.close(handle)
      throw error
    }
    self.kernels = kernels
    self.capability = Int(capability)
    card = String(decoding: name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  deinit { driver.pointee.close(handle) }

  private static func check(
    _ driver: UnsafePointer<ckv_cuda_driver>, _ code: Int32, _ call: @autoclosure () -> String
  ) throws(KVError) {
    if code == 0 { return }
    let name = driver.pointee.error_name(code).map { String(cString: $0) } ?? "error \(code)"
    throw KVError(code == 2 ? .outOfMemory : .unavailable, "CUDA: \(call()) gave \(name)")
  }

  // MARK: Calls that can say no

  func allocate(_ bytes: Int) throws(KVError) -> UnsafeMutableRawPointer {
    try surviving()
    var address: UInt64 = 0
    try CUDASession.check(
      driver, driver.pointee.allocate(handle, max(bytes, 256), &address), "allocating \(bytes) bytes of device memory")
    guard let base = UnsafeMutableRawPointer(bitPattern: UInt(address)) else {
      throw KVError(.outOfMemory, "CUDA: allocating \(bytes) bytes gave no address")
    }
    return base
  }

  func allocateHost(_ bytes: Int) throws(KVError) -> UnsafeMutableRawPointer {
    try surviving()
    var address: UnsafeMutableRawPointer?
    try CUDASession.check(
      driver, driver.pointee.allocate_host(handle, max(bytes, 256), &address),
      "allocating \(bytes) bytes of pinned memory")
    guard let address else { throw KVError(.outOfMemory, "CUDA: allocating \(bytes) pinned bytes gave no address") }
    return address
  }

  /// The error of an earlier call that could not throw.
  func surviving() throws(KVError) {
    if let error = failure.withLock({ $0 }) { throw error }
  }

  // MARK: Calls whose failure is kept

  private func keep(_ code: Int32, _ call: @autoclosure () -> String) {
    do throws(KVError) {
      try CUDASession.check(driver, code, call())
    } catch {
      record(error)
    }
  }

  /// Keeps an error for the next call that can throw.
  func record(_ error: KVError) { failure.withLock { if $0 == nil { $0 = error } } }

  func release(_ base: UnsafeMutableRawPointer) {
    keep(driver.pointee.release(handle, UInt64(UInt(bitPattern: base))), "releasing device memory")
  }

  func releaseHost(_ base: UnsafeMutableRawPointer) {
    keep(driver.pointee.release_host(handle, base), "releasing pinned memory")
  }

  func copy(to target: UnsafeMutableRawPointer, from source: UnsafeRawPointer, _ bytes: Int) {
    if bytes == 0 { return }
    keep(
      driver.pointee.copy(handle, UInt64(UInt(bitPattern: target)), UInt64(UInt(bitPattern: source)), bytes),
      "copying \(bytes) bytes")
  }

  /// Queues a kernel. `arguments` are copied by the driver before the call returns.
  func launch(_ kernel: CUDAKernel, x: Int, y: Int = 1, _ arguments: inout [UnsafeMutableRawPointer?]) {
    if x == 0 || y == 0 { return }
    keep(
      driver.pointee.launch(
        handle, kernels[kernel], UInt32(x), UInt32(y), UInt32(KV_THREADS), &arguments),
      "launching \(kernel.rawValue)")
  }

  func synchronize() { keep(driver.pointee.synchronize(handle), "waiting for the stream") }

  /// Whether kernels can read and write there: device, managed or pinned memory.
  func accessible(_ address: UnsafeRawPointer) -> Bool { driver.pointee.accessible(handle, address) }
}

/// The kernels, by the names they have in the sources.
enum CUDAKernel: String {
  case attend = "kv_attend"
  case finish = "kv_finish"
  case statistics = "kv_statistics"
  case window = "kv_window"
  case nonfinite = "kv_nonfinite"
  case write = "kv_write_rows"
  case read = "kv_read_rows"
  case toDense = "kv_to_dense"
  case toChannel = "kv_to_channel"
  case toRow = "kv_to_row"
  case loadQueries = "kv_load_queries"

  static let modules: [(String, [CUDAKernel])] = [
    ("attend", [.attend, .finish, .statistics, .window]),
    ("rows", [.nonfinite, .write, .read, .toDense, .toChannel, .toRow, .loadQueries]),
  ]
}

/// Memory that is reused from call to call and grows to the largest.
struct CUDAScratch {
  private(set) var base: UnsafeMutableRawPointer?
  private var capacity = 0
  let pinned: Bool

  init(pinned: Bool) { self.pinned = pinned }

  /// At least that many bytes, 256-byte aligned. Earlier contents are gone; nothing queued may still use them.
  mutating func bytes(_ count: Int, _ session: CUDASession) throws(KVError) -> UnsafeMutableRawPointer {
    if let base, capacity >= count { return base }
    let size = max(count + count / 4, 1 << 16)
    let fresh = pinned ? try session.allocateHost(size) : try session.allocate(size)
    free(session)
    base = fresh
    capacity = size
    return fresh
  }

  mutating func free(_ session: CUDASession) {
    if let base { pinned ? session.releaseHost(base) : session.release(base) }
    base = nil
    capacity = 0
  }
}
