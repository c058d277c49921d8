public import KVCompression

/// A decoder-only transformer as its `config.json` describes it, checked: every size is positive and within limits.
public struct ModelConfig: Sendable, Hashable {
  /// The four families this engine runs. They share RMSNorm, rotary positions, grouped queries and SwiGLU.
  public enum Architecture: String, Sendable, CaseIterable {
    case llama, mistral, qwen2, qwen3
  }

  public var architecture: Architecture
  public var vocabularySize: Int
  public var hiddenSize: Int
  /// Width of the gated MLP.
  public var intermediateSize: Int
  public var layerCount: Int
  public var queryHeads: Int
  public var kvHeads: Int
  public var headDim: Int
  /// Sliding window of each layer in tokens; nil: the layer sees everything before it.
  public var slidingWindows: [Int?]
  /// Context the model was made for, in tokens. Longer inputs run, at the model's own risk.
  public var maxPositions: Int
  public var normEpsilon: Float
  /// The positions of queries and keys, with its scaling resolved for a fixed context.
  public var rotary: RotaryEmbedding
  /// The head multiplies by the transposed embedding.
  public var tiedEmbeddings: Bool
  /// q, k and v have a bias.
  public var queryKeyValueBias: Bool
  /// The attention output projection has a bias.
  public var outputBias: Bool
  public var mlpBias: Bool
  /// Each head of q and k is normalised before it is rotated.
  public var queryKeyNorm: Bool
  public var bosTokenID: Int?
  /// Tokens that end a text; may be empty.
  public var eosTokenIDs: [Int]

  /// The shape a cache needs.
  public var shape: ModelShape {
    ModelShape(
      layers: slidingWindows.map {
        LayerShape(queryHeads: queryHeads, kvHeads: kvHeads, keyDim: headDim, slidingWindow: $0)
      },
      rotary: rotary)
  }

  /// Channels of all query heads together.
  var queryWidth: Int { queryHeads * headDim }
  /// Channels of all KV heads together.
  var kvWidth: Int { kvHeads * headDim }
}

/// Sizes beyond these are taken for damage. All are far above any published model; products of two fit 64 bits, and
/// each one alone fits the 32-bit sizes of BLAS.
enum SizeLimit {
  static let vocabulary = 1...(1 << 24)
  static let hidden = 1...(1 << 17)
  static let intermediate = 1...(1 << 20)
  static let layers = 1...4096
  static let heads = 1...4096
  static let headDim = 1...4096
  static let positions = 1...Int(Int32.max)
  static let tokenID = 0...((1 << 24) - 1)
}
