package import KVCompression

/// A backend against the portable CPU kernels, over whole lives of caches: every registered selection and store.
package struct Conformance {
  /// What one policy came to.
  package struct Outcome: Sendable {
    package var policy: String
    /// Largest difference of an attention output; nil where the policy did not run.
    package var distance: Float?
    /// What is wrong; nil: nothing.
    package var complaint: String?
  }

  private let backend: Backend
  private let reference: Backend
  /// Outputs are sums of some hundred products of numbers below 2, added in another order.
  private static let bound: Float = 2e-5
  private static let prompt = [33, 1, 270]
  private static let decoded = 12

  package init(_ backend: Backend) throws(KVError) {
    self.backend = backend
    reference = try .cpu(level: "portable")
  }

  /// Small values for the options methods commonly have.
  private static let small = [
    "budget": "48", "window": "5", "kernel": "3", "sinks": "2", "residual": "32", "lag": "7", "queries": "6",
    "length": "4", "rank_k": "0.3", "rank_v": "0.6", "table": "[[1,0]]",
  ]

  /// One policy for every registered method, but for those that need a calibration of a model.
  package static var policies: [String] {
    PolicyRegistry.standard.methods.filter { method in
      !method.options.contains { $0.name == "calibration" } || method.name == "rotatekv"
    }.map { method in
      let options = method.options.compactMap { option in
        option.name == "window" && method.role == .store ? nil : small[option.name].map { "\(option.name)=\($0)" }
      }
      let text = options.isEmpty ? method.name : "\(method.name)(\(options.joined(separator: ",")))"
      let candidates =
        switch method.role {
        case .selection: ["", "+f16+kivi(residual=32)", "+f16+f16+kivi(residual=32)"].map { text + $0 }
        case .modifier:
          ["", "+f16+kivi(residual=32)"].map { "snapkv(budget=48,window=5)+\(text)\($0)" }
        case .storeModifier: ["pertoken+\(text)"]
        case .layers: ["kivi(residual=32)+layers(first=1,last=0)+f16"]
        case .store: [text]
        }
      return candidates.first { (try? PolicyRegistry.standard.policy($0)) != nil } ?? text
    }
  }

  package func run(_ text: String) -> Outcome {
    do throws(KVError) {
      let policy = try PolicyRegistry.standard.policy(text)
      let shape = ModelShape(
        layers: [LayerShape(queryHeads: 8, kvHeads: 2, keyDim: 64, valueDim: 64)],
        rotary: try RotaryEmbedding(headDim: 64))
      let subject = try KVCache(shape: shape, policy: policy, backend: backend)
      let expected = try KVCache(shape: shape, policy: policy, backend: reference)
      var worst: Float = 0
      for (turn, tokens) in (Self.prompt + Array(repeating: 1, count: Self.decoded)).enumerated() {
        if turn == Self.prompt.count {
          try subject.finishPrefill()
          try expected.finishPrefill()
        }
        let (a, b) = (try step(subject, tokens, turn), try step(expected, tokens, turn))
        for (x, y) in zip(a, b) { worst = abs(x - y) <= worst ? worst : abs(x - y) }
      }
      for head in 0..<2 {
        let (a, b) = (try subject.read(layer: 0, head: head), try expected.read(layer: 0, head: head))
        if a.positions != b.positions {
          return Outcome(policy: text, distance: worst, complaint: "other rows of head \(head) stay")
        }
      }
      return Outcome(policy: text, distance: worst, complaint: worst <= Self.bound ? nil : "outputs differ")
    } catch {
      return Outcome(policy: text, distance: nil, complaint: error.description)
    }
  }

  private func step(_ cache: KVCache, _ tokens: Int, _ turn: Int) throws(KVError) -> [Float] {
    let shape = cache.shape.layers[0]
    var state = UInt64(turn)
    func numbers(_ heads: Int) -> [Float] {
      (0..<heads * tokens * shape.keyDim).map { _ in
        state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        return Float(Int32(truncatingIfNeeded: state >> 33)) / 1_073_741_824 - 0.9
      }
    }
    let (keys, values, queries) = (numbers(shape.kvHeads), numbers(shape.kvHeads), numbers(shape.queryHeads))
    try cache.append(
      layer: 0, keys: TensorView(keys.span, heads: shape.kvHeads, tokens: tokens, dim: shape.keyDim),
      values: TensorView(values.span, heads: shape.kvHeads, tokens: tokens, dim: shape.valueDim))
    var output = [Float](repeating: .nan, count: shape.queryHeads * tokens * shape.valueDim)
    var span = output.mutableSpan
    var view = try MutableTensorView(&span, heads: shape.queryHeads, tokens: tokens, dim: shape.valueDim)
    try cache.attend(
      layer: 0, queries: TensorView(queries.span, heads: shape.queryHeads, tokens: tokens, dim: shape.keyDim),
      into: &view)
    return output
  }
}
