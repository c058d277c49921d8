/// One layer of a cache in the shape that engines with attention of their own already use: update and fetch, an offset
/// that is not the row count, trim, state, mask.
///
/// ```swift
/// let layer = FetchCache(cache, layer: 3)
/// let rows = try layer.update(keys: k, values: v)       // everything to attend to, new tokens last
/// let mask = rows.mask(queries: n)                      // causal, sliding window, and what heads do not hold
/// // … the engine's own attention: softmax(q·k·scale + mask)·v …
/// ```
/// What the policy must see goes to ``KVCache/observe(layer:queries:)`` and ``KVCache/observe(layer:attention:)`` after
/// the attention. The policy acts on a step when the next one begins (or at ``commit()``), so the rows of a step stay what
/// `update` returned.
///
/// The prompt counts as finished when the first single token follows it, or at ``finishPrefill()``.
public final class FetchCache {
  public let cache: KVCache
  public let layer: Int
  private var pending = false

  /// A view of one layer of `cache`. Make one per layer; they share the cache.
  public init(_ cache: KVCache, layer: Int) throws(KVError) {
    _ = try cache.state(layer)
    self.cache = cache
    self.layer = layer
  }

  /// Tokens seen: the position the next token will have, for its rotary embedding.
  public var offset: Int { cache.tokensSeen(layer: layer) }

  /// Rows of the fullest head: what attention walks over.
  public var count: Int {
    (0..<cache.shape.layers[layer].kvHeads).map { cache.rowsHeld(layer: layer, head: $0) }.max() ?? 0
  }

  /// Appends new tokens and returns everything the layer holds, decoded.
  ///
  /// - Parameters:
  ///   - keys: [kvHeads, n, keyDim], post-RoPE at positions `offset ..< offset + n`.
  ///   - values: [kvHeads, n, valueDim].
  /// - Throws: as ``KVCache/append(layer:keys:values:)`` and, for the step before, `missingInput`.
  public func update(
    keys: borrowing TensorView, values: borrowing TensorView
  ) throws(KVError) -> FetchedRows {
    if keys.tokens == 1, offset > 0, cache.layers[layer].phase == .prefill {
      try finishPrefill()
    } else {
      try commit()
    }
    try cache.append(layer: layer, keys: keys, values: values)
    pending = true
    return try fetch()
  }

  /// The rows as they are, without appending.
  public func fetch() throws(KVError) -> FetchedRows {
    let shape = cache.shape.layers[layer]
    var heads: [HeadContents] = []
    for head in 0..<shape.kvHeads { heads.append(try cache.read(layer: layer, head: head)) }
    return FetchedRows(heads: heads, shape: shape, offset: offset)
  }

  /// Lets the policy act on the last step. Called by the next `update` when the engine does not.
  public func commit() throws(KVError) {
    guard pending else { return }
    try cache.commit(layer: layer)
    pending = false
  }

  /// Says that the prompt is complete.
  public func finishPrefill() throws(KVError) {
    try commit()
    if cache.layers[layer].phase == .prefill { try cache.finishPrefill(layer: layer) }
  }

  /// Whether the last token could be taken back.
  public var isTrimmable: Bool { offset > 0 && cache.minimumTrim < offset }

  /// Takes back the newest `tokens` tokens of every layer of the cache; call it on one layer.
  ///
  /// - Throws: `irreversible` when they are part of something compressed.
  public func trim(_ tokens: Int) throws(KVError) {
    guard tokens >= 0, tokens <= offset else {
      throw KVError(.invalidOption, "trimming \(tokens) tokens of \(offset)", layer: layer)
    }
    try cache.trim(to: offset - tokens)
    pending = false
  }

  /// The rows of every KV head, for engines that save state themselves.
  public var state: [HeadContents] {
    get throws(KVError) { try fetch().heads }
  }
}

/// Rows of one layer, decoded to f32 and padded to the fullest head.
public struct FetchedRows: Sendable {
  /// Unpadded, per KV head.
  public let heads: [HeadContents]
  /// Rows of the fullest head.
  public let rows: Int
  public let keyDim: Int
  public let valueDim: Int
  /// Tokens seen when the rows were read: the newest row has position `offset - 1`.
  public let offset: Int
  private let slidingWindow: Int?

  init(heads: [HeadContents], shape: LayerShape, offset: Int) {
    self.heads = heads
    rows = heads.map(\.positions.count).max() ?? 0
    keyDim = shape.keyDim
    valueDim = shape.valueDim
    slidingWindow = shape.slidingWindow
    self.offset = offset
  }

  /// [kvHeads, rows, keyDim]; heads with fewer rows end in zeros.
  public var keys: [Float] { padded(keyDim) { $0.keys } }
  /// [kvHeads, rows, valueDim]; heads with fewer rows end in zeros.
  public var values: [Float] { padded(valueDim) { $0.values } }

  private func padded(_ dim: Int, _ side: (HeadContents) -> [Float]) -> [Float] {
    var result: [Float] = []
    result.reserveCapacity(heads.count * rows * dim)
    for head in heads {
      let own = side(head)
      result += own
      result += repeatElement(0, count: rows * dim - own.count)
    }
    return result
  }

  /// What to add to the logits: [kvHeads, queries, rows], shared by the query heads of a group. Minus infinity where a
  /// query does not see a row (later tokens, outside the sliding window, padding); the row's log bias elsewhere.
  ///
  /// - Parameter queries: the newest tokens, positions `offset - queries ..< offset`.
  public func mask(queries: Int) -> [Float] {
    var result: [Float] = []
    result.reserveCapacity(heads.count * queries * rows)
    for head in heads {
      for query in 0..<queries {
        let position = offset - queries + query
        for row in 0..<rows {
          guard row < head.positions.count, head.positions[row] <= position,
            slidingWindow.map({ head.positions[row] > position - $0 }) ?? true
          else {
            result.append(-.infinity)
            continue
          }
          result.append(head.logBias[row])
        }
      }
    }
    return result
  }
}
