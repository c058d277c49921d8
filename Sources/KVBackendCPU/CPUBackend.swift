internal import CKVKernels
internal import Dispatch
public import KVCore
internal import Synchronization

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// How finely the CPU backend multiplies queries with keys and weights with values.
public enum AttentionProducts: String, Sendable, Hashable, CaseIterable {
  /// Exact rows and f32 products. Where rows are codes, queries and weights may be 16-bit fixed point: off by at most
  /// 2^-16 of the largest of them for each.
  case f32
  /// Eight significant bits, in about half the time for many query rows, for an output that is off by about a
  /// percent. Sums are as exact as before.
  ///
  /// - Rows of f16 and bf16 that meet twelve query rows of a KV head at least (prefill, drafts, window scores, several
  ///   heads over the same latents): queries, weights and rows are rounded to bf16, as matrix units of other processors
  ///   do. A sum is off by at most 2^-7 of the magnitudes it adds up.
  /// - Rows of codes, any number of query rows: queries and weights are rounded to 8-bit fixed point, and each meets its
  ///   code in one product of bytes. An element, times the scale of its channel (keys with scales of channels) or of its
  ///   row (values), is off by at most 1/254 of the largest of its query row, or of at most 128 weights; a sum by that
  ///   for each of its terms, times the code counted from the middle of the codes. Minima and the middles of codes are
  ///   added in f32, whatever was rounded.
  ///
  /// This allows fewer bits and promises none: kernels without such a form (rows of f32 and FP8, channels with other
  /// metadata than f16, head sizes that do not consist of whole groups) stay exact.
  case bf16
}

extension Backend {
  /// Computes on the CPU.
  ///
  /// - Parameters:
  ///   - threads: threads a call may use; nil: the cores there are, or the environment variable `KV_THREADS`. The result
  ///     does not depend on it, to the bit.
  ///   - level: `portable`, `avx2`, `avx512` or `neon`; nil: the best this CPU has, or the environment variable
  ///     `KV_CPU_LEVEL`. Between levels results differ by rounding; codes and metadata never differ.
  ///   - products: `bf16` needs a CPU with AVX-512 BF16 and VNNI. It rounds queries and weights to eight bits where that
  ///     is quicker (``AttentionProducts/bf16``).
  /// - Throws: `unavailable` for a level or products this CPU or build does not have, `invalidOption` for a thread count
  ///   below 1.
  public static func cpu(
    threads: Int? = nil, level: String? = nil, products: AttentionProducts = .f32
  ) throws(KVError) -> Backend {
    Backend(try CPUBackend(threads: threads, level: level, products: products))
  }

  /// The products this machine can form.
  public static var cpuProducts: [AttentionProducts] {
    AttentionProducts.allCases.filter { $0 == .f32 || ckv_bf16_products(ckv_best()) != nil }
  }

  /// The CPU levels this machine can run, best first.
  public static var cpuLevels: [String] {
    (0..<ckv_level_count()).filter { ckv_level_supported($0) }.map { String(cString: ckv_level($0).pointee.name) }
  }
}

/// The CPU backend: C kernels picked at run time, threads over heads and token ranges.
///
/// Immutable but for its meter, so any number of caches on any threads may share one.
package final class CPUBackend: ComputeBackend {
  package let meter = MemoryMeter()
  package let threads: Int
  package let levelName: String
  /// A table of function pointers in static memory.
  nonisolated(unsafe) let kernels: UnsafePointer<ckv_kernels>

  /// Tables of the rotary embeddings met so far: few, and the same for every cache of a model.
  private let rotaryOffsets = Mutex<[(rotary: RotaryEmbedding, table: RotaryOffsets)]>([])

  package var name: String { "cpu (\(levelName), \(threads) thread\(threads == 1 ? "" : "s"))" }

  package var linearAlgebra: String {
    #if canImport(Accelerate)
      "Accelerate, on the processor"
    #else
      "OpenBLAS, on the processor"
    #endif
  }

  package init(threads: Int? = nil, level: String? = nil, products: AttentionProducts = .f32) throws(KVError) {
    let wanted = level ?? CPUBackend.environment("KV_CPU_LEVEL")
    if let wanted {
      guard !wanted.utf8.contains(0), let found = ckv_named(wanted) else {
        throw KVError(
          .unavailable,
          "CPU level \(wanted) is not available here; this machine has \(Backend.cpuLevels.joined(separator: ", "))")
      }
      kernels = try CPUBackend.kernels(found, products)
    } else {
      kernels = try CPUBackend.kernels(ckv_best(), products)
    }
    levelName = String(cString: kernels.pointee.name)

    var count = threads
    if count == nil, let text = CPUBackend.environment("KV_THREADS") {
      guard let number = Int(text) else {
        throw KVError(.invalidOption, "KV_THREADS must be a number of threads; got \(text)")
      }
      count = number
    }
    let resolved = count ?? max(1, Int(sysconf(Int32(_SC_NPROCESSORS_ONLN))))
    guard (1...1024).contains(resolved) else {
      throw KVError(.invalidOption, "threads must lie in 1...1024; got \(resolved)")
    }
    self.threads = resolved
  }

  private static func kernels(
    _ level: UnsafePointer<ckv_kernels>, _ products: AttentionProducts
  ) throws(KVError) -> UnsafePointer<ckv_kernels> {
    if products == .f32 { return level }
    guard let found = ckv_bf16_products(level) else {
      throw KVError(
        .unavailable,
        "products of bf16 need a CPU with AVX-512 BF16 and VNNI, and the level avx512; this is "
          + String(cString: level.pointee.name))
    }
    return found
  }

  func offsets(of rotary: RotaryEmbedding) -> RotaryOffsets {
    rotaryOffsets.withLock { tables in
      // Equal embeddings mostly share their arrays: comparing is quicker than hashing.
      if let known = tables.first(where: { $0.rotary == rotary }) { return known.table }
      let table = RotaryOffsets(rotary)
      tables.append((rotary, table))
      return table
    }
  }

  private static func environment(_ name: String) -> String? {
    guard let value = getenv(name) else { return nil }
    let text = String(cString: value)
    return text.isEmpty ? nil : text
  }

  package func allocate(byteCount: Int, hostVisible: Bool) throws(KVError) -> Buffer {
    var base: UnsafeMutableRawPointer?
    guard posix_memalign(&base, 64, max(byteCount, 64)) == 0, let base else {
      throw KVError(.outOfMemory, "could not allocate \(byteCount) bytes")
    }
    return Buffer(base: base, byteCount: byteCount, meter: meter) { free($0) }
  }

  package func copy(from host: UnsafeRawPointer, to device: UnsafeMutableRawPointer, byteCount: Int) {
    device.copyMemory(from: host, byteCount: byteCount)
  }

  package func copy(from device: UnsafeRawPointer, toHost host: UnsafeMutableRawPointer, byteCount: Int) {
    host.copyMemory(from: device, byteCount: byteCount)
  }

  /// Runs `body(worker, item)` for every item, on up to `threads` threads. Which worker runs an item is not defined, so
  /// nothing an item computes may depend on it.
  func parallel(_ items: Int, _ body: (_ worker: Int, _ item: Int) -> Void) {
    let workers = min(threads, items)
    if workers <= 1 {
      for item in 0..<items { body(0, item) }
      return
    }
    let next = Atomic<Int>(0)
    withoutActuallyEscaping(body) { body in
      // Dispatch asks for a Sendable closure. The work items are independent by the contract above, and the call waits.
      nonisolated(unsafe) let body = body
      DispatchQueue.concurrentPerform(iterations: workers) { worker in
        while true {
          let item = next.add(1, ordering: .relaxed).oldValue
          if item >= items { return }
          body(worker, item)
        }
      }
    }
  }
}

extension RowRun {
  /// Calls `body` with the map the kernels take, nil for none.
  func withKernelMap<Result>(_ body: (UnsafePointer<ckv_map>?) -> Result) -> Result {
    guard let map = map?.pointee else { return body(nil) }
    return withUnsafePointer(to: map.kernelMap, body)
  }

  /// The description the kernels take.
  var kernelRun: ckv_run {
    ckv_run(
      kind: UInt32(encoding.kind.rawValue), code: UInt32(encoding.code), dtype: UInt32(encoding.type.rawValue),
      bits: UInt32(encoding.bits), group: UInt32(encoding.group), factor: encoding.factor, dim: UInt32(dim),
      rows: UInt32(capacity), row_stride: Int64(dim),
      data: UnsafeRawPointer(base), scale: UnsafeRawPointer(scales), min: UnsafeRawPointer(minima))
  }
}

extension MapDescriptor {
  var kernelMap: ckv_map {
    ckv_map(
      dim: UInt32(dim), block: UInt32(block), dtype: UInt32(type.rawValue), sign: signs, factor: factors,
      offset: offsets, order: order)
  }
}
