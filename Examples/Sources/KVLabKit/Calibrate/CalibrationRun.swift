package import KVCompression
package import KVExperiments
package import ReferenceEngine

/// Which numbers of a model `kvlab calibrate` finds out, from the names of its flags.
package struct CalibrateOptions: Sendable {
  /// `pca`, `rotatekv` or `cskv`.
  package var method: String
  package var centred = true
  package var statistic = ChannelStatistic.magnitude
  package var rotatedHeads = 4
  package var perHead = false
  package var start = FactorStart.samples
  package var refit = false
  package var keyShare = 0.25
  package var valueShare = 0.75
  /// Tokens of samples, and of each piece of text.
  package var tokens = 16384
  package var context = 1024
  /// Ranks of a search that runs the model, for `pca`; nil: none.
  package var rates: RateOptions?

  package init(method: String) { self.method = method }

  package static let methods = ["pca", "rotatekv", "cskv"]

  /// - Throws: `unknownName`, `invalidOption`.
  package func calibration() throws(KVError) -> CalibrationMethod {
    guard rates == nil || method == "pca" else {
      throw KVError(.invalidOption, "ranks are searched for the bases of pca; got '\(method)'")
    }
    guard tokens >= 1, context >= 1 else {
      throw KVError(.invalidOption, "--tokens and --context must be at least 1; got \(tokens) and \(context)")
    }
    switch method {
    case "pca":
      if let rates, rates.pieces < 1 || rates.context < 2 {
        throw KVError(
          .invalidOption,
          "a search of ranks takes at least 1 piece of 2 tokens; got \(rates.pieces) of \(rates.context)")
      }
      return .principalComponents(centred: centred)
    case "rotatekv": return try .channelOrder(by: statistic, rotatedHeads: rotatedHeads, perHead: perHead)
    case "cskv": return try .shrunkChannels(start: start, keys: keyShare, values: valueShare, refit: refit)
    default:
      throw KVError(
        .unknownName, "--method is one of \(Self.methods.joined(separator: ", ")); got '\(method)'")
    }
  }
}

/// A search of each head's rank.
package struct RateOptions: Sendable {
  package var share = 0.75
  package var step = 32
  package var floor = 32
  package var together = 1
  /// Pieces of text, and tokens of each: the first half is compressed, the predictions of the second are compared.
  package var pieces = 2
  package var context = 512

  package init() {}
}

/// A calibration over texts that a model reads, or over a dump of another engine's cache.
package struct CalibrationRun {
  private let options: CalibrateOptions
  private let method: CalibrationMethod

  /// - Throws: `unknownName`, `invalidOption`.
  package init(_ options: CalibrateOptions) throws(KVError) {
    self.options = options
    method = try options.calibration()
  }

  // MARK: A model and texts

  /// Reads pieces of the texts, the first of each, then the second, until there are enough tokens.
  ///
  /// - Throws: `missingInput` when there is no text; what the model and the calibration throw.
  package func run(
    _ engine: Engine, texts: [String], _ progress: any Progress
  ) throws(KVError) -> Calibration {
    let calibrator = try Calibrator(method, shape: engine.model.config.shape)
    if method.wantsProjections { try setProjections(engine.model, calibrator) }
    let encoded = texts.map { engine.tokenizer.encode($0) }
    let pieces = pieces(of: encoded, prefix: engine.promptPrefix)
    guard !pieces.isEmpty else { throw KVError(.missingInput, "a calibration needs a text; all are empty") }
    let trials = options.rates == nil ? 0 : 100
    progress.begin(steps: pieces.count + engine.model.config.layerCount + trials)
    defer { progress.end() }
    let backend = try Backend.cpu()
    for piece in pieces {
      progress.advance("text")
      let session = try InferenceSession(engine.model, policy: Policy(store: .dense(.f32)), backend: backend)
      let observer = Observer(calibrator, method)
      session.observer = observer
      for start in stride(from: 0, to: piece.count, by: 512) {
        _ = try session.forward(Array(piece[start..<min(start + 512, piece.count)]), logits: .none)
      }
    }
    let made = try calibrator.finish { _ in progress.advance("factors") }
    guard let rates = options.rates else { return made }
    let search = try RateSearch(
      made, share: rates.share, step: rates.step, floor: rates.floor, together: rates.together)
    let trial = try RateTrial(
      engine.model, pieces: Self.trialPieces(of: encoded, prefix: engine.promptPrefix, rates), backend)
    var shown = 0
    return try search.run { done in
      while shown < min(trials, Int(done * Double(trials))) {
        progress.advance("ranks")
        shown += 1
      }
    } divergence: { (ranks) throws(KVError) in
      try trial.divergence(ranks)
    }
  }

  /// The first pieces of the texts, one of each as long as there are texts.
  package static func trialPieces(
    of texts: [[Int]], prefix: [Int], _ rates: RateOptions
  ) throws(KVError) -> [[Int]] {
    let own = max(1, rates.context - prefix.count)
    var pieces: [[Int]] = []
    var round = 0
    while pieces.count < rates.pieces {
      let fitting = texts.filter { $0.count >= (round + 1) * own }
      guard !fitting.isEmpty else {
        throw KVError(
          .missingInput,
          "a search of ranks wants \(rates.pieces) pieces of \(rates.context) tokens; the texts give \(pieces.count)")
      }
      for text in fitting where pieces.count < rates.pieces {
        pieces.append(prefix + text[round * own..<(round + 1) * own])
      }
      round += 1
    }
    return pieces
  }

  /// At most `context` tokens each, `tokens` in all.
  package func pieces(of texts: [[Int]], prefix: [Int]) -> [[Int]] {
    var pieces: [[Int]] = []
    var left = options.tokens
    let own = max(1, options.context - prefix.count)
    var round = 0
    while left > 0 {
      let fitting = texts.filter { $0.count > round * own }
      if fitting.isEmpty { break }
      for text in fitting where left > 0 {
        let piece = (prefix + text[round * own..<min((round + 1) * own, text.count)]).prefix(left)
        pieces.append(Array(piece))
        left -= piece.count
      }
      round += 1
    }
    return pieces
  }

  private func setProjections(_ model: LanguageModel, _ calibrator: Calibrator) throws(KVError) {
    for layer in 0..<model.config.layerCount {
      guard !model.normsKeys else {
        throw KVError(
          .unsupported,
          "this model normalises keys behind their projection: its weights do not make the cached keys; start with "
            + "samples (--start samples)")
      }
      let (keys, values) = model.keyAndValueProjections(layer: layer)
      try calibrator.setProjection(layer: layer, .keys, weight: keys.weight, bias: keys.bias)
      try calibrator.setProjection(layer: layer, .values, weight: values.weight, bias: values.bias)
    }
  }

  private final class Observer: ForwardObserver {
    private let calibrator: Calibrator
    private let method: CalibrationMethod

    init(_ calibrator: Calibrator, _ method: CalibrationMethod) {
      self.calibrator = calibrator
      self.method = method
    }

    func layer(_ seen: LayerActivations) throws(KVError) {
      let input = seen.attention
      let keys = try TensorView(
        input.keys.span, heads: input.kvHeads, tokens: input.tokens, dim: input.headDim, layout: .tokenMajor)
      let values = try TensorView(
        input.values.span, heads: input.kvHeads, tokens: input.tokens, dim: input.headDim, layout: .tokenMajor)
      try calibrator.add(layer: seen.layer, keys: keys, values: values, firstPosition: seen.firstPosition)
      if !method.keysBeforeRotation {
        let queries = try TensorView(
          input.queries.span, heads: input.queryHeads, tokens: input.tokens, dim: input.headDim, layout: .tokenMajor)
        try calibrator.add(layer: seen.layer, queries: queries)
      }
      if method.wantsInputs {
        try calibrator.add(
          layer: seen.layer, inputs: seen.normalized, channels: seen.normalized.count / seen.tokens)
      }
    }
  }

  // MARK: A dump

  /// The keys and values of a dump, layer by layer. Layers that it lacks are not calibrated.
  ///
  /// - Throws: `missingInput` for a method that wants weights, or keys before their rotary embedding where the dump says
  ///   nothing about it; what the dump and the calibration throw.
  package func run(_ dump: CacheDump, _ progress: any Progress) throws(KVError) -> Calibration {
    guard options.rates == nil else {
      throw KVError(.missingInput, "a search of ranks runs the model; a dump has none")
    }
    guard !method.wantsProjections else {
      throw KVError(.missingInput, "a dump has no weights; start with samples (--start samples)")
    }
    let calibrator = try Calibrator(method, shape: Application.shape(of: dump, layers: dump.layers))
    progress.begin(steps: 2 * dump.layers.count)
    defer { progress.end() }
    for layer in dump.layers {
      progress.advance("layer \(layer)")
      let held = try dump.layer(layer)
      let keys = try TensorView(
        held.keys.elements.span, heads: held.keys.heads, tokens: held.keys.tokens, dim: held.keys.dim)
      let values = try TensorView(
        held.values.elements.span, heads: held.values.heads, tokens: held.values.tokens, dim: held.values.dim)
      try calibrator.add(layer: layer, keys: keys, values: values, firstPosition: 0)
      if !method.keysBeforeRotation, held.queries.tokens > 0 {
        let queries = try TensorView(
          held.queries.elements.span, heads: held.queries.heads, tokens: held.queries.tokens, dim: held.queries.dim)
        try calibrator.add(layer: layer, queries: queries)
      }
    }
    return try calibrator.finish { _ in progress.advance("factors") }
  }
}
