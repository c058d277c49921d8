import ArgumentParser
import KVCompression
import KVExperiments
import KVLabKit
import ReferenceEngine

struct CalibrateCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "calibrate",
    abstract: "Bases, factors or channel orders of a model, for methods that want a calibration.",
    discussion: """
      The model reads pieces of the texts; what passes through its layers is summed up and written as a calibration, a \
      safetensors file that policy texts name, such as "matryoshka(calibration=\\"pca.safetensors\\")". Instead of a model, \
      --input takes a dump of another engine's cache (see kvlab apply).

      pca        bases per KV head of keys as cached and of values; with --rates search also the rank of each head, found \
      by running the model for every step of every head (the more --together, the fewer rounds)
      rotatekv   the order of key channels by their size, before the rotary embedding
      cskv       factors for all heads of a layer, of keys before their rotary embedding and of values; --start says \
      whether they begin with the samples, the weights, or the weights scaled by their inputs (asvd)

      The packaged texts leave out the first three, which kvlab compare measures on.
      """)

  @Option(help: "pca, rotatekv or cskv.")
  var method: String
  @Option(help: "The safetensors file to write.")
  var output: String
  @Option(help: "Directory of a HuggingFace checkpoint. Default: the packaged model.")
  var model: String?
  @Option(help: "A text, or a directory of .txt files. Default: the packaged texts.")
  var text: String?
  @Option(help: "Texts left out at the front. Default: 3 of the packaged ones, 0 of others.")
  var skip: Int?
  @Option(help: "A dump instead of model and text.")
  var input: String?
  @Option(help: "Tokens to read at most.")
  var tokens = 16384
  @Option(help: "Tokens of each piece of text.")
  var context = 1024
  @Flag(inversion: .prefixedNo, help: "pca: take the mean off first.")
  var centred = true
  @Option(help: "pca: ranks of heads by variance (when the file is used), or by a search that runs the model (search).")
  var rates = "variance"
  @Option(help: "pca with --rates search: share of all channels that stay.")
  var share = 0.75
  @Option(help: "pca with --rates search: channels a head gives up at a time.")
  var step = 32
  @Option(help: "pca with --rates search: channels that every head keeps.")
  var floor = 32
  @Option(help: "pca with --rates search: heads that give channels up in one round; 1 is the paper's algorithm.")
  var together = 1
  @Option(help: "pca with --rates search: pieces of text the model reads for every trial.")
  var trialPieces = 2
  @Option(help: "pca with --rates search: tokens of each, half of them compressed.")
  var trialContext = 512
  @Option(help: "rotatekv: channels are ordered by magnitude or by sum.")
  var statistic = "magnitude"
  @Option(help: "rotatekv: heads that a Walsh-Hadamard transform mixes first, 0 for none.")
  var rotatedHeads = 4
  @Flag(help: "rotatekv: an order for each head, not one for the layer.")
  var perHead = false
  @Option(help: "cskv: samples, weights or asvd.")
  var start = "samples"
  @Flag(help: "cskv: fit what restores rows by least squares; the factors then have the ranks below.")
  var refit = false
  @Option(help: "cskv with --refit: latent channels of keys as a share.")
  var keyShare = 0.25
  @Option(help: "cskv with --refit: latent channels of values as a share.")
  var valueShare = 0.75

  func run() throws {
    try reportingErrors { () throws(KVError) in
      let run = try CalibrationRun(options())
      let made: Calibration
      if let input {
        guard model == nil, text == nil else {
          throw KVError(.invalidOption, "--input takes the place of --model and --text")
        }
        made = try run.run(CacheDump(path: input), ProgressBar())
      } else {
        let left = skip ?? (text == nil ? 3 : 0)
        guard left >= 0 else { throw KVError(.invalidOption, "--skip must be at least 0; got \(left)") }
        let texts = try PackagedFiles.readTexts(at: PackagedFiles.texts(or: text)).dropFirst(left)
        made = try run.run(Engine(directory: PackagedFiles.model(or: model)), texts: Array(texts), ProgressBar())
      }
      try made.write(to: output)
      print(
        "\(output): \(made.tensors.count) tensors from \(made.metadata["tokens"] ?? "0") tokens, \(made.checksumText)")
    }
  }

  private func options() throws(KVError) -> CalibrateOptions {
    var options = CalibrateOptions(method: method)
    options.tokens = tokens
    options.context = context
    options.centred = centred
    options.rotatedHeads = rotatedHeads
    options.perHead = perHead
    options.refit = refit
    options.keyShare = keyShare
    options.valueShare = valueShare
    switch rates {
    case "variance": break
    case "search":
      var search = RateOptions()
      search.share = share
      search.step = step
      search.floor = floor
      search.together = together
      search.pieces = trialPieces
      search.context = trialContext
      options.rates = search
    default: throw KVError(.unknownName, "--rates is variance or search; got '\(rates)'")
    }
    guard let statistic = ChannelStatistic(rawValue: statistic) else {
      throw KVError(.unknownName, "--statistic is magnitude or sum; got '\(statistic)'")
    }
    guard let start = FactorStart(rawValue: start) else {
      throw KVError(.unknownName, "--start is samples, weights or asvd; got '\(start)'")
    }
    options.statistic = statistic
    options.start = start
    return options
  }
}
