public import KVCompression

extension ModelConfig {
  /// Reads a HuggingFace `config.json`.
  ///
  /// - Parameter contextLength: the longest context in tokens that will be used; only a dynamic rotary scaling depends
  ///   on it. Nil: `max_position_embeddings`.
  /// - Throws: `inputOutput`; `corruptFile` for a missing or malformed value; `unsupported` for an architecture or
  ///   option this engine lacks. The message names the file, the key, what was expected and what came.
  public init(path: String, contextLength: Int? = nil) throws(KVError) {
    try self.init(FileReading.json(at: path, atMost: 1 << 24), contextLength: contextLength)
  }

  /// The same from the bytes of a file called `file` in messages.
  public init(json bytes: [UInt8], file: String, contextLength: Int? = nil) throws(KVError) {
    try self.init(JSONObject(JSONParser.parse(bytes, file: file), file: file), contextLength: contextLength)
  }

  init(_ json: JSONObject, contextLength: Int?) throws(KVError) {
    let architecture = try Self.architecture(json)
    self.architecture = architecture
    try Self.refuseUnsupported(json)
    vocabularySize = try json.integer("vocab_size", in: SizeLimit.vocabulary)
    hiddenSize = try json.integer("hidden_size", in: SizeLimit.hidden)
    intermediateSize = try json.integer("intermediate_size", in: SizeLimit.intermediate)
    layerCount = try json.integer("num_hidden_layers", in: SizeLimit.layers)
    queryHeads = try json.integer("num_attention_heads", in: SizeLimit.heads)
    kvHeads = try json.optionalInteger("num_key_value_heads", in: SizeLimit.heads) ?? queryHeads
    guard queryHeads % kvHeads == 0 else {
      throw json.failure(
        "num_key_value_heads", expected: "a divisor of num_attention_heads \(queryHeads)", got: .integer(kvHeads))
    }
    headDim = try Self.headDim(json, hiddenSize: hiddenSize, queryHeads: queryHeads)
    guard queryHeads * headDim <= SizeLimit.intermediate.upperBound else {
      throw json.failure(
        "num_attention_heads", expected: "at most \(SizeLimit.intermediate.upperBound) channels of all heads together",
        got: .integer(queryHeads))
    }
    maxPositions = try json.optionalInteger("max_position_embeddings", in: SizeLimit.positions) ?? 2048
    slidingWindows = try Self.slidingWindows(json, architecture: architecture, layerCount: layerCount)
    normEpsilon = Float(try json.optionalNumber("rms_norm_eps", in: 1e-12...1) ?? 1e-6)
    rotary = try RotaryConfig.read(json, headDim: headDim, maxPositions: maxPositions, contextLength: contextLength)

    tiedEmbeddings = try json.bool("tie_word_embeddings", default: false)
    let attentionBias = try json.bool("attention_bias", default: false)
    queryKeyValueBias = architecture == .qwen2 || attentionBias
    outputBias = architecture != .qwen2 && attentionBias
    mlpBias = try json.bool("mlp_bias", default: false)
    queryKeyNorm = architecture == .qwen3
    bosTokenID = try json.integerOrList("bos_token_id", in: SizeLimit.tokenID).first
    eosTokenIDs = try json.integerOrList("eos_token_id", in: SizeLimit.tokenID)
    for (key, ids) in [("bos_token_id", bosTokenID.map { [$0] } ?? []), ("eos_token_id", eosTokenIDs)] {
      for id in ids where id >= vocabularySize {
        throw json.failure(key, expected: "below vocab_size \(vocabularySize)", got: .integer(id))
      }
    }
  }

  private static func architecture(_ json: JSONObject) throws(KVError) -> Architecture {
    let supported = Architecture.allCases.map(\.rawValue).joined(separator: ", ")
    if let type = try json.optionalString("model_type") {
      guard let architecture = Architecture(rawValue: type) else {
        throw json.unsupported("model_type", "\"\(type)\"", supported: supported)
      }
      return architecture
    }
    guard case .string(let name)? = try json.optionalArray("architectures")?.first else {
      throw json.failure("model_type", expected: "one of \(supported)", got: nil)
    }
    guard let match = Architecture.allCases.first(where: { name.lowercased() == "\($0.rawValue)forcausallm" }) else {
      throw json.unsupported("architectures", "\"\(name)\"", supported: supported)
    }
    return match
  }

  /// Options that change the arithmetic and that this engine does not have: running on without them would be a model
  /// that answers, wrongly.
  private static func refuseUnsupported(_ json: JSONObject) throws(KVError) {
    let activation = try json.optionalString("hidden_act") ?? "silu"
    guard activation == "silu" || activation == "swish" else {
      throw json.unsupported("hidden_act", "\"\(activation)\"", supported: "silu")
    }
    if let quantization = try json.value("quantization_config") {
      throw json.unsupported("quantization_config", quantization.summary, supported: "f32, f16 and bf16 weights")
    }
    for key in ["num_local_experts", "num_experts", "attn_logit_softcapping", "final_logit_softcapping"] {
      if let value = try json.value(key) {
        throw json.unsupported(key, value.summary, supported: "models without it")
      }
    }
  }

  private static func headDim(_ json: JSONObject, hiddenSize: Int, queryHeads: Int) throws(KVError) -> Int {
    if let headDim = try json.optionalInteger("head_dim", in: SizeLimit.headDim) { return headDim }
    guard hiddenSize % queryHeads == 0, SizeLimit.headDim.contains(hiddenSize / queryHeads) else {
      throw json.failure(
        "num_attention_heads", expected: "a divisor of hidden_size \(hiddenSize) where head_dim is absent",
        got: .integer(queryHeads))
    }
    return hiddenSize / queryHeads
  }

  /// `layer_types` decides where present; else Mistral slides in every layer, and Qwen slides in the layers from
  /// `max_window_layers` up when `use_sliding_window` says so. Llama never does.
  private static func slidingWindows(
    _ json: JSONObject, architecture: Architecture, layerCount: Int
  ) throws(KVError) -> [Int?] {
    let full = [Int?](repeating: nil, count: layerCount)
    guard architecture != .llama else { return full }
    guard let window = try json.optionalInteger("sliding_window", in: SizeLimit.positions) else { return full }
    let isQwen = architecture != .mistral
    let slides = try json.bool("use_sliding_window", default: false)
    if isQwen, !slides { return full }
    if let types = try json.optionalArray("layer_types") {
      return try layerTypes(types, window: window, json: json, layerCount: layerCount)
    }
    guard isQwen else { return Array(repeating: window, count: layerCount) }
    let firstSliding = try json.optionalInteger("max_window_layers", in: 0...SizeLimit.layers.upperBound) ?? 28
    return (0..<layerCount).map { $0 >= firstSliding ? window : nil }
  }

  private static func layerTypes(
    _ types: [JSONValue], window: Int, json: JSONObject, layerCount: Int
  ) throws(KVError) -> [Int?] {
    guard types.count == layerCount else {
      throw json.failure("layer_types", expected: "a list of \(layerCount), one a layer", got: .array(types))
    }
    var windows: [Int?] = []
    for type in types {
      switch type {
      case .string("full_attention"): windows.append(nil)
      case .string("sliding_attention"): windows.append(window)
      default: throw json.unsupported("layer_types", type.summary, supported: "full_attention and sliding_attention")
      }
    }
    return windows
  }
}
