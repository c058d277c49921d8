internal import KVCore
internal import KVTensorFiles

/// What a synthetic cache looks like. Logits are in nats, after the scale 1/√dim.
///
/// The lowest-frequency rotary pairs carry the positionless structure, as they do in trained models: the last pair the
/// attention sink, the one before it the heavy hitters, those before them one outlier channel each. The other channels
/// carry content.
public struct SyntheticOptions: Hashable, Sendable {
  /// Same options and seed: same bits, on every platform.
  public var seed: UInt64 = 1

  public var layers: Int = 4
  public var queryHeads: Int = 8
  /// KV heads; query head h reads KV head h / (queryHeads / kvHeads).
  public var kvHeads: Int = 2
  public var tokens: Int = 256
  /// Channels of keys, values and queries; even, at least 8.
  public var dim: Int = 64
  /// Queries of the last so many positions. Nil: of every position.
  public var queryTokens: Int?
  /// Queries more, all taken at position `tokens`: the next token, asked several times.
  public var probeQueries: Int = 0

  /// Base of the rotary embedding, half-split layout. Nil: keys and queries are not rotated. Rotation weakens sinks and
  /// heavy hitters at distances n where n · ropeTheta^(−(dim − 2) / dim) approaches 1: raise it for long contexts.
  public var ropeTheta: Double? = 10_000

  /// Key channels with a fixed offset, in every KV head; at most dim/2 − 3.
  public var outlierChannels: Int = 2
  /// Magnitude of that offset; content channels have standard deviation 1.
  public var outlierOffset: Double = 8
  /// Standard deviation of an outlier channel around its offset.
  public var outlierScale: Double = 2

  /// First tokens that every query attends to whatever it asks.
  public var sinkTokens: Int = 1
  /// Logit that a query gives a sink token, up to 256 tokens; log(tokens / 256) is added beyond, so that the sink's
  /// share of the attention does not fade as contexts grow.
  public var sinkLogit: Double = 8
  /// Norm of a sink's key content and of its value against other tokens'.
  public var sinkValueNorm: Double = 0.1

  /// Share of the tokens that receive much attention from all queries, rounded to the nearest count, drawn per KV head
  /// and the same in every layer.
  public var heavyHitterFraction: Double = 0.03
  /// Logit that a query gives a heavy hitter.
  public var heavyHitterLogit: Double = 4

  /// Mean logit that a query of a local head gives the keys before it, weighted by recency. Mixed heads: half of it.
  public var localityLogit: Double = 3
  /// Recent tokens that such a query resembles.
  public var localityWindow: Int = 8
  /// Logit that a query of a retrieval head gives the one earlier token it looks for; grows as `sinkLogit` does.
  public var retrievalLogit: Double = 7
  /// Share of the query heads that are local, and that are retrieval heads; the rest are mixed.
  public var localHeadFraction: Double = 0.5
  public var retrievalHeadFraction: Double = 0.25
  /// How much heads differ: a head's sink and heavy hitter logits are multiplied by a number in 1 ± headVariety.
  public var headVariety: Double = 0.2
  /// Standard deviation of the logits that are neither of the above.
  public var noiseLogit: Double = 0.5

  /// Correlation of the content of layers 0 and 1, keys and values alike, in 0...1.
  public var layerSimilarity: Double = 0.5
  /// What every further layer adds to that correlation, up to 1.
  public var layerSimilarityGrowth: Double = 0.1

  /// Dimensions of the space in which key content and values lie but for noise; at most the content channels.
  public var rank: Int = 16
  /// Standard deviation of the full-rank noise, against content of standard deviation 1.
  public var noise: Double = 0.1

  public init() {}

  /// Query rows per head.
  var queryRows: Int { queryTokens ?? tokens }

  /// Channels of one row in the order of their roles.
  struct Channels {
    var sink: Int
    var heavy: Int
    var outliers: [Int]
    var content: [Int]
  }

  var channels: Channels {
    let half = dim / 2
    let outliers = (0..<outlierChannels).map { half - 3 - $0 + ($0 % 2 == 0 ? 0 : half) }
    let reserved = Set([half - 1, dim - 1, half - 2, dim - 2] + outliers)
    return Channels(
      sink: half - 1, heavy: half - 2, outliers: outliers, content: (0..<dim).filter { !reserved.contains($0) })
  }

  /// What long contexts add to the logits of single tokens.
  var lengthLogit: Double { max(0, PortableMath.log(Double(tokens) / 256)) }

  var heavyCount: Int { Int((heavyHitterFraction * Double(tokens)).rounded()) }

  /// Correlation of the content of `layer` with the layer before it.
  func similarity(of layer: Int) -> Double {
    min(1, layerSimilarity + layerSimilarityGrowth * Double(layer - 1))
  }

  func validate() throws(KVError) {
    try require(layers, "layers", 1...1024)
    try require(kvHeads, "kvHeads", 1...1024)
    try require(queryHeads, "queryHeads", kvHeads...65536)
    try require(tokens, "tokens", 1...(1 << 24))
    try require(dim, "dim", 8...4096)
    guard dim % 2 == 0, queryHeads % kvHeads == 0 else {
      throw KVError(
        .invalidOption,
        "dim must be even and queryHeads a multiple of kvHeads; got \(dim), \(queryHeads) and \(kvHeads)")
    }
    try require(queryRows, "queryTokens", 0...tokens)
    try require(probeQueries, "probeQueries", 0...(1 << 20))
    try require(outlierChannels, "outlierChannels", 0...dim / 2 - 3)
    try require(sinkTokens, "sinkTokens", 0...tokens)
    try require(rank, "rank", 1...dim - 4 - outlierChannels)
    try require(localityWindow, "localityWindow", 1...4096)
    if let ropeTheta { try require(ropeTheta, "ropeTheta", 1...1e12) }
    let shares = [
      (heavyHitterFraction, "heavyHitterFraction"), (localHeadFraction, "localHeadFraction"),
      (retrievalHeadFraction, "retrievalHeadFraction"), (layerSimilarity, "layerSimilarity"),
      (layerSimilarityGrowth, "layerSimilarityGrowth"), (headVariety, "headVariety"),
      (localHeadFraction + retrievalHeadFraction, "localHeadFraction + retrievalHeadFraction"),
    ]
    for (value, name) in shares { try require(value, name, 0...1) }
    guard heavyCount + sinkTokens <= tokens else {
      throw KVError(
        .invalidOption, "\(sinkTokens) sinks and \(heavyCount) heavy hitters do not fit into \(tokens) tokens")
    }
    let magnitudes = [
      (outlierOffset, "outlierOffset"), (outlierScale, "outlierScale"), (sinkLogit, "sinkLogit"),
      (sinkValueNorm, "sinkValueNorm"), (heavyHitterLogit, "heavyHitterLogit"), (localityLogit, "localityLogit"),
      (retrievalLogit, "retrievalLogit"), (noiseLogit, "noiseLogit"), (noise, "noise"),
    ]
    for (value, name) in magnitudes { try require(value, name, 0...1e4) }
    guard elementCount(of: [layers, queryHeads, tokens, dim, 64]) != nil else {
      throw KVError(.invalidOption, "a cache of this size cannot be addressed")
    }
  }

  private func require<Number: Comparable>(
    _ value: Number, _ name: String, _ range: ClosedRange<Number>
  ) throws(KVError) {
    // NaN is in no range.
    guard range.contains(value) else {
      throw KVError(
        .invalidOption, "\(name) must lie in \(range.lowerBound)...\(range.upperBound); got \(value)")
    }
  }
}
