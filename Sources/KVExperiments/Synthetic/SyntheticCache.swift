public import KVCore

/// What a query head of a synthetic cache attends to besides sinks and heavy hitters.
public enum SyntheticHeadKind: Hashable, Sendable, CaseIterable {
  /// Recent tokens.
  case local
  /// Recent tokens, half as strongly.
  case mixed
  /// One earlier token, anywhere, another one for every query.
  case retrieval
}

/// One layer of a synthetic cache.
public struct SyntheticLayer: Hashable, Sendable {
  /// [kvHeads, tokens, dim], rotated when the options have a `ropeTheta`.
  public let keys: HeadTensor
  /// The same keys before rotation.
  public let keysBeforeRotation: HeadTensor
  /// [kvHeads, tokens, dim]
  public let values: HeadTensor
  /// [queryHeads, queryTokens, dim] of the last positions, rotated as the keys are.
  public let queries: HeadTensor
  /// [queryHeads, probeQueries, dim], all at position `tokens`.
  public let probeQueries: HeadTensor
  /// For every query head, and every row of `queries` and then of `probeQueries`: the position a retrieval head looks
  /// for. Empty for other heads.
  public let retrievalTargets: [[Int]]
}

/// Keys, values and queries with the structure real caches have: outlier key channels, attention sinks, heavy hitters,
/// locality, heads of different kinds, layers that resemble each other, low effective rank. Each is an option.
///
/// Reproducible: the same options give the same bits on every platform, and a change of one size leaves the numbers of
/// other layers and heads alone where they do not depend on it.
///
/// ```swift
/// var options = SyntheticOptions()
/// options.tokens = 1024
/// let cache = try SyntheticCache(options)
/// let keys = cache.layers[2].keys          // [2, 1024, 64]
/// ```
///
/// Complexity: O(layers · queryHeads · tokens · dim · (rank + localityWindow)) time, 4 bytes an element of memory.
public struct SyntheticCache: Sendable {
  public let options: SyntheticOptions
  public let layers: [SyntheticLayer]
  /// Kind of every query head, the same in every layer: local heads first, then mixed, then retrieval, dealt out so
  /// that every KV head gets its share.
  public let headKinds: [SyntheticHeadKind]
  /// Heavy hitter positions of every KV head, ascending; never a sink.
  public let heavyHitters: [[Int]]
  /// Outlier channels of the keys, before rotation.
  public let outlierChannels: [Int]

  /// - Throws: `invalidOption` that names the option, its range and its value.
  public init(_ options: SyntheticOptions = SyntheticOptions()) throws(KVError) {
    try options.validate()
    var builder = SyntheticBuilder(options)
    self.options = options
    self.layers = (0..<options.layers).map { builder.layer($0) }
    self.headKinds = builder.headKinds
    self.heavyHitters = builder.heavyHitters
    self.outlierChannels = builder.channels.outliers
  }

  /// The position of every row of a layer's `queries`.
  public var queryPositions: [Int] { Array(options.tokens - options.queryRows..<options.tokens) }
}
