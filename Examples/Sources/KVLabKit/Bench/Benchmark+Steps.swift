internal import KVCompression
internal import KVExperiments

/// What evicting while decoding adds to a token, with everything that happens only now and then.
extension Benchmark {
  private struct Stepping {
    let policy: String
    let rows: Int
    /// Tokens after which all is as it was: those between two evictions, or between two times that gaps are closed.
    let period: Int
  }

  private static let stepping = [
    Stepping(policy: "h2o(heavy=2048,recent=2048)", rows: 4096, period: 64),
    Stepping(policy: "tova(budget=4096)", rows: 4096, period: 64),
    Stepping(policy: "h2o(heavy=2048,recent=2048)+schedule(every=256)", rows: 4096, period: 256),
    Stepping(policy: "tova(budget=4096)+schedule(every=256)", rows: 4096, period: 256),
    Stepping(policy: "lazy(budget=4096,window=256)", rows: 4096, period: 256),
    Stepping(policy: "knorm(budget=4096)+schedule(every=256)", rows: 4096, period: 256),
    Stepping(policy: "keydiff(budget=4096)+schedule(every=256)", rows: 4096, period: 256),
    Stepping(policy: "snapkv(budget=4096,window=32)+schedule(every=256)", rows: 4096, period: 256),
    Stepping(policy: "snapkv(budget=4096,window=32)+schedule(every=512)", rows: 4096, period: 512),
    Stepping(policy: "h2o(heavy=16384,recent=16384)", rows: 32768, period: 181),
  ]

  func evicting(_ machine: Machine) throws(KVError) {
    for row in Self.stepping where wanted("evict-token", row.policy, row.rows, 1, machine) {
      try measure(row, machine)
    }
  }

  private func measure(_ row: Stepping, _ machine: Machine) throws(KVError) {
    let policy = try PolicyRegistry.standard.policy(row.policy)
    // Both caches together are cold.
    let layers = max(1, coldLayers(bytesPerLayer: row.rows * BenchData.shape.kvHeads * BenchData.dim * 8))
    let evicting = try cache(policy, layers: layers, heads: Self.allHeads, machine.backend)
    let plain = try cache(Policy(store: .dense(.f16)), layers: layers, heads: Self.allHeads, machine.backend)
    for layer in 0..<layers {
      try fillWhole(evicting, layer, row.rows)
      try data.fill(plain, layer: layer, tokens: row.rows, heads: Self.allHeads)
    }
    try evicting.finishPrefill()
    let checked = try checkSteps(row, policy, machine)

    let everyToken = policy.schedule.decodeInterval == 1
    let queries = data.queries(1, of: Self.allHeads)
    var output = [Float](repeating: 0, count: queries.count)
    var means: [Double] = []
    var ratios: [Double] = []
    var bandwidth: [Double] = []
    var isWarm = false
    let time = ContinuousClock()
    var start = time.now
    while means.isEmpty || start.duration(to: time.now).seconds < options.secondsPerGroup {
      var own = [Double](repeating: 0, count: layers)
      var other = own
      for _ in 0..<row.period {
        for layer in 0..<layers {
          own[layer] += try Self.seconds { () throws(KVError) in try step(evicting, layer, queries, &output) }
          other[layer] += try Self.seconds { () throws(KVError) in try step(plain, layer, queries, &output) }
        }
        // As many rows as the other one keeps.
        if everyToken { try plain.trim(to: row.rows) }
      }
      try plain.trim(to: row.rows)
      bandwidth.append(machine.probe.measure())
      // The first period makes lists of positions, and room.
      if isWarm {
        means += own.map { $0 / Double(row.period) }
        ratios += zip(own, other).map { $0 / $1 }
      } else {
        isWarm = true
        start = time.now
      }
    }
    report(
      BenchRecord(
        name: "evict-token", store: row.policy, tokens: row.rows, queries: 1, threads: machine.threads, seconds: means,
        bytes: evicting.bytes(layer: 0).total, readBandwidth: BenchRecord.median(bandwidth),
        ratioToF16: BenchRecord.median(ratios), checked: checked))
  }

  private func step(_ cache: KVCache, _ layer: Int, _ queries: [Float], _ output: inout [Float]) throws(KVError) {
    try step(cache, layer, queries, heads: Self.allHeads, &output)
  }

  private func step(
    _ cache: KVCache, _ layer: Int, _ queries: [Float], heads: [Int], _ output: inout [Float]
  ) throws(KVError) {
    let token = cache.tokensSeen(layer: layer)
    try data.append(token..<token + 1, to: cache, layer: layer, heads: heads)
    try attend(cache, layer: layer, queries, 1, heads: heads.count, into: &output, commits: true)
  }

  /// A few evictions of a shorter cache: the same rows survive as with the portable kernels, and the outputs agree.
  private func checkSteps(_ row: Stepping, _ policy: any CompressionPolicy, _ machine: Machine) throws(KVError) -> Bool
  {
    let rows = min(row.rows, 4096)
    let text = row.policy.replacing("\(row.rows / 2)", with: "\(rows / 2)").replacing("=\(row.rows)", with: "=\(rows)")
    let policy = try PolicyRegistry.standard.policy(text)
    let own = try cache(policy, layers: 1, heads: Self.allHeads, machine.backend)
    let portable = try cache(policy, layers: 1, heads: Self.allHeads, .cpu(level: "portable"))
    for cache in [own, portable] {
      try fillWhole(cache, 0, rows)
      try cache.finishPrefill()
    }
    let queries = data.queries(1, of: Self.allHeads)
    var output = [Float](repeating: 0, count: queries.count)
    var expected = output
    let steps = policy.schedule.decodeInterval == 1 ? 3 : 1
    for _ in 0..<steps {
      try step(own, 0, queries, &output)
      try step(portable, 0, queries, &expected)
      if !Self.agree(output, expected) { return false }
    }
    if steps == 1 {
      for cache in [own, portable] { try cache.compress() }
    }
    for head in Self.allHeads {
      if try own.rows(layer: 0, head: head) != portable.rows(layer: 0, head: head) { return false }
    }
    return true
  }

  // MARK: A bounded prompt

  private static let bounded = [
    "snapkv(budget=2048,window=32)", "h2o(heavy=1024,recent=1024)", "tova(budget=2048)", "knorm(budget=2048)",
    "keydiff(budget=2048)", "lagkv(budget=2048)", "adasnapkv(budget=2048,window=32)", "cake(budget=2048)",
  ]

  /// The most a cache ever holds while a long prompt is cut after every chunk.
  func boundedPrompts(_ machine: Machine) throws(KVError) {
    let (tokens, chunk, budget, layers) = (32768, 512, 2048, 2)
    let names = Self.bounded.map { $0 + "+schedule(chunks=true)" }
    var random = SeededGenerator(seed: 3)
    let queries = (0..<BenchData.group * chunk * BenchData.dim).map { _ in Float(random.normal()) }
    var output = [Float](repeating: 0, count: queries.count)
    for text in names where wanted("peak", text, tokens, chunk, machine) {
      // A backend of its own: its meter counts this cache alone.
      let backend = try options.backend.backend(threads: machine.threads)
      let policy = try PolicyRegistry.standard.policy(text)
      let cache = try cache(policy, layers: layers, heads: [0], backend)
      let seconds = try Self.seconds { () throws(KVError) in
        for first in stride(from: 0, to: tokens, by: chunk) {
          for layer in 0..<layers {
            try data.append(first..<first + chunk, to: cache, layer: layer, heads: [0])
            try attend(cache, layer: layer, queries, chunk, heads: 1, into: &output, commits: true)
          }
        }
        try cache.finishPrefill()
      }
      let rowBytes = 2 * BenchData.dim * 2
      // Rows, their positions and marks, what is observed of them, and the queries that are captured.
      let inputs = policy.inputs
      let remembered = 8 + (inputs.observer?.columns ?? 0) * 4
      let captured = inputs.windowQueries * BenchData.group * BenchData.dim * 4
      let allowed = layers * ((budget + chunk) * (rowBytes + remembered) + captured)
      let peak = backend.memory.peakBytes
      report(
        BenchRecord(
          name: "peak", store: text, tokens: tokens, queries: chunk, threads: machine.threads, seconds: [seconds],
          bytes: peak, readBandwidth: machine.probe.measure(),
          ratioToF16: Double(peak) / Double(layers * tokens * rowBytes), ratioToPlain: Double(peak) / Double(allowed),
          checked: peak <= allowed && output.allSatisfy(\.isFinite)))
    }
  }
}
