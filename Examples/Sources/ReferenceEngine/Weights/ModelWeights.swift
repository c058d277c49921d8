import KVCompression

/// The parameters of one transformer block, widened to f32. Matrices are `[outputs, inputs]`.
struct LayerWeights: Sendable {
  let attentionNorm: [Float]
  let query: Linear
  let key: Linear
  let value: Linear
  let output: Linear
  /// Per head, `[headDim]`; Qwen3 only.
  let queryNorm: [Float]?
  let keyNorm: [Float]?
  let mlpNorm: [Float]
  let gate: Linear
  let up: Linear
  let down: Linear
}

/// A projection with an optional bias.
struct Linear: Sendable {
  let weight: Matrix
  let bias: [Float]?

  /// y = x Wᵀ + b for the first n rows; with `adding`, y += x Wᵀ + b.
  func apply(_ x: [Float], rows n: Int, into y: inout [Float], adding: Bool = false) {
    LinearAlgebra.multiply(x, rows: n, by: weight, into: &y, adding: adding)
    if let bias { LinearAlgebra.add(bias, toRows: n, of: &y) }
  }
}

/// All parameters of a model.
struct ModelWeights: Sendable {
  /// `[vocabulary, hidden]`.
  let embedding: Matrix
  let layers: [LayerWeights]
  let finalNorm: [Float]
  /// `[vocabulary, hidden]`; the embedding itself where tied.
  let head: Matrix

  /// Reads every tensor; all of them are checked against the configuration before the first is read.
  init(_ checkpoint: Checkpoint, config: ModelConfig) throws(KVError) {
    let plan = TensorPlan(config)
    for (name, shape) in plan.all { try checkpoint.check(name, shape: shape) }
    let reader = WeightReader(checkpoint: checkpoint)
    let hidden = config.hiddenSize
    embedding = try reader.matrix("model.embed_tokens", config.vocabularySize, hidden)
    head =
      plan.hasHead ? try reader.matrix("lm_head", config.vocabularySize, hidden) : embedding
    finalNorm = try reader.vector("model.norm.weight", hidden)
    var layers: [LayerWeights] = []
    for index in 0..<config.layerCount {
      do throws(KVError) {
        layers.append(try reader.layer(index, config))
      } catch {
        throw error.at(layer: index)
      }
    }
    self.layers = layers
  }
}

/// Every tensor a configuration asks for, with its shape.
private struct TensorPlan {
  var all: [(name: String, shape: [Int])] = []
  let hasHead: Bool

  init(_ config: ModelConfig) {
    let hidden = config.hiddenSize
    hasHead = !config.tiedEmbeddings
    all.append(("model.embed_tokens.weight", [config.vocabularySize, hidden]))
    if hasHead { all.append(("lm_head.weight", [config.vocabularySize, hidden])) }
    all.append(("model.norm.weight", [hidden]))
    for layer in 0..<config.layerCount {
      let prefix = "model.layers.\(layer)."
      all.append((prefix + "input_layernorm.weight", [hidden]))
      all.append((prefix + "post_attention_layernorm.weight", [hidden]))
      for projection in Projection.all(config) {
        all.append((prefix + projection.name + ".weight", [projection.outputs, projection.inputs]))
        if projection.bias { all.append((prefix + projection.name + ".bias", [projection.outputs])) }
      }
      if config.queryKeyNorm {
        all.append((prefix + "self_attn.q_norm.weight", [config.headDim]))
        all.append((prefix + "self_attn.k_norm.weight", [config.headDim]))
      }
    }
  }
}

/// The seven projections of a block.
private struct Projection {
  let name: String
  let outputs: Int
  let inputs: Int
  let bias: Bool

  static func all(_ config: ModelConfig) -> [Projection] {
    let hidden = config.hiddenSize
    let (wide, narrow, mlp) = (config.queryWidth, config.kvWidth, config.intermediateSize)
    let bias = config.queryKeyValueBias
    return [
      Projection(name: "self_attn.q_proj", outputs: wide, inputs: hidden, bias: bias),
      Projection(name: "self_attn.k_proj", outputs: narrow, inputs: hidden, bias: bias),
      Projection(name: "self_attn.v_proj", outputs: narrow, inputs: hidden, bias: bias),
      Projection(name: "self_attn.o_proj", outputs: hidden, inputs: wide, bias: config.outputBias),
      Projection(name: "mlp.gate_proj", outputs: mlp, inputs: hidden, bias: config.mlpBias),
      Projection(name: "mlp.up_proj", outputs: mlp, inputs: hidden, bias: config.mlpBias),
      Projection(name: "mlp.down_proj", outputs: hidden, inputs: mlp, bias: config.mlpBias),
    ]
  }
}

private struct WeightReader {
  let checkpoint: Checkpoint

  func vector(_ name: String, _ count: Int) throws(KVError) -> [Float] {
    let values = try checkpoint.floats(name, shape: [count])
    guard values.allSatisfy(\.isFinite) else { throw KVError(.nonFinite, "tensor \(name) holds NaN or infinity") }
    return values
  }

  func matrix(_ name: String, _ rows: Int, _ columns: Int) throws(KVError) -> Matrix {
    let values = try checkpoint.floats(name + ".weight", shape: [rows, columns])
    guard values.allSatisfy(\.isFinite) else {
      throw KVError(.nonFinite, "tensor \(name).weight holds NaN or infinity")
    }
    return Matrix(rows: rows, columns: columns, values: values)
  }

  func layer(_ index: Int, _ config: ModelConfig) throws(KVError) -> LayerWeights {
    let prefix = "model.layers.\(index)."
    let hidden = config.hiddenSize
    var linear: [Linear] = []
    for projection in Projection.all(config) {
      let name = prefix + projection.name
      let bias = projection.bias ? try vector(name + ".bias", projection.outputs) : nil
      linear.append(Linear(weight: try matrix(name, projection.outputs, projection.inputs), bias: bias))
    }
    let norm = config.queryKeyNorm
    return LayerWeights(
      attentionNorm: try vector(prefix + "input_layernorm.weight", hidden),
      query: linear[0], key: linear[1], value: linear[2], output: linear[3],
      queryNorm: norm ? try vector(prefix + "self_attn.q_norm.weight", config.headDim) : nil,
      keyNorm: norm ? try vector(prefix + "self_attn.k_norm.weight", config.headDim) : nil,
      mlpNorm: try vector(prefix + "post_attention_layernorm.weight", hidden),
      gate: linear[4], up: linear[5], down: linear[6])
  }
}
