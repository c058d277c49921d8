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
  /// By the kernel's raw value.
  nonisolated(unsafe) private let kernels: [UnsafeMutableRawPointer?]
  let card: String
  let capability: Int
  /// The first error of a call that had nobody to tell. A card's context is lost after one; later calls say so.
  private let failure = Mutex<KVError?>(nil)
  /// Whether something was queued since the stream was waited for.
  private let isBusy = Atomic<Bool>(false)
  /// Memory that queued work may still use: freed after the next wait, so that nothing waits for its sake.
  private let retired = Mutex<Retired>(Retired())

  private struct Retired {
    var device: [UInt64] = []
    var pinned: [UInt] = []
    var bytes = 0

    /// False: too much is waiting already.
    mutating func take(_ count: Int, _ add: (inout Retired) -> Void) -> Bool {
      if bytes + count > CUDASession.mostRetired { return false }
      bytes += max(count, 1)
      add(&self)
      return true
    }
  }

  /// Bytes that are held so at most; beyond, the driver waits.
  private static let mostRetired = 16 << 20

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

    var kernels = [UnsafeMutableRawPointer?](repeating: nil, count: CUDAKernel.allCases.count)
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
            driver, driver.pointee.function(handle, loaded, kernel.name, &function), "finding \(kernel.name)")
          kernels[kernel.rawValue] = function
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

  private static let outOfMemory: Int32 = 2

  private static func check(
    _ driver: UnsafePointer<ckv_cuda_driver>, _ code: Int32, _ call: @autoclosure () -> String
  ) throws(KVError) {
    if code == 0 { return }
    let name = driver.pointee.error_name(code).map { String(cString: $0) } ?? "error \(code)"
    throw KVError(code == outOfMemory ? .outOfMemory : .unavailable, "CUDA: \(call()) gave \(name)")
  }

  // MARK: Calls that can say no

  func allocate(_ bytes: Int) throws(KVError) -> UnsafeMutableRawPointer {
    try surviving()
    var address: UInt64 = 0
    var code = driver.pointee.allocate(handle, max(bytes, 256), &address)
    if code == CUDASession.outOfMemory, freesRetired() {
      code = driver.pointee.allocate(handle, max(bytes, 256), &address)
    }
    try CUDASession.check(driver, code, "allocating \(bytes) bytes of device memory")
    guard let base = UnsafeMutableRawPointer(bitPattern: UInt(address)) else {
      throw KVError(.outOfMemory, "CUDA: allocating \(bytes) bytes gave no address")
    }
    return base
  }

  func allocateHost(_ bytes: Int) throws(KVError) -> UnsafeMutableRawPointer {
    try surviving()
    var address: UnsafeMutableRawPointer?
    var code = driver.pointee.allocate_host(handle, max(bytes, 256), &address)
    if code == CUDASession.outOfMemory, freesRetired() {
      code = driver.pointee.allocate_host(handle, max(bytes, 256), &address)
    }
    try CUDASession.check(driver, code, "allocating \(bytes) bytes of pinned memory")
    guard let address else { throw KVError(.outOfMemory, "CUDA: allocating \(bytes) pinned bytes gave no address") }
    return address
  }

  /// The error of an earlier call that could not throw. A lack of memory is said once; a lost context stays lost.
  func surviving() throws(KVError) {
    let error = failure.withLock { failure in
      let error = failure
      if error?.code == .outOfMemory { failure = nil }
      return error
    }
    if let error { throw error }
  }

  /// Whether no error is waiting to be thrown.
  var isWell: Bool { failure.withLock { $0 == nil } }

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

  /// The driver waits for kernels that may still use device memory; little memory is kept until somebody waits anyway.
  func release(_ base: UnsafeMutableRawPointer, bytes: Int) {
    let address = UInt64(UInt(bitPattern: base))
    let isKept = isBusy.load(ordering: .relaxed) && retired.withLock { $0.take(bytes) { $0.device.append(address) } }
    if !isKept { free(address) }
  }

  func releaseHost(_ base: UnsafeMutableRawPointer, bytes: Int) {
    if isBusy.load(ordering: .relaxed) {
      if retired.withLock({ $0.take(bytes) { $0.pinned.append(UInt(bitPattern: base)) } }) { return }
      synchronize()
    }
    freeHost(base)
  }

  private func free(_ address: UInt64) { keep(driver.pointee.release(handle, address), "releasing device memory") }

  private func freeHost(_ base: UnsafeMutableRawPointer?) {
    keep(driver.pointee.release_host(handle, base), "releasing pinned memory")
  }

  /// Gives memory back that waited for the stream. False when there was none.
  private func freesRetired() -> Bool {
    if retired.withLock({ $0.bytes == 0 }) { return false }
    synchronize()
    return true
  }

  func copy(to target: UnsafeMutableRawPointer, from source: UnsafeRawPointer, _ bytes: Int) {
    if bytes == 0 { return }
    isBusy.store(true, ordering: .relaxed)
    keep(
      driver.pointee.copy(handle, UInt64(UInt(bitPattern: target)), UInt64(UInt(bitPattern: source)), bytes),
      "copying \(bytes) bytes")
  }

  /// Queues a kernel. Its arguments are copied by the driver before the call returns.
  func launch<each Argument: BitwiseCopyable>(
    _ kernel: CUDAKernel, x: Int, y: Int = 1, _ arguments: repeat each Argument
  ) {
    if x == 0 || y == 0 { return }
    isBusy.store(true, ordering: .relaxed)
    withUnsafeTemporaryAllocation(byteCount: 512, alignment: 16) { room in
      withUnsafeTemporaryAllocation(of: UnsafeMutableRawPointer?.self, capacity: 16) { list in
        var offset = 0
        var count = 0
        func add<Value: BitwiseCopyable>(_ value: Value) {
          offset = (offset + 15) / 16 * 16
          precondition(offset + MemoryLayout<Value>.size <= room.count && count < list.count, "too many arguments")
          room.storeBytes(of: value, toByteOffset: offset, as: Value.self)
          list[count] = room.baseAddress.map { $0 + offset }
          offset += MemoryLayout<Value>.size
          count += 1
        }
        repeat add(each arguments)
        keep(
          driver.pointee.launch(
            handle, kernels[kernel.rawValue], UInt32(x), UInt32(y), UInt32(KV_THREADS), list.baseAddress),
          "launching \(kernel.name)")
      }
    }
  }

  func synchronize() {
    isBusy.store(false, ordering: .relaxed)
    keep(driver.pointee.synchronize(handle), "waiting for the stream")
    let gone = retired.withLock { retired in
      let gone = retired
      if gone.bytes > 0 { retired = Retired() }
      return gone
    }
    for address in gone.device { free(address) }
    for address in gone.pinned { freeHost(UnsafeMutableRawPointer(bitPattern: address)) }
  }

  /// Runs `body`, a call of a library that computes in this context and on this stream; returns its status.
  func inContext(_ body: () -> Int32) throws(KVError) -> Int32 {
    try CUDASession.check(driver, driver.pointee.enter(handle), "entering the context")
    defer { driver.pointee.leave(handle) }
    isBusy.store(true, ordering: .relaxed)
    return body()
  }

  var stream: UnsafeMutableRawPointer? { driver.pointee.stream(handle) }

  /// Whether kernels can read and write there: device, managed or pinned memory.
  func accessible(_ address: UnsafeRawPointer) -> Bool { driver.pointee.accessible(handle, address) }
}

/// The kernels.
enum CUDAKernel: Int, CaseIterable {
  // attend.cu
  case prepare, attend, decodeHalf64, decodeHalf128, decodeBfloat64, decodeBfloat128, decodeCodes2, decodeCodes4
  case decodeCodes8, restorePartials, checkQueries, finish, statistics, window
  // rows.cu
  case nonfinite, write, read, map, gather
  case toDense, toChannel, toRow, toCodes, toZeroNumbers, toZeroRow, toScaled, toBlocks
  // measure.cu
  case channelRange, compare, normalise, nearest, turn, turnKeys, mix, scan, addRows, restoreRows, turnChannels,
    scaleRows,
    placeRows
  // select.cu
  case pool, select
  // factor.cu
  case zeroRows, turnBack, subtractRow, widen, narrow, scaleWide, columnSums, magnitudes, sketch

  /// The name in the sources.
  var name: String {
    switch self {
    case .prepare: "kv_prepare"
    case .attend: "kv_attend"
    case .decodeHalf64: "kv_decode_f16_64"
    case .decodeHalf128: "kv_decode_f16_128"
    case .decodeBfloat64: "kv_decode_bf16_64"
    case .decodeBfloat128: "kv_decode_bf16_128"
    case .decodeCodes2: "kv_decode_affine2_128"
    case .decodeCodes4: "kv_decode_affine4_128"
    case .decodeCodes8: "kv_decode_affine8_128"
    case .restorePartials: "kv_restore_partials"
    case .checkQueries: "kv_check_queries"
    case .finish: "kv_finish"
    case .statistics: "kv_statistics"
    case .window: "kv_window"
    case .nonfinite: "kv_nonfinite"
    case .write: "kv_write_rows"
    case .read: "kv_read_rows"
    case .map: "kv_map_rows"
    case .gather: "kv_gather"
    case .toDense: "kv_to_dense"
    case .toChannel: "kv_to_channel"
    case .toRow: "kv_to_row"
    case .toCodes: "kv_to_codes"
    case .toZeroNumbers: "kv_to_zero_numbers"
    case .toZeroRow: "kv_to_zero_row"
    case .toScaled: "kv_to_scaled_rows"
    case .toBlocks: "kv_to_blocks"
    case .channelRange: "kv_channel_range"
    case .compare: "kv_compare"
    case .normalise: "kv_normalise"
    case .nearest: "kv_nearest"
    case .turn: "kv_turn_rows"
    case .turnKeys: "kv_turn_keys"
    case .mix: "kv_mix"
    case .scan: "kv_scan"
    case .addRows: "kv_add_rows"
    case .restoreRows: "kv_restore_rows"
    case .turnChannels: "kv_turn_channels"
    case .scaleRows: "kv_scale_rows"
    case .placeRows: "kv_place_rows"
    case .pool: "kv_pool"
    case .select: "kv_select"
    case .zeroRows: "kv_zero_rows"
    case .turnBack: "kv_turn_back"
    case .subtractRow: "kv_subtract_row"
    case .widen: "kv_to_double"
    case .narrow: "kv_to_single"
    case .scaleWide: "kv_scale_wide"
    case .columnSums: "kv_column_sums"
    case .magnitudes: "kv_magnitudes"
    case .sketch: "kv_sketch"
    }
  }

  static let modules: [(String, [CUDAKernel])] = [
    ("attend", members(.prepare, .window)), ("rows", members(.nonfinite, .toBlocks)),
    ("measure", members(.channelRange, .placeRows)), ("select", members(.pool, .select)),
    ("factor", members(.zeroRows, .sketch)),
  ]

  private static func members(_ first: CUDAKernel, _ last: CUDAKernel) -> [CUDAKernel] {
    allCases.filter { $0.rawValue >= first.rawValue && $0.rawValue <= last.rawValue }
  }
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

  /// Whether that many bytes are there already.
  func holds(_ count: Int) -> Bool { base != nil && capacity >= count }

  mutating func free(_ session: CUDASession) {
    if let base { pinned ? session.releaseHost(base, bytes: capacity) : session.release(base, bytes: capacity) }
    base = nil
    capacity = 0
  }
}

/// Pinned memory for the short lists that kernels read while the host goes on. Waits for the stream only when it has been
/// used up.
struct CUDARing {
  private var memory = CUDAScratch(pinned: true)
  private var used = 0
  private var size = 0

  /// Memory that nothing queued uses; it stays as it is until the stream has passed what is queued next.
  mutating func bytes(_ count: Int, _ session: CUDASession) throws(KVError) -> UnsafeMutableRawPointer {
    let wanted = (count + 255) / 256 * 256
    if used + wanted > size {
      session.synchronize()
      used = 0
      size = max(size, wanted)
    }
    let base = try memory.bytes(size, session)
    defer { used += wanted }
    return base + used
  }

  /// Makes sure that further `count` bytes, in several pieces, are there without a new beginning.
  mutating func reserve(_ count: Int, pieces: Int, _ session: CUDASession) throws(KVError) {
    let wanted = count + pieces * 256
    if used + wanted <= size { return }
    session.synchronize()
    used = 0
    size = max(size, wanted)
    _ = try memory.bytes(size, session)
  }

  mutating func free(_ session: CUDASession) {
    memory.free(session)
    size = 0
    used = 0
  }
}
