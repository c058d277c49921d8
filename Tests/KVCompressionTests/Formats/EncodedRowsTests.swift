import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Rows that an engine has encoded.
@Suite struct EncodedRowsTests {
  private static let shape = Geometry(4, 2, 64).shape(layers: 2)

  private func blocks(_ tokens: Int, seed: UInt64, _ block: GGMLBlock) throws -> [UInt8] {
    try FormatTests.encode(normals(2 * tokens * 64, seed: seed), dim: 64, .ggml(block)).bytes
  }

  /// Head-major, token-major and strided views of the same rows.
  @Test func layouts() throws {
    let cache = try makeCache("ggml(keys=q8_0,values=q4_0)", Self.shape)
    let (keys, values) = (try blocks(9, seed: 1, .q8_0), try blocks(9, seed: 2, .q4_0))
    try cache.append(
      layer: 0, keys: EncodedRows(keys.span, .ggml(.q8_0), heads: 2, tokens: 9, dim: 64),
      values: EncodedRows(values.span, .ggml(.q4_0), heads: 2, tokens: 9, dim: 64))
    let expected = try (0..<2).map { try cache.encodedRows(layer: 0, head: $0) }
    #expect(expected[1].keys == Array(keys[(9 * 68)...]) && expected[0].values == Array(values[..<(9 * 36)]))
    #expect(expected[0].positions == Array(0..<9))

    // [token][head], behind a header of 3 bytes, one token at a time.
    var mixed: [UInt8] = [1, 2, 3]
    for t in 0..<9 { for h in 0..<2 { mixed += keys[(h * 9 + t) * 68..<(h * 9 + t + 1) * 68] } }
    var mixedValues: [UInt8] = []
    for t in 0..<9 { for h in 0..<2 { mixedValues += values[(h * 9 + t) * 36..<(h * 9 + t + 1) * 36] } }
    for t in 0..<9 {
      try cache.append(
        layer: 1,
        keys: EncodedRows(
          mixed.span.extracting((3 + t * 136)...), .ggml(.q8_0), heads: 2, tokens: 1, dim: 64, headStride: 68,
          tokenStride: 136),
        values: EncodedRows(
          mixedValues.span.extracting((t * 72)..<((t + 1) * 72)), .ggml(.q4_0), heads: 2, tokens: 1, dim: 64,
          layout: .tokenMajor), firstPosition: t)
    }
    #expect(try (0..<2).map { try cache.encodedRows(layer: 1, head: $0) } == expected)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// Adopted rows, then tokens of our own: the same as if all had been our own; also after a fork and a file.
  @Test func continues() throws {
    let traffic = Traffic(Self.shape, tokens: 60)
    for text in [
      "ggml(keys=q8_0,values=q4_0)", "ggml(keys=q5_1,values=dense)", "fp8", "int8(scale=tensor,factor=0.02)",
    ] {
      let plain = try makeCache(text, Self.shape)
      for layer in 0..<2 { try traffic.append(plain, layer, 0..<40) }
      try plain.finishPrefill()
      let cache = try makeCache(text, Self.shape)
      for layer in 0..<2 {
        let held = try (0..<2).map { try plain.encodedRows(layer: layer, head: $0) }
        let (keys, values) = (held.flatMap(\.keys), held.flatMap(\.values))
        try cache.append(
          layer: layer, keys: EncodedRows(keys.span, held[0].keyEncoding, heads: 2, tokens: 40, dim: 64),
          values: EncodedRows(values.span, held[0].valueEncoding, heads: 2, tokens: 40, dim: 64), firstPosition: 0)
      }
      try cache.finishPrefill()
      #expect(try Snapshot(cache).heads == Snapshot(plain).heads)
      let fork = cache.fork()
      let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu(threads: 1))
      var outputs: [[Float]] = []
      for each in [plain, cache, fork, loaded] {
        var own: [Float] = []
        for token in 40..<60 { own += try traffic.step(each, token..<token + 1) }
        outputs.append(own)
      }
      // Rows lie in other extents, and weights are rounded relative to the largest of 128 rows of one extent.
      for other in outputs.dropFirst() {
        let worst = zip(other, outputs[0]).map { abs($0 - $1) }.max() ?? 0
        #expect(other.count == outputs[0].count && worst <= 4 * 2 / 32639, "\(text): off by \(worst)")
      }
      #expect(cache.minimumTrim == plain.minimumTrim)
    }
  }

  @Test func badRowsAreRefused() throws {
    let cache = try makeCache("ggml(keys=q8_0,values=q4_0)", Self.shape)
    let (keys, values) = (try blocks(3, seed: 1, .q8_0), try blocks(3, seed: 2, .q4_0))
    func append(
      _ keys: [UInt8], _ values: [UInt8], _ block: GGMLBlock = .q8_0, heads: Int = 2, tokens: Int = 3, dim: Int = 64,
      first: Int? = nil, layer: Int = 1
    ) throws {
      try cache.append(
        layer: layer, keys: EncodedRows(keys.span, .ggml(block), heads: heads, tokens: tokens, dim: dim),
        values: EncodedRows(values.span, .ggml(.q4_0), heads: 2, tokens: 3, dim: 64), firstPosition: first)
    }
    expectError(.shapeMismatch, "68 bytes", "holds 407") { try append(Array(keys.dropLast()), values) }
    expectError(.unsupported, "q8_0", "48 channels") { try append(keys, values, dim: 48) }
    expectError(.shapeMismatch, "2 heads x 64", "got 1 x 128", layer: 1) {
      try append(keys, values, heads: 1, dim: 128)
    }
    expectError(.shapeMismatch, "4 keys and 3 values", layer: 1) {
      try append(blocks(4, seed: 1, .q8_0), values, tokens: 4)
    }
    expectError(.invalidOption, "holds keys as q8_0", "rows are q5_0", layer: 1) {
      try append(blocks(3, seed: 1, .q5_0), values, .q5_0)
    }
    expectError(.shapeMismatch, "position 0", "got 2", layer: 1, position: 2) { try append(keys, values, first: 2) }
    expectError(.shapeMismatch, "layer 7", layer: 7) { try append(keys, values, layer: 7) }
    var broken = keys
    broken[4 * 68 + 34] = 0
    broken[4 * 68 + 35] = 0x7C
    expectError(.nonFinite, "byte 34 of an encoded key", "q8_0", layer: 1, head: 1, position: 1) {
      try append(broken, values)
    }
    broken[4 * 68 + 34] = 1
    expectError(.nonFinite, layer: 1, head: 1, position: 1) { try append(broken, values) }
    expectError(.shapeMismatch, "reach beyond") {
      let view = try EncodedRows(
        keys.span, .ggml(.q8_0), heads: 2, tokens: 3, dim: 64, headStride: 68, tokenStride: 170)
      _ = view.tokens
    }
    expectError(.unsupported, "apart from its rows") {
      let view = try EncodedRows(keys.span, .scaledPerToken(.int8), heads: 2, tokens: 3, dim: 64)
      _ = view.tokens
    }
    #expect(cache.tokensSeen(layer: 1) == 0 && cache.bytes.total == 0)

    // Dense tokens in the way.
    let traffic = Traffic(Self.shape, tokens: 4)
    try traffic.append(cache, 1, 0..<1)
    expectError(.wrongPhase, "1 tokens are still dense", layer: 1, head: 0) { try append(keys, values) }
    expectError(.wrongPhase, "1 tokens are not q8_0 yet", layer: 1, head: 0) {
      _ = try cache.encodedRows(layer: 1, head: 0)
    }
    let kivi = try makeCache("kivi", Self.shape)
    expectError(.invalidOption, "holds keys as affine", layer: 0) {
      try kivi.append(
        layer: 0, keys: EncodedRows(keys.span, .ggml(.q8_0), heads: 2, tokens: 3, dim: 64),
        values: EncodedRows(values.span, .ggml(.q4_0), heads: 2, tokens: 3, dim: 64))
    }
  }
}
