package import KVCompression
internal import KVExperiments
package import ReferenceEngine

/// How far a model is from itself with fewer latents: the mean divergence of its predictions over the second half of some
/// pieces of text when keys and values of the first half are latents of given ranks.
package struct RateTrial {
  private struct Piece {
    /// Per layer, [heads, tokens, dim].
    var keys: [[Float]]
    var values: [[Float]]
    var tokens: Int
    var rest: [Int]
    /// What the model predicts over exact rows, [rest, vocabulary].
    var reference: [Float]
  }

  private let model: LanguageModel
  private let backend: Backend
  private let pieces: [Piece]

  /// - Parameter pieces: token ids, at least two of each.
  package init(_ model: LanguageModel, pieces: [[Int]], _ backend: Backend) throws(KVError) {
    self.model = model
    self.backend = backend
    var made: [Piece] = []
    for piece in pieces {
      let half = piece.count / 2
      let cache = try KVCache(shape: model.config.shape, policy: Policy(store: .dense(.f32)), backend: backend)
      let session = try InferenceSession(model, attention: CacheAttention(cache))
      _ = try session.prefill(Array(piece[..<half]))
      var own = Piece(keys: [], values: [], tokens: half, rest: Array(piece[half...]), reference: [])
      for (index, layer) in model.config.shape.layers.enumerated() {
        own.keys.append([])
        own.values.append([])
        for head in 0..<layer.kvHeads {
          let rows = try cache.read(layer: index, head: head)
          own.keys[index] += rows.keys
          own.values[index] += rows.values
        }
      }
      own.reference = try session.forward(own.rest, logits: .all)
      made.append(own)
    }
    self.pieces = made
  }

  /// - Parameter ranks: a calibration with `ranks`.
  package func divergence(_ ranks: Calibration) throws(KVError) -> Double {
    let policy = Policy(
      store: try .matryoshka(
        calibration: NamedCalibration(ranks), rates: .file, latents: .f32, basis: .f32, window: .f32))
    let vocabulary = model.config.vocabularySize
    var mean = MeanAccumulator()
    for piece in pieces {
      let cache = try KVCache(shape: model.config.shape, policy: policy, backend: backend)
      for (index, layer) in model.config.shape.layers.enumerated() {
        let (keys, values) = (piece.keys[index], piece.values[index])
        let keyView = try TensorView(keys.span, heads: layer.kvHeads, tokens: piece.tokens, dim: layer.keyDim)
        let valueView = try TensorView(values.span, heads: layer.kvHeads, tokens: piece.tokens, dim: layer.valueDim)
        try cache.append(layer: index, keys: keyView, values: valueView)
      }
      try cache.finishPrefill()
      let session = try InferenceSession(model, attention: CacheAttention(cache))
      let logits = try session.forward(piece.rest, logits: .all)
      for row in piece.rest.indices {
        let range = row * vocabulary..<(row + 1) * vocabulary
        mean.add(
          try FidelityMetrics.klDivergence(logits: Array(logits[range]), reference: Array(piece.reference[range])))
      }
    }
    return mean.mean
  }
}
