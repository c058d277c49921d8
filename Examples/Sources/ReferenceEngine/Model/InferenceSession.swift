public import KVCompression

/// One sequence: a model, a place for its keys and values, and the position reached. Used from one thread at a time.
public final class InferenceSession {
  /// Which rows of logits a forward pass computes. The head of a large vocabulary costs as much as several layers.
  public enum LogitRows: Sendable { case none, last, all }

  public let model: LanguageModel
  public let attention: any AttentionProvider
  public weak var observer: (any ForwardObserver)?
  var workspace: Workspace

  /// - Throws: `shapeMismatch` when layers of the provider have seen different numbers of tokens.
  public init(_ model: LanguageModel, attention: any AttentionProvider) throws(KVError) {
    self.model = model
    self.attention = attention
    workspace = Workspace(model.config)
    for layer in 1..<max(model.config.layerCount, 1) {
      let (first, other) = (attention.tokensSeen(layer: 0), attention.tokensSeen(layer: layer))
      guard first == other else {
        throw KVError(.shapeMismatch, "layer 0 has seen \(first) tokens and this one \(other)", layer: layer)
      }
    }
  }

  /// A session over a new compressed cache.
  public convenience init(
    _ model: LanguageModel, policy: any CompressionPolicy, backend: Backend
  ) throws(KVError) {
    let cache = try KVCache(shape: model.config.shape, policy: policy, backend: backend)
    try self.init(model, attention: CacheAttention(cache))
  }

  /// The position of the next token.
  public var position: Int { attention.tokensSeen(layer: 0) }

  /// Runs a prompt in chunks and tells the cache that it is complete, where its policy compresses.
  ///
  /// - Parameters:
  ///   - chunk: tokens per forward pass; bounds the memory of activations.
  ///   - finish: false when more of the prompt follows; call ``finishPrefill()`` after it then.
  /// - Returns: the logits after the last token, `[vocabulary]`.
  public func prefill(_ tokens: [Int], chunk: Int = 512, finish: Bool = true) throws(KVError) -> [Float] {
    try check(tokens)
    guard !tokens.isEmpty else { throw KVError(.invalidOption, "a prompt holds at least 1 token; got 0") }
    guard chunk >= 1 else { throw KVError(.invalidOption, "a chunk holds at least 1 token; got \(chunk)") }
    var logits: [Float] = []
    for start in stride(from: 0, to: tokens.count, by: min(chunk, tokens.count)) {
      let end = min(start + min(chunk, tokens.count), tokens.count)
      logits = try forward(Array(tokens[start..<end]), logits: end == tokens.count ? .last : .none)
    }
    if finish { try finishPrefill() }
    return logits
  }

  /// The prompt is complete: the cache's policy compresses.
  public func finishPrefill() throws(KVError) { try attention.finishPrefill() }

  /// Runs one token; the logits of the next, `[vocabulary]`.
  public func decode(_ token: Int) throws(KVError) -> [Float] { try forward([token], logits: .last) }

  /// Natural-log likelihood lost per token: element i belongs to `tokens[i + 1]` given everything up to `tokens[i]`.
  /// The tokens are appended to the sequence; with `after`, the logits that precede `tokens[0]`, its loss comes first.
  ///
  /// - Parameter chunk: tokens per forward pass. 1 reads the text as decoding would, so that the policy acts between.
  public func losses(of tokens: [Int], after logits: [Float]? = nil, chunk: Int = 256) throws(KVError) -> [Float] {
    try check(tokens)
    guard chunk >= 1 else { throw KVError(.invalidOption, "a chunk holds at least 1 token; got \(chunk)") }
    let vocabulary = model.config.vocabularySize
    if let logits, logits.count != vocabulary {
      throw KVError(.shapeMismatch, "logits of \(vocabulary) tokens expected; got \(logits.count)")
    }
    var losses: [Float] = []
    if let logits, let first = tokens.first {
      losses.append(Self.loss(logits, row: 0, vocabulary: vocabulary, target: first))
    }
    var start = 0
    while start < tokens.count {
      let end = tokens.count - start > chunk ? start + chunk : tokens.count
      let logits = try forward(Array(tokens[start..<end]), logits: .all)
      for index in start..<min(end, tokens.count - 1) {
        losses.append(
          Self.loss(logits, row: index - start, vocabulary: vocabulary, target: tokens[index + 1]))
      }
      start = end
    }
    return losses
  }

  /// - Parameter target: below `vocabulary`, which the callers have checked.
  private static func loss(_ logits: [Float], row: Int, vocabulary: Int, target: Int) -> Float {
    logits.withUnsafeBufferPointer { all in
      let row = UnsafeBufferPointer(rebasing: all[row * vocabulary..<(row + 1) * vocabulary])
      return Elementwise.negativeLogLikelihood(row, target: target)
    }
  }

  func check(_ tokens: [Int]) throws(KVError) {
    let vocabulary = model.config.vocabularySize
    for (index, token) in tokens.enumerated() where !(0..<vocabulary).contains(token) {
      throw KVError(
        .invalidOption, "token \(token) at index \(index) is not in the vocabulary of \(vocabulary)",
        position: position + index)
    }
  }
}
