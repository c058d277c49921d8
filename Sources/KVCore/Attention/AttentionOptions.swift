/// What a model's attention does besides softmax(q·k / sqrt(d))·v.
public struct AttentionOptions: Hashable, Sendable {
  /// Factor on q·k. Nil: 1 / sqrt(keyDim).
  public var scale: Float?
  /// `softcap * tanh(logit / softcap)`, applied before any log bias (Gemma 2). Nil: none.
  public var softcap: Float?
  /// False: the queries see every cached row, also later ones (cross attention over a finished cache).
  public var causal: Bool
  /// False: the call only looks. Statistics are not updated, the policy does not act, and the same tokens may be
  /// attended again.
  public var commits: Bool

  public init(scale: Float? = nil, softcap: Float? = nil, causal: Bool = true, commits: Bool = true) {
    self.scale = scale
    self.softcap = softcap
    self.causal = causal
    self.commits = commits
  }

  package func validate(layer: Int? = nil) throws(KVError) {
    if let scale, !scale.isFinite {
      throw KVError(.invalidOption, "the attention scale must be finite; got \(scale)", layer: layer)
    }
    if let softcap, !(softcap > 0 && softcap.isFinite) {
      throw KVError(.invalidOption, "a logit softcap must be positive and finite; got \(softcap)", layer: layer)
    }
  }
}
