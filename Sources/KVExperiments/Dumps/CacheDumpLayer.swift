public import KVCore

/// Keys, values and queries of one attention layer at one moment, f32.
///
/// Keys and queries are as attention uses them: rotated, where the model rotates. Query head h reads KV head
/// h / (queryHeads / kvHeads).
public struct CacheDumpLayer: Hashable, Sendable {
  /// [kvHeads, T, d]
  public let keys: HeadTensor
  /// [kvHeads, T, dv]
  public let values: HeadTensor
  /// [queryHeads, Tq, d] of the last Tq of the T positions.
  public let queries: HeadTensor
  /// The same keys before rotation, [kvHeads, T, d].
  public let keysBeforeRotation: HeadTensor?
  /// [queryHeads, P, d], all taken at position T.
  public let probeQueries: HeadTensor?

  /// - Throws: `shapeMismatch` that names the tensor that does not fit, `nonFinite` that names tensor, head and token
  ///   of a NaN or infinity.
  /// - Complexity: O(elements).
  public init(
    keys: HeadTensor, values: HeadTensor, queries: HeadTensor, keysBeforeRotation: HeadTensor? = nil,
    probeQueries: HeadTensor? = nil
  ) throws(KVError) {
    try self.init(
      keys: keys, values: values, queries: queries, keysBeforeRotation: keysBeforeRotation,
      probeQueries: probeQueries, prefix: "")
  }

  init(
    keys: HeadTensor, values: HeadTensor, queries: HeadTensor, keysBeforeRotation: HeadTensor?,
    probeQueries: HeadTensor?, prefix: String
  ) throws(KVError) {
    try CacheDumpShapes(
      keys: keys.shape, values: values.shape, queries: queries.shape,
      keysBeforeRotation: keysBeforeRotation?.shape, probeQueries: probeQueries?.shape
    ).validate(prefix: prefix)
    self.keys = keys
    self.values = values
    self.queries = queries
    self.keysBeforeRotation = keysBeforeRotation
    self.probeQueries = probeQueries
    for (name, tensor) in named { try tensor.checkFinite("tensor '\(prefix)\(name.rawValue)'") }
  }

  /// A layer of a synthetic cache. Its probe queries and keys before rotation come along where there are any.
  ///
  /// - Throws: nothing in practice; the checks of ``init(keys:values:queries:keysBeforeRotation:probeQueries:)`` run.
  public init(_ layer: SyntheticLayer) throws(KVError) {
    try self.init(
      keys: layer.keys, values: layer.values, queries: layer.queries, keysBeforeRotation: layer.keysBeforeRotation,
      probeQueries: layer.probeQueries.tokens > 0 ? layer.probeQueries : nil)
  }

  public var shape: CacheDumpLayerShape {
    CacheDumpLayerShape(
      queryHeads: queries.heads, kvHeads: keys.heads, tokens: keys.tokens, queryTokens: queries.tokens,
      keyDim: keys.dim, valueDim: values.dim, probeQueries: probeQueries?.tokens ?? 0,
      hasKeysBeforeRotation: keysBeforeRotation != nil)
  }

  /// The tensors there are, by their names in a file.
  var named: [(CacheDumpTensor, HeadTensor)] {
    var all: [(CacheDumpTensor, HeadTensor)] = [(.keys, keys), (.values, values), (.queries, queries)]
    if let keysBeforeRotation { all.append((.keysBeforeRotation, keysBeforeRotation)) }
    if let probeQueries { all.append((.probeQueries, probeQueries)) }
    return all
  }
}

/// Sizes of a dumped layer, known without reading its numbers.
public struct CacheDumpLayerShape: Hashable, Sendable {
  public let queryHeads: Int
  public let kvHeads: Int
  /// Positions held, T.
  public let tokens: Int
  /// Queries of the last so many positions, Tq.
  public let queryTokens: Int
  public let keyDim: Int
  public let valueDim: Int
  /// Queries at position T; 0 without any.
  public let probeQueries: Int
  public let hasKeysBeforeRotation: Bool

  /// Position of every row of `queries`.
  public var queryPositions: [Int] { Array(tokens - queryTokens..<tokens) }
}

/// Names of a layer's tensors, after `layers.L.`.
enum CacheDumpTensor: String, CaseIterable {
  case keys
  case values
  case queries
  case keysBeforeRotation = "keys_pre_rope"
  case probeQueries = "probe_queries"

  func name(layer: Int) -> String { "layers.\(layer).\(rawValue)" }
}

/// The shapes of a layer's tensors, held against each other.
struct CacheDumpShapes {
  var keys: [Int]
  var values: [Int]
  var queries: [Int]
  var keysBeforeRotation: [Int]?
  var probeQueries: [Int]?

  func validate(prefix: String) throws(KVError) {
    try check("keys", keys, prefix, [nil, nil, nil], "[kvHeads, T, d]")
    let (heads, tokens, dim) = (keys[0], keys[1], keys[2])
    try check("values", values, prefix, [heads, tokens, nil], "the KV heads and tokens of the keys, \(keys)")
    try check("queries", queries, prefix, [nil, nil, dim], "[queryHeads, Tq, \(dim)]")
    guard heads >= 1, queries[0] >= heads, queries[0] % heads == 0 else {
      throw KVError(
        .shapeMismatch,
        "tensor '\(prefix)queries': expected a multiple of the \(heads) KV heads of the keys, at least "
          + "one, found \(queries[0]) query heads")
    }
    guard queries[1] <= tokens else {
      throw KVError(
        .shapeMismatch,
        "tensor '\(prefix)queries': expected queries of at most the \(tokens) tokens of the keys, found \(queries[1])")
    }
    if let keysBeforeRotation {
      try check(
        "keys_pre_rope", keysBeforeRotation, prefix, [heads, tokens, dim], "the shape of the keys, \(keys)")
    }
    if let probeQueries {
      try check("probe_queries", probeQueries, prefix, [queries[0], nil, dim], "[\(queries[0]), P, \(dim)]")
    }
  }

  /// - Parameter wanted: sizes the axes must have; nil for any.
  private func check(
    _ name: String, _ shape: [Int], _ prefix: String, _ wanted: [Int?], _ text: String
  ) throws(KVError) {
    let fits = shape.count == 3 && zip(shape, wanted).allSatisfy { $1 == nil || $0 == $1 }
    guard fits, shape[2] >= 1 else {
      throw KVError(.shapeMismatch, "tensor '\(prefix)\(name)': expected \(text), found shape \(shape)")
    }
  }
}
