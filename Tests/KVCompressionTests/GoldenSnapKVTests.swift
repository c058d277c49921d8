import KVCompression
import KVExperiments
import Testing

/// SnapKV against the authors' class (query heads) and KVCache-Factory's grouped variant (KV heads).
@Suite struct GoldenSnapKVTests {
  @Test(arguments: Goldens.names("snapkv."))
  func selection(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let official = name.hasPrefix("snapkv.official.")
    let window = try run.entry.int("window")
    let policy = Policy(
      try .snapKV(
        budget: .tokens(run.entry.int("capacity")), window: window, kernel: run.entry.int("kernel"),
        pooling: #require(Pooling(rawValue: run.entry.text("pooling"))),
        reduction: official ? .mean : #require(GroupReduction(rawValue: run.entry.text("groupReduce")))),
      store: .dense(.f32))
    let keys = try input.keys.repeatingHeads(official ? 2 : 1)
    let values = try input.values.repeatingHeads(official ? 2 : 1)
    let cache = try KVCache(policy, queryHeads: input.queries.heads, kvHeads: keys.heads, dim: keys.dim)
    try cache.append(keys, values)
    _ = try cache.attend(input.queries)

    let past = input.tokens - window
    // Official and grouped code sum over the window; so do we. `mean` over one head is the head.
    try run.expect("scores", cache.scores().flatMap { $0[..<past] })
    try cache.finishPrefill()
    try run.expect("positions", positions: cache.positions())
    let probes = try input.outputProbes()
    let output =
      run.isEqual("positions")
      ? try cache.look(probes)
      : try KernelAttention(backend: cache.backend).attend(
        probes, keys: keys, values: values, positions: Goldens.positions(run.entry, "positions"))
    try run.expect("output", output)
    run.finish()
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// Queries reported by the engine, in chunks that cut the window, are as good as attending through the cache.
  @Test(arguments: Goldens.names("snapkv.grouped.mean.w32.c128"))
  func observedQueries(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let policy = Policy(
      try .snapKV(budget: .tokens(128), window: 32, kernel: run.entry.int("kernel")), store: .dense(.f32))
    let cache = try KVCache(
      policy, queryHeads: input.queries.heads, kvHeads: input.keys.heads, dim: input.keys.dim, inputs: .queries)
    let cut = input.tokens - 23
    for range in [0..<cut, cut..<input.tokens] {
      try cache.append(input.keys.slice(tokens: range), input.values.slice(tokens: range))
      let first = input.tokens - input.queries.tokens
      try cache.observe(
        input.queries.slice(tokens: max(0, range.lowerBound - first)..<range.upperBound - first))
      try cache.commit(layer: 0)
    }
    try run.expect("scores", cache.scores().flatMap { $0[..<(input.tokens - 32)] })
    try cache.finishPrefill()
    try run.expect("positions", positions: cache.positions())
  }
}
