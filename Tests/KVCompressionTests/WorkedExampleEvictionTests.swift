import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// The oracles of the eviction specification, by hand-made numbers.
@Suite struct WorkedExampleEvictionTests {
  // MARK: StreamingLLM (A1)

  private func streaming(
    tokens: Int, sinks: Int, recent: Int, finished: Bool = true
  ) throws -> KVCache {
    let cache = try KVCache(
      Policy(try .streamingLLM(sinks: sinks, recent: recent, positions: .keep), store: .dense(.f32)), queryHeads: 2,
      kvHeads: 2, dim: 4)
    try cache.append(normalTensor(2, tokens, 4, seed: 1), normalTensor(2, tokens, 4, seed: 2))
    if finished { try cache.finishPrefill() }
    return cache
  }

  @Test func sinksAndNewestStay() throws {
    let cache = try streaming(tokens: 10, sinks: 2, recent: 3)
    #expect(try cache.positions() == [[0, 1, 7, 8, 9], [0, 1, 7, 8, 9]])
    try cache.append(normalTensor(2, 1, 4, seed: 3), normalTensor(2, 1, 4, seed: 4))
    try cache.commit(layer: 0)
    #expect(try cache.rows(layer: 0, head: 1) == [0, 1, 8, 9, 10])
    #expect(cache.tokensSeen(layer: 0) == 11)
  }

  /// N + c <= C: nothing; else [0, S) and [N - R + c, N), so that N + c = C.
  @Test func roomForAComingChunk() throws {
    let kept = try streaming(tokens: 10, sinks: 2, recent: 3)
    try kept.makeRoom(for: 2)
    #expect(try kept.rows(layer: 0, head: 0) == [0, 1, 9])
    let whole = try streaming(tokens: 10, sinks: 2, recent: 3, finished: false)
    try whole.makeRoom(for: 2)
    #expect(try whole.rows(layer: 0, head: 0) == [0, 1, 9])
    let small = try streaming(tokens: 3, sinks: 2, recent: 3)
    try small.makeRoom(for: 2)
    #expect(try small.rows(layer: 0, head: 0) == [0, 1, 2])
    // A chunk beyond the window leaves the sinks.
    let long = try streaming(tokens: 10, sinks: 2, recent: 3)
    try long.makeRoom(for: 7)
    #expect(try long.rows(layer: 0, head: 0) == [0, 1])
  }

  @Test func everyComingChunk() throws {
    for sinks in 0...3 {
      for recent in 1...5 {
        for tokens in 1...12 {
          for coming in 0...7 {
            let cache = try streaming(tokens: tokens, sinks: sinks, recent: recent)
            let held = min(tokens, sinks + recent)
            try cache.makeRoom(for: coming)
            let recents = held + coming <= sinks + recent ? held - min(sinks, tokens) : max(0, recent - coming)
            let wanted = Array(0..<min(sinks, tokens)) + Array(tokens - recents..<tokens)
            #expect(
              try cache.rows(layer: 0, head: 0) == wanted,
              "sinks \(sinks), recent \(recent), tokens \(tokens), coming \(coming)")
          }
        }
      }
    }
  }

  /// Without sinks StreamingLLM is a sliding window. It attends before it evicts: one row more than it keeps.
  @Test func withoutSinksItIsASlidingWindow() throws {
    let recent = 6
    let streaming = try KVCache(
      Policy(try .streamingLLM(sinks: 0, recent: recent, positions: .keep), store: .dense(.f32)), queryHeads: 4,
      kvHeads: 2, dim: 8)
    let sliding = try KVCache(
      Policy(store: .dense(.f32)), queryHeads: 4, kvHeads: 2, dim: 8, slidingWindow: recent + 1)
    let keys = try normalTensor(2, 40, 8, seed: 5)
    let values = try normalTensor(2, 40, 8, seed: 6)
    let queries = try normalTensor(4, 40, 8, seed: 7)
    for cache in [streaming, sliding] {
      try cache.append(keys.slice(tokens: 0..<20), values.slice(tokens: 0..<20))
      _ = try cache.attend(queries.slice(tokens: 0..<20))
      try cache.finishPrefill()
    }
    for token in 20..<40 {
      var outputs: [[Float]] = []
      for cache in [streaming, sliding] {
        try cache.append(keys.slice(tokens: token..<token + 1), values.slice(tokens: token..<token + 1))
        outputs.append(try cache.attend(queries.slice(tokens: token..<token + 1)))
      }
      #expect(zip(outputs[0], outputs[1]).allSatisfy { abs($0 - $1) < 1e-6 }, "token \(token)")
    }
  }

  // MARK: H2O (A2)

  private static let rows: [[Float]] = [
    [1], [0.6, 0.4], [0.5, 0.1, 0.4], [0.3, 0.1, 0.4, 0.2], [0.1, 0.1, 0.5, 0.2, 0.1],
  ]

  private func h2o(heavy: Int, recent: Int) throws -> KVCache {
    try KVCache(
      Policy(try .h2o(heavy: heavy, recent: recent), store: .dense(.f32)), queryHeads: 1, kvHeads: 1, dim: 2,
      inputs: .attentionWeights)
  }

  private func token(_ seed: UInt64) throws -> HeadTensor { try normalTensor(1, 1, 2, seed: seed) }

  private func isClose(_ a: [Float], _ b: [Float]) -> Bool {
    a.count == b.count && zip(a, b).allSatisfy { abs($0 - $1) < 1e-6 }
  }

  /// The 5 x 5 matrix, its rows reported as the tokens come.
  @Test func heavyHittersOfTheFiveByFiveMatrix() throws {
    let cache = try h2o(heavy: 1, recent: 2)
    for (index, row) in Self.rows.enumerated() {
      try cache.append(token(UInt64(index)), token(100 + UInt64(index)))
      try cache.observe(layer: 0, attention: [row])
      try cache.commit(layer: 0)
      #expect(abs(cache.accumulated()[0].reduce(0, +) - Float(index + 1)) < 1e-5, "one unit of attention a query")
    }
    #expect(isClose(cache.accumulated()[0], [2.5, 0.7, 1.3, 0.4, 0.1]))
    try cache.finishPrefill()
    #expect(try cache.rows(layer: 0, head: 0) == [0, 3, 4])
    #expect(isClose(cache.accumulated()[0], [2.5, 0.4, 0.1]))

    try cache.append(token(50), token(51))
    try cache.observe(layer: 0, attention: [[0.1, 0.3, 0.2, 0.4]])
    #expect(isClose(cache.accumulated()[0], [2.6, 0.7, 0.3, 0.4]))
    try cache.commit(layer: 0)
    #expect(try cache.rows(layer: 0, head: 0) == [0, 4, 5])
    #expect(isClose(cache.accumulated()[0], [2.6, 0.3, 0.4]))
  }

  /// The same by column sums of the whole prompt at once.
  @Test func heavyHittersFromColumnSums() throws {
    let cache = try h2o(heavy: 1, recent: 2)
    try cache.append(normalTensor(1, 5, 2, seed: 1), normalTensor(1, 5, 2, seed: 2))
    try cache.observe(layer: 0, attention: [[2.5, 0.7, 1.3, 0.4, 0.1]])
    try cache.finishPrefill()
    #expect(try cache.rows(layer: 0, head: 0) == [0, 3, 4])
  }

  /// The smallest budgets, where the authors' slices become empty.
  @Test func smallestBudgets() throws {
    for (heavy, recent, wanted) in [
      (0, 1, [4]), (1, 0, [0]), (2, 0, [0, 2]), (0, 2, [3, 4]), (3, 2, [0, 1, 2, 3, 4]),
    ] {
      let cache = try h2o(heavy: heavy, recent: recent)
      try cache.append(normalTensor(1, 5, 2, seed: 1), normalTensor(1, 5, 2, seed: 2))
      try cache.observe(layer: 0, attention: [[2.5, 0.7, 1.3, 0.4, 0.1]])
      try cache.finishPrefill()
      #expect(try cache.rows(layer: 0, head: 0) == wanted, "heavy \(heavy), recent \(recent)")
    }
  }

  /// A budget of everything is full attention, bit for bit, and the mass is what the queries gave.
  @Test func unreachedBudgetChangesNothing() throws {
    let keys = try normalTensor(2, 30, 8, seed: 1)
    let values = try normalTensor(2, 30, 8, seed: 2)
    let queries = try normalTensor(4, 30, 8, seed: 3)
    let h2o = try KVCache(
      Policy(try .h2o(heavy: 15, recent: 15), store: .dense(.f32)), queryHeads: 4, kvHeads: 2, dim: 8)
    let full = try KVCache(Policy(store: .dense(.f32)), queryHeads: 4, kvHeads: 2, dim: 8)
    for token in 0..<30 {
      let range = token..<token + 1
      var outputs: [[Float]] = []
      for cache in [h2o, full] {
        try cache.append(keys.slice(tokens: range), values.slice(tokens: range))
        outputs.append(try cache.attend(queries.slice(tokens: range)))
        if token == 9 { try cache.finishPrefill() }
      }
      #expect(zip(outputs[0], outputs[1]).allSatisfy { abs($0 - $1) < 1e-6 })
    }
    for sums in h2o.accumulated() { #expect(abs(sums.reduce(0, +) - 60) < 1e-4) }
    let (kept, all) = (try h2o.read(layer: 0, head: 1), try full.read(layer: 0, head: 1))
    #expect(kept == all)
  }

  // MARK: SnapKV (A3)

  private func pooled(_ pooling: Pooling, kernel: Int = 3, _ scores: [Float]) -> [Float] {
    var table = ScoreTable()
    table.reset(counts: [scores.count])
    for (row, score) in scores.enumerated() { table[0, row] = score }
    table.pool(head: 0, rows: 0..<scores.count, kernel: kernel, pooling)
    return (0..<scores.count).map { table[0, $0] }
  }

  private func top(_ count: Int, of scores: [Float]) -> [Int] {
    var taken: [Int] = []
    selectLargest(count, of: scores[...]) { taken.append($0) }
    return taken
  }

  @Test func poolingAndTies() {
    let past: [Float] = [0.1, 0.5, 0.1, 0.1, 0.2, 0.2]
    let average = pooled(.average, past)
    let wanted: [Float] = [0.2, 0.7 / 3, 0.7 / 3, 0.4 / 3, 0.5 / 3, 0.4 / 3]
    #expect(isClose(average, wanted))
    #expect(pooled(.max, past) == [0.5, 0.5, 0.5, 0.2, 0.2, 0.2])
    #expect(top(3, of: average) == [0, 1, 2])
    #expect(top(2, of: average) == [1, 2])
    #expect(top(1, of: average) == [1], "equal scores: the lower position")
    #expect(top(3, of: pooled(.max, past)) == [0, 1, 2])
    #expect(top(4, of: pooled(.max, past)) == [0, 1, 2, 3])
  }

  /// Equal means are equal in f32 too, wherever in the window the same numbers stand.
  @Test func averagesOfTheSameNumbersTie() {
    let average = pooled(.average, [0.1, 0.5, 0.1, 0.1, 0.2, 0.2])
    #expect(average[1] == average[2])
  }

  @Test func poolingAtTheEnds() {
    #expect(pooled(.average, kernel: 5, [5]) == [1])
    #expect(pooled(.max, kernel: 5, [-5]) == [-5])
    #expect(pooled(.max, kernel: 7, [-1, -2, -3]) == [-1, -1, -1])
    #expect(pooled(.average, kernel: 1, [3, 1]) == [3, 1])
  }

  /// Rows taken by score, ties to the lower position, against sorting; all small cases.
  @Test func selectionIsTheSortedOne() {
    var random = SeededGenerator(seed: 11)
    for count in 1...40 {
      for levels in [1, 2, 5, 1000] {
        let scores = (0..<count).map { _ in Float(random.integer(below: levels)) }
        let order = scores.indices.sorted { scores[$0] != scores[$1] ? scores[$0] > scores[$1] : $0 < $1 }
        for kept in 0...count {
          #expect(top(kept, of: scores) == order[..<kept].sorted(), "\(count) scores, \(levels) levels, \(kept) kept")
        }
      }
    }
  }

  /// n <= budget: all stay; n = budget + 1: one goes, never from the window.
  @Test func promptsAroundTheBudget() throws {
    for tokens in 1...14 {
      let cache = try KVCache(
        Policy(try .snapKV(budget: .tokens(10), window: 4, kernel: 3), store: .dense(.f32)), queryHeads: 2, kvHeads: 1,
        dim: 4)
      try cache.append(normalTensor(1, tokens, 4, seed: 1), normalTensor(1, tokens, 4, seed: 2))
      _ = try cache.attend(normalTensor(2, tokens, 4, seed: 3))
      try cache.finishPrefill()
      let rows = try cache.rows(layer: 0, head: 0)
      #expect(rows.count == min(tokens, 10))
      #expect(Array(rows.suffix(4)) == Array(max(0, tokens - 4)..<tokens))
    }
  }
}
