public import KVCompression

/// Sees what passes through the layers: to dump caches, to calibrate, to check against another implementation.
///
/// Both calls come once per layer and chunk, in the order of the layers. Arrays may be kept: they are copied only then.
public protocol ForwardObserver: AnyObject {
  /// Before the attention of a layer runs.
  func layer(_ activations: LayerActivations) throws(KVError)

  /// After the final norm.
  ///
  /// - Parameters:
  ///   - hidden: `[tokens, hiddenSize]`.
  ///   - firstPosition: position of the first token.
  func finalHidden(_ hidden: [Float], firstPosition: Int, tokens: Int) throws(KVError)
}

extension ForwardObserver {
  public func finalHidden(_ hidden: [Float], firstPosition: Int, tokens: Int) throws(KVError) {}
}

/// One layer's activations for a chunk of tokens. All tensors are token-major, f32.
public struct LayerActivations: Sendable {
  public var layer: Int
  /// Position of the first token of the chunk.
  public var firstPosition: Int
  public var tokens: Int
  /// `[tokens, hiddenSize]`: the residual stream as it enters the layer.
  public var hidden: [Float]
  /// `[tokens, hiddenSize]`: the same after the layer's norm, the input of the projections.
  public var normalized: [Float]
  /// `[tokens, queryHeads, headDim]` and `[tokens, kvHeads, headDim]` before RoPE (after q/k norm).
  public var queriesBeforeRotary: [Float]
  public var keysBeforeRotary: [Float]
  /// What attention gets.
  public var attention: AttentionInput
}
