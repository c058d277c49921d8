/// What a policy must be told beyond keys and values. The cache says at construction whether the engine supplies it.
public struct RequiredInputs: Hashable, Sendable {
  /// Post-RoPE queries of the last this many tokens.
  public var windowQueries: Int
  /// The attention weights every cached token received.
  public var attentionWeights: Bool
  /// The rotary embedding, in ``ModelShape/rotary``.
  public var rotary: Bool

  public init(windowQueries: Int = 0, attentionWeights: Bool = false, rotary: Bool = false) {
    self.windowQueries = windowQueries
    self.attentionWeights = attentionWeights
    self.rotary = rotary
  }

  /// Keys and values are enough.
  public static let none = RequiredInputs()

  /// Both needs together.
  public func union(_ other: RequiredInputs) -> RequiredInputs {
    RequiredInputs(
      windowQueries: max(windowQueries, other.windowQueries),
      attentionWeights: attentionWeights || other.attentionWeights, rotary: rotary || other.rotary)
  }
}

extension RequiredInputs: CustomStringConvertible {
  public var description: String {
    var parts: [String] = []
    if windowQueries > 0 { parts.append("queries of the last \(windowQueries) tokens") }
    if attentionWeights { parts.append("attention weights") }
    if rotary { parts.append("the rotary embedding") }
    return parts.isEmpty ? "keys and values only" : parts.joined(separator: ", ")
  }
}

/// What an engine will tell a cache beyond keys and values.
public struct EngineInputs: OptionSet, Hashable, Sendable {
  public let rawValue: Int
  public init(rawValue: Int) { self.rawValue = rawValue }

  /// `observe(layer:queries:)` is called for every appended token, or the cache attends and sees them itself.
  public static let queries = EngineInputs(rawValue: 1)
  /// `observe(layer:attention:)` is called for every appended token, or the cache attends itself.
  public static let attentionWeights = EngineInputs(rawValue: 2)

  /// The engine attends through the cache, which sees everything that passes.
  public static let attendThrough: EngineInputs = [.queries, .attentionWeights]
  /// The engine has its own kernels and reports nothing back.
  public static let attendYourself: EngineInputs = []
}
