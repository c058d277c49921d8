package import KVCompression
internal import KVExperiments
package import ReferenceEngine

/// A prompt continued under a policy, with what it cost.
package struct Generation {
  private let policy: NamedPolicy
  private let prompt: String
  private var options: GenerationOptions
  package var threads: Int?

  package init(policy: NamedPolicy, prompt: String, options: GenerationOptions) {
    self.policy = policy
    self.prompt = prompt
    self.options = options
  }

  /// - Parameter onText: gets the text as it comes, prompt not included.
  package func run(_ engine: Engine, onText: (String) -> Void) throws(KVError) -> GenerationReport {
    let backend = try Backend.cpu(threads: threads)
    let cache = try KVCache(shape: engine.model.config.shape, policy: policy.policy, backend: backend)
    let session = try InferenceSession(engine.model, attention: CacheAttention(cache))
    let tokens = engine.encodePrompt(prompt)
    var options = options
    if options.stopIDs.isEmpty { options.stopIDs = Set(engine.model.config.eosTokenIDs) }
    let clock = ContinuousClock()
    var start = clock.now
    let logits = try session.prefill(tokens)
    let prefill = start.duration(to: clock.now).seconds

    var decoder = StreamingDecoder(engine.tokenizer)
    var text = ""
    start = clock.now
    let result = try session.generate(after: logits, options) { token in
      let piece = decoder.append(token)
      text += piece
      if !piece.isEmpty { onText(piece) }
      return true
    }
    let decode = start.duration(to: clock.now).seconds
    let rest = decoder.finish()
    text += rest
    if !rest.isEmpty { onText(rest) }
    let seen = session.position
    return GenerationReport(
      policy: policy, text: text, promptTokens: tokens.count, generatedTokens: result.tokens.count,
      prefillTokensPerSecond: Double(tokens.count) / prefill,
      decodeTokensPerSecond: Double(max(seen - tokens.count, 0)) / decode, bytes: cache.bytes.total,
      bytesPerToken: Double(cache.bytes.total) / Double(seen),
      ratio: try FidelityMetrics.compressionRatio(
        bytes: cache.bytes.total, elements: seen * cache.shape.elementsPerToken),
      peakCacheBytes: backend.memory.peakBytes)
  }
}

/// What a generation gave and cost.
package struct GenerationReport: Sendable {
  package let policy: NamedPolicy
  package let text: String
  package let promptTokens: Int
  package let generatedTokens: Int
  package let prefillTokensPerSecond: Double
  package let decodeTokensPerSecond: Double
  package let bytes: Int
  package let bytesPerToken: Double
  package let ratio: Double
  package let peakCacheBytes: Int

  package var summary: String {
    "\(policy.spec)\n\(promptTokens) + \(generatedTokens) tokens; cache \(Print.bytes(bytes)), "
      + "\(Print.fixed(bytesPerToken, 0)) bytes a token, ratio \(Print.fixed(ratio, 2)) to f16, peak "
      + "\(Print.bytes(peakCacheBytes)); prefill \(Print.fixed(prefillTokensPerSecond, 0)) and decode "
      + "\(Print.fixed(decodeTokensPerSecond, 0)) tokens/s"
  }

  package var json: JSONText {
    .object([
      .init("policy", .string(policy.name)), .init("spec", .string(policy.spec)), .init("text", .string(text)),
      .init("promptTokens", .integer(promptTokens)), .init("generatedTokens", .integer(generatedTokens)),
      .init("prefillTokensPerSecond", .number(prefillTokensPerSecond)),
      .init("decodeTokensPerSecond", .number(decodeTokensPerSecond)), .init("bytes", .integer(bytes)),
      .init("bytesPerToken", .number(bytesPerToken)), .init("ratio", .number(ratio)),
      .init("peakCacheBytes", .integer(peakCacheBytes)),
    ])
  }
}
