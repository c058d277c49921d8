/// Rotary position embedding of one attention head: which channels turn, how fast, and how an engine computed it.
///
/// A key cached by an engine has been turned by position. Undoing that turn, or moving the key to another position,
/// needs the same inverse frequencies and the same rounding the engine used; this value carries both.
///
/// Angles follow what PyTorch engines do: the inverse frequencies are computed and kept in f32, the angle is the f32
/// product `Float(position) * inverseFrequency` (or the f64 product, see ``AngleProduct``), and cosine and sine are
/// those of that angle, correct to f32 rounding. Scalings follow HuggingFace transformers (`modeling_rope_utils.py`).
///
/// ```
/// pairs of a head with headDim 8, rotaryDim 4
/// halfSplit    (0,2) (1,3)   4 5 6 7 pass through
/// interleaved  (0,1) (2,3)   4 5 6 7 pass through
/// ```
public struct RotaryEmbedding: Hashable, Sendable {
  /// Which two channels make a pair.
  public struct Layout: Hashable, Sendable {
    package enum Kind: Hashable, Sendable { case halfSplit, interleaved }
    package let kind: Kind

    /// Channel c pairs with `c + rotaryDim / 2`: Llama, Mistral, Qwen as HuggingFace lays them out.
    public static let halfSplit = Layout(kind: .halfSplit)
    /// Channel 2i pairs with 2i + 1: GPT-J, and Llama in its original layout.
    public static let interleaved = Layout(kind: .interleaved)
  }

  /// The precision in which position and inverse frequency are multiplied.
  public struct AngleProduct: Hashable, Sendable {
    package enum Kind: Hashable, Sendable { case f32, f64 }
    package let kind: Kind

    /// `Float(position) * inverseFrequency`, rounded to f32: what engines do when they cache a key.
    public static let f32 = AngleProduct(kind: .f32)
    /// The product in f64: for engines that build their tables in double precision.
    public static let f64 = AngleProduct(kind: .f64)
  }

  /// Channels of a head.
  public let headDim: Int
  /// The first `rotaryDim` channels turn, the others pass through (partial rotary). Even, at least 2.
  public let rotaryDim: Int
  /// The base of the geometric series of frequencies (`rope_theta`), before scaling.
  public let theta: Double
  public let layout: Layout
  public let scaling: Scaling
  public let angleProduct: AngleProduct
  /// One angle per position and pair, in radians per token: `rotaryDim / 2` values, scaling applied.
  ///
  /// For ``Scaling/dynamicNTK(factor:originalContext:)`` these hold up to the original context; see
  /// ``resolved(contextLength:)``.
  public let inverseFrequencies: [Float]
  /// The number cosine and sine are multiplied by when a key or a query is rotated (YaRN); 1 elsewhere.
  public let attentionFactor: Float
  /// The length a dynamic scaling was resolved for; nil where the scaling does not depend on the length.
  package let contextLength: Int?

  /// - Parameters:
  ///   - headDim: channels of a head, 1...4096.
  ///   - rotaryDim: channels that turn; nil: all of them.
  ///   - theta: base of the frequencies, `rope_theta` of a config.
  /// - Throws: `invalidOption` for an odd `rotaryDim` or one beyond `headDim`, a base that is not positive and finite,
  ///   and scaling parameters out of range.
  /// - Complexity: O(rotaryDim).
  public init(
    headDim: Int, rotaryDim: Int? = nil, theta: Double = 10_000, layout: Layout = .halfSplit,
    scaling: Scaling = .none, angleProduct: AngleProduct = .f32
  ) throws(KVError) {
    try self.init(
      headDim: headDim, rotaryDim: rotaryDim ?? headDim, theta: theta, layout: layout, scaling: scaling,
      angleProduct: angleProduct, contextLength: nil)
  }

  private init(
    headDim: Int, rotaryDim: Int, theta: Double, layout: Layout, scaling: Scaling, angleProduct: AngleProduct,
    contextLength: Int?
  ) throws(KVError) {
    guard (1...4096).contains(headDim) else {
      throw KVError(.invalidOption, "the head size must lie in 1...4096; got \(headDim)")
    }
    guard rotaryDim >= 2, rotaryDim.isMultiple(of: 2), rotaryDim <= headDim else {
      throw KVError(
        .invalidOption, "the rotary size must be even and lie in 2...\(headDim) (the head size); got \(rotaryDim)")
    }
    guard theta > 0, theta.isFinite, Float(theta).isFinite, Float(theta) > 0 else {
      throw KVError(.invalidOption, "the rotary base must be positive and finite; got \(theta)")
    }
    try scaling.validate(rotaryDim: rotaryDim, theta: theta)
    self.headDim = headDim
    self.rotaryDim = rotaryDim
    self.theta = theta
    self.layout = layout
    self.scaling = scaling
    self.angleProduct = angleProduct
    self.contextLength = contextLength
    inverseFrequencies = scaling.inverseFrequencies(
      rotaryDim: rotaryDim, theta: theta, contextLength: contextLength)
    attentionFactor = scaling.attentionFactor
    guard inverseFrequencies.allSatisfy({ $0.isFinite }) else {
      throw KVError(
        .invalidOption, "a rotary base of \(theta) with this scaling gives frequencies that f32 cannot hold")
    }
  }

  /// Pairs of channels that turn.
  public var pairs: Int { rotaryDim / 2 }

  /// Whether the angle of a position is known. False for a dynamic scaling that was not resolved for a length: such
  /// keys go stale when the context grows, so `rotate`, `unrotate` and `move` refuse.
  public var isStatic: Bool {
    if case .dynamicNTK = scaling.kind { return contextLength != nil }
    return true
  }

  /// The embedding as an engine computes it once `contextLength` tokens are in its context. Itself for every scaling
  /// that does not depend on the length.
  ///
  /// - Throws: `invalidOption` for a length below 1.
  public func resolved(contextLength: Int) throws(KVError) -> RotaryEmbedding {
    guard contextLength >= 1 else {
      throw KVError(.invalidOption, "a context holds at least 1 token; got \(contextLength)")
    }
    guard case .dynamicNTK = scaling.kind else { return self }
    return try RotaryEmbedding(
      headDim: headDim, rotaryDim: rotaryDim, theta: theta, layout: layout, scaling: scaling,
      angleProduct: angleProduct, contextLength: contextLength)
  }

  /// - Throws: `unsupported` where angles depend on a length that is not known. Policies that move or un-rotate keys
  ///   call this at construction.
  public func requireStatic() throws(KVError) {
    guard isStatic else {
      throw KVError(
        .unsupported,
        "dynamic NTK angles depend on the context length, so a cached key cannot be turned back or moved; resolve the "
          + "rotary embedding for a fixed length with resolved(contextLength:)")
    }
  }
}
