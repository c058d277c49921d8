import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// ZipCache: normalised saliency, probes, streaming.
@Suite struct ZipCacheTests {
  private static let shape = Geometry(4, 2, 40, 24).shape()
  private static let dense: [Store] = [.dense(.f32), .dense(.f32)]

  /// Attention of one query head over `rows` tokens in f64: [query][row].
  private static func attention(_ traffic: Traffic, _ queryHead: Int, _ kvHead: Int, tokens: Int) -> [[Double]] {
    (0..<tokens).map { token in
      let q = traffic.query(0, queryHead, token)
      let logits = (0...token).map { row in
        zip(q, traffic.key(0, kvHead, row)).reduce(0.0) { $0 + Double($1.0) * Double($1.1) } / 40.0.squareRoot()
      }
      let top = logits.max() ?? 0
      let weights = logits.map { exponential($0 - top) }
      let sum = weights.reduce(0, +)
      return weights.map { $0 / sum } + Array(repeating: 0, count: tokens - token - 1)
    }
  }

  private static func exponential(_ x: Double) -> Double {
    // Enough terms for the range of these logits.
    var (sum, term, n) = (1.0, 1.0, 1.0)
    let y = x / 64
    while abs(term) > 1e-18 {
      term *= y / n
      sum += term
      n += 1
    }
    var result = sum
    for _ in 0..<6 { result *= result }
    return result
  }

  /// The spec's example: sums favour token 2, saliency token 3.
  @Test func normalisedAttention() {
    let rows: [[Double]] = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.2, 0.3, 0], [0.3, 0.1, 0.1, 0.5]]
    let sums = (0..<4).map { i in rows.reduce(0) { $0 + $1[i] } }
    let normalised = (0..<4).map { sums[$0] / Double(4 - $0) }
    #expect(zip(sums, [2.4, 0.7, 0.4, 0.5]).allSatisfy { abs($0 - $1) < 1e-12 })
    #expect(zip(normalised, [0.6, 0.7 / 3, 0.2, 0.5]).allSatisfy { abs($0 - $1) < 1e-12 })
    #expect(sums[3] < sums[1] && normalised[3] > normalised[1])
  }

  /// That example through the cache: keys of four tokens whose attention is the matrix's, one query head.
  @Test func exampleThroughTheCache() throws {
    // Logits ln A of orthogonal queries: key i is channel i, query t holds sqrt(d) ln A[t][i].
    let table: [[Float]] = [[1], [0.6, 0.4], [0.5, 0.2, 0.3], [0.3, 0.1, 0.1, 0.5]]
    var (keys, queries) = ([Float](), [Float]())
    for (t, row) in table.enumerated() {
      keys += (0..<4).map { $0 == t ? 1 : 0 }
      queries += (0..<4).map { $0 < row.count ? 2 * log(row[$0]) : 0 }
    }
    for strategy in [ProbeQueries.Strategy.all, .recent] {
      let policy = Policy(
        try .zipCache(salient: 0.5, probes: ProbeQueries(strategy, share: 1)), tiers: Self.dense)
      let cache = try KVCache(policy, queryHeads: 1, kvHeads: 1, dim: 4)
      let k = try HeadTensor(heads: 1, tokens: 4, dim: 4, elements: keys)
      try cache.append(k, k)
      _ = try cache.attend(HeadTensor(heads: 1, tokens: 4, dim: 4, elements: queries))
      let scores = try cache.scores()[0]
      #expect(zip(scores, [0.6, 0.7 / 3, 0.2, 0.5]).allSatisfy { abs($0 - Float($1)) < 1e-5 }, "\(scores)")
      try cache.finishPrefill()
      #expect(TierShareTests.tiers(cache) == [[[0, 3], [1, 2]]])
    }
  }

  /// Equal keys see uniform attention: the normaliser takes 1/(l - i) · Σ 1/(k + 1), k from i, which still falls with i.
  @Test func uniformAttention() throws {
    let tokens = 50
    let policy = Policy(try .zipCache(probes: ProbeQueries(.all, share: 1)), tiers: Self.dense)
    let cache = try KVCache(policy, queryHeads: 2, kvHeads: 1, dim: 4)
    let rows = try HeadTensor(
      heads: 1, tokens: tokens, dim: 4, elements: Array(repeating: 0.5, count: tokens * 4))
    try cache.append(rows, rows)
    _ = try cache.attend(normalTensor(2, tokens, 4, seed: 1))
    let scores = try cache.scores()[0]
    for (i, score) in scores.enumerated() {
      let sum = (i..<tokens).reduce(0.0) { $0 + 1 / Double($1 + 1) }
      // Two query heads share the row.
      let wanted = 2 * sum / Double(tokens - i)
      #expect(abs(Double(score) / wanted - 1) < 1e-5, "token \(i): \(score) instead of \(wanted)")
      if i > 0 { #expect(score < scores[i - 1]) }
    }
  }

  private func log(_ x: Float) -> Float { Float(_log(Double(x))) }
  private func _log(_ x: Double) -> Double {
    var y = 0.0
    for _ in 0..<60 { y += 2 * (x - Self.exponential(y)) / (x + Self.exponential(y)) }
    return y
  }

  /// Saliency by every strategy and normaliser, over chunks, against a full attention matrix.
  @Test(arguments: ProbeQueries.Strategy.allCases)
  func strategies(strategy: ProbeQueries.Strategy) throws {
    let tokens = 90
    let traffic = Traffic(Self.shape, tokens: tokens, seed: 6)
    let marked = [3, 17, 40, 41, 77]
    let probes = ProbeQueries(strategy, share: 0.3, seed: 5)
    let chosen = probes.choose(of: 0..<tokens, from: Array(0..<tokens), marked: Set(marked))
    withEvery("normaliser", in: Selection.SaliencyNormaliser.allCases) { normaliser in
      withEvery("chunk", in: [90, 7, 32]) { chunk in
        let policy = Policy(try .zipCache(probes: probes, normaliser: normaliser), tiers: Self.dense)
        let cache = try KVCache(shape: Self.shape, policy: policy, backend: .cpu(threads: 1))
        if strategy == .special { cache.markProbes(marked) }
        for start in stride(from: 0, to: tokens, by: chunk) {
          try traffic.step(cache, start..<min(start + chunk, tokens))
          check(cache.bytes.total == cache.backend.memory.liveBytes, "bytes")
        }
        let scores = try cache.scores()
        for head in 0..<2 {
          var sums = [Double](repeating: 0, count: tokens)
          for member in 0..<2 {
            let matrix = Self.attention(traffic, head * 2 + member, head, tokens: tokens)
            for probe in chosen { for row in 0..<tokens { sums[row] += matrix[probe][row] } }
          }
          for row in 0..<tokens {
            let seen = normaliser == .causal ? tokens - row : chosen.filter { $0 >= row }.count
            let expected = seen == 0 ? 0 : sums[row] / Double(seen)
            guard check(abs(Double(scores[head][row]) - expected) < 1e-5 * max(1, expected), "row \(row)") else {
              return
            }
          }
        }
      }
    }
  }

  /// The numbers of probes are ZipCache's; the draw is the seed's; short prompts have one.
  @Test func draws() {
    for tokens in [1, 2, 19, 20, 40, 100, 288, 1000] {
      let all = Array(0..<tokens)
      let mixed = ProbeQueries(seed: 1).choose(of: 0..<tokens, from: all, marked: [])
      let newest = tokens - Int(0.95 * Double(tokens) + 1e-9)
      #expect(mixed.count == max(1, newest + tokens / 20))
      #expect(Array(mixed.suffix(newest)) == Array(all.suffix(newest)))
      #expect(mixed == mixed.sorted() && Set(mixed).count == mixed.count)
      #expect(ProbeQueries(.random).choose(of: 0..<tokens, from: all, marked: []).count == max(1, tokens / 10))
      #expect(ProbeQueries(.all).choose(of: 0..<tokens, from: all, marked: []) == all)
      #expect(ProbeQueries(.special).choose(of: 0..<tokens, from: all, marked: [tokens - 1]) == [tokens - 1])
    }
    let (one, two) = (ProbeQueries(seed: 1), ProbeQueries(seed: 2))
    let all = Array(0..<1000)
    #expect(one.choose(of: 0..<1000, from: all, marked: []) != two.choose(of: 0..<1000, from: all, marked: []))
    // What is kept of a long prompt, chunk by chunk, holds the draw.
    for seed: UInt64 in 0..<20 {
      let probes = ProbeQueries(seed: seed)
      var kept: [Int] = []
      for start in stride(from: 0, to: 6000, by: 500) {
        let range = 0..<start + 500
        kept = kept.filter { probes.mayBecome($0, of: range, marked: []) }
        kept += (start..<start + 500).filter { probes.mayBecome($0, of: range, marked: []) }
      }
      #expect(
        probes.choose(of: 0..<6000, from: kept, marked: [])
          == probes.choose(of: 0..<6000, from: Array(0..<6000), marked: []))
      #expect(kept.count < 1500)
    }
  }

  /// New tokens wait dense, are ranked among themselves, and encoded once: old codes stay.
  @Test func streaming() throws {
    let traffic = Traffic(Self.shape, tokens: 400, seed: 8)
    withEvery(
      "text", in: ["zipcache(every=50)", "zipcache(every=50,streaming=last)", "zipcache(every=50,strategy=all)"]
    ) {
      let backend = try Backend.cpu(threads: 1)
      let cache = try makeCache($0, Self.shape, backend: backend)
      try traffic.run(cache, prompt: 200, chunk: 64)
      check(TierShareTests.tiers(cache).allSatisfy { $0.map(\.count) == [120, 80] }, "classes of the prompt")
      var old = try cache.read(layer: 0, head: 1).keys
      for token in 200..<400 {
        try traffic.checkedStep(cache, 0, token..<token + 1)
        check(cache.bytes.total == backend.memory.liveBytes, "bytes")
        let now = try cache.read(layer: 0, head: 1)
        check(now.positions == Array(0...token), "rows at \(token)")
        if (token - 199) % 50 == 0 {
          let low = 80 + (token - 199) / 50 * 20
          check(TierShareTests.tiers(cache).allSatisfy { $0.map(\.count) == [token + 1 - low, low] }, "at \(token)")
          // Encoded by now, and the codes of earlier batches as they were.
          checkSame(Array(now.keys[..<old.count]), old, "old keys at \(token)")
          for tier in cache.layers[0].segments {
            let rows = (tier as! RowSegment).heads[1]
            check(rows.keys.tailRows == 0 && rows.values.tailRows == 0, "rows wait at \(token)")
          }
          old = now.keys
        }
      }
    }
  }

  /// Forks and saved caches draw the same probes; chunks do not matter.
  @Test func forkAndSave() throws {
    let traffic = Traffic(Self.shape, tokens: 260, seed: 9)
    let policy = try PolicyRegistry.standard.policy("zipcache(every=30)")
    func start() throws -> KVCache { try KVCache(shape: Self.shape, policy: policy, backend: .cpu(threads: 1)) }
    let whole = try start()
    try traffic.run(whole, prompt: 150, decoded: 110)
    let pieces = try start()
    try traffic.step(pieces, 0..<70)
    let fork = pieces.fork()
    let loaded = try KVCache.load(
      saved: pieces.saved(), policy: policy, shape: Self.shape, backend: .cpu(threads: 1))
    for cache in [pieces, fork, loaded] {
      try traffic.step(cache, 70..<149)
      try traffic.step(cache, 149..<150)
      try cache.finishPrefill()
      for token in 150..<170 { try traffic.step(cache, token..<token + 1) }
      let again = try KVCache.load(
        saved: cache.saved(), policy: policy, shape: Self.shape, backend: .cpu(threads: 1))
      for token in 170..<260 { try traffic.step(again, token..<token + 1) }
      #expect(TierShareTests.tiers(again) == TierShareTests.tiers(whole))
    }
  }

  /// Choosing after every chunk, and again when the prompt ends without a new token.
  @Test func chunks() throws {
    let made = try PolicyRegistry.standard.policy("zipcache+f32+f16")
    let policy = Policy(
      made.selection.scheduled(Schedule(afterPrefillChunks: true, decodeInterval: 3)), tiers: made.tiers)
    let traffic = Traffic(Self.shape, tokens: 60)
    let cache = try KVCache(shape: Self.shape, policy: policy, backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 50, decoded: 10, chunk: 20)
    #expect(try cache.rows(layer: 0, head: 1) == Array(0..<60))
  }

  /// What is missing is said.
  @Test func missingInputs() throws {
    let traffic = Traffic(Self.shape, tokens: 60)
    expectError(.missingInput, "queries") {
      _ = try KVCache(
        shape: Self.shape, policy: PolicyRegistry.standard.policy("zipcache"), backend: .cpu(threads: 1),
        inputs: .attendYourself)
    }
    // Queries of a part of the prompt are not enough.
    let cache = try makeCache("zipcache", Self.shape, inputs: .queries)
    try traffic.append(cache, 0, 0..<30)
    try traffic.append(cache, 0, 30..<60)
    try traffic.observe(cache, 0, 30..<60)
    let before = try Snapshot(cache)
    expectError(.missingInput, "0..<60", layer: 0) { try cache.finishPrefill() }
    #expect(try Snapshot(cache) == before)
    let special = try makeCache("zipcache(strategy=special)", Self.shape)
    try traffic.step(special, 0..<60)
    expectError(.missingInput, "markProbes", layer: 0) { try special.finishPrefill() }
    expectError(.irreversible, layer: 0) { try special.trim(to: 30) }
  }

  /// Payload of the classes, per spec: 0.6 · 4 + 0.4 · 2 = 3.2 bits an element, and numbers per channel and token.
  @Test func bytesAreTheFormula() throws {
    let shape = ModelShape(layerCount: 1, queryHeads: 8, kvHeads: 2, headDim: 128)
    let traffic = Traffic(shape, tokens: 1000)
    let cache = try makeCache("zipcache", shape)
    try traffic.run(cache, prompt: 1000)
    let (high, low, dim) = (600, 400, 128)
    #expect(cache.bytes.payload == 2 * 2 * dim * (high * 4 + low * 2) / 8)
    // Keys: step and minimum per channel and class. Values: a factor per channel and store, step and minimum per token.
    let numbers = 2 * 2 * dim + 2 * dim + 2 * (high + low)
    #expect(cache.bytes.metadata == 2 * 2 * numbers)
    #expect(cache.bytes.index == 2 * 4 * 1000)
  }
}
