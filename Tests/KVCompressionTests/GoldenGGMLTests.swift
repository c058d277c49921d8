import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// ggml's reference C: block bytes, and attention over them.
@Suite struct GoldenGGMLTests {
  @Test(arguments: Goldens.names("ggml."))
  func blocksAndOutput(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let type = try run.entry.text("type")
    let policy = try PolicyRegistry.standard.policy("ggml(keys=\(type),values=\(type),window=f32)")
    let cache = try KVCache(policy, queryHeads: input.queries.heads, kvHeads: input.keys.heads, dim: input.keys.dim)
    try cache.append(input.keys, input.values)
    try cache.finishPrefill()
    let held = try (0..<input.keys.heads).map { try cache.encodedRows(layer: 0, head: $0) }
    try run.expect("keyBlocks", held.flatMap(\.keys).map { Double($0) })
    try run.expect("valueBlocks", held.flatMap(\.values).map { Double($0) })
    // The definition, without rounding of queries and weights.
    let exact = try KVCache(shape: cache.shape, policy: policy, backend: .cpu(threads: 1, level: "portable"))
    try exact.append(input.keys, input.values)
    try exact.finishPrefill()
    let wanted = try exact.look(input.outputProbes())
    try run.expect("output", wanted)
    // Integer kernels round each query element and weight to 1/32639 of the largest: on logits of some tens 5e-4.
    let (got, size) = (try cache.look(input.outputProbes()), wanted.reduce(0) { $0 + $1 * $1 }.squareRoot())
    #expect(zip(got, wanted).reduce(0) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }.squareRoot() <= 5e-4 * size)
    run.finish()
    let rowBytes = try #require(GGMLBlock(name: type)).byteCount * input.keys.dim / 32
    #expect(cache.bytes.payload + cache.bytes.metadata == 2 * input.keys.heads * input.tokens * rowBytes)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    #expect(try policy.estimate(shape: cache.shape, prompt: input.tokens) == cache.bytes)

    // The same blocks taken over from an engine: the same cache, and the same bytes out.
    let adopted = try KVCache(policy, queryHeads: input.queries.heads, kvHeads: input.keys.heads, dim: input.keys.dim)
    let (keys, values) = (held.flatMap(\.keys), held.flatMap(\.values))
    let encoding = RowEncoding.ggml(try #require(GGMLBlock(name: type)))
    let heads = input.keys.heads
    try adopted.append(
      layer: 0, keys: EncodedRows(keys.span, encoding, heads: heads, tokens: input.tokens, dim: input.keys.dim),
      values: EncodedRows(values.span, encoding, heads: heads, tokens: input.tokens, dim: input.keys.dim))
    try adopted.finishPrefill()
    #expect(try (0..<heads).map { try adopted.encodedRows(layer: 0, head: $0) } == held)
    #expect(try adopted.look(input.outputProbes()) == cache.look(input.outputProbes()))
    #expect(adopted.bytes == cache.bytes)
  }
}
