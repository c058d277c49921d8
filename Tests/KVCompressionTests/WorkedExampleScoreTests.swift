import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// The oracles of the specification for scores of keys and values, chunks and prefixes.
@Suite struct WorkedExampleScoreTests {
  static let keys: [Float] = [3, 4, 0, 1, 1, 0, 1, 1]
  static let values: [Float] = [1, 0, 2, 0, 0, 3, 1, 1]

  /// One head of two channels.
  private func cache(
    _ selection: Selection, keys: [Float] = keys, values: [Float] = values, queries: [Float]? = nil
  ) throws -> KVCache {
    let tokens = keys.count / 2
    let cache = try KVCache(Policy(selection, store: .dense(.f32)), queryHeads: 1, kvHeads: 1, dim: 2)
    try cache.append(
      HeadTensor(heads: 1, tokens: tokens, dim: 2, elements: keys),
      HeadTensor(heads: 1, tokens: tokens, dim: 2, elements: values))
    if let queries {
      try cache.observe(HeadTensor(heads: 1, tokens: queries.count / 2, dim: 2, elements: queries))
    }
    return cache
  }

  private func isClose(_ a: [Float], _ b: [Float], _ tolerance: Float = 6e-5) -> Bool {
    a.count == b.count && zip(a, b).allSatisfy { abs($0 - $1) <= tolerance }
  }

  @Test func knorm() throws {
    let cache = try cache(.knorm(budget: .tokens(2)))
    #expect(isClose(try cache.scores()[0], [-5, -1, -1, -1.4142]))
    try cache.finishPrefill()
    #expect(try cache.rows(layer: 0, head: 0) == [1, 2])
  }

  @Test func keyDiff() throws {
    let cache = try cache(.keyDiff(budget: .tokens(1)))
    #expect(isClose(try cache.scores()[0], [-0.9950, -0.7358, -0.6771, -0.9991]))
    try cache.finishPrefill()
    #expect(try cache.rows(layer: 0, head: 0) == [2], "the odd one out")
  }

  @Test func lagKV() throws {
    // Keys and values alike: their mean is the example's.
    let rows: [Float] = [0, 4, 2, 2, 1, 1, 3, 5]
    let crossed = try cache(.lagKV(budget: .tokens(4), sinks: 0, lag: 2, cross: true), keys: rows, values: rows)
    #expect(isClose(Array(try crossed.scores()[0][..<2]), [0.6698, 0.3302]))
    let ranked = try cache(.lagKV(budget: .tokens(3), sinks: 0, lag: 2), keys: rows, values: rows)
    #expect(try ranked.scores()[0] == [0.5, 0, 1, 1])
    try ranked.finishPrefill()
    #expect(try ranked.rows(layer: 0, head: 0) == [0, 2, 3])
    // Fewer rows than two partitions: the newest.
    let short = try cache(.lagKV(budget: .tokens(3), sinks: 0, lag: 3), keys: rows, values: rows)
    #expect(try short.scores()[0] == [0, 0.25, 0.5, 0.75])
  }

  /// A channel that does not vary in the next partition is no NaN.
  @Test func lagKVWithConstantChannels() throws {
    let rows: [Float] = [0, 4, 2, 2, 1, 5, 3, 5, 1, 5, 2, 5]
    let cache = try cache(.lagKV(budget: .tokens(4), sinks: 0, lag: 2), keys: rows, values: rows)
    #expect(try cache.scores()[0].allSatisfy(\.isFinite))
    try cache.finishPrefill()
    #expect(try cache.rows(layer: 0, head: 0).suffix(2) == [4, 5])
  }

  @Test func expectedAttention() throws {
    let selection = try Selection.expectedAttention(budget: .tokens(2), sinks: 0, valueLength: false, rotary: false)
    let captured = try cache(selection, queries: [1, 0, 1, 2, 1, 1])
    // The score times ‖v‖ is the worked example's last line.
    let weighted = try cache(
      .expectedAttention(budget: .tokens(2), sinks: 0, rotary: false), queries: [1, 0, 1, 2, 1, 1])
    #expect(isClose(try weighted.scores()[0], [0.9955, 0.0023, 0.0030, 0.0034], 6e-5))
    let given = try cache(
      .expectedAttention(
        budget: .tokens(2), sinks: 0, valueLength: false, rotary: false,
        statistics: QueryStatistics(layers: [0: .init(mean: [1, 1], covariance: [0, 0, 0, 2.0 / 3])])))
    #expect(isClose(try given.scores()[0], try captured.scores()[0], 1e-6))
  }

  /// Few queries (their deviations) and many (a Cholesky factor of the covariance) say the same.
  @Test func fewAndManyQueries() throws {
    let dim = 6
    var dice = Dice(4)
    let rows = dice.normals(9 * dim)
    let gram = Covariance.gram(rows, dim: dim)
    let factor = Covariance.factor(gram, dim: dim)
    for _ in 0..<20 {
      let key = dice.normals(dim)
      func quadratic(_ vectors: [Float]) -> Double {
        stride(from: 0, to: vectors.count, by: dim).reduce(0.0) { sum, start in
          let product = (0..<dim).reduce(0.0) { $0 + Double(vectors[start + $1]) * Double(key[$1]) }
          return sum + product * product
        }
      }
      #expect(abs(quadratic(rows) - quadratic(factor)) <= 1e-5 * quadratic(rows))
    }
    // A covariance of one direction has one factor.
    let single = Covariance.factor(Covariance.gram(Array(rows[..<dim]), dim: dim), dim: dim)
    let significant = stride(from: 0, to: single.count, by: dim).filter { start in
      single[start..<start + dim].contains { abs($0) > 1e-4 }
    }
    #expect(significant.count == 1)
  }

  /// The mean rotation of some positions is the mean of the rotated rows.
  @Test func meanRotation() throws {
    for layout in [RotaryEmbedding.Layout.halfSplit, .interleaved] {
      let rotary = try RotaryEmbedding(headDim: 10, rotaryDim: 6, theta: 100, layout: layout)
      var dice = Dice(9)
      let row = dice.normals(10)
      var mean = [Double](repeating: 0, count: 10)
      for position in 37..<61 {
        var turned = row
        var span = turned.mutableSpan
        try rotary.rotate(&span, position: position)
        _ = consume span
        for channel in 0..<10 { mean[channel] += Double(turned[channel]) / 24 }
      }
      var ours = row + row
      rotary.turn(&ours, byMeanOf: 37..<61)
      for channel in 0..<20 { #expect(abs(Double(ours[channel]) - mean[channel % 10]) < 1e-6) }
    }
  }

  // MARK: CriticalKV

  /// Scores .4 .3 .2 .1, value norms 1 1 1 5, two kept, one by its score: 0, then 3.
  @Test func critical() throws {
    struct Falling: Scorer {
      var inputs: RequiredInputs { .none }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        for row in 0..<4 { scores[0, row] = 0.4 - 0.1 * Float(row) }
      }
    }
    let base = Selection(
      spec: nil, scorer: Falling(), budget: .tokens(2), router: TopKRouter(), schedule: Schedule())
    let cache = try cache(base.critical(), values: [1, 0, 0, 1, -1, 0, 2, -3])
    try cache.finishPrefill()
    #expect(try cache.rows(layer: 0, head: 0) == [0, 3])
    let plain = try self.cache(base.critical(first: 1), values: [1, 0, 0, 1, -1, 0, 2, -3])
    try plain.finishPrefill()
    #expect(try plain.rows(layer: 0, head: 0) == [0, 1])
  }

  // MARK: Chunks

  /// Chunk means of two heads' sums, chunk length 2: .525, .19, .12.
  @Test func chunkMeans() throws {
    struct TwoHeads: Scorer {
      var inputs: RequiredInputs { .none }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        for head in 0..<2 { scores.set(head: head, WorkedExampleAllocationTests.twoHeads[head]) }
      }
    }
    func kept(_ budget: Int, whole: Bool, shared: Bool = true) throws -> [[Int]] {
      let selection = try Selection(
        spec: nil, scorer: TwoHeads(), budget: .tokens(budget), router: TopKRouter(), schedule: Schedule()
      ).chunks(length: 2, shared: shared, whole: whole)
      let cache = try KVCache(Policy(selection, store: .dense(.f32)), queryHeads: 2, kvHeads: 2, dim: 2)
      try cache.append(normalTensor(2, 6, 2, seed: 1), normalTensor(2, 6, 2, seed: 2))
      try cache.finishPrefill()
      return try cache.positions()
    }
    #expect(try kept(2, whole: true) == [[0, 1], [0, 1]])
    #expect(try kept(3, whole: true) == [[0, 1], [0, 1]])
    #expect(try kept(3, whole: false) == [[0, 1, 2], [0, 1, 2]])
    #expect(try kept(1, whole: true) == [[0, 1], [0, 1]], "at least one chunk")
    #expect(try kept(5, whole: false) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
  }

  // MARK: PrefixKV

  @Test func prefixDrops() throws {
    let layers: [[Double]] = [
      [0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.01, 0.01], [0.2, 0.15, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1],
    ]
    let curves = layers.map { PrefixAllocator.cumulative($0) }
    func drops(_ share: Double, _ protect: Int) -> [Int] {
      curves.map { PrefixAllocator.drop($0, share: share, protect: protect) }
    }
    #expect(drops(0.5, 0) == [7, 5])
    // Sums that hit a share exactly are decided by the last bit: the example is on one side with each.
    let hair = 1e-9
    #expect(drops(0.7 - hair, 0) == [6, 3])
    #expect(drops(0.8 - hair, 0)[0] == 5 && drops(0.8 + hair, 0)[1] == 1)
    #expect(drops(0.9 - hair, 0)[0] == 4 && drops(0.9 + hair, 0)[1] == 0)
    #expect(drops(0.5, 2) == [5, 3])
    #expect(drops(0.7 - hair, 2) == [4, 1])
    var last = Int.max
    for step in 0...100 {
      let sum = drops(Double(step) / 100, 1).reduce(0, +)
      #expect(sum <= last, "more share, fewer drops")
      last = sum
    }
  }

  /// n = 10, ratio .4: 6 kept, cut 3; then 7, 8, 8, 9, 9, 10, 11 rows.
  @Test func prefixGrowth() throws {
    let selection = try Selection.prefixKV(budget: .fraction(0.6), sinks: 1, keep: [0.6])
    let cache = try KVCache(
      Policy(selection, store: .dense(.f32)), queryHeads: 1, kvHeads: 1, dim: 2, inputs: .attentionWeights)
    try cache.append(normalTensor(1, 10, 2, seed: 1), normalTensor(1, 10, 2, seed: 2))
    try cache.observe(layer: 0, attention: [(0..<10).map { 10 - Float($0) }])
    try cache.finishPrefill()
    #expect(try cache.rows(layer: 0, head: 0) == [0, 1, 2, 3, 4, 9])
    #expect(FrozenPrefixRule().cut(kept: 6) == 3)
    var lengths: [Int] = []
    for step in 0..<7 {
      try cache.append(normalTensor(1, 1, 2, seed: 3), normalTensor(1, 1, 2, seed: 4))
      try cache.observe(layer: 0, attention: [[Float](repeating: 0.1, count: cache.rowsHeld(layer: 0, head: 0))])
      try cache.commit(layer: 0)
      lengths.append(cache.rowsHeld(layer: 0, head: 0))
      if step == 2 { #expect(try cache.rows(layer: 0, head: 0) == [0, 1, 2, 4, 9, 10, 11, 12]) }
    }
    #expect(lengths == [7, 8, 8, 9, 9, 10, 11])
  }

  // MARK: Random and tables of heads

  @Test func randomIsSeededAndStateless() throws {
    func kept(_ text: String, layers: Int = 1) throws -> [[[Int]]] {
      let shape = Geometry(2, 2, 8).shape(layers: layers)
      let traffic = Traffic(shape, tokens: 60)
      let cache = try makeCache(text + "+f32", shape)
      try traffic.run(cache, prompt: 60)
      return try positions(cache)
    }
    let one = try kept("random(budget=0.5,seed=1)", layers: 2)
    #expect(try one == kept("random(budget=0.5,seed=1)", layers: 2))
    #expect(try one != kept("random(budget=0.5,seed=2)", layers: 2))
    #expect(one[0][0] != one[0][1] && one[0][0] != one[1][0], "heads and layers draw by themselves")
    // What stays at a quarter stayed at a half.
    let quarter = try kept("random(budget=0.25,seed=1)", layers: 2)
    #expect(zip(quarter, one).allSatisfy { zip($0, $1).allSatisfy { Set($0).isSubset(of: $1) } })
  }

  @Test func tablesOfHeads() throws {
    let text = "# layers by heads\n0.9\t0.1 \n\n0.2, 1.0005\r\n0.5 0.5"
    let table = try HeadTable(parsing: text)
    #expect(table.scores == [[0.9, 0.1], [0.2, 1], [0.5, 0.5]])
    #expect(table.streaming(share: 0.5) == [[false, true], [true, false], [false, true]])
    #expect(table.streaming(share: 0).allSatisfy { !$0.contains(true) })
    #expect(table.streaming(share: 1).allSatisfy { !$0.contains(false) })
    #expect(table.streaming(below: 0.5) == [[false, true], [true, false], [false, false]])
    for bad in [
      "", "#", "0.1 0.2\n0.3", "0.1 x", "nan", "inf", "2", "-1", "0.1 1e999", "0x", String(repeating: "1", count: 80),
    ] {
      #expect(throws: KVError.self, "\(bad)") { try HeadTable(parsing: bad) }
    }
    #expect(throws: KVError.self) { try HeadTable(parsing: String(repeating: "0 ", count: 1 << 20)) }
    #expect(throws: KVError.self) { try HeadTable(parsing: String(repeating: "0 ", count: 5000)) }
    #expect(throws: KVError.self) { try HeadTable(contentsOf: "/nonexistent/heads.tsv") }
    #expect(throws: KVError.self) { try HeadTable(contentsOf: "/dev/zero") }
  }

  /// Streaming heads keep sinks and newest, the others everything or what the selection keeps; their bytes are free.
  @Test func streamingHeads() throws {
    let shape = Geometry(2, 2, 8).shape(layers: 2)
    let traffic = Traffic(shape, tokens: 80)
    let table = "table=[[1,0],[0,0.9]],sinks=2,recent=5"
    let cache = try makeCache("duoattention(\(table))+f32", shape)
    try traffic.run(cache, prompt: 60, decoded: 10)
    let streamed = [0, 1] + Array(65..<70)
    #expect(try positions(cache) == [[Array(0..<70), streamed], [streamed, Array(0..<70)]])

    let behind = try makeCache("snapkv(budget=20,window=4,kernel=1)+heads(\(table))+f32", shape)
    try traffic.run(behind, prompt: 60)
    #expect(behind.rowsHeld(layer: 0, head: 0) == 20)
    #expect(try behind.rows(layer: 0, head: 1) == [0, 1] + Array(55..<60))

    let text = behind.policy.spec.description
    #expect(try PolicyRegistry.standard.policy(text).spec.description == text)
    expectError(.missingInput, "table") { _ = try makeCache("duoattention", shape) }
    expectError(.shapeMismatch, "2 layers") { _ = try makeCache("duoattention(table=[[1,0]])", shape) }
    expectError(.shapeMismatch, "2 KV heads", layer: 0) { _ = try makeCache("duoattention(table=[[1],[0]])", shape) }
  }
}
