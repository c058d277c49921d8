import KVCompression
import KVExperiments
import Testing

@testable import KVCore
@testable import KVEviction

/// KVCrush (A10): the oracle of the specification, the authors' code, and what both leave open.
@Suite struct KVCrushTests {
  // MARK: Worked example

  static let scores: [Float] = [9, 1, 8, 2, 1, 2, 1, 1, 7, 1, 6, 1, 3, 4, 3, 5]

  private func rule(_ anchor: RepresentativeRule.Anchor, _ block: Int = 4) throws -> RepresentativeRule {
    try RepresentativeRule(block: block, anchor: anchor)
  }

  @Test func bitsAndDistances() throws {
    let bits = RepresentativeRule.bits(Self.scores)
    #expect(bits.map { $0 ? 1 : 0 } == [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1])
    #expect(try rule(.alternating).distances(bits: bits, block: 4) == [4, 2, 4, 2])
    #expect(try rule(.mean).distances(bits: bits, block: 4) == [0, 2, 0, 2])
    #expect(try rule(.zeros).distances(bits: bits, block: 4) == [2, 0, 2, 4])
    #expect(try rule(.ones).distances(bits: bits, block: 4) == [2, 4, 2, 0])
    #expect(try rule(.zeros).ranking(Self.scores) == [0, 2, 3, 1])
  }

  @Test(arguments: [
    (RepresentativeRule.Anchor.alternating, 1, [1]), (.alternating, 2, [1, 3]), (.mean, 1, [2]), (.mean, 2, [2, 1]),
    (.zeros, 1, [1]), (.zeros, 2, [1, 2]),
  ])
  func picks(anchor: RepresentativeRule.Anchor, count: Int, kept: [Int]) throws {
    let rule = try rule(anchor)
    let distances = rule.distances(bits: RepresentativeRule.bits(Self.scores), block: 4)
    #expect(rule.picks([1, 2, 3], count: count) { distances[$0] } == kept)
  }

  /// Seven items, four picks: the authors' step is 1, the paper's groups reach the end.
  @Test func stepsAreRoundedDown() throws {
    #expect(try rule(.zeros).picks(Array(0..<7), count: 4) { $0 } == [0, 1, 2, 3])
    let paper = try RepresentativeRule(form: .paper)
    #expect(paper.picks(Array(0..<7), count: 4) { $0 } == [0, 1, 3, 5])
  }

  // MARK: The authors' code

  @Test(arguments: Goldens.names("kvcrush."))
  func golden(name: String) throws {
    let run = try GoldenRun(name)
    let block = try run.entry.int("block")
    let representatives = try run.entry.int("budget")
    let anchor = try #require(RepresentativeRule.Anchor(rawValue: run.entry.text("anchor")))
    let scores = try Goldens.reference(run.entry, "tokenScores").numbers.map { Float($0) }
    let rule = try RepresentativeRule(block: block, representatives: representatives, anchor: anchor)
    let evicted = rule.ranking(scores).suffix(try run.entry.int("evict")).sorted()
    try run.expect("evictedBlocks", evicted.map { Double($0) })
    let bits = RepresentativeRule.bits(scores)
    try run.expect("bits", bits.map { $0 ? 1.0 : 0.0 } as [Double])
    let distances = rule.distances(bits: bits, block: block)
    try run.expect("distances", distances.map { Double($0) })
    let retained = rule.picks(evicted, count: representatives) { distances[$0] }
    try run.expect("retainedBlocks", retained.map { Double($0) })
    run.finish()

    // The whole rule, on the cache's own sums of the same attention.
    let input = try GoldenInput(run.entry)
    let (start, recent) = (try run.entry.int("start"), try run.entry.int("recent"))
    let area = scores.count
    let kept = area - (evicted.count - representatives) * block
    let tokens = start + area + recent
    let selection = try Selection.kvCrush(
      budget: .tokens(start + kept + recent), sinks: start, window: recent, rule: rule, normalised: false,
      queries: tokens, pool: 1, every: block)
    let cache = try KVCache(
      Policy(selection, store: .dense(.f32)), queryHeads: input.queries.heads, kvHeads: input.keys.heads,
      dim: input.keys.dim)
    #expect(tokens == input.tokens)
    try cache.append(input.keys, input.values)
    _ = try cache.attend(input.queries)
    try cache.finishPrefill()
    let gone = Set(evicted).subtracting(retained)
    let expected = (0..<tokens).filter {
      $0 < start || $0 >= start + area || !gone.contains(($0 - start) / block)
    }
    #expect(try cache.positions() == [expected, expected])
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  // MARK: Sums

  /// The heads of a layer share one sum, pooled forward after they were added; counts are of the queries that saw a row.
  @Test(arguments: [RepresentativeRule.Form.code, .paper])
  func pooledSums(form: RepresentativeRule.Form) throws {
    let selection = try Selection.kvCrush(
      budget: .tokens(100), sinks: 0, window: 0, rule: RepresentativeRule(form: form), queries: 2, pool: 2)
    let cache = try KVCache(
      Policy(selection, store: .dense(.f32)), queryHeads: 2, kvHeads: 2, dim: 4, inputs: .attentionWeights)
    try cache.append(normalTensor(2, 4, 4, seed: 1), normalTensor(2, 4, 4, seed: 2))
    try cache.observe(layer: 0, attention: [[1, 0, 0.5, 0.25], [0, 2, 0, 0.25]])
    func columns() -> [[[Float]]] {
      let view = cache.view
      return (0..<2).map { head in
        (0..<2).map { column in (0..<4).map { view.observed(head: head, row: $0, column: column) } }
      }
    }
    let seen: [Float] = [2, 2, 2, 1]
    if form == .code {
      #expect(columns() == [[[2, 2, 0.5, 0.5], seen], [[2, 2, 0.5, 0.5], seen]])
      #expect(try cache.scores() == [[1, 1, 0.25, 0.5], [1, 1, 0.25, 0.5]])
    } else {
      #expect(columns() == [[[1, 0.5, 0.5, 0.25], seen], [[2, 2, 0.25, 0.25], seen]])
    }
  }

  /// A dead slot between two rows is no neighbour.
  @Test func deadSlotsAreNoNeighbours() throws {
    var sums: [Float] = [0, 0, 0, 0, 0, 0, 0, 0]
    let bias: [Float] = [0, -.infinity, 0, 0]
    let weights: [Float] = [1, 0, 3, 2]
    sums.withUnsafeMutableBufferPointer { sums in
      bias.withUnsafeBufferPointer { bias in
        weights.withUnsafeBufferPointer { weights in
          PooledAttention(pool: 2).fold(
            ObservedRows(
              ObservedColumns(
                base: sums.baseAddress, stride: 4, width: 2, count: 4, live: 3, bias: bias.baseAddress, positions: nil,
                firstPosition: 0), weights: weights, queries: 1, group: 1, tokensSeen: 4, decodedTokens: 1,
              prompt: false))
        }
      }
    }
    #expect(sums == [3, 0, 3, 2, 1, 0, 1, 1])
  }

  // MARK: The paper's form

  /// Three heads, bits by hand: representatives are spread along the order of what a head would drop.
  @Test func tokensByHeads() throws {
    struct Given: Scorer {
      var inputs: RequiredInputs { .none }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        let rows: [[Float]] = [[9, 8, 1, 1, 1, 1], [9, 1, 8, 1, 1, 1], [9, 1, 8, 1, 7, 1]]
        for head in 0..<3 { scores.set(head: head, rows[head]) }
      }
    }
    // Tops of two: tokens {0, 1}, {0, 2}, {0, 2}; distances to zeros are 3, 1, 2, 0, 0, 0.
    let selection = try Selection(
      spec: nil, scorer: Given(), budget: .tokens(4),
      router: TopKRouter(
        Protection(), rule: RepresentativeRule(form: .paper, representatives: 2, anchor: .zeros)),
      schedule: Schedule())
    let cache = try KVCache(Policy(selection, store: .dense(.f32)), queryHeads: 3, kvHeads: 3, dim: 4)
    try cache.append(normalTensor(3, 6, 4, seed: 1), normalTensor(3, 6, 4, seed: 2))
    try cache.finishPrefill()
    // Head 0 orders 3, 4, 5, 2; heads 1 and 2 order 3, 4, 5, 1.
    #expect(try cache.positions() == [[0, 1, 3, 5], [0, 2, 3, 5], [0, 2, 3, 5]])
  }

  /// Decoding in steady state drops one block's worth at a time; rows between never exceed budget and block.
  @Test(arguments: RepresentativeRule.Form.allCases)
  func decoding(form: RepresentativeRule.Form) throws {
    let traffic = Traffic(Geometry(4, 2, 40).shape(), tokens: 120)
    let selection = try Selection.kvCrush(
      budget: .tokens(30), sinks: 2, window: 4, rule: RepresentativeRule(form: form, block: 4), every: 4)
    let cache = try KVCache(
      shape: traffic.shape, policy: Policy(selection, store: .dense(.f16)), backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 60, chunk: 60)
    #expect(cache.rowsHeld(layer: 0, head: 0) == 30)
    for token in 60..<120 {
      try traffic.step(cache, token..<token + 1)
      for head in 0..<2 {
        let rows = try cache.rows(layer: 0, head: head)
        #expect(rows.count == 30 + (token - 59) % 4 && rows.starts(with: [0, 1]) && rows.suffix(4).first == token - 3)
      }
      if form == .code { #expect(try cache.rows(layer: 0, head: 0) == cache.rows(layer: 0, head: 1)) }
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    }
  }

  @Test func wrongOptions() throws {
    for text in [
      "kvcrush(block=0)", "kvcrush(share=1.5)", "kvcrush(share=0.5,representatives=2)", "kvcrush(anchor=none)",
      "kvcrush(budget=100)", "kvcrush(form=book)", "kvcrush(queries=0)", "h2o+crush(representatives=-1)",
    ] {
      expectError(.invalidOption) { _ = try PolicyRegistry.standard.policy(text) }
    }
    expectError(.unsupported, "crush") { _ = try PolicyRegistry.standard.policy("streaming+crush") }
    let counted = try PolicyRegistry.standard.policy("kvcrush(representatives=3,anchor=mean)").spec.description
    #expect(try PolicyRegistry.standard.policy(counted).spec.description == counted)
  }
}
