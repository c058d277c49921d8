import Foundation
import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// The oracles of the methods that observe attention, by hand-made rows that an engine reports.
@Suite struct WorkedExampleObserverTests {
  private func cache(
    _ selection: Selection, heads: Int = 1, group: Int = 1, store: Store = .dense(.f32)
  ) throws -> KVCache {
    try KVCache(
      Policy(selection, store: store), queryHeads: heads * group, kvHeads: heads, dim: 2,
      inputs: .attentionWeights)
  }

  private func append(_ cache: KVCache, _ tokens: Int = 1, seed: UInt64 = 1) throws {
    let heads = cache.shape.layers[0].kvHeads
    try cache.append(normalTensor(heads, tokens, 2, seed: seed), normalTensor(heads, tokens, 2, seed: seed + 1))
  }

  private func isClose(_ a: [Float], _ b: [Float], _ tolerance: Float = 1e-4) -> Bool {
    a.count == b.count && zip(a, b).allSatisfy { abs($0 - $1) <= tolerance }
  }

  // MARK: TOVA (A4)

  @Test func newestQueryOverTwoHeads() throws {
    let cache = try cache(.tova(budget: .tokens(3)), heads: 2)
    try append(cache, 5)
    try cache.observe(layer: 0, attention: [[0.5, 0.1, 0.1, 0.2, 0.1], [0.1, 0.1, 0.5, 0.1, 0.2]])
    #expect(try isClose(cache.scores()[0], [0.3, 0.1, 0.3, 0.15, 0.15], 1e-6))
    try cache.finishPrefill()
    #expect(try cache.positions() == [[0, 2, 3], [0, 2, 3]], "of equal ones the lower position")
    // Only the newest row counts, whatever came before.
    try append(cache)
    try cache.observe(layer: 0, attention: [[0, 0.1, 0.6, 0.3], [0, 0.1, 0.6, 0.3]])
    try cache.commit(layer: 0)
    #expect(try cache.positions() == [[2, 3, 5], [2, 3, 5]])
  }

  /// Groups: the mean over query heads is that of the sums an engine reports.
  @Test func groupsAreAveraged() throws {
    let cache = try cache(.tova(budget: .tokens(3)), heads: 2, group: 2)
    try append(cache, 3)
    try cache.observe(layer: 0, attention: [[1, 0.6, 0.4], [0.2, 0.4, 1.4]])
    #expect(try isClose(cache.scores()[1], [0.3, 0.25, 0.45], 1e-6))
  }

  @Test func budgetsThatDoNotBindKeepEverything() throws {
    let cache = try cache(.tova(budget: .tokens(9)), heads: 2)
    try append(cache, 4)
    try cache.observe(layer: 0, attention: [[0, 0, 0, 1], [0, 0, 0, 1]])
    try cache.finishPrefill()
    #expect(try cache.positions() == [[0, 1, 2, 3], [0, 1, 2, 3]])
  }

  /// The eviction in place of decoding chooses as the plan does.
  @Test(arguments: [
    ("h2o(heavy=5,recent=4)", 1), ("h2o(budget=9,normalised=true)", 1), ("tova(budget=9,recent=2)", 2),
    ("h2o(heavy=5,recent=4,every=13)", 2), ("tova(budget=9,every=20)", 2), ("lazy(budget=24,window=12,alpha=0.3)", 1),
  ])
  func inPlaceAndPlannedEvictionAgree(text: String, heads: Int) throws {
    let selection = try PolicyRegistry.standard.policy(text).selection
    // A store that drops by lists: its rows leave the dense window at once.
    let lists = try Store(
      spec: StageSpec(name: "lists"), keys: .newest(0, window: .f32, body: .affinePerToken(bits: 8, group: 8)),
      values: .newest(0, window: .f32, body: .affinePerToken(bits: 8, group: 8)))
    var planned = selection
    planned.router = PlannedRouter(router: try #require(selection.router as? TopKRouter))
    let caches = [
      try cache(selection, heads: heads), try cache(planned, heads: heads),
      try cache(selection, heads: heads, store: lists),
    ]
    #expect(caches[0].inPlace != nil && caches[1].inPlace == nil)
    var random = SeededGenerator(seed: 7)
    for step in 0..<60 {
      let rows = caches[0].rowsHeld(layer: 0, head: 0) + 1
      let weights = (0..<heads).map { _ in (0..<rows).map { _ in Float(random.integer(below: 6)) / 8 } }
      for cache in caches {
        try append(cache, seed: UInt64(step))
        try cache.observe(layer: 0, attention: weights)
        try cache.commit(layer: 0)
        if step == 11 { try cache.finishPrefill() }
      }
      #expect(try caches[0].positions() == caches[1].positions(), "step \(step)")
      #expect(try caches[0].positions() == caches[2].positions(), "step \(step)")
      #expect(caches[0].accumulated() == caches[1].accumulated())
      for cache in caches { #expect(cache.bytes.total == cache.backend.memory.liveBytes) }
    }
    #expect(try caches[0].read(layer: 0, head: 0).keys == caches[1].read(layer: 0, head: 0).keys)
  }

  /// The same router, as one the cache does not know.
  private struct PlannedRouter: Router {
    let router: TopKRouter
    var protection: Protection { router.protection }
    func route(_ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing) {
      router.route(layer, scores: scores, kept: kept, into: &routing)
    }
  }

  // MARK: PrefixKV (A9)

  /// Its decoding looks at no score: engines report nothing, rows carry nothing, and a second prompt begins anew.
  @Test(arguments: ["prefixkv(budget=0.5)", "prefixkv(budget=12,sinks=2,every=3)"])
  func nothingIsObservedWhileDecoding(text: String) throws {
    let selection = try PolicyRegistry.standard.policy(text).selection
    let caches = try [cache(selection, heads: 2), cache(selection, heads: 2)]
    for cache in caches {
      try append(cache, 20)
      let weights = (0..<20).map { Float($0 * 7 % 11) / 8 }
      try cache.observe(layer: 0, attention: [weights, weights])
      #expect(cache.bytes.state > 0)
      try cache.finishPrefill()
      #expect(cache.bytes.state == 0)
    }
    for step in 0..<12 {
      for (index, cache) in caches.enumerated() {
        try append(cache, seed: UInt64(step))
        let rows = cache.rowsHeld(layer: 0, head: 0)
        if index == 1 {
          try cache.observe(
            layer: 0, attention: [Array(repeating: 0.5, count: rows)] + [Array(repeating: 0.25, count: rows)])
        }
        try cache.commit(layer: 0)
        #expect(cache.bytes.state == 0 && cache.bytes.total == cache.backend.memory.liveBytes)
      }
      #expect(try caches[0].positions() == caches[1].positions())
    }
    try caches[0].compress()
    caches[0].beginPrefill()
    try append(caches[0], 4)
    expectError(.missingInput, "attention weights", layer: 0) { try caches[0].finishPrefill() }
    let rows = caches[0].rowsHeld(layer: 0, head: 0)
    let weights = (0..<rows).map { Float($0) }
    try caches[0].observe(layer: 0, attention: [weights, weights])
    try caches[0].finishPrefill()
    #expect(caches[0].bytes.state == 0)
  }

  // MARK: LazyEviction (A11)

  private func columns(_ cache: KVCache) -> [[Float]] {
    let view = cache.view
    return (0..<2).map { column in
      (0..<view.rowCount(head: 0)).map { view.observed(head: 0, row: $0, column: column) }
    }
  }

  /// Two rows of the prompt, then three steps with the rows of the oracle: their first row has three tokens.
  @Test func recurrenceState() throws {
    let cache = try cache(.lazyEviction(budget: .tokens(100), window: 4, alpha: 0.1))
    try append(cache, 2)
    try cache.observe(layer: 0, attention: [[1, 1]])
    try cache.finishPrefill()
    #expect(columns(cache) == [[0, 0], [0, 0]], "prompts are not observed")
    let steps: [([Float], [Float], [Float])] = [
      ([0.5, 0.3, 0.2], [1, 1, 1], [1, 1, 1]), ([0.05, 0.5, 0.05, 0.4], [1, 2, 1, 2], [1, 1, 1, 1]),
      ([0.3, 0.05, 0.05, 0.3, 0.3], [3, 2, 1, 3, 3], [2, 1, 1, 1, 1]),
    ]
    for (weights, last, longest) in steps {
      try append(cache)
      try cache.observe(layer: 0, attention: [weights])
      #expect(columns(cache) == [last, longest])
    }
    #expect(try isClose(cache.scores()[0], [1.0758, 1.2384, 1.0949, 1.5379, 1.5379]))
  }

  @Test func recurrenceScores() {
    let code = Recurrence(threshold: 0.1)
    let paper = Recurrence(threshold: 0.1, form: .paper)
    let states: [(Float, Float)] = [(10, 3), (8, 3), (2, 3), (8, 1), (8, 0)]
    let scores = states.map { score(code, $0) }
    #expect(isClose(scores, [0.7763, 0.5561, 0.2883, 1.0949, 0]))
    #expect(isClose(states.dropLast().map { score(paper, $0) }, [1.2384, 0.9169, 0.3683, 1.2384]))
    #expect(score(paper, (8, 0)) < 1e-30 && score(paper, (10, 0)) == 1)
  }

  /// The score at step 10 of a row last active at `state.0` with the interval `state.1`.
  private func score(_ scorer: Recurrence, _ state: (Float, Float)) -> Float {
    var planes = [state.0, state.1]
    var result: [Float] = [0]
    planes.withUnsafeMutableBufferPointer { planes in
      result.withUnsafeMutableBufferPointer { scores in
        scorer.score(
          ObservedRows(
            ObservedColumns(
              base: planes.baseAddress, stride: 1, width: 2, count: 1, live: 1, bias: nil, positions: nil,
              firstPosition: 0),
            weights: UnsafeBufferPointer(start: nil, count: 0), queries: 0, group: 1, tokensSeen: 20,
            decodedTokens: 10, prompt: false), into: scores)
      }
    }
    return result[0]
  }

  // MARK: Window statistics (A5, A8)

  /// One head of one channel, keys 1: a query's logits are all alike unless biased; rows are made by the keys instead.
  /// Attention rows a_{t,j} are reached with keys ln a and a query of 1 when rows sum to 1.
  private func statistics(
    _ rows: [[Float]], _ statistic: WindowStatistic
  ) throws -> (scores: [Float], totals: WindowTotals) {
    let tokens = rows[rows.count - 1].count
    let window = rows.count
    // One channel a query: query i is the unit vector i, key j holds the logarithms of column j.
    let dim = window
    let policy = Policy(
      try .snapKV(budget: .tokens(tokens + window + 1), window: window, kernel: 1), store: .dense(.f32))
    let cache = try KVCache(
      policy, queryHeads: 1, kvHeads: 1, dim: dim, attention: AttentionOptions(scale: 1))
    var keys = [Float](repeating: -40, count: tokens * dim)
    for (query, row) in rows.enumerated() {
      for (token, weight) in row.enumerated() { keys[token * dim + query] = weight == 0 ? -40 : log(weight) }
    }
    var queries = [Float](repeating: 0, count: tokens * dim)
    for query in 0..<window { queries[(tokens - window + query) * dim + query] = 1 }
    let k = try HeadTensor(heads: 1, tokens: tokens, dim: dim, elements: keys)
    try cache.append(k, k)
    _ = try cache.attend(HeadTensor(heads: 1, tokens: tokens, dim: dim, elements: queries))
    let view = cache.view
    var table = ScoreTable(counts: view.rowCounts)
    let totals = try view.windowStatistics(
      statistic, window: window, reduction: .sum, totals: true, into: &table)
    return ((0..<tokens).map { table[0, $0] }, totals)
  }

  @Test func lowCountsOfTheOracle() throws {
    let rows: [[Float]] = [[0.4, 0.1, 0.3, 0.2], [0.3, 0.05, 0.25, 0.25, 0.15], [0.3, 0.05, 0.1, 0.25, 0.1, 0.2]]
    #expect(try statistics(rows, .belowEvenShare).scores == [0, 3, 1, 1, 2, 0])
    #expect(try isClose(statistics(rows, .max).scores, [0.4, 0.1, 0.3, 0.25, 0.15, 0.2]))
    #expect(try isClose(statistics(rows, .sum).scores, [1, 0.2, 0.65, 0.7, 0.25, 0.2]))
  }

  /// The oracle's past rows; what is missing to 1 lies in the window, of which the first row is seen by both queries.
  @Test func momentsAndEntropyOfTheOracle() throws {
    let rows: [[Float]] = [[0.5, 0.3, 0.1, 0.1], [0.1, 0.3, 0.4, 0.1, 0.1]]
    let (scores, totals) = try statistics(rows, .meanVariance(gamma: 200))
    #expect(isClose(Array(scores[..<3]), [16.3, 0.3, 9.25], 1e-3))
    #expect(abs(totals.entropy - 1.89599) < 1e-4 && abs(totals.variance - 0.125) < 1e-5)
    let cake = LayerPreference(window: 2, tau1: 1, tau2: 1)
    #expect(abs(cake.preference(entropy: totals.entropy, variance: totals.variance) - 0.2370) < 1e-4)
  }

  /// Full buffers lose half at once; what is newest stays.
  @Test func scissorhandsDropsInBatches() throws {
    let cache = try KVCache(
      Policy(try .scissorhands(buffer: .tokens(12), history: 5, recent: 3), store: .dense(.f32)), queryHeads: 2,
      kvHeads: 1, dim: 4)
    var held: [Int] = []
    for token in 0..<30 {
      try cache.append(normalTensor(1, 1, 4, seed: UInt64(token)), normalTensor(1, 1, 4, seed: UInt64(token + 50)))
      _ = try cache.attend(normalTensor(2, 1, 4, seed: UInt64(token + 100)))
      if token == 7 { try cache.finishPrefill() }
      let rows = try cache.rows(layer: 0, head: 0)
      held.append(rows.count)
      #expect(rows.suffix(3) == Array(max(0, token - 2)...token)[...])
    }
    #expect(held == Array(1...12) + Array(6...12) + Array(6...12) + Array(6...9))
  }

  // MARK: Bounded prompts

  /// A prompt in chunks never holds more than budget and chunk, and what the policy remembers of as many rows.
  @Test(arguments: [
    "h2o(budget=128)+schedule(chunks=true)", "tova(budget=128)+schedule(chunks=true)",
    "snapkv(budget=128,window=16)+schedule(chunks=true)",
    "streaming(sinks=4,recent=124,positions=keep)+schedule(chunks=true)",
  ])
  func chunkedPromptsAreBounded(text: String) throws {
    let (budget, chunk, heads, dim) = (128, 64, 2, 64)
    let policy = try PolicyRegistry.standard.policy(text + "+f32")
    let cache = try KVCache(policy, queryHeads: 2 * heads, kvHeads: heads, dim: dim)
    let meter = cache.backend.memory
    for start in stride(from: 0, to: 1024, by: chunk) {
      try cache.append(
        normalTensor(heads, chunk, dim, seed: UInt64(start)), normalTensor(heads, chunk, dim, seed: UInt64(start + 1)))
      _ = try cache.attend(normalTensor(2 * heads, chunk, dim, seed: UInt64(start + 2)))
      #expect(cache.rowsHeld(layer: 0, head: 1) == min(start + chunk, budget))
    }
    try cache.finishPrefill()
    let rows = (budget + chunk) * heads * 2 * dim * 4
    // Position, log bias and one number a row, grown and copied once; queries of the window.
    let statistics = 2 * heads * (budget + chunk + 64) * 12 + policy.inputs.windowQueries * 2 * heads * dim * 4
    #expect(meter.peakBytes <= rows + statistics, "\(meter.peakBytes) of \(rows) and \(statistics)")
    #expect(meter.peakBytes >= rows, "the bound is near")
    #expect(cache.bytes.total == meter.liveBytes)
  }

  // MARK: Columns follow rows

  /// Forks, saved caches, trims refused, multi-turn: what is observed stays with its row.
  @Test func observedNumbersFollowTheirRows() throws {
    let cache = try cache(.lazyEviction(budget: .tokens(6), window: 3, alpha: 0.2))
    try append(cache, 4)
    try cache.observe(layer: 0, attention: [[0, 0, 0, 0]])
    try cache.finishPrefill()
    var random = SeededGenerator(seed: 3)
    for step in 0..<9 {
      let rows = cache.rowsHeld(layer: 0, head: 0) + 1
      let weights = (0..<rows).map { _ in Float(random.integer(below: 4)) / 8 }
      let fork = cache.fork()
      let loaded = try KVCache.load(
        saved: cache.saved(), policy: cache.policy, shape: cache.shape, backend: .cpu(threads: 1))
      for one in [cache, fork, loaded] {
        try append(one, seed: UInt64(20 + step))
        try one.observe(layer: 0, attention: [weights])
        try one.commit(layer: 0)
      }
      #expect(columns(cache) == columns(fork) && columns(cache) == columns(loaded), "step \(step)")
      #expect(try cache.positions() == fork.positions() && cache.positions() == loaded.positions())
      #expect(cache.bytes.state > 0 && loaded.bytes.total == loaded.backend.memory.liveBytes)
    }
    #expect(cache.rowsHeld(layer: 0, head: 0) == 6)
    // The next turn's rows enter with the clock as it stands.
    cache.beginPrefill()
    try append(cache, 2, seed: 90)
    try cache.observe(layer: 0, attention: [Array(repeating: 1, count: 8)])
    #expect(Array(columns(cache)[0].suffix(2)) == [9, 9])
    #expect(cache.tokensSeen(layer: 0) == 15)
    #expect(try cache.rows(layer: 0, head: 0).suffix(2) == [13, 14])
  }

  @Test func observersThatKeepTooMuchAreRefused() throws {
    struct Greedy: AttentionObserver {
      var columns: Int
      func fold(_ rows: ObservedRows) {}
    }
    struct Asks: Scorer {
      var columns: Int
      var inputs: RequiredInputs { RequiredInputs(observer: Greedy(columns: columns)) }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {}
    }
    for columns in [0, 17, -1] {
      let selection = Selection(
        spec: nil, scorer: Asks(columns: columns), budget: .tokens(4), router: TopKRouter(), schedule: Schedule())
      #expect(throws: KVError.self) { _ = try cache(selection) }
    }
  }
}
