package import KVCompression
package import KVExperiments

/// A policy run over a dumped cache: the tokens of every layer are appended at once, the policy hears what the dump has of
/// queries, the prompt ends, and what is left is read back.
package struct Application {
  private let dump: CacheDump
  private let policy: NamedPolicy
  private let layers: [Int]
  private let threads: Int?
  private let backend: BackendChoice

  /// - Parameter layers: nil: every layer of the dump.
  /// - Throws: `missingInput` for layers the dump lacks and for inputs the policy needs and the dump cannot give.
  package init(
    dump: CacheDump, policy: NamedPolicy, layers: LayerList? = nil, threads: Int? = nil, backend: BackendChoice = .cpu
  ) throws(KVError) {
    self.dump = dump
    self.policy = policy
    self.layers = layers?.layers ?? dump.layers
    self.threads = threads
    self.backend = backend
    for layer in self.layers {
      guard let shape = dump.shapes[layer] else {
        throw KVError(.missingInput, "the dump holds layers \(dump.layers), not layer \(layer)", layer: layer)
      }
      try checkInputs(shape, layer)
    }
  }

  private func checkInputs(_ shape: CacheDumpLayerShape, _ layer: Int) throws(KVError) {
    let inputs = policy.policy.inputs
    guard shape.tokens >= 1 else {
      throw KVError(.shapeMismatch, "tensor 'layers.\(layer).keys': at least 1 token expected, found 0", layer: layer)
    }
    if inputs.attentionWeights, shape.queryTokens < shape.tokens {
      throw KVError(
        .missingInput,
        "\(policy.name) needs the attention weights of every token, so the queries of all \(shape.tokens) tokens; "
          + "tensor 'layers.\(layer).queries' has those of the last \(shape.queryTokens)", layer: layer)
    }
    let wanted = min(inputs.windowQueries, shape.tokens)
    if shape.queryTokens < wanted {
      throw KVError(
        .missingInput,
        "\(policy.name) needs the queries of the last \(wanted) tokens; tensor 'layers.\(layer).queries' has those of "
          + "the last \(shape.queryTokens)", layer: layer)
    }
    if policy.policy.positions == .slot, dump.ropeTheta == nil {
      throw KVError(
        .missingInput,
        "\(policy.name) counts positions in slots, which turns queries; the dump's __metadata__ must say rope_theta")
    }
  }

  // MARK: Running

  /// O(tokens · dim) per layer, and the policy's own cost.
  package func run(_ progress: any Progress = NoProgress()) throws(KVError) -> AppliedDump {
    progress.begin(steps: 2 * layers.count)
    defer { progress.end() }
    let cache = try makeCache()
    var exact: [Int: [Float]] = [:]
    for layer in layers {
      progress.advance("layer \(layer): appending")
      let data = try dump.layer(layer)
      try fill(cache, layer, data)
      if let probes = data.probeQueries, probes.tokens > 0 {
        exact[layer] = try attendExactly(data, cache.shape.layers[layer], probes, cache.attention)
      }
    }
    try cache.finishPrefill()
    let status = cache.status
    var result = AppliedDump(policy: policy, metadata: dump.metadata)
    for layer in layers {
      progress.advance("layer \(layer): reading back")
      let shape = cache.shape.layers[layer]
      var applied = AppliedLayer(layer: layer, status: status[layer], shape: shape)
      for head in 0..<shape.kvHeads { applied.heads.append(try cache.read(layer: layer, head: head)) }
      if let exact = exact[layer], let probes = try dump.layer(layer).probeQueries {
        let output = try Self.attend(cache, layer, probes, valueDim: shape.valueDim)
        applied.attention = output
        applied.probes = probes.tokens
        applied.attentionError = try FidelityMetrics.relativeFrobenius(output, reference: exact)
      }
      result.layers.append(applied)
    }
    return result
  }

  private func makeCache() throws(KVError) -> KVCache {
    try KVCache(
      shape: Self.shape(of: dump, layers: layers), policy: policy.policy, backend: backend.backend(threads: threads),
      attention: AttentionOptions(scale: dump.scale.map { Float($0) }))
  }

  /// Layers keep their numbers: those that are not in the dump have no cache.
  static func shape(of dump: CacheDump, layers: [Int]) throws(KVError) -> ModelShape {
    var shapes = [LayerShape](repeating: .uncached, count: (layers.last ?? -1) + 1)
    for layer in layers {
      guard let shape = dump.shapes[layer] else { continue }
      shapes[layer] = LayerShape(
        queryHeads: shape.queryHeads, kvHeads: shape.kvHeads, keyDim: shape.keyDim, valueDim: shape.valueDim)
    }
    return ModelShape(layers: shapes, rotary: try rotary(dump, shapes))
  }

  private static func rotary(_ dump: CacheDump, _ shapes: [LayerShape]) throws(KVError) -> RotaryEmbedding? {
    guard let theta = dump.ropeTheta, let dim = shapes.first(where: \.cached)?.keyDim else { return nil }
    // Layers of several head sizes have several embeddings; only policies that move keys ask for one.
    guard shapes.allSatisfy({ !$0.cached || $0.keyDim == dim }), dim % 2 == 0 else { return nil }
    let layout: RotaryEmbedding.Layout
    switch dump.ropeLayout {
    case nil, "half", "half_split", "half-split", "neox": layout = .halfSplit
    case "interleaved", "gptj": layout = .interleaved
    case let other?:
      throw KVError(.unsupported, "__metadata__ 'rope_layout': expected half or interleaved, found '\(other)'")
    }
    return try RotaryEmbedding(headDim: dim, theta: theta, layout: layout)
  }

  private func fill(_ cache: KVCache, _ layer: Int, _ data: CacheDumpLayer) throws(KVError) {
    try Self.append(data, to: cache, layer)
    let inputs = policy.policy.inputs
    let queries = data.queries
    if inputs.attentionWeights {
      // The cache forms the weights itself; Tq is T here.
      var output = [Float](repeating: 0, count: queries.heads * queries.tokens * data.values.dim)
      var span = output.mutableSpan
      var target = try MutableTensorView(
        &span, heads: queries.heads, tokens: queries.tokens, dim: data.values.dim)
      try cache.attend(
        layer: layer,
        queries: TensorView(queries.elements.span, heads: queries.heads, tokens: queries.tokens, dim: queries.dim),
        into: &target)
    } else {
      if inputs.windowQueries > 0 {
        try cache.observe(
          layer: layer,
          queries: TensorView(queries.elements.span, heads: queries.heads, tokens: queries.tokens, dim: queries.dim))
      }
      try cache.commit(layer: layer)
    }
  }

  private static func append(_ data: CacheDumpLayer, to cache: KVCache, _ layer: Int) throws(KVError) {
    let (keys, values) = (data.keys, data.values)
    try cache.append(
      layer: layer, keys: TensorView(keys.elements.span, heads: keys.heads, tokens: keys.tokens, dim: keys.dim),
      values: TensorView(values.elements.span, heads: values.heads, tokens: values.tokens, dim: values.dim))
  }

  /// The same over everything the dump has of a layer, in f32.
  private func attendExactly(
    _ data: CacheDumpLayer, _ layer: LayerShape, _ probes: HeadTensor, _ options: AttentionOptions
  ) throws(KVError) -> [Float] {
    let full = try KVCache(
      shape: ModelShape(layers: [layer]), policy: Policy(store: .dense(.f32)),
      backend: backend.backend(threads: threads),
      attention: options)
    try Self.append(data, to: full, 0)
    return try Self.attend(full, 0, probes, valueDim: layer.valueDim)
  }

  /// Attention of queries at position T over everything a layer holds, [queryHeads, P, valueDim].
  private static func attend(
    _ cache: KVCache, _ layer: Int, _ probes: HeadTensor, valueDim: Int
  ) throws(KVError) -> [Float] {
    var options = cache.attention
    options.causal = false
    options.commits = false
    var result = [Float](repeating: 0, count: probes.heads * probes.tokens * valueDim)
    // A call takes at most as many queries as tokens were seen.
    let step = min(cache.tokensSeen(layer: layer), 256)
    for first in stride(from: 0, to: probes.tokens, by: step) {
      let part = try probes.slice(tokens: first..<min(first + step, probes.tokens))
      var output = [Float](repeating: 0, count: part.heads * part.tokens * valueDim)
      var span = output.mutableSpan
      var target = try MutableTensorView(&span, heads: part.heads, tokens: part.tokens, dim: valueDim)
      try cache.attend(
        layer: layer, queries: TensorView(part.elements.span, heads: part.heads, tokens: part.tokens, dim: part.dim),
        into: &target, options: options)
      _ = consume target
      let length = part.tokens * valueDim
      for head in 0..<part.heads {
        let place = (head * probes.tokens + first) * valueDim
        result.replaceSubrange(place..<place + length, with: output[head * length..<(head + 1) * length])
      }
    }
    return result
  }
}
