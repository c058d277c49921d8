package import KVCompression
internal import KVExperiments

/// Keys, values and queries for benchmarks, made once: a block of tokens that is appended again and again.
package final class BenchData {
  package static let shape = LayerShape(queryHeads: 32, kvHeads: 8, keyDim: 128)
  package static let group = 4
  package static let dim = 128
  /// For stores that turn keys.
  package static func rotary() throws(KVError) -> RotaryEmbedding { try RotaryEmbedding(headDim: dim) }
  package static let blockTokens = 4096
  package static let maximumQueries = 32

  /// [kvHeads, blockTokens, dim]
  package let keys: [Float]
  package let values: [Float]
  /// The same of a layer that is much like the first, as neighbouring layers are.
  private(set) lazy var nearbyKeys = Self.near(keys, values)
  private(set) lazy var nearbyValues = Self.near(values, keys)
  /// [queryHeads, maximumQueries, dim]
  package let queries: [Float]

  package init(seed: UInt64 = 1) {
    func random(_ count: Int, stream: Int) -> [Float] {
      var generator = SeededGenerator(seed: seed, streams: stream)
      return [Float](unsafeUninitializedCapacity: count) { buffer, initialized in
        // Four 16-bit numbers a draw; their sum in pairs is near enough to normal.
        var index = 0
        while index < count {
          let bits = generator.next()
          for shift in [0, 32] where index < count {
            let (a, b) = (UInt16(truncatingIfNeeded: bits >> shift), UInt16(truncatingIfNeeded: bits >> (shift + 16)))
            buffer[index] = (Float(a) + Float(b) - 65535) / 26755
            index += 1
          }
        }
        initialized = count
      }
    }
    let rows = Self.shape.kvHeads * Self.blockTokens * Self.dim
    keys = random(rows, stream: 1)
    values = random(rows, stream: 2)
    queries = random(Self.shape.queryHeads * Self.maximumQueries * Self.dim, stream: 3)
  }

  private static func near(_ rows: [Float], _ other: [Float]) -> [Float] {
    rows.indices.map { 0.9 * rows[$0] + 0.3 * other[$0] }
  }

  /// Queries [queryHeads, count, dim] of the heads that read `heads`.
  package func queries(_ count: Int, of heads: [Int]) -> [Float] {
    var result: [Float] = []
    for head in heads {
      for member in 0..<Self.group {
        let start = (head * Self.group + member) * Self.maximumQueries * Self.dim
        result += queries[start..<start + count * Self.dim]
      }
    }
    return result
  }

  /// Appends tokens `range` of the endless repetition of the block; the range lies in one repetition.
  ///
  /// - Parameters:
  ///   - heads: KV heads the cache has, of the eight; evenly spaced.
  ///   - nearby: the rows of the layer that is much like the others.
  package func append(
    _ range: Range<Int>, to cache: KVCache, layer: Int, heads: [Int], nearby: Bool = false
  ) throws(KVError) {
    let first = range.lowerBound % Self.blockTokens
    let row = Self.dim
    let headStride = Self.blockTokens * row
    let step = heads.count > 1 ? heads[1] - heads[0] : 1
    let start = heads[0] * headStride + first * row
    let end = heads[heads.count - 1] * headStride + (first + range.count) * row
    // Spans are of these copies (of references), which live as long as the call.
    let (allKeys, allValues) = nearby ? (nearbyKeys, nearbyValues) : (keys, values)
    try cache.append(
      layer: layer,
      keys: TensorView(
        allKeys.span.extracting(start..<end), heads: heads.count, tokens: range.count, dim: row,
        headStride: step * headStride, tokenStride: row),
      values: TensorView(
        allValues.span.extracting(start..<end), heads: heads.count, tokens: range.count, dim: row,
        headStride: step * headStride, tokenStride: row))
  }

  /// Fills a layer with `tokens` tokens as a prompt of one block and decoding of the rest, so that quantizing stores never
  /// hold more than a block in full.
  ///
  /// - Parameter asPrompt: the whole is a prompt that is not finished.
  package func fill(
    _ cache: KVCache, layer: Int, tokens: Int, heads: [Int], asPrompt: Bool = false
  ) throws(KVError) {
    for first in stride(from: 0, to: tokens, by: Self.blockTokens) {
      let last = min(first + Self.blockTokens, tokens)
      try append(first..<last, to: cache, layer: layer, heads: heads)
      if asPrompt { continue }
      if first == 0 { try cache.finishPrefill(layer: layer) } else { try cache.commit(layer: layer) }
    }
  }
}
