import Foundation
import KVCompression
import KVExperiments
import ReferenceEngine

/// A random model of any supported architecture, written as a checkpoint directory by the test itself.
struct TinyModel {
  var config: [String: Any]
  var tensors: [String: (shape: [Int], values: [Float])] = [:]

  static let vocabulary = 50
  static let hidden = 32
  static let mlp = 48
  static let layers = 3
  static let queryHeads = 4
  static let kvHeads = 2
  static let headDim = 16

  init(_ architecture: String, extra: [String: Any] = [:], seed: UInt64 = 1) {
    config = [
      "model_type": architecture, "vocab_size": Self.vocabulary, "hidden_size": Self.hidden,
      "intermediate_size": Self.mlp, "num_hidden_layers": Self.layers, "num_attention_heads": Self.queryHeads,
      "num_key_value_heads": Self.kvHeads, "head_dim": Self.headDim, "hidden_act": "silu",
      "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": false,
      "eos_token_id": [1, 2], "bos_token_id": 0,
    ]
    config.merge(extra) { $1 }
    var random = SplitMix64(seed: seed)
    func add(_ name: String, _ shape: [Int], around center: Float = 0, scale: Float = 0.25) {
      let values = (0..<shape.reduce(1, *)).map { _ in center + Float.random(in: -scale...scale, using: &random) }
      tensors[name] = (shape, values)
    }
    let (wide, narrow) = (Self.queryHeads * Self.headDim, Self.kvHeads * Self.headDim)
    add("model.embed_tokens.weight", [Self.vocabulary, Self.hidden], scale: 1)
    if !flag("tie_word_embeddings") { add("lm_head.weight", [Self.vocabulary, Self.hidden]) }
    add("model.norm.weight", [Self.hidden], around: 1)
    for layer in 0..<Self.layers {
      let prefix = "model.layers.\(layer)."
      add(prefix + "input_layernorm.weight", [Self.hidden], around: 1)
      add(prefix + "post_attention_layernorm.weight", [Self.hidden], around: 1)
      add(prefix + "self_attn.q_proj.weight", [wide, Self.hidden])
      add(prefix + "self_attn.k_proj.weight", [narrow, Self.hidden])
      add(prefix + "self_attn.v_proj.weight", [narrow, Self.hidden])
      add(prefix + "self_attn.o_proj.weight", [Self.hidden, wide])
      add(prefix + "mlp.gate_proj.weight", [Self.mlp, Self.hidden])
      add(prefix + "mlp.up_proj.weight", [Self.mlp, Self.hidden])
      add(prefix + "mlp.down_proj.weight", [Self.hidden, Self.mlp])
      let bias = architecture == "qwen2" || flag("attention_bias")
      if bias {
        add(prefix + "self_attn.q_proj.bias", [wide])
        add(prefix + "self_attn.k_proj.bias", [narrow])
        add(prefix + "self_attn.v_proj.bias", [narrow])
        if architecture != "qwen2" { add(prefix + "self_attn.o_proj.bias", [Self.hidden]) }
      }
      if flag("mlp_bias") {
        add(prefix + "mlp.gate_proj.bias", [Self.mlp])
        add(prefix + "mlp.up_proj.bias", [Self.mlp])
        add(prefix + "mlp.down_proj.bias", [Self.hidden])
      }
      if architecture == "qwen3" {
        add(prefix + "self_attn.q_norm.weight", [Self.headDim], around: 1)
        add(prefix + "self_attn.k_norm.weight", [Self.headDim], around: 1)
      }
    }
  }

  func flag(_ key: String) -> Bool { config[key] as? Bool ?? false }

  /// Writes config.json and the weights, as one file or as `shards` of them with an index.
  func write(to directory: String, as type: SafeTensorsType = .f32, shards: Int = 1) throws {
    try JSONSerialization.data(withJSONObject: config).write(to: URL(fileURLWithPath: directory + "/config.json"))
    let names = tensors.keys.sorted()
    var writers = Array(repeating: SafeTensorsWriter(), count: shards)
    var map: [String: String] = [:]
    for (index, name) in names.enumerated() {
      guard let tensor = tensors[name] else { continue }
      try writers[index % shards].add(name, shape: tensor.shape, floats: tensor.values, as: type)
      map[name] = "model-\(index % shards + 1)-of-\(shards).safetensors"
    }
    if shards == 1 { return try writers[0].write(to: directory + "/model.safetensors") }
    for (index, writer) in writers.enumerated() {
      try writer.write(to: directory + "/model-\(index + 1)-of-\(shards).safetensors")
    }
    try JSONSerialization.data(withJSONObject: ["weight_map": map])
      .write(to: URL(fileURLWithPath: directory + "/model.safetensors.index.json"))
  }

  func load(as type: SafeTensorsType = .f32, shards: Int = 1) throws -> LanguageModel {
    try Paths.withTemporaryDirectory { directory in
      try write(to: directory, as: type, shards: shards)
      return try LanguageModel(directory: directory)
    }
  }
}
