import KVCompression
import KVExperiments
import ReferenceEngine
import Testing

@Suite struct ArchitectureTests {
  struct Case: CustomTestStringConvertible, Sendable {
    let name: String
    let make: @Sendable () -> PlainModel
    var testDescription: String { name }
  }

  static let none = [Int?](repeating: nil, count: TinyModel.layers)
  static let cases: [Case] = [
    Case(name: "llama") { PlainModel(model: TinyModel("llama"), windows: none) },
    Case(name: "llama tied, with biases") {
      let extra = ["tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true]
      return PlainModel(model: TinyModel("llama", extra: extra), windows: none)
    },
    Case(name: "llama, linear scaling, half of the channels turn") {
      let extra: [String: Any] = [
        "rope_scaling": ["type": "linear", "factor": 4.0] as [String: Any], "partial_rotary_factor": 0.5,
      ]
      return PlainModel(
        model: TinyModel("llama", extra: extra), windows: none, linearFactor: 4, rotaryDim: TinyModel.headDim / 2)
    },
    Case(name: "mistral, window 5") {
      PlainModel(model: TinyModel("mistral", extra: ["sliding_window": 5]), windows: [5, 5, 5])
    },
    Case(name: "qwen2") {
      let extra: [String: Any] = ["sliding_window": 5, "use_sliding_window": false]
      return PlainModel(model: TinyModel("qwen2", extra: extra), windows: none)
    },
    Case(name: "qwen2, window in the upper layers") {
      let extra: [String: Any] = ["sliding_window": 4, "use_sliding_window": true, "max_window_layers": 1]
      return PlainModel(model: TinyModel("qwen2", extra: extra), windows: [nil, 4, 4])
    },
    Case(name: "qwen3") { PlainModel(model: TinyModel("qwen3"), windows: none) },
    Case(name: "qwen3, layer types") {
      let extra: [String: Any] = [
        "sliding_window": 3, "use_sliding_window": true,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
      ]
      return PlainModel(model: TinyModel("qwen3", extra: extra), windows: [nil, 3, nil])
    },
  ]

  static let tokens = [7, 3, 49, 0, 12, 12, 30, 5, 41, 22, 9, 1, 17]

  private func session(_ model: LanguageModel) throws -> InferenceSession {
    try InferenceSession(model, attention: FullAttention(model.config.shape))
  }

  @Test(arguments: cases)
  func agreesWithTheDefinition(_ item: Case) throws {
    let plain = item.make()
    let model = try plain.model.load()
    #expect(model.config.shape.layers.map(\.slidingWindow) == plain.windows)
    let expected = plain.logits(Self.tokens).flatMap { $0.map { Float($0) } }
    let logits = try session(model).forward(Self.tokens, logits: .all)
    #expect(rowError(logits, expected, width: TinyModel.vocabulary) <= 1e-5)
  }

  /// At once, in chunks of several sizes and token by token: the same to rounding.
  @Test(arguments: cases)
  func chunksDoNotMatter(_ item: Case) throws {
    let model = try item.make().model.load()
    let whole = try session(model).forward(Self.tokens, logits: .all)
    for chunk in [1, 2, 5, 12] {
      let session = try session(model)
      var logits: [Float] = []
      for start in stride(from: 0, to: Self.tokens.count, by: chunk) {
        logits += try session.forward(Array(Self.tokens.dropFirst(start).prefix(chunk)), logits: .all)
      }
      #expect(rowError(logits, whole, width: TinyModel.vocabulary) <= 1e-5, "chunks of \(chunk)")
      #expect(session.position == Self.tokens.count)
      let prefilled = try self.session(model).prefill(Self.tokens, chunk: chunk)
      #expect(relativeError(prefilled, whole.suffix(TinyModel.vocabulary)) <= 1e-5, "prefill by \(chunk)")
    }
  }

  @Test(arguments: [1, 3]) func filesOfEveryType(shards: Int) throws {
    let tiny = TinyModel("qwen2")
    let exact = try session(tiny.load()).forward(Self.tokens)
    #expect(try session(tiny.load(shards: shards)).forward(Self.tokens) == exact)
    // 11 and 8 significant bits of each weight.
    #expect(relativeError(try session(tiny.load(as: .f16, shards: shards)).forward(Self.tokens), exact) < 3e-3)
    #expect(relativeError(try session(tiny.load(as: .bf16, shards: shards)).forward(Self.tokens), exact) < 3e-2)
  }

  @Test func lossesFollowTheLogits() throws {
    let model = try TinyModel("llama").load()
    let all = try session(model).losses(of: Self.tokens, chunk: 4)
    #expect(all.count == Self.tokens.count - 1)
    let split = try session(model)
    let logits = try split.prefill(Array(Self.tokens.prefix(6)))
    let rest = try split.losses(of: Array(Self.tokens.dropFirst(6)), after: logits, chunk: 1)
    #expect(relativeError(rest, all.suffix(rest.count)) <= 1e-5)
    #expect(rest.count == Self.tokens.count - 6)
  }

  @Test func generationStopsAndRepeats() throws {
    let model = try TinyModel("llama").load()
    func run(_ options: GenerationOptions, cancelAt limit: Int = .max) throws -> GenerationResult {
      let session = try session(model)
      let logits = try session.prefill([0, 5, 9])
      var seen = 0
      return try session.generate(after: logits, options) { _ in
        seen += 1
        return seen < limit
      }
    }
    let greedy = try run(GenerationOptions(maximumTokens: 12))
    #expect(greedy.tokens.count == 12 && greedy.end == .maximumTokens)
    let stop = greedy.tokens[3]
    let first = greedy.tokens.firstIndex(of: stop) ?? 0
    let stopped = try run(GenerationOptions(maximumTokens: 12, stopIDs: [stop]))
    #expect(stopped.end == .stop(stop) && stopped.tokens == Array(greedy.tokens.prefix(first)))
    #expect(try run(GenerationOptions(maximumTokens: 12), cancelAt: 2).end == .cancelled)
    let warm = SamplingOptions(temperature: 1.5, topP: 0.9, seed: 4)
    let drawn = try run(GenerationOptions(maximumTokens: 12, sampling: warm))
    #expect(drawn == (try run(GenerationOptions(maximumTokens: 12, sampling: warm))))
    #expect(try run(GenerationOptions(maximumTokens: 0)).tokens.isEmpty)
  }

  @Test func samplingFollowsProbabilities() throws {
    var sampler = try Sampler(SamplingOptions(temperature: 1, topP: 0.8, seed: 9))
    var counts = [0, 0, 0, 0]
    // Probabilities 0.5, 0.25, 0.15, 0.1: top-p 0.8 keeps three.
    let logits: [Float] = [-0.6931472, -1.3862944, -1.89712, -2.3025851]
    for _ in 0..<4000 { counts[try sampler.next(logits)] += 1 }
    #expect(counts[3] == 0)
    #expect(abs(Double(counts[0]) / 4000 - 0.5 / 0.9) < 0.03)
    #expect(try Sampler.argmax([1, 3, 3]) == 1)
    #expect(throws: KVError.self) { try Sampler.argmax([1, .nan]) }
    #expect(throws: KVError.self) { try Sampler.argmax([]) }
    #expect(throws: KVError.self) { try Sampler(SamplingOptions(temperature: -1)) }
    #expect(throws: KVError.self) { try Sampler(SamplingOptions(topP: 0)) }
  }

  @Test func wrongCallsAreErrors() throws {
    let model = try TinyModel("llama").load()
    let session = try session(model)
    #expect(throws: KVError.self) { try session.forward([]) }
    #expect(throws: KVError.self) { try session.forward([50]) }
    #expect(throws: KVError.self) { try session.forward([-1]) }
    #expect(throws: KVError.self) { try session.prefill([]) }
    #expect(throws: KVError.self) { try session.prefill([1], chunk: 0) }
    #expect(throws: KVError.self) { try session.losses(of: [1, 2], after: [0]) }
    #expect(session.position == 0)
  }
}
