import KVCompression
import KVCore
import Testing

/// Tensors an engine must not hand over: each gives the right error at the right place, and nothing has changed.
@Suite struct BadTensorTests {
  static let geometry = Geometry(4, 2, 40, 24)
  static let policies = [
    "f32", "f16", "bf16", "kivi(residual=32)", "h2o(budget=20)+f32", "snapkv(budget=20,window=4,every=2)+f16",
    "streaming(sinks=2,recent=20,positions=keep)+kivi(residual=32)",
  ]

  /// Runs bad calls on a cache in mid-life and compares it with a twin that never saw them.
  func unchanged(
    _ text: String, layers: Int = 2, inPrompt: Bool = false, sourceLocation: SourceLocation = #_sourceLocation,
    _ body: (KVCache, Traffic) throws -> Void
  ) throws {
    let backend = try Backend.cpu(threads: 1)
    let traffic = Traffic(Self.geometry.shape(layers: layers), tokens: 120)
    let cache = try makeCache(text, traffic.shape, backend: backend)
    let twin = try makeCache(text, traffic.shape)
    for c in [cache, twin] {
      try traffic.step(c, 0..<64)
      if !inPrompt {
        try c.finishPrefill()
        for token in 64..<80 { try traffic.step(c, token..<token + 1) }
      }
    }
    let before = try Snapshot(cache)
    let memory = backend.memory.liveBytes
    try body(cache, traffic)
    check(try! Snapshot(cache) == before, "an error changed the cache", sourceLocation: sourceLocation)
    check(
      backend.memory.liveBytes == memory, "an error left \(backend.memory.liveBytes - memory) bytes",
      sourceLocation: sourceLocation)
    let next = inPrompt ? 64 : 80
    checkSame(
      try traffic.step(cache, next..<next + 3), try traffic.step(twin, next..<next + 3), "next tokens",
      sourceLocation: sourceLocation)
    check(try! Snapshot(cache) == Snapshot(twin), "contents after the next tokens", sourceLocation: sourceLocation)
  }

  /// Appends n tokens of arbitrary shape.
  func append(
    _ cache: KVCache, _ layer: Int, keys: [Float], values: [Float], keyHeads: Int = 2, valueHeads: Int = 2,
    keyTokens: Int = 3, valueTokens: Int = 3, keyDim: Int = 40, valueDim: Int = 24
  ) throws {
    try cache.append(
      layer: layer, keys: TensorView(keys.span, heads: keyHeads, tokens: keyTokens, dim: keyDim),
      values: TensorView(values.span, heads: valueHeads, tokens: valueTokens, dim: valueDim))
  }

  static let badFloats: [Float] = [.nan, .infinity, -.infinity, Float(bitPattern: 0x7F80_0001)]

  @Test func nonFiniteKeysAndValues() throws {
    withEvery("policy", in: Self.policies) { text in
      try unchanged(text) { cache, _ in
        withEvery("bad", in: Self.badFloats) { bad in
          withEvery("place", in: [(0, 0, 0), (1, 2, 23), (0, 1, 17)]) { head, token, channel in
            var dice = Dice(3)
            let (keys, values) = (dice.exacts(2 * 3 * 40), dice.exacts(2 * 3 * 24))
            var badKeys = keys
            badKeys[(head * 3 + token) * 40 + channel] = bad
            expectError(.nonFinite, "channel \(channel) of a key", layer: 1, head: head, position: 80 + token) {
              try append(cache, 1, keys: badKeys, values: values)
            }
            var badValues = values
            badValues[(head * 3 + token) * 24 + channel] = bad
            expectError(.nonFinite, "channel \(channel) of a value", layer: 1, head: head, position: 80 + token) {
              try append(cache, 1, keys: keys, values: badValues)
            }
          }
        }
      }
    }
  }

  /// In f16 and bf16 memory, and in the layout of a projection.
  @Test func nonFiniteInEveryTypeAndLayout() throws {
    try unchanged("f32", layers: 1) { cache, _ in
      var dice = Dice(4)
      let (keys, values) = (dice.exacts(2 * 3 * 40), dice.exacts(2 * 3 * 24))
      withEvery("layout", in: [TensorLayout.headMajor, .tokenMajor]) { layout in
        withEvery("bad", in: Self.badFloats) { bad in
          let (head, token, channel) = (1, 2, 39)
          let index = layout == .headMajor ? (head * 3 + token) * 40 + channel : (token * 2 + head) * 40 + channel
          var halves = keys.map { Float16($0) }
          halves[index] = Float16(bad)
          let bits16 = values.map { Float16($0) }
          expectError(.nonFinite, "channel 39", layer: 0, head: 1, position: 82) {
            try cache.append(
              layer: 0, keys: TensorView(halves.span, heads: 2, tokens: 3, dim: 40, layout: layout),
              values: TensorView(bits16.span, heads: 2, tokens: 3, dim: 24, layout: layout))
          }
          var brains = keys.map { bfloat16($0) }
          brains[index] = bfloat16(bad)
          let bitsB = values.map { bfloat16($0) }
          expectError(.nonFinite, "channel 39", layer: 0, head: 1, position: 82) {
            try cache.append(
              layer: 0, keys: TensorView(bfloat16: brains.span, heads: 2, tokens: 3, dim: 40, layout: layout),
              values: TensorView(bfloat16: bitsB.span, heads: 2, tokens: 3, dim: 24, layout: layout))
          }
        }
      }
    }
  }

  @Test func nonFiniteQueriesAndWeights() throws {
    withEvery("policy", in: Self.policies) { text in
      withEvery("in the prompt", in: [true, false]) { inPrompt in
        try unchanged(text, layers: 1, inPrompt: inPrompt) { cache, traffic in
          let seen = inPrompt ? 64 : 80
          for bad in Self.badFloats {
            var queries = traffic.queries(0, seen - 2..<seen)
            queries[(3 * 2 + 1) * 40 + 7] = bad
            expectError(.nonFinite, "channel 7 of a query", layer: 0, head: 3, position: seen - 1) {
              try attend(cache, queries, tokens: 2)
            }
            expectError(.nonFinite, "channel 7 of a query", layer: 0, head: 3, position: seen - 1) {
              try cache.observe(layer: 0, queries: TensorView(queries.span, heads: 4, tokens: 2, dim: 40))
            }
            var weights = (0..<2).map { [Float](repeating: 0.1, count: cache.rowsHeld(layer: 0, head: $0)) }
            weights[1][5] = bad
            expectError(.nonFinite, "row 5", layer: 0, head: 1) { try cache.observe(layer: 0, attention: weights) }
          }
          let rows = cache.rowsHeld(layer: 0, head: 0)
          expectError(.shapeMismatch, "2 KV heads", "got 1", layer: 0) {
            try cache.observe(layer: 0, attention: [Array(repeating: 0, count: rows)])
          }
          expectError(.shapeMismatch, "\(rows) rows", "got \(rows + 1)", layer: 0, head: 1) {
            try cache.observe(
              layer: 0, attention: [Array(repeating: 0, count: rows), Array(repeating: 0, count: rows + 1)])
          }
        }
      }
    }
  }

  private func attend(
    _ cache: KVCache, _ queries: [Float], heads: Int = 4, tokens: Int, dim: Int = 40, outHeads: Int = 4,
    outTokens: Int? = nil, outDim: Int = 24, layer: Int = 0, options: AttentionOptions? = nil
  ) throws {
    let n = outTokens ?? tokens
    var out = [Float](repeating: 7, count: outHeads * n * outDim)
    var span = out.mutableSpan
    var view = try MutableTensorView(&span, heads: outHeads, tokens: n, dim: outDim)
    defer { check(out.allSatisfy { $0 == 7 }, "an error wrote the output") }
    do {
      try cache.attend(
        layer: layer, queries: TensorView(queries.span, heads: heads, tokens: tokens, dim: dim), into: &view,
        options: options)
      _ = consume view
    }
  }

  @Test func shapesThatDoNotFit() throws {
    withEvery("policy", in: Self.policies) { text in
      try unchanged(text) { cache, _ in
        let zeros = [Float](repeating: 0, count: 4 * 3 * 80)
        func z(_ n: Int) -> [Float] { Array(zeros.prefix(n)) }
        expectError(.shapeMismatch, "2 heads x 40", "got 3 x 40", layer: 1) {
          try append(cache, 1, keys: z(360), values: z(144), keyHeads: 3)
        }
        expectError(.shapeMismatch, "2 heads x 40", "got 2 x 24", layer: 0) {
          try append(cache, 0, keys: z(144), values: z(144), keyDim: 24)
        }
        expectError(.shapeMismatch, "2 heads x 24", "got 1 x 24", layer: 0) {
          try append(cache, 0, keys: z(240), values: z(72), valueHeads: 1)
        }
        expectError(.shapeMismatch, "2 heads x 24", "got 2 x 40", layer: 0) {
          try append(cache, 0, keys: z(240), values: z(240), valueDim: 40)
        }
        expectError(.shapeMismatch, "3 keys and 2 values", layer: 0) {
          try append(cache, 0, keys: z(240), values: z(96), valueTokens: 2)
        }
        expectError(.shapeMismatch, "at least one token", layer: 0) {
          try append(cache, 0, keys: [], values: [], keyTokens: 0, valueTokens: 0)
        }
        for layer in [-1, 2, 1000] {
          expectError(.shapeMismatch, "layer \(layer)", "2 layers", layer: layer) {
            try append(cache, layer, keys: z(240), values: z(144))
          }
        }
        expectError(.shapeMismatch, "4 heads x 40", "got 2 x 40", layer: 0) {
          try attend(cache, z(80), heads: 2, tokens: 1)
        }
        expectError(.shapeMismatch, "4 heads x 40", "got 4 x 20", layer: 0) {
          try attend(cache, z(80), tokens: 1, dim: 20)
        }
        expectError(.shapeMismatch, "got 0", layer: 0) { try attend(cache, [], tokens: 0) }
        expectError(.shapeMismatch, "1...80", "got 81", layer: 0) {
          try attend(cache, [Float](repeating: 0, count: 4 * 81 * 40), tokens: 81)
        }
        expectError(.shapeMismatch, "4 heads x 1 tokens x 24", "got 4 x 2 x 24", layer: 0) {
          try attend(cache, z(160), tokens: 1, outTokens: 2)
        }
        expectError(.shapeMismatch, "got 4 x 1 x 40", layer: 0) { try attend(cache, z(160), tokens: 1, outDim: 40) }
        expectError(.shapeMismatch, "got 2 x 1 x 24", layer: 0) { try attend(cache, z(160), tokens: 1, outHeads: 2) }
        for (options, word) in [
          (AttentionOptions(scale: .nan), "scale"), (.init(scale: .infinity), "scale"), (.init(softcap: 0), "softcap"),
          (.init(softcap: -1), "softcap"), (.init(softcap: .nan), "softcap"), (.init(softcap: .infinity), "softcap"),
        ] {
          expectError(.invalidOption, word, layer: 0) { try attend(cache, z(160), tokens: 1, options: options) }
        }
      }
    }
  }

  @Test func viewsThatLieOutsideTheirMemory() {
    let memory = [Float](repeating: 0, count: 100)
    let few = [Float](repeating: 0, count: 99)
    func view(_ h: Int, _ t: Int, _ d: Int, _ hs: Int? = nil, _ ts: Int? = nil, _ m: [Float]) throws {
      if let hs, let ts {
        _ = try TensorView(m.span, heads: h, tokens: t, dim: d, headStride: hs, tokenStride: ts)
      } else {
        _ = try TensorView(m.span, heads: h, tokens: t, dim: d)
      }
    }
    let cases: [(Int, Int, Int, Int?, Int?, [Float])] = [
      (2, 5, 10, nil, nil, few), (2, 5, 0, nil, nil, memory), (-2, 5, -10, nil, nil, memory),
      (2, -5, -10, nil, nil, memory),
      (Int.max, 2, 2, nil, nil, memory), (Int.max / 2, 1, 4, nil, nil, memory), (2, 5, 10, 51, 10, memory),
      (2, 5, 10, -50, 10, memory),
      (2, 5, 10, 50, 11, memory), (2, 5, 10, Int.max, 1, memory), (3, 2, 1, Int.max / 2, Int.max, memory),
      (2, 5, 10, 50, -1, memory),
    ]
    withEvery("case", in: cases) { c in
      expectError(.shapeMismatch) { try view(c.0, c.1, c.2, c.3, c.4, c.5) }
    }
    labelled("last element just inside") { try view(2, 5, 10, 50, 10, memory) }
    expectError(.shapeMismatch) {
      let bits = [UInt16](repeating: 0, count: 3)
      _ = try TensorView(bfloat16: bits.span, heads: 1, tokens: 1, dim: 4)
    }
    expectError(.shapeMismatch) {
      var out = [Float](repeating: 0, count: 3)
      var span = out.mutableSpan
      _ = try MutableTensorView(&span, heads: 1, tokens: 1, dim: 4)
    }
  }

  /// Values beyond what will hold them, now or once they are encoded.
  @Test func valuesBeyondTheStore() throws {
    let cases: [(String, Float)] = [
      ("f16", 65520), ("f16", -1e6), ("bf16", .greatestFiniteMagnitude), ("kivi(residual=32)", 65520),
      ("kivi(residual=32,window=bf16)", 1e5), ("kivi(residual=32,window=f32)", -1e5),
      ("kivi(residual=32,window=f16,metadata=f32)", 65520),
      ("kivi(residual=32,window=bf16,metadata=bf16)", .greatestFiniteMagnitude),
      ("h2o(budget=20)+f16", 7e4), ("snapkv(budget=20,window=4,every=2)+f16", 7e4),
      ("streaming(sinks=2,recent=20,positions=keep)+f16", 7e4),
    ]
    withEvery("case", in: cases) { text, bad in
      // Many tokens at once, so that the failed append has asked for new extents.
      try unchanged(text, layers: 1) { cache, _ in
        var dice = Dice(6)
        var (keys, values) = (dice.exacts(2 * 67 * 40), dice.exacts(2 * 67 * 24))
        keys[(67 + 66) * 40 + 5] = bad
        expectError(.unrepresentable, "channel 5 of a key", layer: 0, head: 1, position: 146) {
          try append(cache, 0, keys: keys, values: values, keyTokens: 67, valueTokens: 67)
        }
        keys[(67 + 66) * 40 + 5] = 0
        values[66 * 24 + 23] = bad
        expectError(.unrepresentable, "channel 23 of a value", layer: 0, head: 0, position: 146) {
          try append(cache, 0, keys: keys, values: values, keyTokens: 67, valueTokens: 67)
        }
      }
    }
    // The largest numbers that fit do.
    withEvery(
      "fits",
      in: [
        ("f16", Float(65504)), ("f16", 65519), ("bf16", 3.3e38), ("f32", .greatestFiniteMagnitude),
        ("kivi(residual=32,window=f32)", 65519),
      ]
    ) {
      text, value in
      let cache = try makeCache(text, Geometry(1, 1, 8).shape())
      var keys = [Float](repeating: 0, count: 8)
      keys[3] = value
      try append(
        cache, 0, keys: keys, values: keys, keyHeads: 1, valueHeads: 1, keyTokens: 1, valueTokens: 1, keyDim: 8,
        valueDim: 8)
      let held = try cache.read(layer: 0, head: 0).keys[3]
      check(held.isFinite && abs(held - value) <= abs(value) / 128, "holds \(held)")
    }
  }

  @Test func batchMistakes() throws {
    let shape = Self.geometry.shape()
    let backend = try Backend.cpu(threads: 1)
    let traffic = Traffic(shape, tokens: 40)
    func cache(_ text: String, _ shape: ModelShape? = nil, _ own: Backend? = nil) throws -> KVCache {
      let cache = try makeCache(text, shape ?? traffic.shape, backend: own ?? backend)
      if shape == nil { try traffic.append(cache, 0, 0..<30) }
      return cache
    }
    let (a, b) = (try cache("snapkv(budget=20,window=4)"), try cache("h2o(budget=20)"))
    let before = try (Snapshot(a), Snapshot(b))
    func attend(_ caches: [KVCache], _ tokens: [Int], total: Int = 2, poison: Int? = nil) throws {
      var queries = [Float](repeating: 0.1, count: 4 * total * 40)
      if let poison { queries[poison] = .nan }
      var out = [Float](repeating: 0, count: 4 * total * 24)
      var span = out.mutableSpan
      var view = try MutableTensorView(&span, heads: 4, tokens: total, dim: 24)
      try KVCache.attend(
        caches, layer: 0, queries: TensorView(queries.span, heads: 4, tokens: total, dim: 40), tokens: tokens,
        into: &view)
    }
    expectError(.shapeMismatch, "2 caches") { try attend([a, b], [1]) }
    expectError(.shapeMismatch, "adding up to 2") { try attend([a, b], [1, 2]) }
    expectError(.shapeMismatch) { try attend([a, b], [2, 0]) }
    expectError(.shapeMismatch) { try attend([a, b], [3, -1]) }
    expectError(.shapeMismatch, "twice") { try attend([a, a], [1, 1]) }
    expectError(.shapeMismatch) { try attend([], [], total: 2) }
    let other = try cache("f16", Geometry(4, 2, 40).shape())
    expectError(.shapeMismatch, "model shape") { try attend([a, other], [1, 1]) }
    let elsewhere = try cache("f16", nil, Backend.cpu(threads: 1))
    expectError(.shapeMismatch, "backend") { try attend([a, elsewhere], [1, 1]) }
    let empty = try makeCache("f16", shape, backend: backend)
    expectError(.shapeMismatch, layer: 0) { try attend([a, empty], [1, 1]) }
    // The second cache's query: the first has not been touched either.
    expectError(.nonFinite, layer: 0, head: 0, position: 29) { try attend([a, b], [1, 1], poison: 40 + 3) }
    #expect(try Snapshot(a) == before.0)
    #expect(try Snapshot(b) == before.1)
    #expect(KVCache.bytes(of: [a, b, elsewhere]).total - elsewhere.bytes.total == backend.memory.liveBytes)
  }
}
