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
}
