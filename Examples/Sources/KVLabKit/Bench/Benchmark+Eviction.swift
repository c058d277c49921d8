internal import KVCompression
internal import KVExperiments

/// Times what it wraps; one cache at a time uses it.
private final class StageClock: @unchecked Sendable {
  // Written by the cache that works, read after it: one thread at a time, as caches are used.
  var scoring = 0.0
  var selecting = 0.0
}

private struct ClockedScorer: Scorer {
  let base: any Scorer
  let clock: StageClock

  var inputs: RequiredInputs { base.inputs }

  func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    var result = scores
    clock.scoring = try Benchmark.seconds { () throws(KVError) in try base.score(layer, into: &result) }
    scores = result
  }
}

private struct ClockedRouter: Router {
  let base: any Router
  let clock: StageClock

  var protection: Protection { base.protection }
  var inputs: RequiredInputs { base.inputs }

  func route(_ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing) throws(KVError) {
    var result = routing
    clock.selecting = try Benchmark.seconds { () throws(KVError) in
      try base.route(layer, scores: scores, kept: kept, into: &result)
    }
    routing = result
  }
}

/// What choosing costs at the end of a prompt, while decoding, and in a prompt's attention.
extension Benchmark {
  private static let scored = [
    "snapkv(budget=0.25,window=32)", "h2o(budget=0.25)", "tova(budget=0.25)", "knorm(budget=0.25)",
    "keydiff(budget=0.25)",
    "lagkv(budget=0.25)",
  ]

  /// Scores, selection and compaction of a prompt of 32768 tokens, beside one read of its keys.
  func choosing(_ machine: Machine) throws(KVError) {
    let tokens = 32768
    let names = ["evict-score", "evict-select", "evict-move"]
    for text in Self.scored where names.contains(where: { wanted($0, text, tokens, 32, machine) }) {
      let clock = StageClock()
      let own = try PolicyRegistry.standard.policy(text).selection
      guard let scorer = own.scorer else { throw KVError(.unsupported, "\(text) has no scorer") }
      let policy = Policy(
        Selection(
          spec: own.spec, scorer: ClockedScorer(base: scorer, clock: clock), budget: own.budget,
          router: ClockedRouter(base: own.router, clock: clock), schedule: Schedule()), store: .dense(.f16))
      let keyBytes = tokens * BenchData.shape.kvHeads * BenchData.dim * 2
      let full = try cache(policy, layers: 2, heads: Self.allHeads, machine.backend)
      for layer in 0..<2 { try fillWhole(full, layer, tokens) }
      let unclocked = try cache(Policy(own, store: .dense(.f16)), layers: 1, heads: Self.allHeads, machine.backend)
      try fillWhole(unclocked, 0, tokens)
      try unclocked.finishPrefill(layer: 0)

      var seconds: [[Double]] = [[], [], []]
      var bandwidth: [Double] = []
      var same = true
      let time = ContinuousClock()
      let start = time.now
      while seconds[0].count < 5
        || (seconds[0].count < 31 && start.duration(to: time.now).seconds < options.secondsPerGroup / 2)
      {
        bandwidth.append(machine.probe.measure())
        let fork = full.fork()
        let layer = seconds[0].count % 2
        let whole = try Self.seconds { () throws(KVError) in try fork.finishPrefill(layer: layer) }
        for (index, part) in [clock.scoring, clock.selecting, whole - clock.scoring - clock.selecting].enumerated() {
          seconds[index].append(part)
        }
        if seconds[0].count == 1 {
          for head in Self.allHeads {
            let chosen = try fork.rows(layer: layer, head: head)
            let wanted = try unclocked.rows(layer: 0, head: head)
            same = same && chosen == wanted
          }
        }
      }
      for (index, name) in names.enumerated() where wanted(name, text, tokens, 32, machine) {
        report(
          BenchRecord(
            name: name, store: text, tokens: tokens, queries: 32, threads: machine.threads, seconds: seconds[index],
            bytes: keyBytes, readBandwidth: BenchRecord.median(bandwidth), checked: same))
      }
    }
  }

  /// A prompt that was attended by nobody: queries for window scorers, made up weights for the others.
  func fillWhole(_ cache: KVCache, _ layer: Int, _ tokens: Int) throws(KVError) {
    try data.fill(cache, layer: layer, tokens: tokens, heads: Self.allHeads, asPrompt: true)
    let queries = data.queries(32, of: Self.allHeads)
    try cache.observe(
      layer: layer,
      queries: TensorView(queries.span, heads: Self.allHeads.count * BenchData.group, tokens: 32, dim: BenchData.dim))
    guard cache.policy.inputs.attentionWeights else { return }
    try cache.observe(
      layer: layer,
      attention: Self.allHeads.map { head in
        var random = SeededGenerator(seed: 7, streams: head)
        return (0..<tokens).map { _ in Float(random.uniform()) }
      })
  }

  /// One decoded token at the full cache and at four shares of it: append, attend, and what the policy does.
  func decoding(_ machine: Machine) throws(KVError) {
    let tokens = 32768
    let texts = ["f16"] + ["0.5", "0.25", "0.125", "0.05"].map { "snapkv(budget=\($0),window=32)" }
    guard texts.contains(where: { wanted("decode", $0, tokens, 1, machine) }) else { return }
    let queries = data.queries(1, of: Self.allHeads)
    var output = [Float](repeating: 0, count: queries.count)
    var full = Double.nan
    for text in texts where text == "f16" || wanted("decode", text, tokens, 1, machine) {
      let policy = try PolicyRegistry.standard.policy(text)
      let predicted = try policy.estimate(shape: ModelShape(layers: [BenchData.shape]), prompt: tokens).total
      let layers = min(coldLayers(bytesPerLayer: predicted), 24)
      let cache = try cache(policy, layers: layers, heads: Self.allHeads, machine.backend)
      for layer in 0..<layers {
        try fillWhole(cache, layer, tokens)
        try cache.finishPrefill(layer: layer)
      }
      var seconds: [Double] = []
      var bandwidth: [Double] = []
      let time = ContinuousClock()
      let start = time.now
      while seconds.count < 5
        || (seconds.count < 101 && start.duration(to: time.now).seconds < options.secondsPerGroup / 2)
      {
        bandwidth.append(machine.probe.measure())
        let layer = seconds.count % layers
        let token = cache.tokensSeen(layer: layer)
        seconds.append(
          try Self.seconds { () throws(KVError) in
            try data.append(token..<token + 1, to: cache, layer: layer, heads: Self.allHeads)
            try attend(cache, layer: layer, queries, 1, heads: 8, into: &output, commits: true)
          })
      }
      if text == "f16" { full = BenchRecord.median(seconds) }
      if !wanted("decode", text, tokens, 1, machine) { continue }
      report(
        BenchRecord(
          name: "decode", store: text, tokens: tokens, queries: 1, threads: machine.threads, seconds: seconds,
          bytes: cache.bytes(layer: 0).payload, readBandwidth: BenchRecord.median(bandwidth),
          ratioToF16: BenchRecord.median(seconds) / full, checked: output.allSatisfy(\.isFinite)))
    }
  }

  /// A prompt of 8192 tokens in chunks of 512 through one KV head, with and without the sums of attention.
  func prefill(_ machine: Machine) throws(KVError) {
    let (tokens, chunk, heads) = (8192, 512, [0])
    let texts = ["f16", "h2o(budget=1.0)"]
    guard texts.contains(where: { wanted("prefill", $0, tokens, chunk, machine) }) else { return }
    var random = SeededGenerator(seed: 3)
    let queries = (0..<BenchData.group * chunk * BenchData.dim).map { _ in Float(random.normal()) }
    var seconds: [[Double]] = [[], []]
    var outputs = [[Float]](repeating: [Float](repeating: 0, count: queries.count), count: 2)
    var bandwidth: [Double] = []
    for round in 0..<6 {
      bandwidth.append(machine.probe.measure())
      // Another one begins each round.
      for turn in 0..<2 {
        let index = (turn + round) % 2
        let cache = try cache(
          PolicyRegistry.standard.policy(texts[index]), layers: 1, heads: heads, machine.backend)
        var output = outputs[index]
        seconds[index].append(
          try Self.seconds { () throws(KVError) in
            for first in stride(from: 0, to: tokens, by: chunk) {
              try data.append(first..<first + chunk, to: cache, layer: 0, heads: heads)
              try attend(cache, layer: 0, queries, chunk, heads: 1, into: &output, commits: true)
            }
          })
        outputs[index] = output
      }
    }
    let plain = BenchRecord.median(seconds[0])
    for (index, text) in texts.enumerated() where wanted("prefill", text, tokens, chunk, machine) {
      report(
        BenchRecord(
          name: "prefill", store: text, tokens: tokens, queries: chunk, threads: machine.threads,
          seconds: seconds[index], bytes: tokens / 2 * (tokens / chunk) * BenchData.dim * 4,
          readBandwidth: BenchRecord.median(bandwidth), ratioToF16: BenchRecord.median(seconds[index]) / plain,
          checked: Self.agree(outputs[0], outputs[1])))
    }
  }
}
