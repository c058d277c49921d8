import KVCompression
import KVExperiments
import Testing

/// H2O against the authors' `H2OKVCache_LayerWise`.
@Suite struct GoldenH2OTests {
  @Test(arguments: Goldens.names("h2o."))
  func prefillAndDecode(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let repeats = try run.entry.text("groupReduce") == "none" ? 2 : 1
    try feed(run, input, repeats: repeats) { cache, _ in
      if input.hasAllQueries {
        _ = try cache.attend(input.queries)
      } else {
        try cache.observe(layer: 0, attention: columnSums(input, kvHeads: input.keys.heads * repeats))
      }
    }
    run.finish()
  }

  /// The prompt in chunks: the sums are the same.
  @Test(arguments: Goldens.names("h2o.").filter { $0.hasSuffix("a4") })
  func chunkedPrefill(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let repeats = try run.entry.text("groupReduce") == "none" ? 2 : 1
    try feed(run, input, repeats: repeats, chunk: 67) { cache, range in
      _ = try cache.attend(input.queries.slice(tokens: range))
    }
    run.finish()
  }

  /// What the engine's own kernels would report.
  @Test(arguments: Goldens.names("h2o."))
  func observedAttention(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let repeats = try run.entry.text("groupReduce") == "none" ? 2 : 1
    try feed(run, input, repeats: repeats) { cache, _ in
      try cache.observe(layer: 0, attention: columnSums(input, kvHeads: input.keys.heads * repeats))
    }
    run.finish()
  }

  /// The sums the model's own attention left, per KV head.
  private func columnSums(_ input: GoldenInput, kvHeads: Int) -> [[Float]] {
    let group = input.columnSums.count / kvHeads
    return (0..<kvHeads).map { head in
      (0..<input.tokens).map { token in
        (0..<group).reduce(0) { $0 + input.columnSums[head * group + $1][token] }
      }
    }
  }

  private func feed(
    _ run: GoldenRun, _ input: GoldenInput, repeats: Int, chunk: Int? = nil,
    observe: (KVCache, Range<Int>) throws -> Void
  ) throws {
    let policy = Policy(
      try .h2o(heavy: run.entry.int("hh"), recent: run.entry.int("recent")), store: .dense(.f32))
    let keys = try input.keys.repeatingHeads(repeats)
    let values = try input.values.repeatingHeads(repeats)
    let cache = try KVCache(policy, queryHeads: input.queries.heads, kvHeads: keys.heads, dim: keys.dim)
    for start in stride(from: 0, to: input.tokens, by: chunk ?? input.tokens) {
      let range = start..<min(start + (chunk ?? input.tokens), input.tokens)
      try cache.append(keys.slice(tokens: range), values.slice(tokens: range))
      try observe(cache, range)
    }
    try run.expect("prefill.scores", cache.scores().flatMap { $0 })
    try cache.finishPrefill()
    try run.expect("prefill.positions", positions: cache.positions())
    try run.expect("prefill.accumulated", cache.accumulated().flatMap { $0 })

    let probeKeys = try input.probeKeys.repeatingHeads(repeats)
    let probeValues = try input.probeValues.repeatingHeads(repeats)
    var outputs: [Float] = []
    var positions: [[Int]] = []
    var accumulated: [Float] = []
    for step in 0..<8 {
      try cache.append(probeKeys.slice(tokens: step..<step + 1), probeValues.slice(tokens: step..<step + 1))
      outputs += try cache.attend(input.probeQueries.slice(tokens: step..<step + 1))
      positions += try cache.positions()
      accumulated += cache.accumulated().flatMap { $0 }
    }
    try run.expect("decode.positions", positions: positions)
    try run.expect("decode.accumulated", accumulated)
    try run.expect("decode.output", outputs)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }
}
