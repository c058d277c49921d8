import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// How layers of every kind are seen, observed and attended; a continuation of `LifeCycleTests`.
@Suite struct LayerAndAttentionTests {
  static let geometry = LifeCycleTests.geometry
  static let policies = LifeCycleTests.policies

  static func shape(layers: Int = 1) throws -> ModelShape { try LifeCycleTests.shape(layers: layers) }

  // MARK: Layers of other kinds

  @Test func slidingWindows() throws {
    withEvery("policy", in: ["f32", "kivi(residual=32)", "h2o(budget=20)+f32", "snapkv(budget=20,window=4)+f16"]) {
      text in
      withEvery("window", in: [1, 7, 33]) { window in
        let shape = ModelShape(layers: [Self.geometry.layer(slidingWindow: window), Self.geometry.layer()])
        let backend = try Backend.cpu(threads: 1)
        let traffic = Traffic(shape, tokens: 150)
        let cache = try makeCache(text, shape, backend: backend)
        for start in [0, 20] {
          for layer in 0..<2 { try traffic.checkedStep(cache, layer, start..<start + 20) }
        }
        try cache.finishPrefill()
        for token in 40..<150 {
          for layer in 0..<2 { try traffic.checkedStep(cache, layer, token..<token + 1) }
          let rows = try cache.rows(layer: 0, head: 0)
          // The next query sees the last window - 1 tokens and itself.
          check(rows.suffix(window - 1).elementsEqual(token + 2 - window..<token + 1), "window holds \(rows)")
          check(rows.count == window - 1 || rows.count == window, "\(rows.count) rows of a window of \(window)")
        }
        check(cache.bytes.total == backend.memory.liveBytes, "bytes")
        check(cache.status[0].state == .skipped, "state \(cache.status[0])")
        check(cache.status[0].reason.contains("\(window) tokens"), cache.status[0].reason)
        if ProductTests.estimable(cache.policy as! Policy) || text.hasSuffix("f32") {
          let estimate = try cache.policy.estimate(shape: shape, prompt: 40, decoded: 110, chunk: 20)
          check(estimate == cache.bytes, "estimated \(estimate), measured \(cache.bytes)")
        }
      }
    }
  }

  @Test func uncachedLayers() throws {
    let shape = ModelShape(layers: [Self.geometry.layer(), .uncached, Self.geometry.layer()])
    let traffic = Traffic(shape, tokens: 60)
    let cache = try makeCache("h2o(budget=20)", shape)
    try traffic.run(cache, prompt: 40, decoded: 20)
    #expect(cache.rowsHeld(layer: 2, head: 1) == 20 && cache.tokensSeen(layer: 1) == 0)
    #expect(cache.status[1].state == .uncached && !cache.status[1].reason.isEmpty)
    #expect(try cache.policy.estimate(shape: shape, prompt: 40, decoded: 20) == cache.bytes)
    expectError(.unsupported, "no KV cache", layer: 1) { _ = try cache.rows(layer: 1, head: 0) }
    expectError(.shapeMismatch, "layer 3", "3 layers", layer: 3) { _ = try cache.rows(layer: 3, head: 0) }
    expectError(.shapeMismatch, "head 2", "2 KV heads", layer: 0) { _ = try cache.read(layer: 0, head: 2) }
  }

  @Test func statusSaysWhy() throws {
    let shape = ModelShape(
      layers: [Self.geometry.layer(), .uncached, Self.geometry.layer(slidingWindow: 16)])
    let traffic = Traffic(shape, tokens: 60)
    func texts(_ cache: KVCache) -> [String] { cache.status.map { "\($0.state)" } }
    let cache = try makeCache("snapkv(budget=20,window=4)", shape)
    #expect(texts(cache) == ["empty", "uncached", "empty"])
    try traffic.step(cache, 0..<40)
    #expect(texts(cache) == ["prefilling", "uncached", "prefilling"])
    try cache.finishPrefill()
    #expect(texts(cache) == ["compressed", "uncached", "skipped"])
    #expect(cache.status[0].reason == "40 rows became 20 at token 40")
    #expect(cache.status[0].rowsHeld == [20, 20] && cache.status[0].tokensSeen == 40)
    #expect(cache.status.map(\.bytes).reduce(ByteCount(), +) == cache.bytes)
    let small = try makeCache("snapkv(budget=50,window=4)", shape)
    try traffic.run(small, prompt: 40)
    #expect(texts(small) == ["complete", "uncached", "skipped"])
    #expect(small.status[0].reason == "40 rows fit the budget")
    let dense = try makeCache("f16", shape)
    try traffic.run(dense, prompt: 40)
    #expect(dense.status[0].reason == "the policy keeps every token")
  }

  // MARK: Engines with attention of their own

  /// H2O and SnapKV through observe and commit keep what they keep through attend.
  @Test func observingIsAttending() throws {
    withEvery(
      "policy",
      in: [
        "h2o(budget=20)+f32", "h2o(budget=20,every=4)+f32", "h2o(budget=20)+kivi(residual=32)",
        "snapkv(budget=20,window=5)+f32",
        "snapkv(budget=24,window=5,every=3)+f16", "streaming(sinks=2,recent=18,positions=keep)+f32",
        "kivi(residual=32)",
      ]
    ) { text in
      let shape = Self.geometry.shape(layers: 2)
      let traffic = Traffic(shape, tokens: 90)
      let through = try makeCache(text, shape)
      try traffic.run(through, prompt: 60, decoded: 30, chunk: 25)
      let probe = try makeCache(text, shape)
      let needs = probe.policy.inputs
      var inputs: EngineInputs = []
      if needs.windowQueries > 0 { inputs.insert(.queries) }
      if needs.attentionWeights { inputs.insert(.attentionWeights) }
      let cache = try makeCache(text, shape, inputs: inputs)
      func step(_ range: Range<Int>) throws {
        for layer in 0..<2 {
          try traffic.append(cache, layer, range)
          if needs.windowQueries > 0 { try traffic.observe(cache, layer, range) }
          if needs.attentionWeights {
            try cache.observe(layer: layer, attention: weights(cache, traffic, layer, range))
          }
          try cache.commit(layer: layer)
        }
      }
      for start in stride(from: 0, to: 60, by: 25) { try step(start..<min(start + 25, 60)) }
      try cache.finishPrefill()
      for token in 60..<90 { try step(token..<token + 1) }
      check(try positions(cache) == positions(through), "\(try! positions(cache)) and \(try! positions(through))")
      check(try Snapshot(cache).heads == Snapshot(through).heads, "contents")
    }
  }

  /// The weights an engine's own attention gives, per KV head, summed over queries and the heads of the group.
  private func weights(_ cache: KVCache, _ traffic: Traffic, _ layer: Int, _ range: Range<Int>) throws -> [[Float]] {
    let s = traffic.shape.layers[layer]
    return try (0..<s.kvHeads).map { head in
      let held = try cache.read(layer: layer, head: head)
      var queries: [Float] = []
      for member in 0..<s.group {
        for token in range { queries += traffic.query(layer, head * s.group + member, token) }
      }
      let sums = try AttentionReference().columnSums(
        queries: HeadTensor(heads: s.group, tokens: range.count, dim: s.keyDim, elements: queries),
        keys: HeadTensor(heads: 1, tokens: held.positions.count, dim: s.keyDim, elements: held.keys),
        queryPositions: Array(range), keyPositions: [held.positions])
      return held.positions.indices.map { row in Float(sums.reduce(0) { $0 + $1[row] }) }
    }
  }

  /// Rows appended and never attended are missing input, not silence.
  @Test func tokensThatNobodyAttended() throws {
    let traffic = Traffic(Self.geometry.shape(), tokens: 60)
    let h2o = try makeCache("h2o(budget=20)", traffic.shape)
    try traffic.append(h2o, 0, 0..<20)
    try traffic.append(h2o, 0, 20..<40)
    try traffic.attend(h2o, 0, 20..<40)
    expectError(.missingInput, "20", layer: 0) { try h2o.finishPrefill() }
    // SnapKV needs the window only; a hole in it is an error.
    let snap = try makeCache("snapkv(budget=20,window=10)", traffic.shape)
    try traffic.step(snap, 0..<30)
    try traffic.append(snap, 0, 30..<35)
    try traffic.append(snap, 0, 35..<40)
    try traffic.attend(snap, 0, 35..<40)
    expectError(.missingInput, layer: 0) { try snap.finishPrefill() }
    let fine = try makeCache("snapkv(budget=20,window=5)", traffic.shape)
    try traffic.append(fine, 0, 0..<35)
    try traffic.append(fine, 0, 35..<40)
    try traffic.attend(fine, 0, 35..<40)
    try fine.finishPrefill()
    #expect(fine.rowsHeld(layer: 0, head: 0) == 20)
  }

  // MARK: Attention

  /// Slot distances: the same as attention over keys turned to their slot, with the query at its slot, in f64.
  @Test(arguments: [RotaryEmbedding.Layout.halfSplit, .interleaved])
  func slotPositions(layout: RotaryEmbedding.Layout) throws {
    let rotary = try RotaryEmbedding(headDim: 24, rotaryDim: 16, theta: 100, layout: layout, angleProduct: .f64)
    var shape = Geometry(4, 2, 24, 9).shape()
    shape.rotary = rotary
    let traffic = Traffic(shape, tokens: 107)
    let cache = try makeCache("streaming(sinks=3,recent=12)+f32", shape)
    try traffic.run(cache, prompt: 40)
    // One and several tokens, with and without dead slots behind them, and more than the few that are split by rows.
    for range in [40..<41, 41..<42, 42..<43, 43..<60, 60..<61, 61..<70, 70..<71, 71..<107] {
      let count = range.count
      try traffic.append(cache, 0, range)
      let held = try (0..<2).map { try cache.read(layer: 0, head: $0) }
      let output = try traffic.attend(cache, 0, range)
      var expected: [HeadContents] = []
      for head in held {
        var turned = head
        for (slot, position) in head.positions.enumerated() {
          turn(&turned.keys, at: slot * 24, rotary, from: position, to: slot)
          turned.positions[slot] = slot
        }
        expected.append(turned)
      }
      // Queries sit in the last slots.
      var queries = traffic.queries(0, range)
      let rows = held[0].positions.count
      for i in 0..<4 * count {
        turn(&queries, at: i * 24, rotary, from: range.lowerBound + i % count, to: rows - count + i % count)
      }
      let oracle = try Oracle(
        expected, shape.layers[0], queries: queries, tokens: count, firstPosition: rows - count)
      // Keys here are turned and rounded once more: |q| |k| scale times a few ulp more than the bound counts.
      check(oracle.worst(output) <= 4, "off by \(oracle.worst(output)) bounds at \(range)")
    }
  }

  /// Turns the pairs of a row by (to - from) times the frequency, in f64.
  private func turn(_ row: inout [Float], at start: Int, _ rotary: RotaryEmbedding, from: Int, to: Int) {
    for pair in 0..<rotary.pairs {
      let angle = Double(rotary.inverseFrequencies[pair]) * Double(to - from)
      let (i, j) =
        rotary.layout == .interleaved
        ? (start + 2 * pair, start + 2 * pair + 1) : (start + pair, start + pair + rotary.pairs)
      let (x, y) = (Double(row[i]), Double(row[j]))
      let (sine, cosine) = sinCos(angle)
      row[i] = Float(x * cosine - y * sine)
      row[j] = Float(x * sine + y * cosine)
    }
  }

  private func sinCos(_ angle: Double) -> (Double, Double) {
    // Taylor after halving: exact enough for an oracle, no Foundation.
    let small = angle / 1024
    var (s, c) = (
      small - small * small * small / 6 + small * small * small * small * small / 120, 1 - small * small / 2
    )
    c += small * small * small * small / 24 - small * small * small * small * small * small / 720
    for _ in 0..<10 { (s, c) = (2 * s * c, c * c - s * s) }
    return (s, c)
  }

  @Test func optionsOfAttention() throws {
    let all: [AttentionOptions] = [
      .init(), .init(scale: 0.3), .init(softcap: 3), .init(scale: 1, softcap: 0.5), .init(causal: false),
      .init(scale: -0.2),
    ]
    withEvery("store", in: ["f32", "bf16", "kivi(bits=4,residual=32)"]) { store in
      withEvery("geometry", in: Geometry.all) { geometry in
        let traffic = Traffic(geometry.shape(), tokens: 90)
        let cache = try makeCache(store, traffic.shape)
        try traffic.run(cache, prompt: 70)
        try traffic.append(cache, 0, 70..<75)
        let held = try (0..<geometry.kvHeads).map { try cache.read(layer: 0, head: $0) }
        let before = try Snapshot(cache)
        for options in all where (options.scale ?? 1) > 0 {
          var looking = options
          looking.commits = false
          let output = try traffic.attend(cache, 0, 70..<75, looking)
          try Oracle(
            held, geometry.layer(), queries: traffic.queries(0, 70..<75), tokens: 5, firstPosition: 70,
            options: options,
            folded: store.hasPrefix("kivi")
          ).check(output)
          // The same call again gives the same bits: it only looked.
          checkSame(try traffic.attend(cache, 0, 70..<75, looking), output, "second look")
        }
        check(try Snapshot(cache) == before, "looking changed the cache")
      }
    }
  }

  /// `commits: false` leaves statistics and schedule alone too.
  @Test func lookingChangesNothing() throws {
    withEvery("policy", in: Self.policies) { text in
      let shape = try Self.shape()
      let traffic = Traffic(shape, tokens: 90)
      let (cache, twin) = (try makeCache(text, shape), try makeCache(text, shape))
      for cache in [cache, twin] { try traffic.run(cache, prompt: 60, decoded: 5) }
      for token in 65..<80 {
        for c in [cache, twin] { try traffic.append(c, 0, token..<token + 1) }
        for _ in 0..<3 { try traffic.attend(cache, 0, token..<token + 1, AttentionOptions(commits: false)) }
        checkSame(
          try traffic.attend(cache, 0, token..<token + 1), try traffic.attend(twin, 0, token..<token + 1),
          "token \(token)")
        check(try Snapshot(cache) == Snapshot(twin), "contents at \(token)")
      }
    }
  }

  /// A log bias per slot, through the backend: what merging methods give.
  @Test func biasPerSlot() throws {
    var dice = Dice(5)
    let (rows, dim, valueDim) = (37, 24, 9)
    let keys = dice.normals(rows * dim)
    let values = dice.normals(rows * valueDim)
    let queries = dice.normals(2 * dim)
    withEvery("level", in: Backend.cpuLevels) { level in
      withEvery(
        "bias",
        in: [[Float]](
          arrayLiteral: (0..<rows).map { Float($0 % 5) / 2 }, (0..<rows).map { $0 % 3 == 0 ? -.infinity : 0.5 },
          Array(repeating: -.infinity, count: rows)
        )
      ) { bias in
        var kernel = KernelAttention(backend: try Backend.cpu(threads: 1, level: level))
        kernel.scale = 0.2
        let segment = try kernel.segment(
          HeadTensor(heads: 1, tokens: rows, dim: dim, elements: keys),
          HeadTensor(heads: 1, tokens: rows, dim: valueDim, elements: values), bias: [bias])
        let output = try kernel.attend(HeadTensor(heads: 2, tokens: 1, dim: dim, elements: queries), over: [segment])
          .output
        let held = HeadContents(positions: Array(0..<rows), keys: keys, values: values, logBias: bias)
        try Oracle(
          [held], Geometry(2, 1, dim, valueDim).layer(), queries: queries, tokens: 1, firstPosition: rows - 1,
          options: .init(scale: 0.2)
        ).check(output)
      }
    }
  }

  /// A cache whose attention is never asked for still settles: attention over nothing is zero.
  @Test func nothingToSee() throws {
    let traffic = Traffic(Self.geometry.shape(), tokens: 40)
    let cache = try makeCache("streaming(sinks=0,recent=3,positions=keep)", traffic.shape)
    try traffic.run(cache, prompt: 10)
    try cache.makeRoom(for: 100)
    #expect(cache.rowsHeld(layer: 0, head: 0) == 0)
    let output = try traffic.attend(cache, 0, 9..<10, AttentionOptions(commits: false))
    #expect(output.allSatisfy { $0 == 0 })
    let many = Traffic(Self.geometry.shape(), tokens: 60)
    let other = try makeCache("streaming(sinks=0,recent=3,positions=keep)", many.shape)
    try many.run(other, prompt: 60)
    try other.makeRoom(for: 100)
    #expect(try many.attend(other, 0, 20..<60, AttentionOptions(commits: false)).allSatisfy { $0 == 0 })
  }

  /// Steady-state decoding allocates once in `growth` tokens, in the backend.
  @Test func allocationsOfDecoding() throws {
    // Dense: an extent of 64 rows for keys and values of two heads. KIVI: blocks of keys (body and tail), single rows
    // of values.
    withEvery("policy", in: [("f32", 4), ("f16", 4), ("kivi(residual=64)", 14), ("kivi(bits=8,residual=32)", 20)]) {
      text, most in
      let traffic = Traffic(Self.geometry.shape(), tokens: 600)
      let backend = try Backend.cpu(threads: 1)
      let cache = try makeCache(text, traffic.shape, backend: backend)
      try traffic.run(cache, prompt: 130, decoded: 70)
      var steps = 0
      for start in stride(from: 200, to: 584, by: 64) {
        let before = backend.memory.allocations
        for token in start..<start + 64 {
          let now = backend.memory.allocations
          try traffic.step(cache, token..<token + 1)
          if backend.memory.allocations != now { steps += 1 }
        }
        check(
          backend.memory.allocations - before <= most, "\(backend.memory.allocations - before) allocations in 64 tokens"
        )
      }
      check(steps <= 6 * 5, "\(steps) of 384 steps allocated")
    }
  }
}
