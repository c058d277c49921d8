public import KVCompression

/// A model with its tokenizer: what a HuggingFace checkpoint directory holds.
public struct Engine: Sendable {
  public let model: LanguageModel
  public let tokenizer: Tokenizer
  /// Tokens before every text: from the tokenizer's template, else the beginning-of-text token of Llama and Mistral.
  public let promptPrefix: [Int]

  /// Loads config.json, the weights, tokenizer.json and, where present, tokenizer_config.json.
  ///
  /// - Throws: see ``LanguageModel/init(directory:contextLength:)`` and ``Tokenizer/init(path:)``; `corruptFile` when
  ///   the tokenizer has ids beyond the model's vocabulary.
  public init(directory: String, contextLength: Int? = nil) throws(KVError) {
    model = try LanguageModel(directory: directory, contextLength: contextLength)
    tokenizer = try Tokenizer(path: directory + "/tokenizer.json")
    guard tokenizer.count <= model.config.vocabularySize else {
      throw KVError(
        .corruptFile,
        "\(directory): tokenizer.json has ids up to \(tokenizer.count - 1), config.json a vocab_size of "
          + "\(model.config.vocabularySize)")
    }
    promptPrefix = try Self.prefix(directory, tokenizer, model.config)
  }

  private static func prefix(
    _ directory: String, _ tokenizer: Tokenizer, _ config: ModelConfig
  ) throws(KVError) -> [Int] {
    if let template = tokenizer.template { return template.prefix }
    let path = directory + "/tokenizer_config.json"
    let isLlama = config.architecture == .llama || config.architecture == .mistral
    var adds = isLlama
    if FileReading.exists(path) {
      adds = try FileReading.json(at: path, atMost: 1 << 26).bool("add_bos_token", default: isLlama)
    }
    return adds ? config.bosTokenID.map { [$0] } ?? [] : []
  }

  /// Token ids of a prompt, prefix included.
  public func encodePrompt(_ text: String) -> [Int] { promptPrefix + tokenizer.encode(text) }

  /// Runs a prompt over a new cache and continues it.
  ///
  /// - Parameters:
  ///   - options: `stopIDs` empty: the model's end-of-text tokens.
  ///   - onText: receives text as it is generated, whole characters at a time; returning false ends it.
  /// - Returns: the generated tokens and the session, whose cache can be inspected or continued.
  public func generate(
    _ prompt: String, policy: any CompressionPolicy, backend: Backend, _ options: GenerationOptions = .init(),
    chunk: Int = 512, onText: (String) -> Bool = { _ in true }
  ) throws(KVError) -> (result: GenerationResult, session: InferenceSession) {
    let session = try InferenceSession(model, policy: policy, backend: backend)
    let logits = try session.prefill(encodePrompt(prompt), chunk: chunk)
    var options = options
    if options.stopIDs.isEmpty { options.stopIDs = Set(model.config.eosTokenIDs) }
    var decoder = StreamingDecoder(tokenizer)
    let result = try session.generate(after: logits, options) { token in
      let text = decoder.append(token)
      return text.isEmpty || onText(text)
    }
    let rest = decoder.finish()
    if !rest.isEmpty { _ = onText(rest) }
    return (result, session)
  }
}
