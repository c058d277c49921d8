import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Keys that are turned so that survivors are neighbours, against keys rotated anew at the new positions.
@Suite struct RerotationTests {
  /// A sequence whose keys are known before their rotation.
  struct Sequence {
    let rotary: RotaryEmbedding
    let bare: HeadTensor
    let keys: HeadTensor
    let values: HeadTensor
    let queries: HeadTensor

    init(heads: Int, group: Int, tokens: Int, rotary: RotaryEmbedding, scale: Float = 1, seed: UInt64 = 1) throws {
      let dim = rotary.headDim
      self.rotary = rotary
      bare = try HeadTensor(
        heads: heads, tokens: tokens, dim: dim,
        elements: normalTensor(heads, tokens, dim, seed: seed).elements.map { $0 * scale })
      keys = try Sequence.rotated(bare, rotary)
      values = try normalTensor(heads, tokens, dim, seed: seed + 1)
      queries = try Sequence.rotated(normalTensor(heads * group, tokens, dim, seed: seed + 2), rotary)
    }

    static func rotated(_ rows: HeadTensor, _ rotary: RotaryEmbedding) throws -> HeadTensor {
      var elements = rows.elements
      let positions = (0..<rows.heads).flatMap { _ in (0..<rows.tokens).map { Int32($0) } }
      var span = elements.mutableSpan
      try rotary.rotate(&span, stride: rows.dim, positions: positions.span)
      return try HeadTensor(heads: rows.heads, tokens: rows.tokens, dim: rows.dim, elements: elements)
    }

    func feed(_ cache: KVCache, _ range: Range<Int>) throws -> [Float] {
      try cache.append(keys.slice(tokens: range), values.slice(tokens: range))
      return try cache.attend(queries.slice(tokens: range))
    }

    /// What the cache must hold: every key of a row rotated anew, the newest row at the newest position.
    func check(
      _ cache: KVCache, tolerance: Float, forked: Bool = false, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
      let dim = rotary.headDim
      for head in 0..<keys.heads {
        let held = try cache.read(layer: 0, head: head)
        let first = cache.tokensSeen(layer: 0) - held.positions.count
        for (row, position) in held.positions.enumerated() {
          var expected = Array(
            bare.elements[(head * bare.tokens + position) * dim..<(head * bare.tokens + position + 1) * dim])
          var span = expected.mutableSpan
          try rotary.rotate(&span, position: first + row)
          let own = held.keys[row * dim..<(row + 1) * dim]
          let worst = zip(own, expected).map { abs($0 - $1) }.max() ?? 0
          #expect(worst <= tolerance, "head \(head), row \(row) of token \(position)", sourceLocation: sourceLocation)
        }
      }
      if forked { return }
      #expect(cache.bytes.total == cache.backend.memory.liveBytes, sourceLocation: sourceLocation)
    }
  }

  static let embeddings: [(Int, Int?, RotaryEmbedding.Layout)] = [
    (64, nil, .halfSplit), (40, 32, .halfSplit), (40, nil, .interleaved), (8, 2, .interleaved),
  ]

  static let policies = [
    "snapkv(budget=0.4,window=5)+positions", "streaming(sinks=3,recent=12,positions=rerotate)",
    "h2o(budget=20)+positions", "tova(budget=20)+positions", "snapkv(budget=20,window=4)+adakv+positions",
    "knorm(budget=20)+schedule(chunks=true,every=3)+positions", "lagkv(budget=0.5,lag=6)+positions",
    "random(budget=0.3,every=5)+positions(policy=rerotate)",
  ]

  /// A prompt in chunks, decoding, another turn and a fork: after every step keys are what recomputation gives.
  @Test(arguments: policies, embeddings.indices)
  func recomputation(text: String, embedding: Int) throws {
    let (dim, rotaryDim, layout) = Self.embeddings[embedding]
    let rotary = try RotaryEmbedding(
      headDim: dim, rotaryDim: rotaryDim, theta: 500, layout: layout, angleProduct: .f64)
    let sequence = try Sequence(heads: 2, group: embedding + 1, tokens: 110, rotary: rotary)
    let policy = try PolicyRegistry.standard.policy(text + "+f32")
    #expect(policy.positions == .rerotate)
    let cache = try KVCache(policy, queryHeads: 2 * (embedding + 1), kvHeads: 2, dim: dim, rotary: rotary)
    for start in [0, 17, 34] { _ = try sequence.feed(cache, start..<start + 17) }
    try cache.finishPrefill()
    try sequence.check(cache, tolerance: 2e-5)
    for token in 51..<70 {
      _ = try sequence.feed(cache, token..<token + 1)
      try sequence.check(cache, tolerance: 2e-5)
    }
    let fork = cache.fork()
    let before = try cache.read(layer: 0, head: 1)
    fork.beginPrefill()
    _ = try sequence.feed(fork, 70..<100)
    try fork.finishPrefill()
    try sequence.check(fork, tolerance: 4e-5, forked: true)
    #expect(KVCache.bytes(of: [cache, fork]).total == cache.backend.memory.liveBytes)
    #expect(try cache.read(layer: 0, head: 1) == before, "a fork turns copies")
    let restored = try KVCache.load(saved: try fork.saved(), backend: .cpu(threads: 2))
    for token in 100..<110 {
      #expect(try sequence.feed(fork, token..<token + 1) == sequence.feed(restored, token..<token + 1))
      #expect(try fork.read(layer: 0, head: 0) == restored.read(layer: 0, head: 0))
    }
    try sequence.check(fork, tolerance: 4e-5, forked: true)
  }

  /// Turned keys see what turned queries see.
  @Test(arguments: ["streaming(sinks=4,recent=9,positions=POLICY)", "h2o(budget=14)+positions(policy=POLICY)"])
  func asWithSlots(text: String) throws {
    let rotary = try RotaryEmbedding(headDim: 32, theta: 10_000, angleProduct: .f64)
    let sequence = try Sequence(heads: 2, group: 2, tokens: 90, rotary: rotary)
    let caches = try ["slot", "rerotate"].map { name in
      try KVCache(
        PolicyRegistry.standard.policy(text.replacing("POLICY", with: name) + "+f32"), queryHeads: 4, kvHeads: 2,
        dim: 32, rotary: rotary)
    }
    for cache in caches {
      _ = try sequence.feed(cache, 0..<40)
      try cache.finishPrefill()
    }
    for token in 40..<90 {
      let outputs = try caches.map { try sequence.feed($0, token..<token + 1) }
      #expect(zip(outputs[0], outputs[1]).allSatisfy { abs($0 - $1) < 1e-4 }, "token \(token)")
      #expect(try caches[0].positions() == caches[1].positions())
    }
  }

  /// Rounding of 16 bits is one per move.
  @Test(arguments: ["f16", "bf16"])
  func halfPrecision(store: String) throws {
    let rotary = try RotaryEmbedding(headDim: 64, theta: 10_000, angleProduct: .f64)
    let sequence = try Sequence(heads: 1, group: 2, tokens: 64, rotary: rotary)
    let cache = try KVCache(
      PolicyRegistry.standard.policy("knorm(budget=0.5)+positions+" + store), queryHeads: 2, kvHeads: 1, dim: 64,
      rotary: rotary)
    _ = try sequence.feed(cache, 0..<64)
    try cache.finishPrefill()
    try sequence.check(cache, tolerance: store == "f16" ? 4e-3 : 3.2e-2)
  }

  @Test(arguments: Goldens.names("kvpress.rerotation."))
  func golden(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let rotary = try RotaryEmbedding(
      headDim: input.keys.dim, theta: #require(Goldens.index.get().model["ropeTheta"]?.double))
    let ratio = try #require(run.entry.parameters?["compression_ratio"]?.double)
    let cache = try KVCache(
      Policy(.knorm(budget: .fraction(1 - ratio)).positioned(.rerotate), store: .dense(.f32)),
      queryHeads: input.queries.heads, kvHeads: input.keys.heads, dim: input.keys.dim, rotary: rotary)
    try cache.append(input.keys, input.values)
    try cache.finishPrefill()
    try run.expect("positions", positions: cache.positions())
    // Theirs are counted from 0, ours end at the newest token.
    var keys: [Float] = []
    for head in 0..<input.keys.heads {
      var own = try cache.read(layer: 0, head: head).keys
      let rows = own.count / input.keys.dim
      let from = (input.tokens - rows..<input.tokens).map { Int32($0) }
      let to = (0..<rows).map { Int32($0) }
      var span = own.mutableSpan
      try rotary.move(&span, stride: input.keys.dim, from: from.span, to: to.span)
      keys += own
    }
    try run.expect("keys", keys)
    run.finish()
  }

  // MARK: What cannot be

  private func make(_ text: String, rotary: Bool = true) throws -> KVCache {
    try KVCache(
      PolicyRegistry.standard.policy(text), queryHeads: 2, kvHeads: 2, dim: 32,
      rotary: rotary ? RotaryEmbedding(headDim: 32, angleProduct: .f64) : nil)
  }

  @Test func refused() throws {
    expectError(.missingInput, "give ModelShape the rotary embedding") {
      _ = try make("knorm+positions", rotary: false)
    }
    expectError(.unsupported, "again and again, which kivi") { _ = try make("h2o(budget=20)+positions+kivi(bits=4)") }
    expectError(.unsupported, "again and again") { _ = try make("knorm+schedule(chunks=true)+positions+int8") }
    expectError(.unsupported, "one tier") { _ = try make("knorm+tiers(shares=[0.5,0.5])+positions+f16+f16") }
    expectError(.unsupported, "not merged") { _ = try make("h2o(budget=20)+merge+positions+f16") }
    expectError(.unsupported, "after the prompt, which svd") { _ = try make("knorm+positions+svd(rank_k=0.5)") }
    _ = try make("knorm+positions(policy=keep)+kivi", rotary: false)
  }

  /// Rows of a first prompt are encoded when the second would turn them: said, and nothing changed.
  @Test func encodedKeys() throws {
    let cache = try make("knorm(budget=0.5)+positions+kivi(bits=4,residual=32)")
    let rotary = try #require(cache.shape.rotary)
    let sequence = try Sequence(heads: 2, group: 1, tokens: 160, rotary: rotary)
    _ = try sequence.feed(cache, 0..<120)
    try cache.finishPrefill()
    // Four bits of keys turned before they were encoded.
    try sequence.check(cache, tolerance: 0.6)
    cache.beginPrefill()
    _ = try sequence.feed(cache, 120..<160)
    let before = try cache.read(layer: 0, head: 0)
    let error = expectError(.unsupported, "encoded", layer: 0, head: 0, position: before.positions[0]) {
      try cache.finishPrefill()
    }
    #expect(error != nil)
    #expect(try cache.read(layer: 0, head: 0) == before)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// A pair of channels at the edge of f16 cannot be turned by an eighth of a circle.
  @Test func beyondTheType() throws {
    let rotary = try RotaryEmbedding(headDim: 2, theta: 1, angleProduct: .f64)
    let policy = try PolicyRegistry.standard.policy("streaming(sinks=1,recent=2,positions=rerotate)+f16")
    let cache = try KVCache(policy, queryHeads: 1, kvHeads: 1, dim: 2, rotary: rotary)
    let keys = try HeadTensor(heads: 1, tokens: 4, dim: 2, elements: [60_000, -60_000, 1, 1, 1, 1, 1, 1])
    try cache.append(keys, keys)
    expectError(.unrepresentable, "±65504", layer: 0, head: 0, position: 0) { try cache.finishPrefill() }
    #expect(try cache.rows(layer: 0, head: 0) == [0, 1, 2, 3])
    #expect(try cache.read(layer: 0, head: 0).keys == keys.elements)
  }
}
