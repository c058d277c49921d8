import KVCompression
import KVExperiments
import Testing

@testable import KVCore
@testable import KVMerging

/// Drops the rows it is told to, and merges as it is told.
struct ToldRouter: Router {
  var dropped: Set<Int>
  var told: [(merge: Routing.Merge, terms: [Routing.Term])] = []

  var protection: Protection { Protection() }
  var merges: Bool { true }

  func route(_ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing) throws(KVError) {
    for head in 0..<layer.kvHeads {
      for row in 0..<layer.rowCount(head: head) where !dropped.contains(row) { routing[head, row] = .tier(0) }
    }
    for (merge, terms) in told { routing.merge(merge, terms: terms) }
  }
}

/// A cache of one head over hand-made rows, cut by a router when the prompt ends.
func toldCache(
  _ keys: [[Float]], _ values: [[Float]], router: any Router, store: Store = .dense(.f32), kept: Int? = nil,
  attention: [Float]? = nil, scale: Float = 1, rotary: RotaryEmbedding? = nil
) throws -> KVCache {
  let count = keys.count
  struct Given: Scorer {
    var inputs: RequiredInputs { .none }
    func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
      layer.accumulatedAttention(into: &scores)
    }
  }
  let selection = Selection(
    spec: nil, scorer: Given(), budget: .tokens(kept ?? count - 1), router: router, schedule: Schedule())
  let cache = try KVCache(
    shape: ModelShape(
      layers: [LayerShape(queryHeads: 1, kvHeads: 1, keyDim: keys[0].count, valueDim: values[0].count)], rotary: rotary),
    policy: Policy(selection, store: store), backend: .cpu(threads: 1), attention: AttentionOptions(scale: scale))
  try cache.append(
    HeadTensor(heads: 1, tokens: count, dim: keys[0].count, elements: keys.flatMap { $0 }),
    HeadTensor(heads: 1, tokens: count, dim: values[0].count, elements: values.flatMap { $0 }))
  if let attention { try cache.observe(layer: 0, attention: [attention]) }
  try cache.finishPrefill()
  return cache
}

func expectClose(
  _ actual: [Float], _ expected: [Float], _ tolerance: Float = 2e-6, sourceLocation: SourceLocation = #_sourceLocation
) {
  #expect(actual.count == expected.count, sourceLocation: sourceLocation)
  for (a, e) in zip(actual, expected) {
    #expect(abs(a - e) <= tolerance * max(1, abs(e)), "\(actual), expected \(expected)", sourceLocation: sourceLocation)
  }
}

/// The oracles of the merging specification.
@Suite struct WorkedExampleMergingTests {
  private func look(_ cache: KVCache, _ query: [Float]) throws -> [Float] {
    try cache.look(HeadTensor(heads: 1, tokens: 1, dim: query.count, elements: query))
  }

  /// 0.3: a duplicate counts twice only with log 2.
  @Test func countOfASlot() throws {
    let keys: [[Float]] = [[2, 0], [2, 0], [0, 1]]
    let values: [[Float]] = [[1, 0], [3, 0], [0, 2]]
    var merge = Routing.Merge(head: 0, target: 0)
    merge.valueDivisor = 2
    let terms = [Routing.Term(row: 1, weight: 1)]
    let plain = try toldCache(keys, values, router: ToldRouter(dropped: [1], told: [(merge, terms)]))
    expectClose(try look(plain, [1, 0]), [1.761594, 0.238406])
    merge.logBias = 0.6931472
    let counted = try toldCache(keys, values, router: ToldRouter(dropped: [1], told: [(merge, terms)]))
    expectClose(try look(counted, [1, 0]), [1.873242, 0.126758])
    let held = try counted.read(layer: 0, head: 0)
    #expect(held.logBias == [0.6931472, 0])
    #expect(held.counts == [2, 1])
    #expect(held.positions == [0, 2])
    expectClose(held.values, [2, 0, 0, 2])
  }

  /// 0.4: the mean of a key at two positions lies between them, attenuated; turned first, it is the key.
  @Test func meansOfTurnedKeys() throws {
    let rotary = try RotaryEmbedding(headDim: 4, theta: 100, layout: .interleaved)
    func key(_ position: Int) throws -> [Float] {
      var key: [Float] = [1, 0.5, -0.3, 0.7]
      var span = key.mutableSpan
      try rotary.rotate(&span, position: position)
      return key
    }
    let keys = try (0..<14).map(key)
    let values = keys.map { _ in [Float(1)] }
    var merge = Routing.Merge(head: 0, target: 10)
    (merge.key, merge.keyDivisor, merge.valueDivisor) = (.average, 2, 2)
    let terms = [Routing.Term(row: 13, weight: 1)]
    let averaged = try toldCache(
      keys, values, router: ToldRouter(dropped: [13], told: [(merge, terms)]), rotary: rotary)
    let mean = try averaged.read(layer: 0, head: 0).keys[40..<44]
    expectClose(Array(mean), [0.065151, -0.044833, -0.752930, 0.011976])
    merge.key = .rotate
    let turned = try toldCache(
      keys, values, router: ToldRouter(dropped: [13], told: [(merge, terms)]), rotary: rotary)
    expectClose(Array(try turned.read(layer: 0, head: 0).keys[40..<44]), keys[10], 1e-6)
  }

  // MARK: KVMerger

  private let runKeys: [[Float]] = [[1, 0], [0.9, 0.1], [0.8, 0.3], [-1, 0.2], [0.1, 1]]
  private let runValues: [[Float]] = [[1, 0], [0, 1], [2, 2], [5, 5], [7, 7]]
  private let runAttention: [Float] = [0.2, 0.5, 0.3, 0.1, 0.4]

  private func kvMerger(_ change: (inout KVMergerOptions) -> Void = { _ in }, kept: Int? = nil) throws -> KVCache {
    var options = KVMergerOptions()
    options.key = .average
    options.logCount = false
    change(&options)
    let router = RunRouter(
      exact: kept != nil, threshold: kept == nil ? 0.75 : -1, recent: 0, heavy: 0, options: options)
    let selection = Selection(
      spec: nil, scorer: ReceivedAttention(attention: .accumulated), budget: kept.map { .tokens($0) } ?? .unlimited,
      router: router, schedule: Schedule())
    let cache = try KVCache(
      Policy(selection, store: .dense(.f32)), queryHeads: 1, kvHeads: 1, dim: 2, attention: AttentionOptions(scale: 1))
    try cache.append(
      HeadTensor(heads: 1, tokens: 5, dim: 2, elements: runKeys.flatMap { $0 }),
      HeadTensor(heads: 1, tokens: 5, dim: 2, elements: runValues.flatMap { $0 }))
    try cache.observe(layer: 0, attention: [runAttention])
    return cache
  }

  @Test func runsOfNeighbours() throws {
    let cache = try kvMerger()
    expectClose(
      cache.view.cosines(head: 0, of: [0, 1, 2, 3], and: [1, 2, 3, 4]), [0.993884, 0.969377, -0.849285, 0.097571])
    expectClose(cache.view.squaredDistances(head: 0, of: [0, 1, 2], and: [1, 1, 1]), [0.02, 0, 0.05])
    try cache.finishPrefill()
    let held = try cache.read(layer: 0, head: 0)
    #expect(held.positions == [1, 3, 4])
    #expect(held.counts == [3, 1, 1])
    #expect(held.logBias == [0, 0, 0])
    expectClose(held.keys, [0.900020, 0.133296, -1, 0.2, 0.1, 1])
    expectClose(held.values, [0.999667, 0.999800, 5, 5, 7, 7])

    let scaled = try kvMerger { $0.scalesValues = true }
    try scaled.finishPrefill()
    expectClose(Array(try scaled.read(layer: 0, head: 0).values[..<2]), [2.999000, 2.999400])

    let narrow = try kvMerger { $0.sigma = 0.3 }
    try narrow.finishPrefill()
    expectClose(Array(try narrow.read(layer: 0, head: 0).keys[..<2]), [0.905179, 0.123379])
    expectClose(Array(try narrow.read(layer: 0, head: 0).values[..<2]), [0.908557, 0.948206])
  }

  @Test func weightsOfARun() {
    let distances = [0.02, 0, 0.05]
    func normalised(_ width: KVMergerOptions.Width, _ sigma: Double) -> [Float] {
      let weights = KVMergerOptions.weights(distances, width: width, sigma: sigma)
      return weights.map { Float($0 / weights.reduce(0, +)) }
    }
    expectClose(normalised(.fixed, 5), [0.333356, 0.333489, 0.333156])
    expectClose(normalised(.fixed, 0.3), [0.337382, 0.377031, 0.285588])
    expectClose(normalised(.twoPass, 0), normalised(.fixed, 0.469980), 1e-5)
    expectClose(normalised(.fixed, 1e6), [1.0 / 3, 1.0 / 3, 1.0 / 3])
    expectClose(normalised(.fixed, 1e-6), [0, 1, 0])
    expectClose(
      KVMergerOptions.weights([0, 0], width: .twoPass, sigma: 1).map { Float($0) }, [1, 1])
  }

  @Test func exactBudgets() throws {
    let cache = try kvMerger(kept: 4)
    try cache.finishPrefill()
    #expect(try cache.read(layer: 0, head: 0).positions == [1, 2, 3, 4])
    #expect(try cache.read(layer: 0, head: 0).counts == [2, 1, 1, 1])
    for kept in 1...5 {
      let cache = try kvMerger(kept: kept)
      try cache.finishPrefill()
      #expect(cache.rowsHeld(layer: 0, head: 0) == kept)
      #expect(try cache.read(layer: 0, head: 0).counts.reduce(0, +) == 5)
    }
  }

  // MARK: MergingPress, D2O's sums, cluster means

  @Test func mergingPress() throws {
    let rule = MergeRule(gate: .cosine(0), update: .weighted, weights: .length, logCount: false)
    let cache = try toldCache(
      [[1, 0], [0, 1], [0.8, 0.6]], [[1, 1], [2, 2], [3, 4]],
      router: MergingRouter(ToldRouter(dropped: [2]), rule: rule))
    let held = try cache.read(layer: 0, head: 0)
    expectClose(held.values, [1.768181, 2.152271, 2, 2])
    #expect(held.keys == [1, 0, 0, 1])
  }

  @Test func movingThreshold() throws {
    let keys: [[Float]] = [[1, 0], [0, 1], [0.8, 0.6], [0.6, 0.8], [-1, 0]]
    let values: [[Float]] = [[1, 1], [2, 2], [10, 0], [0, 10], [9, 9]]
    func merged(_ update: MergeRule.Update, _ weights: MergeRule.Weights) throws -> HeadContents {
      let rule = MergeRule(
        gate: .movingAverage(old: 0.5, new: 0.5, averaged: true), update: update, weights: weights, key: .average,
        logCount: false)
      let cache = try toldCache(
        keys, values, router: MergingRouter(ToldRouter(dropped: [2, 3, 4]), rule: rule), kept: 2)
      expectClose(cache.layers[0].routerMemory, [1.6 / 3])
      return try cache.read(layer: 0, head: 0)
    }
    let official = try merged(.damped, .cosine)
    expectClose(official.keys, [0.82, 0.24, 0.24, 0.82])
    expectClose(official.values, [4.5, 0.5, 1, 5])
    let paper = try merged(.weighted, .exponential)
    expectClose(paper.keys, [0.909967, 0.270100, 0.270100, 0.909967])
    expectClose(paper.values, [5.051494, 0.549834, 1.099668, 5.601328])
  }

  /// The cluster means of Chelsea's example: counts as weights, and log 2.
  @Test func clusterMeans() throws {
    let keys: [[Float]] = [[1, 0], [0.96, 0.28], [0, 1], [0.6, 0.8]]
    let values: [[Float]] = [[1, 0], [3, 0], [0, 1], [0, 5]]
    let whole = try toldCache(keys, values, router: TopKRouter(), kept: 4)
    expectClose(try look(whole, [1, 1]), [1.010639, 1.775980])
    for (bias, expected) in [(false, [0.623043, 2.337212]), (true, [0.950107, 1.782062])] as [(Bool, [Float])] {
      let rule = MergeRule(targets: .nearestPosition, gate: .open, update: .counts, key: .average, logCount: bias)
      let cache = try toldCache(keys, values, router: MergingRouter(ToldRouter(dropped: [0]), rule: rule))
      let held = try cache.read(layer: 0, head: 0)
      expectClose(Array(held.keys[..<2]), [0.98, 0.14])
      expectClose(Array(held.values[..<2]), [2, 0])
      expectClose(try look(cache, [1, 1]), expected)
    }
  }

  /// Elastic Cache's oracle: nearest anchor, of two the earlier, means.
  @Test func nearestAnchors() throws {
    // Sinks and the last token receive nothing there; here they are left out of the rows.
    let keys = (1...6).map { [Float($0), 1] }
    let values = (1...6).map { [Float(10 * $0)] }
    let rule = MergeRule(targets: .nearestPosition, gate: .open, update: .mean, key: .average, logCount: false)
    let cache = try toldCache(keys, values, router: MergingRouter(ToldRouter(dropped: [1, 3, 5]), rule: rule), kept: 3)
    #expect(try cache.read(layer: 0, head: 0).values == [15, 35, 55])
  }

  /// LOOK-M's pivot: (x + Σ (x + y) / 2) / (1 + n).
  @Test func pivots() throws {
    let rule = MergeRule(gate: .open, update: .pivot, key: .average, logCount: false)
    let cache = try toldCache(
      [[2, 0], [4, 0], [6, 0]], [[1], [2], [6]], router: MergingRouter(ToldRouter(dropped: [1, 2]), rule: rule), kept: 1
    )
    let held = try cache.read(layer: 0, head: 0)
    expectClose(held.keys, [(2 + 3 + 4) / 3.0, 0])
    expectClose(held.values, [(1 + 1.5 + 3.5) / 3.0])
  }

  // MARK: CaM

  private func prominence(_ prominence: Prominence) throws -> [Float] {
    let rule = MergeRule(
      targets: .next(4), gate: .open, update: .add, weights: .prominence(prominence), logCount: false)
    let cache = try toldCache(
      (0..<5).map { [Float($0)] }, [[10], [0], [0], [0], [0]],
      router: MergingRouter(ToldRouter(dropped: [0]), rule: rule), attention: [0.05, 0.1, 0.15, 0.2, 0.5])
    return try cache.read(layer: 0, head: 0).values
  }

  @Test func prominentTokensLeaveTheirValues() throws {
    let mean = 0.05 / 0.2375
    expectClose(
      try prominence(Prominence(attention: .accumulated)), Array(repeating: Float(2.5 * mean), count: 4))
    expectClose(
      try prominence(Prominence(attention: .accumulated, reference: .later)),
      Array(repeating: Float(2.5 * mean), count: 4))
    expectClose(
      try prominence(Prominence(attention: .accumulated, reference: .largest)),
      Array(repeating: 0.25, count: 4))
    // Over seeds the draws have the mean of the expectation; n draws of p scatter by sqrt(p (1 - p) / n).
    var drawn = 0
    for seed in 0..<400 {
      let values = try prominence(Prominence(attention: .accumulated, mode: .random(seed: UInt64(seed))))
      #expect(values == [0, 0, 0, 0] || values == [2.5, 2.5, 2.5, 2.5])
      if values[0] > 0 { drawn += 1 }
    }
    #expect(abs(Double(drawn) / 400 - mean) < 4 * (mean * (1 - mean) / 400).squareRoot())
  }

  @Test func probabilitiesWithoutAttention() {
    let prominence = Prominence(attention: .accumulated)
    #expect(prominence.probability(0, 0) == 0)
    #expect(prominence.probability(0.1, 0) == 1)
    #expect(prominence.probability(0.2, 0.1) == 1)
    #expect(prominence.probability(0.05, 0.1) == 0.5)
  }

  /// Near the end fewer rows follow; the value is divided by those there are. Without any it is dropped.
  @Test func followersBeyondTheEnd() throws {
    let rule = MergeRule(
      targets: .next(4), gate: .open, update: .add, weights: .prominence(Prominence(attention: .accumulated)),
      logCount: false)
    let cache = try toldCache(
      (0..<5).map { [Float($0)] }, [[0], [0], [6], [0], [8]],
      router: MergingRouter(ToldRouter(dropped: [2, 4]), rule: rule), kept: 3, attention: [1, 1, 1, 1, 1])
    #expect(try cache.read(layer: 0, head: 0).values == [0, 0, 6])
  }
}
