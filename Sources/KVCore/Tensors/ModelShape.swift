/// The shape of one attention layer as a cache sees it.
public struct LayerShape: Hashable, Sendable {
  /// KV heads (the query heads divided by the GQA group size).
  public var kvHeads: Int
  public var queryHeads: Int
  /// Channels of a key, and of a query.
  public var keyDim: Int
  /// Channels of a value, and of an attention output. Often equal to `keyDim`.
  public var valueDim: Int
  /// A query at position p sees positions `p - slidingWindow + 1 ... p` only. Nil: everything before it.
  public var slidingWindow: Int?
  /// False for layers without a KV cache (state-space layers, layers that share another's cache).
  public var cached: Bool

  public init(
    queryHeads: Int, kvHeads: Int, keyDim: Int, valueDim: Int? = nil, slidingWindow: Int? = nil
  ) {
    self.queryHeads = queryHeads
    self.kvHeads = kvHeads
    self.keyDim = keyDim
    self.valueDim = valueDim ?? keyDim
    self.slidingWindow = slidingWindow
    self.cached = true
  }

  /// A layer that keeps no keys and values.
  public static var uncached: LayerShape {
    var shape = LayerShape(queryHeads: 0, kvHeads: 0, keyDim: 0)
    shape.cached = false
    return shape
  }

  /// Query heads per KV head. Query head h reads KV head h / group.
  public var group: Int { kvHeads == 0 ? 0 : queryHeads / kvHeads }

  package func validate(layer: Int) throws(KVError) {
    if !cached {
      guard queryHeads == 0, kvHeads == 0 else {
        throw KVError(
          .invalidOption,
          "a layer without a cache has no heads here; got \(queryHeads) query heads and \(kvHeads) KV heads",
          layer: layer)
      }
      return
    }
    guard kvHeads >= 1, queryHeads >= kvHeads, queryHeads % kvHeads == 0 else {
      throw KVError(
        .invalidOption,
        "query heads must be a multiple of the KV heads; got \(queryHeads) query heads and \(kvHeads) KV heads",
        layer: layer)
    }
    guard (1...4096).contains(keyDim), (1...4096).contains(valueDim) else {
      throw KVError(
        .invalidOption, "head sizes must lie in 1...4096; got key \(keyDim), value \(valueDim)", layer: layer)
    }
    if let slidingWindow, slidingWindow < 1 {
      throw KVError(.invalidOption, "a sliding window holds at least 1 token; got \(slidingWindow)", layer: layer)
    }
  }
}

/// The attention layers of a model, with what a cache must know of its positions.
public struct ModelShape: Hashable, Sendable {
  public var layers: [LayerShape]
  /// Rotary embedding of the keys as cached. Nil: the model has none, or the engine does not say; policies that must
  /// un-rotate or move keys then refuse at construction.
  public var rotary: RotaryEmbedding?

  public init(layers: [LayerShape], rotary: RotaryEmbedding? = nil) {
    self.layers = layers
    self.rotary = rotary
  }

  /// `layerCount` equal layers.
  public init(
    layerCount: Int, queryHeads: Int, kvHeads: Int, headDim: Int, slidingWindow: Int? = nil,
    rotary: RotaryEmbedding? = nil
  ) {
    let layer = LayerShape(
      queryHeads: queryHeads, kvHeads: kvHeads, keyDim: headDim, slidingWindow: slidingWindow)
    self.init(layers: Array(repeating: layer, count: layerCount), rotary: rotary)
  }

  package func validate() throws(KVError) {
    for (index, layer) in layers.enumerated() { try layer.validate(layer: index) }
  }
}
