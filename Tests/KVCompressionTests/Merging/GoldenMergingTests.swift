import KVCompression
import KVExperiments
import Testing

@testable import KVCore
@testable import KVMerging

/// Merging against NVIDIA/kvpress and the code of CaM's authors.
@Suite struct GoldenMergingTests {
  /// `MergingPress` over `KnormPress`.
  @Test(arguments: Goldens.names("kvpress.merging."))
  func mergingPress(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let base = Selection(
      spec: nil, scorer: KeyNorm(), budget: .tokens(input.tokens / 2), router: TopKRouter(), schedule: Schedule())
    let rule = MergeRule(gate: .cosine(0), update: .weighted, weights: .length, logCount: false)
    let cache = try KVCache(
      Policy(base.merging(rule), store: .dense(.f32)), queryHeads: input.queries.heads, kvHeads: input.keys.heads,
      dim: input.keys.dim)
    try cache.append(input.keys, input.values)
    try cache.finishPrefill()
    try run.expect("positions", positions: cache.positions())
    try run.expect("values", (0..<input.keys.heads).flatMap { try cache.read(layer: 0, head: $0).values })
    try run.expect("output", cache.look(input.outputProbes()))
    run.finish()
    // Keys are the tokens' own.
    for head in 0..<input.keys.heads {
      let held = try cache.read(layer: 0, head: head)
      checkSame(
        held.keys, held.positions.flatMap { Array(input.keys.row(head: head, token: $0)) }, "keys of head \(head)")
    }
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// `CAMPress` over `KnormPress`, whose scores are averaged over the heads.
  @Test(arguments: Goldens.names("kvpress.cam."))
  func camPress(name: String) throws {
    struct SharedKeyNorm: Scorer {
      var inputs: RequiredInputs { .none }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        for row in 0..<layer.rowCount(head: 0) {
          var mean: Float = 0
          for head in 0..<layer.kvHeads { mean -= layer.lengths(head: head, .keys, of: [row])[0] }
          for head in 0..<layer.kvHeads { scores[head, row] = mean / Float(layer.kvHeads) }
        }
      }
    }
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let prominence = Prominence(attention: .newest(try run.entry.int("merge")))
    let base = Selection(
      spec: nil, scorer: SharedKeyNorm(), budget: .tokens(try run.entry.int("target")), router: TopKRouter(),
      schedule: Schedule())
    let rule = MergeRule(
      targets: .next(try run.entry.int("budget")), gate: .open, update: .add, weights: .prominence(prominence),
      logCount: false, candidates: .best(try run.entry.int("merge")))
    let cache = try KVCache(
      Policy(base.merging(rule), store: .dense(.f32)), queryHeads: input.queries.heads, kvHeads: input.keys.heads,
      dim: input.keys.dim)
    try cache.append(input.keys, input.values)
    _ = try cache.attend(input.queries)
    // The press keeps a sum over its queries, mean over the group.
    try run.expect("attentionSum", prominence.attention(of: cache.view).values)
    try cache.finishPrefill()
    try run.expect("positions", positions: cache.positions())
    try run.expect("values", (0..<input.keys.heads).flatMap { try cache.read(layer: 0, head: $0).values })
    run.finish()
  }

  /// One decode step of the HELM code: the attention of that step alone, compared with the mean of all later rows. Its mask
  /// hides the two oldest tokens of its window one and two steps early.
  @Test(arguments: Goldens.names("cam.helm."))
  func camHELM(name: String) throws {
    let run = try GoldenRun(name)
    let (start, recent) = (try run.entry.int("start"), try run.entry.int("recent") - 2)
    let prominence = Prominence(attention: .newest(1), reference: .later)
    let (cache, input) = try self.cache(
      run,
      .cam(
        start: start, recent: recent, merge: run.entry.int("mergeBudget"), prominence: prominence, afterPrompt: false)
    ) { cache, keys, values, queries in
      try cache.append(keys, values)
      _ = try cache.attend(queries)
    }
    let attention = try prominence.attention(of: cache.view)
    try run.expect("attention", attention.values)
    let length = input.tokens + 1
    let evicted = length - recent - 1
    try run.expect("evictedPosition", [Double(evicted)])
    let probabilities = (0..<4).map { head in
      prominence.probability(
        attention[head, evicted], (evicted + 1..<length).reduce(0) { $0 + attention[head, $1] } / Float(recent))
    }
    try run.expect("probability", probabilities)
    let merged = try targets(cache)
    try cache.compress()
    try run.expect("changedPositions", merged.map(Double.init))
    try run.expect("changedValues", values(cache, at: merged))
    run.finish()
  }

  /// The streaming code: attention of the last prompt query and of the first decoded one.
  @Test(arguments: Goldens.names("cam.streaming."))
  func camStreaming(name: String) throws {
    let run = try GoldenRun(name)
    let (start, recent) = (try run.entry.int("start"), try run.entry.int("recent"))
    let prominence = Prominence(attention: .accumulated)
    let (cache, input) = try self.cache(
      run,
      .cam(
        start: start, recent: recent, merge: run.entry.int("mergeBudget"), prominence: prominence, afterPrompt: false)
    ) { cache, keys, values, queries in
      let last = keys.tokens - 1
      try cache.append(keys.slice(tokens: 0..<last), values.slice(tokens: 0..<last))
      try cache.observe(layer: 0, attention: Array(repeating: Array(repeating: 0, count: last), count: 4))
      try cache.append(keys.slice(tokens: last..<last + 1), values.slice(tokens: last..<last + 1))
      _ = try cache.attend(queries.slice(tokens: queries.tokens - 1..<queries.tokens))
    }
    let attention = try prominence.attention(of: cache.view)
    let evicted = input.tokens + 1 - recent - 1
    let merge = try run.entry.int("mergeBudget")
    try run.expect(
      "probability",
      (0..<4).map { head in
        prominence.probability(
          attention[head, evicted],
          (evicted + 1...evicted + merge).reduce(0) { $0 + attention[head, $1] } / Float(merge))
      })
    let merged = try targets(cache)
    try cache.compress()
    let rows = try cache.rows(layer: 0, head: 0)
    try run.expect("positions", rows.map(Double.init))
    try run.expect("changedSlots", merged.map { Double(rows.firstIndex(of: $0) ?? -1) })
    try run.expect("changedValues", values(cache, at: merged))
    run.finish()
  }

  /// D2O: thresholds, sets and merged rows over six decode steps, on query heads.
  @Test(arguments: Goldens.names("d2o.hh"))
  func d2o(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let policy = try PolicyRegistry.standard.policy(
      "d2o(heavy=\(run.entry.int("hhSize")),recent=\(run.entry.int("recentSize")),layers=uniform,skip_first=0,skip_last=0,"
        + "update=official,gate=mean,keys=average,bias=none,start=step)+f32")
    let keys = try input.keys.repeatingHeads(2)
    let values = try input.values.repeatingHeads(2)
    let cache = try KVCache(policy, queryHeads: 4, kvHeads: 4, dim: keys.dim)
    try cache.append(keys, values)
    _ = try cache.attend(input.queries)
    try cache.finishPrefill()
    let probeKeys = try input.probeKeys.repeatingHeads(2)
    let probeValues = try input.probeValues.repeatingHeads(2)
    var outputs: [Float] = []
    var thresholds: [Float] = []
    var positions: [[Int]] = []
    let steps = try run.entry.int("steps")
    for step in 0..<steps {
      try cache.append(probeKeys.slice(tokens: step..<step + 1), probeValues.slice(tokens: step..<step + 1))
      outputs += try cache.attend(input.probeQueries.slice(tokens: step..<step + 1))
      thresholds.append(try #require(cache.layers[0].routerMemory.first))
      positions += try cache.positions()
      guard step == 0 || step == steps - 1 else { continue }
      let held = try (0..<4).map { try cache.read(layer: 0, head: $0) }
      try run.expect(step == 0 ? "firstKeys" : "lastKeys", held.flatMap(\.keys))
      try run.expect(step == 0 ? "firstValues" : "lastValues", held.flatMap(\.values))
    }
    try run.expect("thresholds", thresholds)
    try run.expect("positions", positions: positions)
    try run.expect("decode.output", outputs)
    run.finish()
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  @Test func d2oLayerShares() throws {
    let run = try GoldenRun("d2o.layerRatios.a")
    let file = try Goldens.file("inputs_a.safetensors")
    let sums = try file.floats(named: "column_sums")
    let tokens = sums.count / 32
    let variances = (0..<8).map { layer in
      D2OLayers.normalisedVariance(
        (0..<4).map { Array(sums[(layer * 4 + $0) * tokens..<(layer * 4 + $0 + 1) * tokens]) })
    }
    try run.expect("normalisedVariance", variances)
    guard case .array(let rows)? = run.entry.outputs["rows"]?.value else {
      Issue.record("no rows")
      return
    }
    for row in rows {
      let heavy = try #require(row["parameters"]?["hhRatio"]?.double)
      let recent = try #require(row["parameters"]?["recentRatio"]?.double)
      let shares = D2OLayers.shares(variances, total: heavy + recent)
      for (own, part) in [("hhRatios", heavy), ("recentRatios", recent)] {
        let expected = try #require(row[own]?.numbers)
        for (share, wanted) in zip(shares, expected) {
          #expect(abs(share * part / (heavy + recent) - wanted) <= 1e-5 + 1e-3 * wanted, "\(own)")
        }
      }
    }
    run.finish(except: ["rows"])
  }

  /// A prompt and the first probe, on query heads, before anything is dropped.
  private func cache(
    _ run: GoldenRun, _ selection: Selection,
    prompt: (KVCache, HeadTensor, HeadTensor, HeadTensor) throws -> Void
  ) throws -> (KVCache, GoldenInput) {
    let input = try GoldenInput(run.entry)
    let keys = try input.keys.repeatingHeads(2)
    let values = try input.values.repeatingHeads(2)
    let waiting = selection.scheduled(Schedule(afterPrefill: false, decodeInterval: 1000))
    let cache = try KVCache(Policy(waiting, store: .dense(.f32)), queryHeads: 4, kvHeads: 4, dim: keys.dim)
    try prompt(cache, keys, values, input.queries)
    try cache.finishPrefill()
    try cache.append(
      input.probeKeys.repeatingHeads(2).slice(tokens: 0..<1), input.probeValues.repeatingHeads(2).slice(tokens: 0..<1))
    _ = try cache.attend(input.probeQueries.slice(tokens: 0..<1))
    return (cache, input)
  }

  /// Positions of the rows that a part of a value goes to, which may be too small to change them; the same in all heads.
  private func targets(_ cache: KVCache) throws -> [Int] {
    let view = cache.view
    var scores = ScoreTable()
    scores.reset(counts: view.rowCounts)
    var routing = Routing()
    routing.reset(like: scores)
    let kept = cache.policy.budget.resolveTokens(
      tokens: view.tokensSeen, layer: 0, head: 0, layers: 1, kvHeads: 4, bytesPerRow: 1)
    try cache.policy.router.route(view, scores: scores, kept: Array(repeating: kept, count: 4), into: &routing)
    let heads = (0..<4).map { head in
      routing.merges.filter { $0.head == head }.map { view.position(head: head, row: $0.target) }
    }
    #expect(heads.allSatisfy { $0 == heads[0] })
    return heads[0]
  }

  private func values(_ cache: KVCache, at positions: [Int]) throws -> [Float] {
    try (0..<4).flatMap { head in
      let held = try cache.read(layer: 0, head: head)
      let dim = held.values.count / held.positions.count
      return positions.compactMap(held.positions.firstIndex).flatMap { held.values[$0 * dim..<($0 + 1) * dim] }
    }
  }
}
