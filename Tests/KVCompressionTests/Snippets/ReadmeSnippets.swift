import KVCompression
import Testing

/// The code of README.md and of the overview.
@Suite struct ReadmeSnippets {
  @Test func embed() throws {
    let shape = ModelShape(layerCount: 32, queryHeads: 32, kvHeads: 8, headDim: 128)
    let policy = try PolicyRegistry.standard.policy("snapkv(budget=0.25,window=32)+kivi(bits=2)")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())

    // Attention of one layer for the next tokens: queries, keys and values after the rotary embedding, [head, token, dim].
    func attention(layer: Int, tokens: Int, q: [Float], k: [Float], v: [Float]) throws -> [Float] {
      try cache.append(
        layer: layer, keys: TensorView(k.span, heads: 8, tokens: tokens, dim: 128),
        values: TensorView(v.span, heads: 8, tokens: tokens, dim: 128))
      var output = [Float](repeating: 0, count: 32 * tokens * 128)
      var span = output.mutableSpan
      var target = try MutableTensorView(&span, heads: 32, tokens: tokens, dim: 128)
      try cache.attend(layer: layer, queries: TensorView(q.span, heads: 32, tokens: tokens, dim: 128), into: &target)
      return output
    }
    func run(tokens: Int) throws {
      for layer in 0..<32 {
        let rows = [Float](repeating: 0.5, count: 8 * tokens * 128)
        let output = try attention(
          layer: layer, tokens: tokens, q: [Float](repeating: 0.1, count: 32 * tokens * 128), k: rows, v: rows)
        #expect(output.allSatisfy { $0.isFinite })
      }
    }

    try run(tokens: 160)  // the prompt, at once or in chunks
    try cache.finishPrefill()  // the policy chooses tokens and stores them
    try run(tokens: 1)  // decoding: the same call, one or several tokens at a time
    print(cache.bytes.total, cache.status[0].reason)

    #expect(cache.rowsHeld(layer: 0, head: 0) == 41)
    #expect(cache.tokensSeen(layer: 0) == 161)
  }

  @Test func overview() throws {
    let layer = ModelShape(layerCount: 1, queryHeads: 32, kvHeads: 8, headDim: 128)
    let policy = try PolicyRegistry.standard.policy("snapkv(budget=1024)+kivi(bits=4)")
    let bytes = try policy.estimate(shape: layer, prompt: 2048, decoded: 1)
    print(policy.spec, policy.inputs, bytes.total)

    #expect(bytes.total > 0)
  }
}
