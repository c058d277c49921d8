internal import KVCompression
internal import KVExperiments

/// A scorer that measures the one it wraps.
private final class ScorerClock: @unchecked Sendable {
  // Written by the cache that scores, read after it: one thread at a time, as caches are used.
  var seconds = 0.0
  var scores = ScoreTable()
}

private struct TimedScorer: Scorer {
  let base: any Scorer
  let clock: ScorerClock

  var inputs: RequiredInputs { base.inputs }

  func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    let time = ContinuousClock()
    let start = time.now
    try base.score(layer, into: &scores)
    clock.seconds = start.duration(to: time.now).seconds
    clock.scores = scores
  }
}

extension Benchmark {
  private static let window = 32

  /// SnapKV at the end of a prompt of 32768 tokens: scoring alone, and with the selection and the copy of what stays.
  func snapKV(_ machine: Machine) throws(KVError) {
    let tokens = 32768
    let names = ["snapkv-score", "snapkv-finish"]
    guard names.contains(where: { wanted($0, "f16", tokens, Self.window, machine) }) else { return }
    let clock = ScorerClock()
    let policy = try Self.snapKVPolicy(clock)
    let keyBytes = tokens * BenchData.shape.kvHeads * BenchData.dim * 2
    let layers = coldLayers(bytesPerLayer: keyBytes)
    let full = try cache(policy, layers: layers, heads: Self.allHeads, machine.backend)
    for layer in 0..<layers { try fillPrompt(full, layer, tokens, heads: Self.allHeads) }

    try full.fork().finishPrefill(layer: 0)
    let checked = try checkSnapKV(clock.scores, tokens)

    var scoring: [Double] = []
    var finishing: [Double] = []
    var bandwidth: [Double] = []
    let time = ContinuousClock()
    let start = time.now
    var round = 0
    while round < 5 || (round < 31 && start.duration(to: time.now).seconds < options.secondsPerGroup) {
      bandwidth.append(machine.probe.measure())
      let fork = full.fork()
      let layer = (round + 1) % layers
      finishing.append(try Self.seconds { () throws(KVError) in try fork.finishPrefill(layer: layer) })
      scoring.append(clock.seconds)
      round += 1
    }
    for (name, seconds, bytes) in [
      (names[0], scoring, keyBytes),
      // A quarter of the rows, keys and values, is also read and written.
      (names[1], finishing, keyBytes + keyBytes),
    ] where wanted(name, "f16", tokens, Self.window, machine) {
      report(
        BenchRecord(
          name: name, store: "f16", tokens: tokens, queries: Self.window, threads: machine.threads, seconds: seconds,
          bytes: bytes, readBandwidth: BenchRecord.median(bandwidth), checked: checked))
    }
  }

  private static func snapKVPolicy(_ clock: ScorerClock) throws(KVError) -> Policy {
    let snap = try Selection.snapKV(budget: .fraction(0.25), window: window)
    guard let scorer = snap.scorer else { throw KVError(.unsupported, "snapkv without a scorer") }
    return Policy(
      Selection(
        spec: snap.spec, scorer: TimedScorer(base: scorer, clock: clock), budget: snap.budget, router: snap.router,
        schedule: snap.schedule), store: .dense(.f16))
  }

  private func fillPrompt(_ cache: KVCache, _ layer: Int, _ tokens: Int, heads: [Int]) throws(KVError) {
    try data.fill(cache, layer: layer, tokens: tokens, heads: heads, asPrompt: true)
    let queries = data.queries(Self.window, of: heads)
    try cache.observe(
      layer: layer,
      queries: TensorView(
        queries.span, heads: heads.count * BenchData.group, tokens: Self.window, dim: BenchData.dim))
  }

  private func checkSnapKV(_ scores: ScoreTable, _ tokens: Int) throws(KVError) -> Bool {
    let heads = Self.checkedHeads("", tokens: tokens)
    var own: [Float] = []
    for head in heads { for row in 0..<scores.rowCount(head: head) { own.append(scores[head, row]) } }
    if references["snapkv"] == nil {
      let clock = ScorerClock()
      let portable = try cache(
        Self.snapKVPolicy(clock), layers: 1, heads: heads, .cpu(level: "portable"))
      try fillPrompt(portable, 0, tokens, heads: heads)
      try portable.finishPrefill(layer: 0)
      var scores: [Float] = []
      for head in heads.indices {
        for row in 0..<clock.scores.rowCount(head: head) { scores.append(clock.scores[head, row]) }
      }
      references["snapkv"] = scores
    }
    return Self.agree(own, references["snapkv"] ?? [])
  }

  /// One decoded token under H2O with a full budget: append, attend, add up the attention, drop one row a head.
  func h2o(rows: Int, _ machine: Machine) throws(KVError) {
    guard wanted("h2o-step", "f16", rows, 1, machine) else { return }
    let policy = Policy(try .h2o(heavy: rows / 2, recent: rows / 2), store: .dense(.f16))
    let layers = coldLayers(bytesPerLayer: rows * BenchData.shape.kvHeads * BenchData.dim * 4)
    let heavy = try cache(policy, layers: layers, heads: Self.allHeads, machine.backend)
    for layer in 0..<layers { try fillObserved(heavy, layer, rows, heads: Self.allHeads) }
    let checked = try checkH2O(heavy, rows, policy)
    // The same shape without a policy, for the comparison.
    let dense = try cache(Policy(store: .dense(.f16)), layers: layers, heads: Self.allHeads, machine.backend)
    for layer in 0..<layers { try data.fill(dense, layer: layer, tokens: rows, heads: Self.allHeads) }

    let queries = data.queries(1, of: Self.allHeads)
    var output = [Float](repeating: 0, count: queries.count)
    // The first drop gives every layer its lists of positions.
    for layer in 0..<layers { try step(heavy, layer, queries, heads: Self.allHeads, &output) }
    var stepping: [Double] = []
    var attending: [Double] = []
    var bandwidth: [Double] = []
    let time = ContinuousClock()
    let start = time.now
    var round = 0
    while round < 5 || (round < 201 && start.duration(to: time.now).seconds < options.secondsPerGroup) {
      bandwidth.append(machine.probe.measure())
      let layer = round % layers
      stepping.append(
        try Self.seconds { () throws(KVError) in try step(heavy, layer, queries, heads: Self.allHeads, &output) })
      attending.append(
        try Self.seconds { () throws(KVError) in
          try attend(dense, layer: layer, queries, 1, heads: 8, into: &output)
        })
      round += 1
    }
    report(
      BenchRecord(
        name: "h2o-step", store: "f16", tokens: rows, queries: 1, threads: machine.threads, seconds: stepping,
        bytes: heavy.bytes(layer: 0).total, readBandwidth: BenchRecord.median(bandwidth),
        ratioToF16: BenchRecord.median(stepping) / BenchRecord.median(attending), checked: checked))
  }

  private func step(
    _ cache: KVCache, _ layer: Int, _ queries: [Float], heads: [Int], _ output: inout [Float]
  ) throws(KVError) {
    let token = cache.tokensSeen(layer: layer)
    try data.append(token..<token + 1, to: cache, layer: layer, heads: heads)
    try attend(cache, layer: layer, queries, 1, heads: heads.count, into: &output, commits: true)
  }

  /// A full cache whose rows have been attended: the weights are made up, and no two alike.
  private func fillObserved(_ cache: KVCache, _ layer: Int, _ rows: Int, heads: [Int]) throws(KVError) {
    try data.fill(cache, layer: layer, tokens: rows, heads: heads, asPrompt: true)
    var weights: [[Float]] = []
    for head in heads {
      var random = SeededGenerator(seed: 7, streams: head)
      weights.append((0..<rows).map { _ in Float(random.uniform()) * 8 })
    }
    try cache.observe(layer: layer, attention: weights)
    try cache.finishPrefill(layer: layer)
  }

  /// Three steps on the last layer: the same rows survive and the outputs agree.
  private func checkH2O(_ cache: KVCache, _ rows: Int, _ policy: Policy) throws(KVError) -> Bool {
    let heads = Self.checkedHeads("", tokens: rows)
    let portable = try self.cache(policy, layers: 1, heads: heads, .cpu(level: "portable"))
    try fillObserved(portable, 0, rows, heads: heads)
    let layer = cache.shape.layers.count - 1
    var output = [Float](repeating: 0, count: data.queries(1, of: Self.allHeads).count)
    var expected = [Float](repeating: 0, count: data.queries(1, of: heads).count)
    for _ in 0..<3 {
      try step(cache, layer, data.queries(1, of: Self.allHeads), heads: Self.allHeads, &output)
      try step(portable, 0, data.queries(1, of: heads), heads: heads, &expected)
      if !Self.agree(Self.part(output, of: heads), expected) { return false }
    }
    for (index, head) in heads.enumerated() {
      if try cache.rows(layer: layer, head: head) != portable.rows(layer: 0, head: index) { return false }
    }
    return true
  }
}
