import Foundation

/// The same architectures written out in double precision, one position at a time and without a cache: the definition
/// that the engine's layers are compared with. It shares no code with the engine.
struct PlainModel {
  let model: TinyModel
  /// Window of each layer; nil: none.
  let windows: [Int?]
  var linearFactor = 1.0
  var rotaryDim = TinyModel.headDim

  private func tensor(_ name: String) -> [Double] { (model.tensors[name]?.values ?? []).map(Double.init) }

  private func project(_ x: [Double], _ name: String) -> [Double] {
    let weight = tensor(name + ".weight")
    let bias = tensor(name + ".bias")
    return (0..<weight.count / x.count).map { row in
      var sum = bias.isEmpty ? 0 : bias[row]
      for i in x.indices { sum += weight[row * x.count + i] * x[i] }
      return sum
    }
  }

  private func norm(_ x: [Double], _ name: String) -> [Double] {
    let weight = tensor(name)
    let mean = x.reduce(0) { $0 + $1 * $1 } / Double(x.count)
    return zip(x, weight).map { $0 / (mean + 1e-5).squareRoot() * $1 }
  }

  private func heads(_ x: [Double], position: Int, norm name: String) -> [[Double]] {
    stride(from: 0, to: x.count, by: TinyModel.headDim).map { start in
      var head = Array(x[start..<start + TinyModel.headDim])
      if model.tensors[name] != nil { head = norm(head, name) }
      return turned(head, position)
    }
  }

  private func turned(_ head: [Double], _ position: Int) -> [Double] {
    var result = head
    let half = rotaryDim / 2
    for i in 0..<half {
      let angle = Double(position) / linearFactor * pow(1000, -Double(2 * i) / Double(rotaryDim))
      result[i] = head[i] * cos(angle) - head[i + half] * sin(angle)
      result[i + half] = head[i + half] * cos(angle) + head[i] * sin(angle)
    }
    return result
  }

  /// Logits of every position, `[tokens][vocabulary]`.
  func logits(_ tokens: [Int]) -> [[Double]] {
    let embedding = tensor("model.embed_tokens.weight")
    let width = TinyModel.hidden
    var states = tokens.map { Array(embedding[$0 * width..<($0 + 1) * width]) }
    for layer in 0..<TinyModel.layers {
      let prefix = "model.layers.\(layer)."
      let inputs = states.map { norm($0, prefix + "input_layernorm.weight") }
      let attention = attend(inputs, prefix + "self_attn.", window: windows[layer])
      for t in states.indices {
        states[t] = zip(states[t], project(attention[t], prefix + "self_attn.o_proj")).map { $0 + $1 }
        let x = norm(states[t], prefix + "post_attention_layernorm.weight")
        let gate = project(x, prefix + "mlp.gate_proj").map { $0 / (1 + exp(-$0)) }
        let up = project(x, prefix + "mlp.up_proj")
        let down = project(zip(gate, up).map { $0 * $1 }, prefix + "mlp.down_proj")
        states[t] = zip(states[t], down).map { $0 + $1 }
      }
    }
    let head = model.flag("tie_word_embeddings") ? "model.embed_tokens" : "lm_head"
    return states.map { project(norm($0, "model.norm.weight"), head) }
  }

  private func attend(_ inputs: [[Double]], _ prefix: String, window: Int?) -> [[Double]] {
    let queries = inputs.enumerated().map {
      heads(project($1, prefix + "q_proj"), position: $0, norm: prefix + "q_norm.weight")
    }
    let keys = inputs.enumerated().map {
      heads(project($1, prefix + "k_proj"), position: $0, norm: prefix + "k_norm.weight")
    }
    let values = inputs.map { project($0, prefix + "v_proj") }
    let dim = TinyModel.headDim
    return inputs.indices.map { t in
      var output: [Double] = []
      for head in 0..<TinyModel.queryHeads {
        let kv = head / (TinyModel.queryHeads / TinyModel.kvHeads)
        let visible = inputs.indices.filter { past in past <= t && t - past < window ?? Int.max }
        let scores = visible.map { s in
          exp(zip(queries[t][head], keys[s][kv]).reduce(0) { $0 + $1.0 * $1.1 } / Double(dim).squareRoot())
        }
        let total = scores.reduce(0, +)
        for c in 0..<dim {
          output.append(zip(visible, scores).reduce(0) { $0 + $1.1 / total * values[$1.0][kv * dim + c] })
        }
      }
      return output
    }
  }
}
