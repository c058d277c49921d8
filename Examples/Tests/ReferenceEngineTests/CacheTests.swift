import KVCompression
import KVExperiments
import ReferenceEngine
import Testing

/// The engine over the library's caches.
@Suite struct CacheTests {
  private func session(_ model: LanguageModel, _ policy: String) throws -> InferenceSession {
    try InferenceSession(model, policy: PolicyRegistry.standard.policy(policy), backend: .cpu())
  }

  @Test(arguments: ArchitectureTests.cases)
  func exactCacheIsFullAttention(_ item: ArchitectureTests.Case) throws {
    let model = try item.make().model.load()
    let tokens = ArchitectureTests.tokens
    let full = try InferenceSession(model, attention: FullAttention(model.config.shape))
    let expected = try full.forward(tokens, logits: .all)
    for chunk in [1, 4, 13] {
      let session = try session(model, "f32")
      var logits: [Float] = []
      for start in stride(from: 0, to: tokens.count, by: chunk) {
        logits += try session.forward(Array(tokens.dropFirst(start).prefix(chunk)), logits: .all)
      }
      #expect(rowError(logits, expected, width: TinyModel.vocabulary) <= 1e-5, "chunks of \(chunk)")
    }
  }

  @Test func decodingContinuesAPrompt() throws {
    let model = try TinyModel("llama").load()
    let tokens = ArchitectureTests.tokens
    let whole = try session(model, "f32").forward(tokens, logits: .last)
    let session = try session(model, "f32")
    var logits = try session.prefill(Array(tokens.prefix(5)), chunk: 2)
    for token in tokens.dropFirst(5) { logits = try session.decode(token) }
    #expect(relativeError(logits, whole) <= 1e-5)
  }

  /// A fork of the cache is a session of its own: what one continues, the other does not see.
  @Test func forksAreIndependent() throws {
    let model = try TinyModel("llama").load()
    let cache = try KVCache(shape: model.config.shape, policy: Policies.exact, backend: .cpu())
    let session = try InferenceSession(model, attention: CacheAttention(cache))
    _ = try session.prefill([0, 4, 8])
    let fork = try InferenceSession(model, attention: CacheAttention(cache.fork()))
    _ = try session.decode(30)
    #expect(fork.position == 3 && session.position == 4)
    let straight = try self.session(model, "f32")
    _ = try straight.prefill([0, 4, 8])
    #expect(try fork.decode(9) == straight.decode(9))
  }

  /// Compressed caches on the reference model: fewer rows or bytes, and text that is still text.
  @Test(arguments: ["snapkv(budget=96,window=16)", "kivi(bits=4)", "streamingllm(budget=96)"])
  func compressedGeneration(_ policy: String) throws {
    let engine = try Reference.engine
    let text = String(repeating: "The cache holds keys and values for every token of the prompt. ", count: 20)
    let policy = try PolicyRegistry.standard.policy(policy)
    var streamed = ""
    let (result, session) = try engine.generate(
      text, policy: policy, backend: .cpu(), GenerationOptions(maximumTokens: 12)
    ) { piece in
      streamed += piece
      return true
    }
    #expect(engine.tokenizer.decode(result.tokens, skippingSpecial: true) == streamed)
    let cache = try #require(session.attention as? CacheAttention).cache
    let prompt = engine.encodePrompt(text).count
    #expect(session.position >= prompt)
    let dense = try InferenceSession(engine.model, policy: Policies.exact, backend: .cpu())
    _ = try dense.prefill(engine.encodePrompt(text))
    let full = try #require(dense.attention as? CacheAttention).cache
    #expect(cache.bytes.total < full.bytes.total)
  }
}
