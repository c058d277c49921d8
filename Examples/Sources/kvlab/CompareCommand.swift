import ArgumentParser
import Foundation
import KVCompression
import KVLabKit
import ReferenceEngine

struct CompareCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "compare",
    abstract: "Policies side by side on a model and a text.",
    discussion: """
      Each piece of text has --context tokens of prompt and --decode tokens after it. The prompt is read with full \
      attention, the policy compresses, then the rest of the text is read token by token over the compressed cache while \
      the policy goes on acting. Only predictions made in that second part count. A full cache (dense f32) reads the same \
      tokens; all changes are against it.

      bytesPerToken      bytes the cache holds after the last token, by the tokens it has seen
      ratio              how many times smaller than 2 bytes a number (f16)
      perplexity         of the decoded part; perplexityChange is relative, 0.05 is 5 % worse
      klDivergence       mean KL(full || policy) of the next-token distributions, nats
      attentionError     ||output - full|| / ||full|| over the attention outputs of all decoded tokens and layers, both \
      for the same queries over the same history
      needleAccuracy     share of five-digit codes hidden in a text that come out whole. The cache is compressed before \
      the question is known; the question then arrives as one chunk. needleAccuracyQueryAware: the question is part of \
      the prompt. Digits are teacher-forced, which for whole codes is the same as greedy decoding. Each text holds --notes \
      codes; oneNeedleAccuracy and oneNeedleAccuracyQueryAware are for texts that hold one
      keys/best, values/best  of low-rank stores: relative error of the prompt's restored rows, and the least that as many \
      latent channels could have
      rowsPerHead        rows that heads hold after the last token: least, mean and most over layers and heads. Where \
      they differ, each head's memory is what its own rows need
      *TokensPerSecond   of the model with this cache; compressing counts as prefill
      peakCacheBytes     most the cache ever held, the uncompressed prompt included
      """)

  @Option(help: "Directory of a HuggingFace checkpoint. Default: the packaged model.")
  var model: String?
  @Option(help: "A text, or a directory of .txt files. Default: the packaged texts.")
  var text: String?
  @Option(help: "Policies separated by commas, such as 'f16,kivi(bits=2),snapkv(budget=0.25)+kivi'.")
  var policies: String?
  @Option(help: "Policies of a family instead: eviction, quantization, merging, lowrank or all.")
  var preset: String?
  @Option(help: "Parts of the cache that the selections of a preset keep (default: 0.5,0.25,0.125,0.05).")
  var ratios: String?
  @Option(help: "Directory with pca.safetensors and cskv.safetensors (kvlab calibrate), for methods of a preset.")
  var calibrations: String?
  @Option(help: "Prompt tokens of each piece of text (default: 1024).")
  var context: Int?
  @Option(help: "Tokens read one by one after the prompt (default: 256).")
  var decode: Int?
  @Option(help: "Pieces of text (default: 3).")
  var samples: Int?
  @Option(help: "Needle sequences, 0 for none (default: 8).")
  var needles: Int?
  @Option(help: "Notes in each needle sequence; all are asked about (default: 4).")
  var notes: Int?
  @Option(help: "Tokens of a needle sequence before its questions (default: as --context).")
  var needleContext: Int?
  @Option(help: "Of the needles.")
  var seed: UInt64 = 1
  @Flag(help: "A small run: fewer policies and tokens.")
  var quick = false
  @Option(help: "Writes the table as JSON, an array with an object a policy.")
  var json: String?
  @OptionGroup var threading: ThreadsOption
  @OptionGroup var placing: BackendOption

  func run() throws {
    try reportingErrors { () throws(KVError) in
      var options = quick ? CompareOptions.quick : CompareOptions()
      options.context = context ?? options.context
      options.decode = decode ?? options.decode
      options.samples = samples ?? options.samples
      options.needles = needles ?? options.needles
      options.notes = notes ?? options.notes
      options.needleContext = needleContext
      options.seed = seed
      options.threads = threading.threads
      options.backend = placing.backend
      try options.validate()
      let backend = try placing.backend.backend(threads: threading.threads)
      let directory = try PackagedFiles.model(or: model)
      let engine = try Engine(directory: directory)
      let (chosen, refused) = try choice(PresetSizes(shape: engine.model.config.shape, options: options))
      let comparison = try Comparison(
        engine: engine, policies: chosen, texts: PackagedFiles.readTexts(at: PackagedFiles.texts(or: text)),
        names: PackagedFiles.names(model: directory), options: options)
      print(
        "\(engine.model.parameterCount) parameters, \(engine.model.config.layerCount) layers; "
          + "\(options.samples) texts of \(options.context) + \(options.decode) tokens, "
          + "\(options.needles * options.notes) needle questions; \(backend.name)")
      var result = try comparison.run(ProgressBar())
      result.failures = refused + result.failures
      print(CompareRecord.table(result.records))
      if !result.failures.isEmpty { print("\nnot measured:\n" + PolicyFailure.list(result.failures)) }
      if let json {
        try TextFile.write(result.json.pretty, to: json)
        print("written to \(json)")
      }
      // A preset tries what there is; policies that were asked for by name should have run.
      if preset == nil, let failure = result.failures.first {
        var error = failure.error
        error.message = "\(failure.policy): \(error.message)"
        throw error
      }
    }
  }

  private func choice(_ sizes: PresetSizes) throws(KVError) -> (policies: [NamedPolicy], failures: [PolicyFailure]) {
    guard let preset else {
      guard ratios == nil, calibrations == nil else {
        throw KVError(.invalidOption, "--ratios and --calibrations go with --preset")
      }
      return (
        try NamedPolicy.list(
          policies ?? (quick ? NamedPolicy.quickDefaults : NamedPolicy.defaults).joined(separator: ",")), []
      )
    }
    guard policies == nil else { throw KVError(.invalidOption, "--policies and --preset exclude each other") }
    guard let preset = ComparePreset(rawValue: preset) else {
      let names = ComparePreset.allCases.map(\.rawValue).joined(separator: ", ")
      throw KVError(.invalidOption, "--preset is one of \(names); got '\(preset)'")
    }
    let kept = try ratios.map { (text) throws(KVError) in try ComparePreset.ratios(text) }
    return NamedPolicy.attempt(
      preset.texts(ratios: kept ?? ComparePreset.defaultRatios, sizes: sizes, calibrations: calibrations))
  }
}
