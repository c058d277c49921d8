import CAllocationCounter
import KVCompression
import Testing

/// Decoding in steady state does not touch the heap: not for rows (they have room), not for arrays, closures or boxes.
@Suite struct AllocationTests {
  @Test(arguments: [
    "f32", "f16", "bf16", "kivi(bits=8)", "kivi(bits=4)", "kivi(bits=2)", "snapkv(budget=128,window=16)",
    "h2o(budget=128)", "h2o(budget=128,normalised=true)", "tova(budget=128)", "lazy(budget=128,window=8,alpha=0.001)",
    "lazy(budget=128,window=32,alpha=0.001)", "h2o(budget=128)+schedule(every=16)",
    "snapkv(budget=128,window=16)+schedule(over=4096,every=1)",
  ])
  func decodingAllocatesNothing(text: String) throws {
    let (queryHeads, kvHeads, dim) = (4, 2, 64)
    let cache = try KVCache(
      shape: ModelShape(layerCount: 1, queryHeads: queryHeads, kvHeads: kvHeads, headDim: dim),
      policy: PolicyRegistry.standard.policy(text), backend: .cpu(threads: 1))
    let prompt = [Float](repeating: 0.25, count: 256 * queryHeads * dim)
    var promptOutput = prompt
    try step(cache, prompt, prompt, prompt, &promptOutput, tokens: 256, queryHeads, kvHeads, dim)
    try cache.finishPrefill()

    let queries = [Float](repeating: 0.5, count: queryHeads * dim)
    let row = [Float](repeating: 0.125, count: kvHeads * dim)
    var output = queries
    // Past the first tokens, which open new extents, and the first time gaps are closed.
    for _ in 0..<(text.hasPrefix("snapkv") || !text.contains("budget") ? 4 : 80) {
      try step(cache, row, row, queries, &output, tokens: 1, queryHeads, kvHeads, dim)
    }
    let before = allocation_counter_value()
    for _ in 0..<40 { try step(cache, row, row, queries, &output, tokens: 1, queryHeads, kvHeads, dim) }
    let made = allocation_counter_value() - before
    guard allocation_counter_available() else { return }
    #if DEBUG
      // Unoptimised code boxes and copies; what can be asserted of it is that the count does not grow with the tokens.
      _ = made
    #else
      #expect(made == 0, "\(made) allocations in 40 decode steps of \(text)")
    #endif
  }

  private func step(
    _ cache: KVCache, _ keys: [Float], _ values: [Float], _ queries: [Float], _ output: inout [Float], tokens: Int,
    _ queryHeads: Int, _ kvHeads: Int, _ dim: Int
  ) throws {
    try cache.append(
      layer: 0,
      keys: TensorView(
        keys.span, heads: kvHeads, tokens: tokens, dim: dim, headStride: tokens * dim, tokenStride: dim),
      values: TensorView(
        values.span, heads: kvHeads, tokens: tokens, dim: dim, headStride: tokens * dim, tokenStride: dim))
    var span = output.mutableSpan
    var view = try MutableTensorView(&span, heads: queryHeads, tokens: tokens, dim: dim)
    try cache.attend(
      layer: 0, queries: TensorView(queries.span, heads: queryHeads, tokens: tokens, dim: dim), into: &view)
  }
}
