public import KVCompression

extension InferenceSession {
  /// Runs the next tokens of the sequence through every layer.
  ///
  /// - Parameters:
  ///   - tokens: ids at positions `position ..< position + tokens.count`; at least one.
  ///   - rows: whose logits to compute.
  /// - Returns: logits, row-major `[rows, vocabulary]`; empty for `.none`.
  /// - Throws: `invalidOption` for ids outside the vocabulary, and what attention throws. After an error from a layer
  ///   the cache holds the tokens in some layers only: the sequence is lost.
  public func forward(_ tokens: [Int], logits rows: LogitRows = .last) throws(KVError) -> [Float] {
    try check(tokens)
    let n = tokens.count
    guard n >= 1 else { throw KVError(.invalidOption, "a forward pass takes at least 1 token; got 0") }
    let first = position
    guard n <= Workspace.longestChunk, n <= SizeLimit.positions.upperBound - first else {
      throw KVError(
        .unsupported, "a chunk of \(n) tokens; at most \(Workspace.longestChunk) in one pass", position: first)
    }
    workspace.reserve(n)
    return try withSerialBLAS { () throws(KVError) in try pass(tokens, logits: rows) }
  }

  private func pass(_ tokens: [Int], logits rows: LogitRows) throws(KVError) -> [Float] {
    let config = model.config
    let n = tokens.count
    let first = position
    embed(tokens)
    let angles = try RotaryRows(config.rotary, firstPosition: first, tokens: n)
    for layer in 0..<config.layerCount {
      do throws(KVError) {
        try attentionBlock(layer, tokens: n, firstPosition: first, angles: angles)
      } catch {
        throw error.at(layer: layer)
      }
      mlpBlock(model.weights.layers[layer], tokens: n)
    }
    Elementwise.rmsNorm(
      workspace.hidden, rows: n, weight: model.weights.finalNorm, epsilon: config.normEpsilon,
      into: &workspace.normalized)
    try observer?.finalHidden(
      Array(workspace.normalized.prefix(n * config.hiddenSize)), firstPosition: first, tokens: n)
    return head(rows, tokens: n)
  }

  private func embed(_ tokens: [Int]) {
    let width = model.config.hiddenSize
    let table = model.weights.embedding.values
    for (row, token) in tokens.enumerated() {
      for i in 0..<width { workspace.hidden[row * width + i] = table[token * width + i] }
    }
  }

  private func attentionBlock(
    _ index: Int, tokens n: Int, firstPosition: Int, angles: RotaryRows
  ) throws(KVError) {
    let config = model.config
    let layer = model.weights.layers[index]
    Elementwise.rmsNorm(
      workspace.hidden, rows: n, weight: layer.attentionNorm, epsilon: config.normEpsilon,
      into: &workspace.normalized)
    var queries = [Float](repeating: 0, count: n * config.queryWidth)
    var keys = [Float](repeating: 0, count: n * config.kvWidth)
    var values = [Float](repeating: 0, count: n * config.kvWidth)
    layer.query.apply(workspace.normalized, rows: n, into: &queries)
    layer.key.apply(workspace.normalized, rows: n, into: &keys)
    layer.value.apply(workspace.normalized, rows: n, into: &values)
    if let norm = layer.queryNorm {
      Elementwise.normalize(rows: n * config.queryHeads, weight: norm, epsilon: config.normEpsilon, of: &queries)
    }
    if let norm = layer.keyNorm {
      Elementwise.normalize(rows: n * config.kvHeads, weight: norm, epsilon: config.normEpsilon, of: &keys)
    }
    let unrotated = observer == nil ? nil : (queries, keys)
    angles.rotate(&queries, tokens: n, heads: config.queryHeads)
    angles.rotate(&keys, tokens: n, heads: config.kvHeads)
    let input = AttentionInput(
      layer: index, tokens: n, queryHeads: config.queryHeads, kvHeads: config.kvHeads, headDim: config.headDim,
      queries: queries, keys: keys, values: values)
    if let observer, let (queries, keys) = unrotated {
      let count = n * config.hiddenSize
      try observer.layer(
        LayerActivations(
          layer: index, firstPosition: firstPosition, tokens: n, hidden: Array(workspace.hidden.prefix(count)),
          normalized: Array(workspace.normalized.prefix(count)), queriesBeforeRotary: queries, keysBeforeRotary: keys,
          attention: input))
    }
    var output = [Float](repeating: 0, count: n * config.queryWidth)
    try attention.attend(input, into: &output)
    layer.output.apply(output, rows: n, into: &workspace.hidden, adding: true)
  }

  private func mlpBlock(_ layer: LayerWeights, tokens n: Int) {
    Elementwise.rmsNorm(
      workspace.hidden, rows: n, weight: layer.mlpNorm, epsilon: model.config.normEpsilon,
      into: &workspace.normalized)
    layer.gate.apply(workspace.normalized, rows: n, into: &workspace.gate)
    layer.up.apply(workspace.normalized, rows: n, into: &workspace.up)
    Elementwise.gatedSiLU(gate: &workspace.gate, up: workspace.up, count: n * model.config.intermediateSize)
    layer.down.apply(workspace.gate, rows: n, into: &workspace.hidden, adding: true)
  }

  private func head(_ rows: LogitRows, tokens n: Int) -> [Float] {
    let width = model.config.hiddenSize
    let count: Int
    let input: [Float]
    switch rows {
    case .none: return []
    case .last:
      count = 1
      input = Array(workspace.normalized[(n - 1) * width..<n * width])
    case .all:
      count = n
      input = workspace.normalized
    }
    var logits = [Float](repeating: 0, count: count * model.config.vocabularySize)
    LinearAlgebra.multiply(input, rows: count, by: model.weights.head, into: &logits)
    return logits
  }
}

/// Buffers of a forward pass that live across layers and chunks.
struct Workspace {
  static let longestChunk = 1 << 16

  private let hiddenSize: Int
  private let intermediateSize: Int
  /// `[tokens, hiddenSize]`: the residual stream, and its normalised copy.
  var hidden: [Float] = []
  var normalized: [Float] = []
  /// `[tokens, intermediateSize]`.
  var gate: [Float] = []
  var up: [Float] = []

  init(_ config: ModelConfig) {
    hiddenSize = config.hiddenSize
    intermediateSize = config.intermediateSize
  }

  /// Room for a chunk of n tokens; never shrinks.
  mutating func reserve(_ n: Int) {
    guard hidden.count < n * hiddenSize else { return }
    hidden = [Float](repeating: 0, count: n * hiddenSize)
    normalized = hidden
    gate = [Float](repeating: 0, count: n * intermediateSize)
    up = gate
  }
}
