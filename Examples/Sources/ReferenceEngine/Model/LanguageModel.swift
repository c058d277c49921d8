public import KVCompression

/// The weights and configuration of a model. Immutable; sessions share it.
public final class LanguageModel: Sendable {
  public let config: ModelConfig
  let weights: ModelWeights

  /// Loads `config.json` and the weights of a HuggingFace checkpoint directory.
  ///
  /// - Parameter contextLength: see ``ModelConfig/init(path:contextLength:)``.
  /// - Throws: `inputOutput`, `corruptFile`, `unsupported` or `nonFinite`; messages name file, key or tensor.
  public init(directory: String, contextLength: Int? = nil) throws(KVError) {
    config = try ModelConfig(path: directory + "/config.json", contextLength: contextLength)
    weights = try ModelWeights(Checkpoint(directory: directory), config: config)
  }

  /// Parameters, a tied head counted once.
  public var parameterCount: Int {
    var count = weights.embedding.values.count + weights.finalNorm.count
    if !config.tiedEmbeddings { count += weights.head.values.count }
    for layer in weights.layers {
      count += layer.attentionNorm.count + layer.mlpNorm.count
      count += (layer.queryNorm?.count ?? 0) + (layer.keyNorm?.count ?? 0)
      for linear in [layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down] {
        count += linear.weight.values.count + (linear.bias?.count ?? 0)
      }
    }
    return count
  }

  /// The projections that make a layer's keys and values, [heads · headDim][hidden], with their biases.
  package func keyAndValueProjections(
    layer: Int
  ) -> (keys: (weight: [Float], bias: [Float]?), values: (weight: [Float], bias: [Float]?)) {
    let own = weights.layers[layer]
    return ((own.key.weight.values, own.key.bias), (own.value.weight.values, own.value.bias))
  }

  /// Whether keys are normalised behind their projection.
  package var normsKeys: Bool { config.queryKeyNorm }
}
