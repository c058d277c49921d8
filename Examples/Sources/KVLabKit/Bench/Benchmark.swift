internal import Foundation
package import KVCompression

/// What the benchmark runs.
package struct BenchOptions: Sendable {
  /// Only cases whose label contains it; nil: all.
  package var filter: String?
  /// Thread counts, each a pass of its own.
  package var threads: [Int]
  /// Context lengths of decode attention.
  package var contexts = [4096, 32768, 131_072]
  /// Seconds of timing a group of cases gets; fewer than 5 repeats never.
  package var secondsPerGroup = 6.0
  package var backend = BackendChoice.cpu

  package init(threads: [Int], filter: String? = nil) {
    self.threads = threads
    self.filter = filter
  }
}

/// The benchmark: every case is checked against the portable kernels, then timed cold, repeats of the compared stores
/// taking turns so that a drift of the machine meets all of them.
///
/// Shape: 32 query heads, 8 KV heads, 128 channels. Cold: layers of one cache take turns, as in a model, and together
/// they are several times the last-level cache.
package final class Benchmark {
  static let stores =
    [
      "f32", "f16", "bf16", "kivi(bits=8)", "kivi(bits=4)", "kivi(bits=2)",
      "int8", "int8(format=int4,group=32,metadata=f16)", "fp8", "ggml(keys=q8_0,values=q8_0)",
      "ggml(keys=q5_1,values=q5_1)",
      "ggml(keys=q4_0,values=q4_0)", "ggml(keys=iq4_nl,values=iq4_nl)",
      "pertoken(bits=4,group=32)", "pertoken(bits=2,group=32)", "cst(bits=4)",
      // Attention on a quarter of the channels: a basis for each head, and one for all heads.
      "svd(rank_k=0.25,rank_v=0.25,rope=post,scope=head,new=project,keep=0)",
      "svd(rank_k=0.25,rank_v=0.25,rope=post,new=project,keep=0)",
    ] + plainForms.keys.sorted()
  /// Rotated, divided and tiered stores, and the plain store of the same width that each is compared with.
  static let plainForms = [
    "pertoken(bits=4,group=32)+rotated": "pertoken(bits=4,group=32)",
    "pertoken(bits=2,group=32)+rotated": "pertoken(bits=2,group=32)",
    "kivi(bits=4)+rotated(keys=false)": "kivi(bits=4)",
    "ggml(keys=q4_0,values=q4_0)+rotated": "ggml(keys=q4_0,values=q4_0)",
    "rotatekv(bits=4)": "pertoken(bits=4,group=32)",
    "rotatekv(bits=2)": "pertoken(bits=2,group=32)",
    // As ZipCache's two widths lie: any row in either.
    "random(budget=1.0)+tiers(shares=[0.6,0.4],every=0)+cst(bits=4)+cst(bits=2)": "cst(bits=4)",
    "tiers(shares=[0.25,0.75],every=0)+kivi(bits=4)+kivi(bits=2)": "kivi(bits=4)",
    "random(budget=1.0)+tiers(shares=[0.25,0.75],every=0)+kivi(bits=4)+kivi(bits=2)": "kivi(bits=4)",
  ]
  static let allHeads = Array(0..<BenchData.shape.kvHeads)

  let options: BenchOptions
  let data = BenchData()
  let emit: (BenchRecord) -> Void
  let progress: any Progress
  /// Reference results, which no thread count changes.
  var references: [String: [Float]] = [:]
  /// Cases whose result was not the portable one.
  package private(set) var failures: [String] = []

  package init(_ options: BenchOptions, progress: any Progress, emit: @escaping (BenchRecord) -> Void) {
    self.options = options
    self.progress = progress
    self.emit = emit
  }

  /// - Throws: what caches throw; a failed check is no error but a record with `checked` false.
  package func run() throws(KVError) {
    progress.begin(steps: options.threads.count * (options.contexts.count + 8))
    defer { progress.end() }
    for threads in options.threads {
      let backend = try options.backend.backend(threads: threads)
      let probe = try options.backend.probe(backend)
      _ = probe.measure()
      let machine = Machine(threads: threads, backend: backend, probe: probe)
      for tokens in options.contexts {
        progress.advance("attend, \(tokens) tokens, \(threads) threads")
        try decodeAttention(tokens: tokens, machine)
      }
      progress.advance("two layers held together, \(threads) threads")
      try pairedLayers(tokens: 32768, machine)
      // Many sequences in one call are what a card is measured by.
      if options.backend == .cuda { try batch(tokens: min(options.contexts.max() ?? 0, 32768), machine) }
      for tokens in options.contexts { try hostTime(tokens: tokens, machine) }
      progress.advance("append, \(threads) threads")
      try appending(machine)
      progress.advance("SnapKV, \(threads) threads")
      try snapKV(machine)
      progress.advance("choosing, \(threads) threads")
      try choosing(machine)
      progress.advance("decoding, \(threads) threads")
      try decoding(machine)
      progress.advance("prefill with statistics, \(threads) threads")
      try prefill(machine)
      progress.advance("factorisation, \(threads) threads")
      try factorisation(machine)
      progress.advance("bounded prompts, \(threads) threads")
      try boundedPrompts(machine)
      progress.advance("evicting while decoding, \(threads) threads")
      try evicting(machine)
    }
  }

  // MARK: What all cases share

  struct Machine {
    let threads: Int
    let backend: Backend
    let probe: any BandwidthProbe
  }

  func wanted(_ name: String, _ store: String, _ tokens: Int, _ queries: Int, _ machine: Machine) -> Bool {
    guard let filter = options.filter else { return true }
    return BenchRecord.label(name, store, tokens, queries, machine.threads).contains(filter)
  }

  func report(_ record: BenchRecord) {
    if !record.checked { failures.append(record.label) }
    progress.end()
    emit(record)
  }

  /// Layers that make a cache cold when they take turns.
  func coldLayers(bytesPerLayer: Int) -> Int {
    max(1, min(128, (Self.coldBytes + bytesPerLayer - 1) / max(bytesPerLayer, 1)))
  }

  static let coldBytes = max(256 << 20, min(4 * lastLevelCache, 1 << 30))

  /// Bytes of the cache that one core sees. 32 MiB where the system does not say.
  static let lastLevelCache: Int = {
    // Not sysconf: on AMD processors it adds up the caches of all cores.
    let folder = "/sys/devices/system/cpu/cpu0/cache/"
    let sizes = (2...4).compactMap { try? String(contentsOfFile: "\(folder)index\($0)/size", encoding: .utf8) }
    let bytes = sizes.compactMap { text -> Int? in
      let digits = Int(text.prefix { $0.isNumber })
      return text.contains("M") ? digits.map { $0 << 20 } : digits.map { $0 << 10 }
    }
    return bytes.max() ?? 32 << 20
  }()

  /// A cache of `layers` layers of the shape, restricted to some KV heads.
  func cache(
    _ policy: any CompressionPolicy, layers: Int, heads: [Int], _ backend: Backend
  ) throws(KVError) -> KVCache {
    try KVCache(
      shape: ModelShape(
        layerCount: layers, queryHeads: heads.count * BenchData.group, kvHeads: heads.count, headDim: BenchData.dim,
        rotary: BenchData.rotary()),
      policy: policy, backend: backend)
  }

  /// The heads that a check compares: all of a short context, the first and the last of a long one. Where a head's rows
  /// depend on which head it is, all.
  static func checkedHeads(_ store: String, tokens: Int) -> [Int] {
    let shared = store.hasPrefix("svd") && !store.contains("scope=head")
    let depends = shared || store.hasPrefix("rotatekv") || store.hasPrefix("random")
    return depends || tokens <= 8192 ? allHeads : [0, BenchData.shape.kvHeads - 1]
  }

  static func seconds(_ body: () throws(KVError) -> Void) throws(KVError) -> Double {
    let clock = ContinuousClock()
    let start = clock.now
    try body()
    return start.duration(to: clock.now).seconds
  }

  /// Attention of `count` queries over one layer, into `output` [queryHeads, count, dim].
  func attend(
    _ cache: KVCache, layer: Int, _ queries: [Float], _ count: Int, heads: Int, into output: inout [Float],
    commits: Bool = false
  ) throws(KVError) {
    let queryHeads = heads * BenchData.group
    let view = try TensorView(queries.span, heads: queryHeads, tokens: count, dim: BenchData.dim)
    var span = output.mutableSpan
    var target = try MutableTensorView(&span, heads: queryHeads, tokens: count, dim: BenchData.dim)
    try cache.attend(layer: layer, queries: view, into: &target, options: AttentionOptions(commits: commits))
  }

  /// The part of an output of all heads that belongs to some of them.
  static func part(_ output: [Float], of heads: [Int]) -> [Float] {
    let length = output.count / BenchData.shape.kvHeads
    return heads.flatMap { output[$0 * length..<($0 + 1) * length] }
  }

  /// Kernels of different levels add in different orders: f32 rounding, no more.
  static func agree(_ x: [Float], _ reference: [Float], within bound: Double = 1e-4) -> Bool {
    guard x.count == reference.count, !x.isEmpty else { return false }
    var error = 0.0
    var norm = 0.0
    for (a, b) in zip(x, reference) {
      error += Double(a - b) * Double(a - b)
      norm += Double(b) * Double(b)
    }
    return error.squareRoot() <= bound * norm.squareRoot()
  }
}
