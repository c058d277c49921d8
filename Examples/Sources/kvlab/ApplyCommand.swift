import ArgumentParser
import KVCompression
import KVExperiments
import KVLabKit

struct ApplyCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "apply",
    abstract: "A policy over a dumped cache of any engine.",
    discussion: """
      Input tensors, for each layer L: layers.L.keys and layers.L.values [kvHeads, T, d], layers.L.queries [queryHeads, \
      Tq, d] of the last Tq positions, all after RoPE; optional layers.L.keys_pre_rope and layers.L.probe_queries \
      [queryHeads, P, d], taken at position T. __metadata__ may carry rope_theta, scale and rope_layout (half or \
      interleaved).

      Output tensors, for each layer L and KV head h: layers.L.positions.h (I32, ascending), layers.L.keys.h and \
      layers.L.values.h (F32, as reconstructed), layers.L.log_bias.h where rows carry one, and layers.L.attention \
      [queryHeads, P, d]: the probe queries' attention over the compressed cache.

      Policies that need attention weights (h2o) need Tq = T.
      """)

  @Option(help: "What compresses the cache.")
  var policy: String
  @Option(help: "A safetensors file with the dump.")
  var input: String
  @Option(help: "The safetensors file to write.")
  var output: String
  @Option(help: "Layers, such as 0,3,5-7. Default: all of the dump.")
  var layers: String?
  @Option(help: "Writes bytes per layer, ratio and the options used as JSON.")
  var json: String?
  @OptionGroup var threading: ThreadsOption
  @OptionGroup var placing: BackendOption

  func run() throws {
    try reportingErrors { () throws(KVError) in
      let named = try NamedPolicy(policy)
      let chosen = try layers.map { (text) throws(KVError) in try LayerList(text) }
      let application = try Application(
        dump: CacheDump(path: input), policy: named, layers: chosen, threads: threading.threads,
        backend: placing.backend)
      let result = try application.run(ProgressBar())
      try result.write(to: output)
      print(result.table)
      if let json { try TextFile.write(result.json().pretty, to: json) }
    }
  }
}
