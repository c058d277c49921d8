import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// RotateKV against the authors' quantizer behind their rotation and permutation.
@Suite struct GoldenRotateKVTests {
  @Test(arguments: Goldens.names("rotatekv."))
  func rowsAndOutput(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let (heads, tokens, dim) = (input.keys.heads, input.tokens, input.keys.dim)
    let order = try Goldens.reference(run.entry, "permutation").numbers.map { Int($0) }
    let store = try Store.rotateKV(
      keyBits: run.entry.int("bits"), group: run.entry.int("group"), heads: run.entry.int("headGroup"),
      levels: .squared, calibration: RotateKVTests.calibration([order]), window: .f32, metadata: .f32)
    let cache = try KVCache(
      Policy(store: store), queryHeads: input.queries.heads, kvHeads: heads, dim: dim,
      rotary: try RotaryEmbedding(headDim: dim, theta: 500_000))
    try cache.append(input.keys, input.values)
    try cache.finishPrefill()

    let segment = try #require(cache.layers[0].segments[0] as? LowRankSegment)
    let sides = try #require(segment.lowRank.sides)
    let keys = sides.keys.stores[0]
    #expect(keys.bodyRows == tokens && keys.dim == heads * dim)
    // Behind the map, rows are what the authors quantize.
    let before = try Self.rotated(cache, input.keys, map: try #require(keys.fixedMap))
    try run.expect("rotatedKeys", Self.byHead(before, heads: heads, dim: dim))
    try run.expect("quantizedKeys", Self.byHead(Self.bare(keys), heads: heads, dim: dim))
    try run.expect("quantizedValues", sides.values.stores.flatMap { try Self.bare($0) })
    try run.expect("output", cache.look(input.outputProbes()))
    run.finish()
  }

  /// Rows as their codes say, without the map that lies in front of them.
  private static func bare(_ store: RowStore) throws -> [Float] {
    let reader = try Backend.cpu(threads: 1).operations
    var rows: [Float] = []
    for extent in store.extents[..<store.bodyExtents] {
      var own = [Float](repeating: 0, count: extent.rows * store.dim)
      let run = RowRun(
        encoding: extent.encoding, dim: store.dim, capacity: extent.capacity, base: extent.buffer.base)
      own.withUnsafeMutableBufferPointer {
        reader.read(
          RunSlice(run: run, first: extent.first, count: extent.rows), into: $0.baseAddress!, stride: store.dim)
      }
      rows += own
    }
    return rows
  }

  /// Keys of all heads side by side, turned back and mapped, in f32.
  private static func rotated(_ cache: KVCache, _ keys: HeadTensor, map: RowMap) throws -> [Float] {
    let reader = try Backend.cpu(threads: 1).operations
    let width = keys.heads * keys.dim
    var plain = keys.elements
    let positions = (0..<keys.heads).flatMap { _ in 0..<Int32(keys.tokens) }
    var span = plain.mutableSpan
    try cache.shape.rotary?.unrotate(&span, stride: keys.dim, positions: positions.span)
    var rows = [Float](repeating: 0, count: keys.tokens * width)
    for head in 0..<keys.heads {
      for token in 0..<keys.tokens {
        for c in 0..<keys.dim {
          rows[token * width + head * keys.dim + c] = plain[(head * keys.tokens + token) * keys.dim + c]
        }
      }
    }
    var result = rows
    rows.withUnsafeMutableBytes { from in
      result.withUnsafeMutableBytes { to in
        let source = RowRun(encoding: .dense(.f32), dim: width, capacity: keys.tokens, base: from.baseAddress!)
        let target = RowRun(
          encoding: .dense(.f32), dim: width, capacity: keys.tokens, base: to.baseAddress!, map: map.descriptor)
        reader.transcode([RunSlice(run: source, first: 0, count: keys.tokens)], to: target, row: 0)
      }
    }
    return result
  }

  /// [token][head][dim] as [head][token][dim].
  private static func byHead(_ rows: [Float], heads: Int, dim: Int) -> [Float] {
    var result: [Float] = []
    for head in 0..<heads {
      for token in 0..<rows.count / (heads * dim) {
        let start = (token * heads + head) * dim
        result += rows[start..<start + dim]
      }
    }
    return result
  }
}
