import KVCompression
import Testing

/// Keeps the tokens whose keys are shortest. arXiv 2406.11430.
///
/// Needs: keys and values only. Runs: after the prompt.
struct KeyNorm: Scorer {
  var inputs: RequiredInputs { .none }

  func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    let dim = layer.shape.keyDim
    for head in 0..<layer.kvHeads {
      let keys = layer.keys(head: head)
      for row in 0..<layer.rowCount(head: head) {
        scores[head, row] = -keys[row * dim..<(row + 1) * dim].reduce(0) { $0 + $1 * $1 }
      }
    }
  }
}

extension Selection {
  static func keyNorm(budget: Budget = .fraction(0.5), recent: Int = 32) throws(KVError) -> Selection {
    try BudgetSplit.validate(sinks: 0, window: recent, budget: budget)
    return Selection(
      spec: StageSpec(
        name: "keynorm", options: [SpecOption("budget", budget.specValue), SpecOption("recent", .integer(recent))]),
      scorer: KeyNorm(), budget: budget, router: TopKRouter(Protection(window: recent)), schedule: Schedule())
  }

  static let keyNormMethod = MethodDescription(
    name: "keynorm", role: .selection, summary: "the shortest keys, and a recent window", paper: "arXiv 2406.11430",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept in all"),
      .init("recent", "newest tokens that always stay"),
    ]
  ) { (reader) throws(KVError) in
    .selection(
      try .keyNorm(
        budget: reader.budget("budget", default: .fraction(0.5)),
        recent: reader.int("recent", default: 32, in: 0...1_048_576)))
  }
}

/// Shares the rows of a layer between its heads: the best rows stay, whichever head holds them. After Ada-KV.
struct AdaptiveHeads: Allocator {
  func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    requests.map { request in
      var kept = request.rows.map { min($0, request.protection.window) }
      var candidates: [(score: Float, head: Int)] = []
      for head in request.rows.indices {
        for row in 0..<request.rows[head] - kept[head] { candidates.append((request.scores[head, row], head)) }
      }
      candidates.sort { $0.score != $1.score ? $0.score > $1.score : $0.head < $1.head }
      let total = zip(request.rows, request.budget).reduce(0) { $0 + min($1.0, $1.1) }
      for winner in candidates.prefix(max(0, total - kept.reduce(0, +))) { kept[winner.head] += 1 }
      return kept
    }
  }
}

/// The code of "Write your own policy" and of the method pages.
@Suite struct PolicySnippets {
  let shape = ModelShape(layerCount: 2, queryHeads: 4, kvHeads: 2, headDim: 64)

  func numbers(_ count: Int, step: Int) -> [Float] {
    (0..<count).map { (index: Int) -> Float in
      let residue = (index * step + index / 64 * 11) % 101
      return Float(residue) / 101 - 0.5
    }
  }

  func fill(_ cache: KVCache, tokens: Int) throws {
    for layer in 0..<2 {
      let k = numbers(2 * tokens * 64, step: 37)
      let q = numbers(4 * tokens * 64, step: 53)
      var output = [Float](repeating: 0, count: 4 * tokens * 64)
      var span = output.mutableSpan
      var target = try MutableTensorView(&span, heads: 4, tokens: tokens, dim: 64)
      try cache.append(
        layer: layer, keys: TensorView(k.span, heads: 2, tokens: tokens, dim: 64),
        values: TensorView(k.span, heads: 2, tokens: tokens, dim: 64))
      try cache.attend(
        layer: layer, queries: TensorView(q.span, heads: 4, tokens: tokens, dim: 64), into: &target)
    }
  }

  @Test func ownScorer() throws {
    var registry = PolicyRegistry.standard
    registry.register(Selection.keyNormMethod)
    let policy = try registry.policy("keynorm(budget=0.25)+kivi(bits=4)")

    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    try fill(cache, tokens: 256)
    try cache.finishPrefill()
    #expect(cache.rowsHeld(layer: 1, head: 1) == 64)
    #expect(policy.spec.description.hasPrefix("keynorm(budget=0.25,recent=32)+kivi(bits=4"))
  }

  @Test func ownAllocator() throws {
    let chosen = try Selection.snapKV(budget: .fraction(0.25), window: 8)
    let adaptive = Selection(
      spec: nil, scorer: chosen.scorer, budget: chosen.budget, allocator: AdaptiveHeads(), router: chosen.router,
      schedule: chosen.schedule)
    let policy = Policy(adaptive, store: .dense(.f16))

    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    try fill(cache, tokens: 128)
    try cache.finishPrefill()
    #expect(cache.rowsHeld(layer: 0, head: 0) + cache.rowsHeld(layer: 0, head: 1) == 64)
  }

  @Test func ownStore() throws {
    let sixAndTwo = Store(
      spec: StageSpec(name: "channel8-token4"),
      keys: try .blocks(of: 64, window: .bf16, body: .affinePerChannel(bits: 8, group: 64, metadata: .bf16)),
      values: try .newest(64, window: .bf16, body: .affinePerToken(bits: 4, group: 64, metadata: .bf16)))
    let policy = Policy(try .h2o(budget: .tokens(128)), store: sixAndTwo)

    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    try fill(cache, tokens: 200)
    try cache.finishPrefill()
    #expect(cache.rowsHeld(layer: 0, head: 0) == 128)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  @Test func twoTiers() throws {
    let important = try Selection.h2o(budget: .fraction(0.2))
    let mixed = Selection(
      spec: nil, scorer: important.scorer, budget: important.budget,
      router: TopKRouter(important.router.protection, others: .tier(1)), schedule: important.schedule)
    let coarse = Store(
      spec: StageSpec(name: "coarse"),
      keys: try .newest(0, window: .f16, body: .affinePerToken(bits: 2, group: 32)),
      values: try .newest(0, window: .f16, body: .affinePerToken(bits: 2, group: 32)))
    let policy = Policy(mixed, tiers: [.dense(.f16), coarse])

    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    try fill(cache, tokens: 100)
    try cache.finishPrefill()
    #expect(cache.rowsHeld(layer: 0, head: 0) == 100)
  }

  @Test func methods() throws {
    let dense = Policy(store: .dense(.bf16))
    let streaming = Policy(try .streamingLLM(sinks: 4, recent: 1020, positions: .keep), store: .dense(.f16))
    let h2o = Policy(try .h2o(budget: .fraction(0.2), recentShare: 0.5, every: 1), store: .dense(.f16))
    let snapKV = Policy(try .snapKV(budget: .tokens(1024), window: 32, kernel: 7, pooling: .max), store: .dense(.f16))
    let kivi = Policy(store: try .kivi(keyBits: 4, valueBits: 2))
    let cst = Policy(store: try .cst(keyBits: 4, valueBits: 2))
    let low = Store(
      spec: StageSpec(name: "low"),
      keys: try .newest(0, window: .f16, body: .affinePerToken(bits: 2, group: 64)),
      values: try .newest(0, window: .f16, body: .affinePerToken(bits: 2, group: 64)))
    let balanced = Policy(store: try low.balanced())
    #expect(balanced.spec.description == "low+balanced")
    let rotated = Policy(store: try .kivi().rotated(keys: nil, values: .signs(seed: 7)))
    let name = Calibration.Name(layer: 0, side: .keys, quantity: "order")
    let orders = NamedCalibration(
      try Calibration([name: .init(shape: [1, 4], integers: [3, 1, 0, 2])]), source: "orders.safetensors")
    let rotateKV = Policy(
      try Selection.everything.tiers(shares: TierShares([0, 1]), sinks: 20),
      tiers: [.dense(.f16), try .rotateKV(keyBits: 4, valueBits: 2, calibration: orders)])
    #expect(rotateKV.spec.description.contains("checksum=xxh64-"))
    let both = Policy(try .snapKV(budget: .fraction(0.25)), store: try .kivi(keyBits: 2))
    let zipCache = Policy(
      try .zipCache(salient: 0.6, probes: ProbeQueries(.mixed, share: 0.1, seed: 7)),
      tiers: [try .cst(keyBits: 4), try .cst(keyBits: 2)])
    let miKV = Policy(
      try .miKV(important: 0.2), tiers: [.dense(.f16), try Store.perToken(keyBits: 2, group: 64).balanced()])
    let perToken = Policy(store: try .perToken(keyBits: 4, valueBits: 2, group: 64, window: 32))
    let mixed = Policy(
      try .h2o(budget: .fraction(1)).tiers(shares: TierShares([0.1, 0.3, 0.6])),
      tiers: [.dense(.f16), try .kivi(keyBits: 4), try .kivi(keyBits: 2)])
    let int8 = Policy(store: try .int8(values: ScaledSide(.int4, sharing: .token(group: 32)), metadata: .f16))
    let fp8 = Policy(store: try .fp8(keys: ScaledSide(.e5m2, sharing: .tensor(1))))
    let ggml = Policy(store: try .ggml(keys: .q8_0, values: .q4_0))
    let quant = Policy(store: try .quant(keys: .channel(bits: 4, group: 64), values: .ggml(.iq4_nl)))
    let edges = try Store.kivi(keyBits: 2).except(in: LayerChoice(first: 2, last: 2), .kivi(keyBits: 8))

    for policy in [
      dense, streaming, h2o, snapKV, kivi, cst, rotated, both, mixed, zipCache, miKV, perToken, int8, fp8,
      ggml, quant,
      Policy(store: edges),
    ] {
      #expect(try PolicyRegistry.standard.policy(policy.spec).spec == policy.spec)
    }
  }

  @Test func blocksOfAnEngine() throws {
    let shape = ModelShape(layerCount: 1, queryHeads: 4, kvHeads: 2, headDim: 64)
    // [token][head][2 blocks], all zero: scales of 0.
    let keyBlocks = [UInt8](repeating: 0, count: 5 * 2 * 2 * 34)
    let valueBlocks = [UInt8](repeating: 0, count: 5 * 2 * 2 * 18)
    let store = try Store.ggml(keys: .q8_0, values: .q4_0)
    let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu())
    try cache.append(
      layer: 0,
      keys: EncodedRows(keyBlocks.span, .ggml(.q8_0), heads: 2, tokens: 5, dim: 64, layout: .tokenMajor),
      values: EncodedRows(valueBlocks.span, .ggml(.q4_0), heads: 2, tokens: 5, dim: 64, layout: .tokenMajor))
    let held = try cache.encodedRows(layer: 0, head: 1)
    #expect(held.keys == Array(keyBlocks[..<(5 * 2 * 34)]) && held.positions == [0, 1, 2, 3, 4])
  }

  @Test func texts() throws {
    let registry = PolicyRegistry.standard
    let policy = try registry.policy("snapkv(budget=25%)+kivi(bits=4)")
    let same = try registry.policy(
      #"{"stages":[{"name":"snapkv","options":{"budget":0.25}},{"name":"kivi","options":{"bits":4}}]}"#)
    print(policy.spec)  // every option with its value

    #expect(policy.spec == same.spec)

    do {
      _ = try registry.policy("snapkw(budget=2048)")
    } catch {
      print(error)  // unknown name at byte 0: no method is called "snapkw"; did you mean "snapkv"? …
    }

    #expect(throws: KVError.self) { try registry.policy("snapkw(budget=2048)") }
  }

  @Test func saveAndLoad() throws {
    let policy = try PolicyRegistry.standard.policy("kivi(bits=2)")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    try fill(cache, tokens: 150)
    try cache.finishPrefill()

    let bytes = try cache.saved()  // or save(to: path)
    let description = try KVCache.savedDescription(of: bytes)
    print(description.policy, description.tokensSeen)
    let restored = try KVCache.load(saved: bytes, backend: .cpu())

    #expect(restored.bytes.total == cache.bytes.total)
    #expect(restored.tokensSeen(layer: 0) == 150)
  }
}
