import ArgumentParser
import Foundation
import KVCompression
import KVLabKit

struct BenchCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "bench",
    abstract: "How fast the kernels are, against the memory bandwidth of this machine.",
    discussion: """
      32 query heads, 8 KV heads, 128 channels; caches colder than the last-level cache. Every result is first checked \
      against the portable kernels. Repeats of the compared stores take turns, with a measurement of the read bandwidth \
      in between; the median counts.

      attend         attention of 1 and of 8 new tokens over every store
      two-layers     attention of 1 new token over both layers of a pair that shares directions, against two dense ones
      append         appending blocks of 1024 tokens to a cache in use; bytes are those of the f32 input
      snapkv-score   SnapKV's scores of a prompt of 32768; snapkv-finish adds choosing and moving what stays
      evict-score    scores of a prompt of 32768; evict-select: which rows stay; evict-move: bringing them there. Bytes \
      are those of its keys, so that the share of the read bandwidth is one read of the keys over the time
      decode         one decoded token with all of 32768 rows, and with a half to a twentieth of them
      peak           a prompt of 32768 through one KV head in chunks of 512, cut to 2048 rows after each: bytes are the \
      most there ever were; vs f16: over those of the whole prompt; vs plain: over those of 2560 rows with what the policy \
      remembers of them; checked: not more
      prefill        a prompt of 8192 in chunks of 512 through one KV head, plain and with H2O's sums
      factor         latents of a prompt of 32768 tokens: 1024 channels at rank 256, and 4096 (q4: four layers) at rank \
      512; checked: the error is at most 1 % above the least. processorMilliseconds in the JSON is the time of all threads
      evict-token    a decoded token at a full budget, append to eviction: the mean over a whole period of evictions. vs \
      f16: over the same tokens through a cache that holds as many rows and evicts nothing

      attend-b16     with --backend cuda: one new token of 16 sequences in one call
      host           with --backend cuda on a driver that does nothing (make host-time): what the processor does for a \
      decoded token of one layer, append to eviction, the mean over 128 tokens and 32 layers; checked: nine of ten steps \
      ask the heap for nothing. host-b16: of 16 sequences in one call, for each

      With --backend cuda the read bandwidth is that of copies on the card, reads and writes together, and times include \
      the host's part. Tensors lie in ordinary memory: append measures the bus, too.

      A label is CASE/STORE/T<tokens>/q<queries>/t<threads>. Exit code 1 when a check fails. Needs up to 5 GB of memory; \
      --contexts 4096,32768 needs less.
      """)

  @Option(help: "Only cases whose label contains this text, such as 'attend/kivi(bits=2)/T32768' or '/t1'.")
  var filter: String?
  @Option(help: "Thread counts, such as 1,2; each is a pass of its own. Default: 1 and the cores there are.")
  var threads: String?
  @Option(help: "Context lengths of the attend cases.")
  var contexts = "4096,32768,131072"
  @Option(help: "Seconds of timing for each group of cases.")
  var seconds = 6.0
  @Option(help: "Writes one JSON object a line for every case.")
  var json: String?
  @OptionGroup var placing: BackendOption

  func validate() throws {
    if let threads { _ = try threadList(threads) }
    guard contextList != nil else {
      throw ValidationError(
        "--contexts: expected numbers of tokens of 1 to 1048576 such as 4096,32768; got '\(contexts)'")
    }
    guard seconds > 0, seconds <= 3600 else { throw ValidationError("--seconds must lie in 0...3600; got \(seconds)") }
  }

  private var contextList: [Int]? {
    let counts = contexts.split(separator: ",", omittingEmptySubsequences: false).map { Int($0) ?? 0 }
    return !counts.isEmpty && counts.allSatisfy { (1...1 << 20).contains($0) } ? counts : nil
  }

  func run() throws {
    let cores = ProcessInfo.processInfo.activeProcessorCount
    let isCard = placing.backend == .cuda
    let counts = try threads.map(threadList) ?? (cores > 1 && !isCard ? [1, cores] : [1])
    try reportingErrors { () throws(KVError) in
      var options = BenchOptions(threads: counts, filter: filter)
      options.contexts = contextList ?? options.contexts
      options.secondsPerGroup = seconds
      options.backend = placing.backend
      printNow("\(try placing.backend.backend().name); \(cores) cores\n\(BenchRecord.heading)\n")
      var lines = ""
      let benchmark = Benchmark(options, progress: ProgressBar()) { record in
        printNow(record.line + "\n")
        lines += record.json.compact + "\n"
      }
      try benchmark.run()
      if lines.isEmpty { throw KVError(.invalidOption, "no case's label contains '\(filter ?? "")'") }
      if let json { try TextFile.write(lines, to: json) }
      if !benchmark.failures.isEmpty {
        throw KVError(
          .unsupported, "differs from the portable kernels: \(benchmark.failures.joined(separator: ", "))")
      }
    }
  }
}
