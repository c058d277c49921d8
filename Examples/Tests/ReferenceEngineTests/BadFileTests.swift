import Foundation
import KVCompression
import KVExperiments
import ReferenceEngine
import Testing

/// Files that are wrong in one place each: an error of the library's type that says where, and never a crash.
@Suite struct BadFileTests {
  static let badConfigs: [(key: String, json: String, code: KVError.Code)] = [
    ("model_type", "null", .corruptFile), ("model_type", "3", .corruptFile),
    ("model_type", "\"gemma3\"", .unsupported), ("vocab_size", "null", .corruptFile),
    ("vocab_size", "0", .corruptFile), ("vocab_size", "\"50\"", .corruptFile), ("vocab_size", "50.5", .corruptFile),
    ("vocab_size", "9223372036854775807", .corruptFile), ("vocab_size", "99999999999999999999", .corruptFile),
    ("hidden_size", "-32", .corruptFile), ("hidden_size", "1e400", .corruptFile), ("hidden_size", "[]", .corruptFile),
    ("intermediate_size", "false", .corruptFile), ("num_hidden_layers", "1000000", .corruptFile),
    ("num_attention_heads", "0", .corruptFile), ("num_attention_heads", "4097", .corruptFile),
    ("num_key_value_heads", "3", .corruptFile), ("num_key_value_heads", "-1", .corruptFile),
    ("head_dim", "100000", .corruptFile), ("head_dim", "15", .corruptFile), ("hidden_act", "\"gelu\"", .unsupported),
    ("max_position_embeddings", "0", .corruptFile), ("rms_norm_eps", "-1", .corruptFile),
    ("rms_norm_eps", "\"x\"", .corruptFile), ("rope_theta", "0", .corruptFile), ("rope_theta", "true", .corruptFile),
    ("rope_scaling", "5", .corruptFile), ("rope_scaling", "{\"type\":\"longrope\"}", .unsupported),
    ("rope_scaling", "{\"type\":\"linear\"}", .corruptFile),
    ("rope_scaling", "{\"type\":\"linear\",\"factor\":0}", .corruptFile),
    ("rope_scaling", "{\"rope_type\":\"llama3\",\"factor\":8}", .corruptFile),
    ("rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":4,\"beta_fast\":1,\"beta_slow\":2}", .corruptFile),
    ("partial_rotary_factor", "2", .corruptFile), ("tie_word_embeddings", "1", .corruptFile),
    ("attention_bias", "\"no\"", .corruptFile), ("eos_token_id", "50", .corruptFile),
    ("eos_token_id", "[1, -2]", .corruptFile), ("eos_token_id", "\"</s>\"", .corruptFile),
    ("bos_token_id", "-1", .corruptFile), ("quantization_config", "{\"bits\":4}", .unsupported),
    ("sliding_window", "0", .corruptFile), ("layer_types", "[\"full_attention\"]", .corruptFile),
    ("layer_types", "[\"a\",\"b\",\"c\"]", .unsupported),
  ]

  @Test(arguments: badConfigs.indices)
  func configuration(_ index: Int) throws {
    let (key, json, code) = Self.badConfigs[index]
    var config = TinyModel("mistral", extra: ["sliding_window": 8]).config
    config[key] = "@"
    let text = String(decoding: try JSONSerialization.data(withJSONObject: config), as: UTF8.self)
      .replacingOccurrences(of: "\"\(key)\":\"@\"", with: "\"\(key)\":\(json)")
    let error = try #require(throws: KVError.self) { try ModelConfig(json: Array(text.utf8), file: "config.json") }
    #expect(error.code == code, "\(error)")
    #expect(error.message.contains("config.json"))
  }

  @Test(arguments: [
    "", "{", "[]", "null", "{\"a\":1}{", "{\"model_type\":\"llama\",\"model_type\":\"llama\"}", "\u{1}", "{\"a\":tru}",
    "{\"a\":\"\\ud800\"}", "{\"a\":01}", "{\"a\":1.}", "{\"a\":\"\n\"}", "{\"a\" 1}", "[1,]", "{\"model_type\":}",
  ])
  func malformedJSON(_ text: String) throws {
    #expect(throws: KVError.self) { try ModelConfig(json: Array(text.utf8), file: "c") }
    #expect(throws: KVError.self) { try Tokenizer(json: Array(text.utf8), file: "t") }
  }

  @Test func deepNestingIsAnError() {
    let text = String(repeating: "[", count: 1_000_000)
    #expect(throws: KVError.self) { try ModelConfig(json: Array(text.utf8), file: "c") }
    #expect(throws: KVError.self) { try ModelConfig(json: [0x7B, 0x22, 0xFF, 0x22], file: "c") }
  }

  @Test func absentOptionalsHaveDefaults() throws {
    var config = TinyModel("llama").config
    for key in [
      "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
      "rope_theta", "tie_word_embeddings", "eos_token_id", "bos_token_id",
    ] { config[key] = nil }
    config["model_type"] = nil
    config["architectures"] = ["Qwen3ForCausalLM"]
    let read = try ModelConfig(json: Array(JSONSerialization.data(withJSONObject: config)), file: "c")
    #expect(read.architecture == .qwen3 && read.kvHeads == 4 && read.headDim == 8 && read.eosTokenIDs.isEmpty)
    #expect(read.rotary.theta == 10_000)
  }

  // MARK: Weights

  @Test func missingAndMisshapenTensors() throws {
    let tiny = TinyModel("qwen3")
    for name in tiny.tensors.keys.sorted() {
      var missing = tiny
      missing.tensors[name] = nil
      let first = try #require(throws: KVError.self) { try missing.load() }
      #expect(first.code == .corruptFile && first.message.contains(name))
      var wrong = tiny
      wrong.tensors[name] = ([2, 3], [1, 2, 3, 4, 5, 6])
      let second = try #require(throws: KVError.self) { try wrong.load() }
      #expect(second.code == .corruptFile && second.message.contains(name) && second.message.contains("[2, 3]"))
    }
    var poisoned = tiny
    poisoned.tensors["model.norm.weight"]?.values[3] = .nan
    #expect(try #require(throws: KVError.self) { try poisoned.load() }.code == .nonFinite)
  }

  @Test func brokenDirectories() throws {
    #expect(throws: KVError.self) { try LanguageModel(directory: "/nonexistent") }
    try Paths.withTemporaryDirectory { directory in
      let tiny = TinyModel("llama")
      func index(_ text: String) throws -> KVError {
        try Data(text.utf8).write(to: URL(fileURLWithPath: directory + "/model.safetensors.index.json"))
        return try #require(throws: KVError.self) { try LanguageModel(directory: directory) }
      }
      try tiny.write(to: directory, shards: 2)
      _ = try index("{}")
      _ = try index("{\"weight_map\":{\"a\":3}}")
      _ = try index("{\"weight_map\":{\"model.norm.weight\":\"../x.safetensors\"}}")
      _ = try index("{\"weight_map\":{\"model.norm.weight\":\"gone.safetensors\"}}")
      _ = try index("{\"weight_map\":{\"nothing\":\"model-1-of-2.safetensors\"}}")
      // A truncated single file takes precedence over shards, and is refused.
      let whole = try Paths.bytes(directory + "/model-1-of-2.safetensors")
      for count in [0, 7, 8, 100, whole.count - 1] {
        try Data(whole.prefix(count)).write(to: URL(fileURLWithPath: directory + "/model.safetensors"))
        #expect(throws: KVError.self) { try LanguageModel(directory: directory) }
      }
    }
  }
}
