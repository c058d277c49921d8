public import KVCompression

/// Where a forward pass stores keys and values and gets attention from. One provider per sequence.
///
/// The library's cache is one (``CacheAttention``); a full-attention reference in the tests is another.
public protocol AttentionProvider: AnyObject {
  /// Tokens a layer has been given: the position of the next one.
  func tokensSeen(layer: Int) -> Int

  /// Appends the keys and values of the next tokens of a layer and attends with their queries.
  ///
  /// - Parameter output: `[tokens, queryHeads, headDim]`, overwritten.
  func attend(_ input: AttentionInput, into output: inout [Float]) throws(KVError)

  /// The prompt is complete.
  func finishPrefill() throws(KVError)
}

/// What the attention of one layer gets for a chunk of consecutive tokens. All tensors are token-major, f32.
public struct AttentionInput: Sendable {
  public var layer: Int
  public var tokens: Int
  public var queryHeads: Int
  public var kvHeads: Int
  public var headDim: Int
  /// `[tokens, queryHeads, headDim]`, post-RoPE.
  public var queries: [Float]
  /// `[tokens, kvHeads, headDim]`, post-RoPE.
  public var keys: [Float]
  /// `[tokens, kvHeads, headDim]`.
  public var values: [Float]
}

/// Attention through the library's compressed cache.
public final class CacheAttention: AttentionProvider {
  public let cache: KVCache

  public init(_ cache: KVCache) { self.cache = cache }

  public func tokensSeen(layer: Int) -> Int { cache.tokensSeen(layer: layer) }

  public func attend(_ input: AttentionInput, into output: inout [Float]) throws(KVError) {
    let (n, dim) = (input.tokens, input.headDim)
    let keys = try TensorView(
      input.keys.span, heads: input.kvHeads, tokens: n, dim: dim, layout: .tokenMajor)
    let values = try TensorView(
      input.values.span, heads: input.kvHeads, tokens: n, dim: dim, layout: .tokenMajor)
    try cache.append(layer: input.layer, keys: keys, values: values)
    let queries = try TensorView(
      input.queries.span, heads: input.queryHeads, tokens: n, dim: dim, layout: .tokenMajor)
    var span = output.mutableSpan
    var target = try MutableTensorView(
      &span, heads: input.queryHeads, tokens: n, dim: dim, layout: .tokenMajor)
    try cache.attend(layer: input.layer, queries: queries, into: &target)
  }

  public func finishPrefill() throws(KVError) { try cache.finishPrefill() }
}
