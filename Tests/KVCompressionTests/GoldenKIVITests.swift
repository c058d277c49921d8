import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// KIVI against the authors' packing code: scales, minima, packed words, attention.
@Suite struct GoldenKIVITests {
  @Test(arguments: Goldens.names("kivi."))
  func codesAndOutput(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let type = try #require(run.entry.text("arithmetic") == "float32" ? ElementType.f32 : .f16)
    let bits = try run.entry.int("bits")
    let group = try run.entry.int("group")
    let residual = try run.entry.int("residual")
    let policy = Policy(
      store: try .kivi(keyBits: bits, group: group, residual: residual, window: type, metadata: type))
    let cache = try KVCache(
      policy, queryHeads: input.queries.heads, kvHeads: input.keys.heads, dim: input.keys.dim)
    try cache.append(input.keys, input.values)
    try cache.finishPrefill()

    let heads = try cache.segment.heads
    let keys = heads.map { EncodedBody($0.keys) }
    let values = heads.map { EncodedBody($0.values) }
    let quantizedKeys = try run.entry.int("quantizedKeys")
    let quantizedValues = try run.entry.int("quantizedValues")
    #expect(keys.allSatisfy { $0.rows == quantizedKeys } && values.allSatisfy { $0.rows == quantizedValues })
    #expect(heads.allSatisfy { $0.keys.tailRows == input.tokens - quantizedKeys })
    #expect(heads.allSatisfy { $0.values.tailRows == residual })

    try run.expect("keyScales", keys.flatMap(\.scales))
    try run.expect("keyMins", keys.flatMap(\.minima))
    try run.expect("valueScales", values.flatMap(\.scales))
    try run.expect("valueMins", values.flatMap(\.minima))
    try run.expect("keyWords", words: keys.flatMap(\.words))
    try run.expect("valueWords", words: values.flatMap(\.words))
    if run.entry.outputs["output"] != nil { try run.expect("output", cache.look(input.outputProbes())) }
    run.finish()

    // D·(b/8 + 2m/G) bytes per encoded token and head, for K and V each.
    let dim = input.keys.dim
    for (body, rows) in [(keys, quantizedKeys), (values, quantizedValues)] {
      for head in body {
        #expect(head.payloadBytes == rows * dim * bits / 8)
        #expect(head.metadataBytes == rows * dim / group * 2 * type.byteCount)
      }
    }
    #expect(
      cache.bytes.metadata
        == input.keys.heads * (quantizedKeys + quantizedValues) * dim / group * 2 * type.byteCount)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    #expect(try policy.estimate(shape: cache.shape, prompt: input.tokens) == cache.bytes)
  }
}
