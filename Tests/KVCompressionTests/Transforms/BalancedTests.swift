import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// MiKV's balancer: factors from the keys and queries of the prompt.
@Suite struct BalancedTests {
  private func low(bits: Int = 2, group: Int = 64, type: ElementType = .f32) throws -> Store {
    let body = try RowEncoding.affinePerToken(bits: bits, group: group, metadata: type)
    return Store(
      spec: StageSpec(name: "low"), keys: try .newest(0, window: .f32, body: body),
      values: try .newest(0, window: .f32, body: body))
  }

  private func factors(_ cache: KVCache, head: Int) throws -> [Float] {
    let run = try #require(cache.segment.heads[head].keys.sharedMap?.numberRun)
    var result = [Float](repeating: 0, count: run.dim)
    result.withUnsafeMutableBufferPointer { buffer in
      cache.backend.operations.read(
        RunSlice(run: run, first: 0, count: 1), into: buffer.baseAddress!, stride: run.dim)
    }
    return result
  }

  /// The specification's example, with channels of zeros: b = (2, 1/4) multiplies keys, so factors are (1/2, 4). Two query
  /// heads of one group; queries and keys have their maxima in different tokens and signs.
  @Test func workedExample() throws {
    let cache = try KVCache(Policy(store: try low().balanced()), queryHeads: 4, kvHeads: 2, dim: 4)
    let keys = try HeadTensor(
      heads: 2, tokens: 3, dim: 4,
      elements: [
        1, 3, 0, 1, -0.5, -16, 0, 2, 0.25, 7, 0, 4, /* head 1 */ 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
      ])
    let queries = try HeadTensor(
      heads: 4, tokens: 3, dim: 4,
      elements: [
        1, 1, 5, 0, 2, 0, 0, 0, 3, 0.5, 0, 0, /* same KV head */ -4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        1, 1, 1, 1e9, 1, 1, 1, 1, 1, 1, 1, 1, /* same */ 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
      ])
    // Chunks of the prompt add up.
    for token in 0..<3 {
      let range = token..<token + 1
      try cache.append(keys.slice(tokens: range), keys.slice(tokens: range))
      if token == 1 {
        let state = cache.layers[0]
        let saved = try KVCache.load(
          saved: cache.saved(), policy: cache.policy, shape: cache.shape, backend: .cpu(threads: 1))
        #expect(saved.layers[0].queryPeaks?.peaks == state.queryPeaks?.peaks)
        #expect(saved.bytes == cache.bytes && saved.bytes.total == saved.backend.memory.liveBytes)
      }
      _ = try cache.attend(queries.slice(tokens: range))
    }
    #expect(cache.bytes.state == 2 * 4 * 4)
    let fork = cache.fork()
    _ = try fork.look(queries.slice(tokens: 2..<3))
    expectError(.irreversible, layer: 0) { try cache.trim(to: 2) }
    try cache.finishPrefill()
    #expect(cache.bytes.state == 0 && cache.bytes.total + fork.bytes.total > 0)
    let first = try factors(cache, head: 0)
    #expect(abs(first[0] - 0.5) < 1e-6 && abs(first[1] - 4) < 1e-6)
    // Both ranges become the root of their product: 2 and 4. Rows are divided by factors, queries multiplied.
    #expect(abs(1 / first[0] - 2) < 1e-5 && abs(16 / first[1] - 4) < 1e-5)
    #expect(abs(4 * first[0] - 2) < 1e-5 && abs(1 * first[1] - 4) < 1e-5)
    // No key: 1. No query: as large as a factor may be.
    #expect(first[2] == 1 && first[3] == 1e4)
    let second = try factors(cache, head: 1)
    #expect(second == [1, 1, 1, 1e-4])
    // Scales and minima of 64 rows of room for keys and values of two heads, and four factors a head.
    #expect(cache.bytes.metadata == 2 * 2 * 64 * 2 * 4 + 2 * 4 * 4)
  }

  /// Channels that are large in keys and small in queries: balanced codes make the smaller error of logits.
  @Test(arguments: [2, 3, 4])
  func outliers(bits: Int) throws {
    var dice = Dice(12)
    let (tokens, dim) = (256, 64)
    let large: Set<Int> = [3, 17, 40]
    let keys = (0..<tokens).flatMap { _ in (0..<dim).map { dice.normal() * (large.contains($0) ? 12 : 1) } }
    let queries = (0..<tokens).flatMap { _ in (0..<dim).map { dice.normal() / (large.contains($0) ? 12 : 1) } }
    func error(_ store: Store) throws -> Double {
      let cache = try KVCache(Policy(store: store), queryHeads: 1, kvHeads: 1, dim: dim)
      let k = try HeadTensor(heads: 1, tokens: tokens, dim: dim, elements: keys)
      let q = try HeadTensor(heads: 1, tokens: tokens, dim: dim, elements: queries)
      try cache.append(k, k)
      _ = try cache.attend(q)
      try cache.finishPrefill()
      let held = try cache.read(layer: 0, head: 0).keys
      var sum = 0.0
      for i in 0..<64 {
        for t in 0..<tokens {
          var wrong = 0.0
          for c in 0..<dim {
            wrong += Double(queries[i * dim + c]) * Double(held[t * dim + c] - keys[t * dim + c])
          }
          sum += wrong * wrong
        }
      }
      return sum.squareRoot()
    }
    let plain = try error(low(bits: bits))
    let balanced = try error(low(bits: bits).balanced())
    #expect(balanced < plain / 2, "\(balanced) and \(plain)")
  }

  /// Attention over balanced rows is attention over the rows read back; later rows use the same factors; saved and loaded.
  @Test func life() throws {
    withEvery("text", in: ["kivi(bits=4,residual=32)+balanced", "h2o(budget=60)+kivi(bits=2,residual=32)+balanced"]) {
      text in
      withEvery("geometry", in: [Geometry(4, 2, 40, 24), Geometry(3, 1, 67), Geometry(16, 1, 16, 9)]) { geometry in
        let traffic = Traffic(geometry.shape(), tokens: 150, seed: 3)
        let cache = try makeCache(text, traffic.shape)
        try traffic.step(cache, 0..<45)
        try traffic.step(cache, 45..<90)
        try cache.finishPrefill()
        let maps = try (0..<geometry.kvHeads).map { try factors(cache, head: $0) }
        for token in 90..<131 { try traffic.checkedStep(cache, 0, token..<token + 1) }
        check(try (0..<geometry.kvHeads).map { try factors(cache, head: $0) } == maps, "factors changed")
        check(cache.bytes.total == cache.backend.memory.liveBytes, "bytes")
        let loaded = try KVCache.load(
          saved: cache.saved(), policy: cache.policy, shape: traffic.shape, backend: .cpu(threads: 1))
        check(try Snapshot(loaded) == Snapshot(cache), "what was saved differs")
        for token in 131..<150 {
          let output = try traffic.checkedStep(cache, 0, token..<token + 1)
          checkSame(output, try traffic.checkedStep(loaded, 0, token..<token + 1), "after loading")
        }
        if !text.hasPrefix("h2o") {
          let estimate = try cache.policy.estimate(shape: traffic.shape, prompt: 90, decoded: 60, chunk: 45)
          check(estimate == cache.bytes, "estimated \(estimate), measured \(cache.bytes)")
        }
      }
    }
  }

  @Test func errors() throws {
    let registry = PolicyRegistry.standard
    expectError(.invalidOption, "only rows that are encoded") { _ = try registry.policy("f16+balanced") }
    expectError(.invalidOption, "cannot be rotated") { _ = try registry.policy("kivi+balanced+rotated") }
    expectError(.invalidOption, "cannot be rotated") { _ = try registry.policy("kivi+rotated+balanced") }
    expectError(.invalidOption, "scaled per channel already") { _ = try registry.policy("cst+balanced") }
    let shape = ModelShape(layerCount: 1, queryHeads: 1, kvHeads: 1, headDim: 8)
    expectError(.missingInput, "queries of the prompt") {
      _ = try makeCache("kivi+balanced", shape, inputs: .attendYourself)
    }
    let silent = try makeCache("kivi+balanced", shape, inputs: .queries)
    let traffic = Traffic(shape, tokens: 4)
    try traffic.append(silent, 0, 0..<4)
    expectError(.missingInput, "not observed", layer: 0) { try silent.finishPrefill() }
    try traffic.observe(silent, 0, 0..<4)
    try silent.finishPrefill()
  }
}
