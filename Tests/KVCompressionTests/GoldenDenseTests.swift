import KVCompression
import KVExperiments
import Testing

/// Full attention over an uncompressed f32 cache against PyTorch in f64.
@Suite struct GoldenDenseTests {
  @Test(arguments: Goldens.names("dense."))
  func attention(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let cache = try KVCache(
      Policy(store: .dense(.f32)), queryHeads: input.queries.heads, kvHeads: input.keys.heads, dim: input.keys.dim)
    try cache.append(input.keys, input.values)
    try run.expect("probe.output", cache.look(input.probeQueries))

    // The last prompt rows: few queries and many take different paths.
    let last = try input.queries.slice(tokens: input.queries.tokens - 16..<input.queries.tokens)
    try run.expect("prefill.lastOutputs", cache.attend(last, AttentionOptions(commits: false)))
    let all = try HeadTensor(
      heads: input.queries.heads, tokens: input.queries.tokens, dim: input.keys.dim,
      elements: cache.attend(input.queries))
    try run.expect("prefill.lastOutputs", all.slice(tokens: all.tokens - 16..<all.tokens).elements)

    let bytes = input.keys.heads * input.tokens * 2 * input.keys.dim * 4
    #expect(cache.bytes == ByteCount(payload: bytes))
    #expect(cache.backend.memory.liveBytes == bytes)

    try cache.finishPrefill()
    var outputs: [[Float]] = []
    for step in 0..<input.probeKeys.tokens {
      try cache.append(
        input.probeKeys.slice(tokens: step..<step + 1), input.probeValues.slice(tokens: step..<step + 1))
      outputs.append(try cache.attend(input.probeQueries.slice(tokens: step..<step + 1)))
    }
    try run.expect("causal.output", headMajor(outputs, heads: input.queries.heads))

    let kernel = KernelAttention(backend: cache.backend)
    let result = try kernel.attend(input.probeQueries, over: [kernel.segment(input.keys, input.values)])
    try run.expect("probe.output", result.output)
    try run.expect("probe.logsumexp", result.logSumExp)
    run.finish()
  }

  /// The prompt's probes in one call, causally: a draft of several tokens.
  @Test(arguments: Goldens.names("dense."))
  func draft(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let cache = try KVCache(
      Policy(store: .dense(.f32)), queryHeads: input.queries.heads, kvHeads: input.keys.heads, dim: input.keys.dim)
    for start in stride(from: 0, to: input.tokens, by: 100) {
      let range = start..<min(start + 100, input.tokens)
      try cache.append(input.keys.slice(tokens: range), input.values.slice(tokens: range))
    }
    try cache.finishPrefill()
    try cache.append(input.probeKeys, input.probeValues)
    try run.expect("causal.output", cache.attend(input.probeQueries))
  }
}

/// [step][head, dim] to [head, step, dim].
func headMajor(_ steps: [[Float]], heads: Int) -> [Float] {
  let dim = (steps.first?.count ?? 0) / heads
  return (0..<heads).flatMap { head in steps.flatMap { Array($0[head * dim..<(head + 1) * dim]) } }
}
