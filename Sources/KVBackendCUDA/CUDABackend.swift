package import CKVCUDA
internal import KVBackendCPU
public import KVCore
internal import Synchronization

extension Backend {
  /// Keeps rows in the memory of an NVIDIA card and computes there.
  ///
  /// Nothing of CUDA is needed to build or to run without one: the driver library is looked for when this is called.
  /// Keys, values, queries and outputs may lie in ordinary memory, which is staged, or in device or pinned memory,
  /// which is used in place.
  ///
  /// - Parameters:
  ///   - device: which card.
  ///   - context: the engine's own `CUcontext`, to share its allocations; nil for the card's primary context.
  ///   - stream: the engine's `CUstream` in that context; nil with a context is its default stream.
  /// - Throws: `unavailable`, naming what was looked for: the driver library, the card, or its capability.
  public static func cuda(
    device: Int = 0, context: UnsafeMutableRawPointer? = nil, stream: UnsafeMutableRawPointer? = nil
  ) throws(KVError) -> Backend {
    var why: UnsafePointer<CChar>?
    guard let driver = ckv_cuda_load_driver(&why) else {
      throw KVError(.unavailable, "no CUDA backend: \(why.map { String(cString: $0) } ?? "no driver")")
    }
    return Backend(try CUDABackend(driver: driver, device: device, context: context, stream: stream))
  }
}

/// The CUDA backend. Rows are in device memory; positions, biases and statistics, which the core edits one by one, in
/// pinned memory that kernels reach over the bus.
package final class CUDABackend: ComputeBackend {
  package let meter = MemoryMeter()
  let session: CUDASession
  /// For what lies in ordinary memory and is not worth a trip over the bus.
  let host: CPUBackend
  /// Scores from which on rows are chosen on the card: fewer are looked at in less than a launch takes.
  let leastSelected: Int
  /// Tables of functions in static memory.
  nonisolated(unsafe) private let libraries: CUDALibraries
  /// What makes products and eigenvectors on the card; nil until it is needed, or where it is not installed.
  private let algebra = Mutex<CUDAAlgebra?>(nil)
  /// One call at a time: the stream is one, and so is the memory for descriptions and intermediate results.
  private let lock = Mutex<Void>(())
  /// Touched under the lock only, by `exclusively`.
  nonisolated(unsafe) private var scratch = Scratch()

  /// Memory between the calls.
  struct Scratch {
    /// Staged tensors and results for the host, of calls that wait for the card.
    var pinned = CUDAScratch(pinned: true)
    /// Column sums of a window, measures of rows.
    var columns = CUDAScratch(pinned: true)
    /// Descriptions and short lists.
    var ring = CUDARing()
    /// Intermediate results of attention.
    var device = CUDAScratch(pinned: false)
    /// Descriptions on the card.
    var region = CUDAScratch(pinned: false)
    /// Rows as f32.
    var table = CUDAScratch(pinned: false)
    var plan = CUDADescriptions()
    var staging: [CUDADescriptions.Staging] = []
    /// Of the rows that are being written: which target, and its tokens that were written before.
    var written: [(target: Int, token: Int)] = []
  }

  package var name: String { "cuda (\(session.card), compute \(session.capability / 10).\(session.capability % 10))" }

  package init(
    driver: UnsafePointer<ckv_cuda_driver>, device: Int, context: UnsafeMutableRawPointer? = nil,
    stream: UnsafeMutableRawPointer? = nil, leastSelected: Int = 4096, libraries: CUDALibraries = .installed
  ) throws(KVError) {
    self.leastSelected = leastSelected
    self.libraries = libraries
    guard device >= 0, device < 1 << 16 else {
      throw KVError(.invalidOption, "CUDA devices are counted from 0; got \(device)")
    }
    session = try CUDASession(driver, device: device, context: context, stream: stream)
    host = try CPUBackend(threads: 1)
    // What cannot throw must not need more than this: appending, encoding, moving and reading rows.
    _ = try scratch.pinned.bytes(CUDABackend.stagingBytes, session)
    _ = try scratch.ring.bytes(CUDABackend.stagingBytes, session)
    _ = try scratch.table.bytes(CUDABackend.tableElements * 4, session)
  }

  /// cuBLAS and cuSOLVER with their handles, made when they are needed first. Nil: they are not installed.
  func cardAlgebra() throws(KVError) -> CUDAAlgebra? {
    guard let functions = libraries.find().functions else { return nil }
    return try algebra.withLock { algebra throws(KVError) in
      if let made = algebra { return made }
      // Handles must not be made while others of this context are used.
      var made: CUDAAlgebra?
      try exclusively { _ throws(KVError) in made = try CUDAAlgebra(functions, session) }
      algebra = made
      return made
    }
  }

  package var linearAlgebra: String {
    let (functions, reason) = libraries.find()
    if let functions { return "\(String(cString: functions.pointee.names)), on the card" }
    return "\(host.linearAlgebra), as \(reason)"
  }

  /// Pinned memory for staging, and for lists, that is always there.
  static let stagingBytes = 1 << 20
  /// In that memory: places of what is refused, a list of writes, staged rows.
  static let listOffset = 256
  static let halfStaging = (stagingBytes - listOffset) / 2 / 256 * 256
  static let mostWrites = min(halfStaging / MemoryLayout<kv_write>.stride, 65_535)
  /// Floats on the card that are always there: rows on their way between encodings behind maps, at least a group of the
  /// longest ones.
  static let tableElements = 1 << 22

  deinit {
    session.synchronize()
    scratch.pinned.free(session)
    scratch.columns.free(session)
    scratch.ring.free(session)
    scratch.device.free(session)
    scratch.region.free(session)
    scratch.table.free(session)
    session.synchronize()
  }

  /// Runs `body` alone with the memory between the calls.
  func exclusively(_ body: (inout Scratch) throws(KVError) -> Void) throws(KVError) {
    try lock.withLock { _ throws(KVError) in try body(&scratch) }
  }

  /// The same for what cannot fail at once: an error is kept for the next call that can. Where memory is short,
  /// `otherwise` does the same with less.
  func exclusivelyRecording(
    _ body: (inout Scratch) throws(KVError) -> Void, otherwise: (() -> Void)? = nil
  ) {
    do throws(KVError) {
      try exclusively(body)
    } catch {
      if error.code == .outOfMemory, let otherwise { return otherwise() }
      session.record(error)
    }
  }

  /// Copies on the card may not overlap.
  package var movesOverlappingRows: Bool { false }
  package func moveRows(_ source: RunSlice, to target: RowRun, row: Int) {
    preconditionFailure("rows on the card are copied to new memory")
  }

  /// Columns are in pinned memory, which the processor reads as its own.
  package func hidden(_ bias: UnsafePointer<Float>, count: Int) -> Int { host.hidden(bias, count: count) }

  package func lowest(_ values: UnsafePointer<Float>, bias: UnsafePointer<Float>?, count: Int) -> Int {
    host.lowest(values, bias: bias, count: count)
  }

  package func allocate(byteCount: Int, hostVisible: Bool) throws(KVError) -> Buffer {
    let session = session
    if hostVisible {
      return Buffer(base: try session.allocateHost(byteCount), byteCount: byteCount, meter: meter) {
        // What is queued may still read it.
        session.releaseHost($0, bytes: byteCount)
      }
    }
    return Buffer(base: try session.allocate(byteCount), byteCount: byteCount, meter: meter) {
      session.release($0, bytes: byteCount)
    }
  }

  package func copy(from host: UnsafeRawPointer, to device: UnsafeMutableRawPointer, byteCount: Int) {
    session.copy(to: device, from: host, byteCount)
    session.synchronize()
  }

  package func copy(from device: UnsafeRawPointer, toHost host: UnsafeMutableRawPointer, byteCount: Int) {
    session.copy(to: host, from: device, byteCount)
    session.synchronize()
  }
}

/// Hands out ranges of a piece of memory whose size is known afterwards: first counted, then taken.
struct CUDALayout {
  private(set) var total = 0

  /// Offset in bytes of `count` values, 256-byte aligned.
  mutating func take<Value: BitwiseCopyable>(_ count: Int, of type: Value.Type, atLeast least: Int = 1) -> Int {
    let offset = total
    total += (max(count, least) * MemoryLayout<Value>.stride + 255) / 256 * 256
    return offset
  }
}

/// Blocks for a grid that walks over `count` elements.
func gridBlocks(_ count: Int) -> Int { min(max(1, (count + KV_THREADS - 1) / KV_THREADS), 4096) }
