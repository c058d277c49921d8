/// What a policy must be told beyond keys and values. The cache says at construction whether the engine supplies it.
public struct RequiredInputs: Sendable {
  /// Post-RoPE queries of the last this many tokens.
  public var windowQueries: Int
  /// Whether those queries are also needed of decoded tokens. False: they are freed when the prompt is complete.
  public var queriesWhileDecoding = true
  /// What is remembered of the attention weights every cached token receives. Nil: they are not needed.
  public var observer: (any AttentionObserver)?
  /// The rotary embedding, in ``ModelShape/rotary``.
  public var rotary: Bool
  /// Post-RoPE queries of tokens drawn from all that came since the last choice.
  public var probes: ProbeQueries?

  public init(
    windowQueries: Int = 0, queriesWhileDecoding: Bool = true, observer: (any AttentionObserver)?,
    rotary: Bool = false
  ) {
    self.windowQueries = windowQueries
    self.queriesWhileDecoding = queriesWhileDecoding
    self.observer = observer
    self.rotary = rotary
  }

  /// - Parameter attentionWeights: whether rows carry the sum of the attention they received, ``AttentionSum``.
  public init(windowQueries: Int = 0, attentionWeights: Bool = false, rotary: Bool = false) {
    self.init(windowQueries: windowQueries, observer: attentionWeights ? AttentionSum() : nil, rotary: rotary)
  }

  /// Whether the weights every cached token receives are needed.
  public var attentionWeights: Bool { observer != nil }

  /// The queries of probes alone.
  public init(probes: ProbeQueries) {
    self.init()
    self.probes = probes
  }

  /// Keys and values are enough.
  public static let none = RequiredInputs()

  /// Both needs together.
  ///
  /// - Precondition: at most one observer, or twice the same: rows carry the numbers of one.
  public func union(_ other: RequiredInputs) -> RequiredInputs {
    precondition(
      observer == nil || other.observer == nil || self.observes(as: other), "two observers of the same attention")
    var result = RequiredInputs(
      windowQueries: max(windowQueries, other.windowQueries),
      queriesWhileDecoding: windowQueries > 0 && queriesWhileDecoding
        || other.windowQueries > 0 && other.queriesWhileDecoding,
      observer: observer ?? other.observer, rotary: rotary || other.rotary)
    result.probes = probes ?? other.probes
    return result
  }

  private func observes(as other: RequiredInputs) -> Bool {
    observer.map { AnyHashable($0) } == other.observer.map { AnyHashable($0) }
  }
}

extension RequiredInputs: Hashable {
  public static func == (a: RequiredInputs, b: RequiredInputs) -> Bool {
    a.windowQueries == b.windowQueries && a.queriesWhileDecoding == b.queriesWhileDecoding && a.rotary == b.rotary
      && a.probes == b.probes && a.observes(as: b)
  }

  public func hash(into hasher: inout Hasher) {
    hasher.combine(windowQueries)
    hasher.combine(queriesWhileDecoding)
    hasher.combine(rotary)
    hasher.combine(probes)
    hasher.combine(observer.map { AnyHashable($0) })
  }
}

extension RequiredInputs: CustomStringConvertible {
  public var description: String {
    var parts: [String] = []
    if windowQueries > 0 { parts.append("queries of the last \(windowQueries) tokens") }
    if let probes { parts.append("queries of \(probes)") }
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
