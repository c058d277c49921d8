import KVBackendCPU
import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Caches whose older rows are latents.
@Suite struct LowRankTests {
  /// A store that keeps latents even where they are no smaller.
  static func store(_ change: (inout LowRankFormat) -> Void) -> Store {
    var format = LowRankFormat(
      keys: .share(1), values: .share(1), keyLatents: .dense(.f32), valueLatents: .dense(.f32), basis: .f32,
      window: .f32)
    format.evenIfLarger = true
    change(&format)
    return Store(spec: StageSpec(name: "test"), factory: format)
  }

  static let geometries = [
    Geometry(2, 2, 20), Geometry(4, 1, 24, 40), Geometry(16, 1, 16, 9), Geometry(6, 3, 8, 33),
  ]

  static func worst(_ a: [Float], _ b: [Float]) -> Float { zip(a, b).map { abs($0 - $1) }.max() ?? 0 }

  /// A basis with every direction restores every row, however it is shared and wherever keys are turned.
  @Test func fullRankIsExact() throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      withEvery("layers", in: [1, 2, 3]) { layers in
        withEvery("perHead", in: [false, true]) { perHead in
          withEvery("beforeRotation", in: [false, true]) { before in
            let shape = try geometry.shape(layers: 3, rotary: true)
            let traffic = Traffic(shape, tokens: 90)
            let store = Self.store {
              $0.layersPerGroup = layers
              $0.perHead = perHead
              $0.beforeRotation = before
            }
            let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 2))
            let dense = try makeCache("f32", shape)
            let a = try traffic.run(cache, prompt: 61, decoded: 3, chunk: 40)
            let b = try traffic.run(dense, prompt: 61, decoded: 3, chunk: 40)
            check(Self.worst(a, b) < 2e-4, "off by \(Self.worst(a, b))")
            for layer in 0..<3 {
              for head in 0..<geometry.kvHeads {
                let x = try cache.read(layer: layer, head: head)
                let y = try dense.read(layer: layer, head: head)
                check(x.positions == y.positions, "positions")
                check(Self.worst(x.keys, y.keys) < 1e-4 && Self.worst(x.values, y.values) < 1e-4, "rows")
              }
            }
          }
        }
      }
    }
  }

  /// Attention over latents is attention over the rows they stand for.
  @Test func absorbedIsMaterialised() throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      withEvery(
        "store",
        in: [
          "svd(rank_k=0.3,rank_v=0.4,rope=post)", "svd(rank_k=0.3,rank_v=0.4,rope=pre)",
          "svd(rank_k=0.5,rank_v=0.5,rope=pre,scope=head,latents=int8)", "svd(rank_k=0.3,rank_v=full,rope=post)",
          "svd(rank_k=full,rank_v=0.3,rope=pre)", "xkv(layers=2,rank_k=0.2,rank_v=0.3,equalise=true)",
          "xkv(layers=2,rank_k=0.2,rank_v=0.3,new=project,keep=4,latents=int4)",
        ]
      ) { text in
        withEvery("queries", in: [1, 33]) { queries in
          let shape = try geometry.shape(layers: 2, rotary: true)
          let traffic = Traffic(shape, tokens: 80 + queries)
          let cache = try makeCache(text, shape)
          try traffic.run(cache, prompt: 80)
          for layer in 0..<2 {
            let range = 80..<80 + queries
            try traffic.append(cache, layer, range)
            let held = try (0..<geometry.kvHeads).map { try cache.read(layer: layer, head: $0) }
            let output = try traffic.attend(cache, layer, range)
            let oracle = try Oracle(
              held, shape.layers[layer], queries: traffic.queries(layer, range), tokens: queries, firstPosition: 80)
            let worst = zip(output, oracle.outputs).map { abs(Double($0) - $1) }.max() ?? 0
            // Kernels over codes round queries too.
            let bound = text.contains("latents=int") ? 2e-3 : 5e-5
            check(output.count == oracle.outputs.count && worst < bound, "off by \(worst)")
          }
        }
      }
    }
  }

  /// Heads that share latents are attended together, in blocks of at most 128 query rows, and it does not show.
  @Test(arguments: [
    ("svd(rank_k=0.3,rank_v=0.4,rope=post)", Geometry(32, 8, 8), [1, 9, 32]),
    ("svd(rank_k=0.3,rank_v=0.4,rope=post,latents=int8)", Geometry(10, 5, 12, 20), [1, 7]),
  ])
  func headsTogether(text: String, geometry: Geometry, counts: [Int]) throws {
    let shape = try geometry.shape(layers: 1, rotary: true)
    let traffic = Traffic(shape, tokens: 200)
    let outputs = try [1, 3].map { threads in
      let cache = try makeCache(text, shape, backend: .cpu(threads: threads))
      try traffic.run(cache, prompt: 168)
      try traffic.append(cache, 0, 168..<200)
      let held = try (0..<geometry.kvHeads).map { try cache.read(layer: 0, head: $0) }
      return try counts.map { count in
        let range = 200 - count..<200
        let output = try traffic.attend(cache, 0, range, AttentionOptions(commits: false))
        if threads > 1 { return output }
        let oracle = try Oracle(
          held, shape.layers[0], queries: traffic.queries(0, range), tokens: count, firstPosition: 200 - count)
        let worst = zip(output, oracle.outputs).map { abs(Double($0) - $1) }.max() ?? 0
        let bound = text.contains("latents=int") ? 2e-3 : 5e-5
        #expect(output.count == oracle.outputs.count && worst < bound, "\(count) queries: off by \(worst)")
        return output
      }
    }
    for index in counts.indices { checkSame(outputs[0][index], outputs[1][index], "3 threads") }
  }

  /// Layers that are copies of each other share one set of latents without loss at half the rank.
  @Test func identicalLayersRestoreExactly() throws {
    let shape = try Geometry(2, 1, 16).shape(layers: 2, rotary: true)
    var traffic = Traffic(shape, tokens: 200)
    traffic.keys[1] = traffic.keys[0]
    traffic.values[1] = traffic.values[0]
    let store = Self.store {
      $0.layersPerGroup = 2
      $0.keys = .channels(16)
      $0.values = .channels(16)
    }
    let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 200)
    for layer in 0..<2 {
      let held = try cache.read(layer: layer, head: 0)
      #expect(Self.worst(held.keys, traffic.keys(layer, 0..<200)) < 1e-4)
      #expect(Self.worst(held.values, traffic.values(layer, 0..<200)) < 1e-4)
    }
  }

  /// The specification's example of xKV: two layers of three tokens.
  @Test func twoLayersOfThreeTokens() throws {
    let rows: [[Float]] = [[1, 0, 0, 1, 1, 1], [2, 1, 1, -1, 3, 0]]
    let shape = ModelShape(layerCount: 2, queryHeads: 1, kvHeads: 1, headDim: 2)
    for (rank, wanted) in [
      (2, rows),
      (
        1,
        [
          [0.714286, 0.571429, 0.357143, 0.285714, 1.071429, 0.857143], [2, 0.142857, 1, 0.071429, 3, 0.214286],
        ] as [[Float]]
      ),
    ] {
      let store = Self.store {
        $0.layersPerGroup = 2
        $0.keys = .channels(rank)
        $0.values = .channels(rank)
        $0.beforeRotation = false
      }
      let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 1))
      for (layer, own) in rows.enumerated() {
        let view = try TensorView(own.span, heads: 1, tokens: 3, dim: 2)
        try cache.append(layer: layer, keys: view, values: TensorView(own.span, heads: 1, tokens: 3, dim: 2))
      }
      try cache.finishPrefill()
      for (layer, own) in wanted.enumerated() {
        let held = try cache.read(layer: layer, head: 0)
        #expect(Self.worst(held.keys, own) < 1e-5 && Self.worst(held.values, own) < 1e-5, "\(held.keys)")
      }
      if rank == 1 { continue }
      // New tokens on the basis: one in its span, one that is not.
      let segment = try #require(cache.layers[0].segments[0] as? LowRankSegment)
      let basis = try #require(segment.lowRank.sides?.keys.basis)
      let encoder = basis.encoderRows(unit: 0, backend: cache.backend.operations)
      for (row, latents, residual) in [
        ([1, 2, 4, -1], [4.407785, 1.603567], 0), ([1, 0, 0, 0], nil, 0.907485),
      ] as [([Float], [Float]?, Float)] {
        let found = (0..<2).map { i in (0..<4).reduce(Float(0)) { $0 + row[$1] * encoder[i * 4 + $1] } }
        let energy = row.reduce(0) { $0 + $1 * $1 }
        let kept = found.reduce(0) { $0 + $1 * $1 }
        #expect(abs((max(0, energy - kept) / energy).squareRoot() - residual) < 2e-3, "\(found)")
        if let latents { #expect(Self.worst(found.map(abs), latents) < 1e-4, "\(found)") }
      }
    }
  }

  /// A cache saved before the last layer of a group has its prompt waits on, loaded.
  @Test func filesOfAHalfFinishedPrompt() throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 2, rotary: true)
    let traffic = Traffic(shape, tokens: 130)
    let cache = try makeCache("xkv(layers=2,rank_k=6,rank_v=8)", shape)
    for layer in 0..<2 { try traffic.append(cache, layer, 0..<120) }
    try cache.finishPrefill(layer: 0)
    let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu(threads: 1))
    for one in [cache, loaded] {
      #expect(one.layers[0].segments[0] is RowSegment)
      try one.finishPrefill(layer: 1)
      #expect(one.layers[0].segments[0] is LowRankSegment && one.bytes.total == one.backend.memory.liveBytes)
    }
    #expect(try Snapshot(loaded) == Snapshot(cache))
    for token in 120..<130 {
      checkSame(try traffic.step(loaded, token..<token + 1), try traffic.step(cache, token..<token + 1), "\(token)")
    }
  }

  /// Rows of a long prompt become latents a piece at a time; what runs out of memory on the way loses none, and goes on
  /// with the next step.
  @Test(arguments: [false, true])
  func piecesOfAPrompt(perHead: Bool) throws {
    let shape = try Geometry(2, 2, 4).shape(layers: 2, rotary: true)
    let tokens = 2100
    let traffic = Traffic(shape, tokens: tokens + 1)
    let store = Self.store {
      $0.layersPerGroup = 2
      $0.perHead = perHead
    }
    let short = try ShortBackend()
    func filled() throws -> KVCache {
      let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: Backend(short))
      for layer in 0..<2 {
        for start in stride(from: 0, to: tokens, by: 700) { try traffic.append(cache, layer, start..<start + 700) }
      }
      return cache
    }
    func expectRows(_ cache: KVCache, _ count: Int) throws {
      for layer in 0..<2 {
        let dim = 4
        for head in 0..<2 {
          let rows = try cache.read(layer: layer, head: head)
          let first = head * (tokens + 1) * dim
          check(rows.positions == Array(0..<count), "positions")
          check(Self.worst(rows.keys, Array(traffic.keys[layer][first..<first + count * dim])) < 1e-4, "keys")
          check(Self.worst(rows.values, Array(traffic.values[layer][first..<first + count * dim])) < 1e-4, "values")
        }
      }
    }
    let whole = try filled()
    short.asked = 0
    try whole.finishPrefill()
    let asked = short.asked
    try expectRows(whole, tokens)
    let segment = try #require(whole.layers[0].segments[0] as? LowRankSegment)
    #expect(segment.frozen == [tokens, tokens])
    var partly = 0
    for left in 0..<asked {
      let cache = try filled()
      short.left = left
      let outcome = Result { () throws(KVError) in try cache.finishPrefill() }
      short.left = nil
      guard case .failure(let error) = outcome else { continue }
      check(error.code == .outOfMemory, "\(error)")
      try expectRows(cache, tokens)
      let joint = cache.layers.compactMap { $0.segments[0] as? LowRankSegment }
      if let frozen = joint.first?.frozen[0], frozen > 0 { partly += 1 }
      check(cache.bytes.total == cache.backend.memory.liveBytes - whole.bytes.total, "\(left) allocations: bytes")
      try traffic.step(cache, tokens..<tokens + 1)
      try expectRows(cache, tokens + 1)
      check(cache.layers.allSatisfy { ($0.segments[0] as? LowRankSegment)?.frozen[1] ?? 0 >= tokens }, "not resumed")
    }
    #expect(partly > 0)
  }

  /// Bytes are the closed form of the method's page: latents once per group, bases once.
  @Test func bytesAreTheClosedForm() throws {
    let shape = ModelShape(
      layerCount: 4, queryHeads: 4, kvHeads: 2, headDim: 32, rotary: try RotaryEmbedding(headDim: 32))
    let (tokens, width) = (400, 64)
    for (text, latents, bases) in [
      ("svd(rank_k=16,rank_v=24)", 4 * 40 * tokens, 4 * 40 * width),
      ("xkv(layers=4,rank_k=16,rank_v=24)", 40 * tokens, 40 * 4 * width),
      ("xkv(layers=3,rank_k=18,rank_v=24)", (42 + 6 + 8) * tokens, 42 * 3 * width + 14 * width),
      ("svd(rank_k=4,rank_v=6,scope=head)", 4 * 2 * 10 * tokens, 4 * 2 * 10 * 32),
    ] {
      let traffic = Traffic(shape, tokens: tokens)
      let cache = try makeCache(text, shape)
      try traffic.run(cache, prompt: tokens)
      #expect(cache.bytes == ByteCount(payload: 2 * latents, metadata: 2 * bases), "\(text): \(cache.bytes)")
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
      #expect(try cache.policy.estimate(shape: shape, prompt: tokens) == cache.bytes)
    }
  }

  /// Prompts too short for their basis, ranks beyond the rows, one token, one head: nothing breaks and nothing grows.
  @Test func smallPromptsStayDense() throws {
    withEvery("prompt", in: [1, 2, 7, 33]) { prompt in
      withEvery("store", in: ["svd", "xkv", "svd(scope=head,rank_k=5,rank_v=9)", "svd(rank_k=1,rank_v=1)"]) { text in
        let shape = try Geometry(4, 2, 16).shape(layers: 3, rotary: true)
        let traffic = Traffic(shape, tokens: prompt + 3)
        let cache = try makeCache(text, shape)
        let dense = try makeCache("f16", shape)
        try traffic.run(cache, prompt: prompt, decoded: 3)
        try traffic.run(dense, prompt: prompt, decoded: 3)
        check(cache.bytes.total <= dense.bytes.total + 3 * 2 * 2 * 2 * 16 * 64, "\(cache.bytes), \(dense.bytes) dense")
        check(try cache.rows(layer: 2, head: 1) == Array(0..<prompt + 3), "rows")
      }
    }
  }

  @Test func zeroAndConstantRows() throws {
    let shape = try Geometry(2, 2, 16).shape(layers: 2, rotary: true)
    for text in ["svd(rank_k=4,rank_v=4)", "xkv(layers=2,rank_k=4,rank_v=4,equalise=true)"] {
      var traffic = Traffic(shape, tokens: 120)
      for layer in 0..<2 {
        traffic.keys[layer] = Array(repeating: 0, count: traffic.keys[layer].count)
        traffic.values[layer] = Array(repeating: layer == 0 ? 0 : 1.5, count: traffic.values[layer].count)
      }
      let cache = try makeCache(text, shape)
      let outputs = try traffic.run(cache, prompt: 110, decoded: 10)
      #expect(outputs.allSatisfy { abs($0) < 1e-6 || abs($0 - 1.5) < 2e-3 })
    }
  }

  @Test func sameBitsAtAnyThreadCount() throws {
    let shape = try Geometry(4, 2, 32).shape(layers: 2, rotary: true)
    let traffic = Traffic(shape, tokens: 300)
    for text in ["svd(rank_k=0.3,rank_v=0.3)", "xkv(layers=2,rank_k=9,rank_v=12)"] {
      let outputs = try [1, 2, 3].map { threads in
        try traffic.run(makeCache(text, shape, backend: .cpu(threads: threads)), prompt: 280, decoded: 20)
      }
      for other in outputs.dropFirst() { checkSame(outputs[0], other, text) }
    }
  }

  /// Rows in the span of the prompt's are projected without loss; others lose what lies outside.
  @Test func projectedTokens() throws {
    let shape = try Geometry(2, 1, 16).shape(layers: 1, rotary: false)
    var traffic = Traffic(shape, tokens: 400)
    // Keys and values of rank 3.
    for token in 0..<400 {
      for c in 3..<16 {
        traffic.keys[0][token * 16 + c] = traffic.keys[0][token * 16 + c % 3]
        traffic.values[0][token * 16 + c] = traffic.values[0][token * 16 + c % 3]
      }
    }
    let cache = try makeCache(
      "svd(rank_k=3,rank_v=3,rope=post,new=project,keep=5,latents=f32,basis=f32,window=f32)", shape)
    try traffic.run(cache, prompt: 200, decoded: 200)
    let segment = try #require(cache.layers[0].segments[0] as? LowRankSegment)
    #expect((5..<37).contains(segment.window.slotCount(head: 0)))
    let held = try cache.read(layer: 0, head: 0)
    #expect(held.positions == Array(0..<400))
    #expect(Self.worst(held.keys, traffic.keys(0, 0..<400)) < 1e-4)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    #expect(try cache.policy.estimate(shape: shape, prompt: 200, decoded: 200) == cache.bytes)
  }

  /// A refreshed basis describes new directions, and what it described before.
  @Test func refreshedBasis() throws {
    let shape = try Geometry(2, 1, 16).shape(layers: 1, rotary: false)
    var traffic = Traffic(shape, tokens: 400)
    for token in 0..<400 {
      let live = token < 200 ? 0..<4 : 4..<8
      for c in 0..<16 where !live.contains(c) {
        traffic.keys[0][token * 16 + c] = 0
        traffic.values[0][token * 16 + c] = 0
      }
    }
    let refreshing = try makeCache(
      "svd(rank_k=8,rank_v=8,rope=post,new=refresh,keep=10,every=60,latents=f32,basis=f32,window=f32)", shape)
    try traffic.run(refreshing, prompt: 200, decoded: 200)
    let held = try refreshing.read(layer: 0, head: 0)
    #expect(Self.worst(held.keys, traffic.keys(0, 0..<400)) < 2e-4)
    #expect(Self.worst(held.values, traffic.values(0, 0..<400)) < 2e-4)
    let segment = try #require(refreshing.layers[0].segments[0] as? LowRankSegment)
    #expect(segment.window.slotCount(head: 0) < 70)
    #expect(refreshing.bytes.total == refreshing.backend.memory.liveBytes)
    expectError(.invalidOption, "codes") { _ = try PolicyRegistry.standard.policy("svd(new=refresh,latents=int4)") }
  }

  static let lives = [
    "svd(rank_k=0.3,rank_v=0.4)", "svd(rank_k=0.3,rank_v=0.4,scope=head,rope=post,latents=int4,new=project,keep=6)",
    "xkv(layers=2,rank_k=0.2,rank_v=0.3,new=project,keep=6,latents=int8)",
    "xkv(layers=3,rank_k=0.2,rank_v=0.3,equalise=true)", "svd(rank_k=0.3,rank_v=0.4,new=refresh,keep=4,every=20)",
  ]

  /// Forks go their own way over shared memory; a saved cache continues with the same bits.
  @Test(arguments: lives)
  func forksAndFiles(text: String) throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 5, rotary: true)
    let traffic = Traffic(shape, tokens: 260)
    let cache = try makeCache(text, shape)
    try traffic.run(cache, prompt: 150, decoded: 20)
    try checkForksAndFiles(cache, traffic, continuing: 170..<260)
  }

  /// What was factored cannot be cut; what is dense can.
  @Test(arguments: lives)
  func trimming(text: String) throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 3, rotary: true)
    let traffic = Traffic(shape, tokens: 170)
    let cache = try makeCache(text, shape)
    try traffic.run(cache, prompt: 150, decoded: 3)
    let minimum = cache.minimumTrim
    #expect(minimum > 100 && minimum <= 153)
    expectError(.irreversible, "compressed", layer: 0) { try cache.trim(to: minimum - 1) }
    try cache.trim(to: minimum)
    #expect(try cache.rows(layer: 1, head: 1) == Array(0..<minimum))
    try traffic.step(cache, minimum..<minimum + 5)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// Layers of a group wait for the last; layers that cannot be in one stay as they are.
  @Test func groupsAndStatus() throws {
    var layers = Array(repeating: Geometry(2, 2, 16).layer(), count: 6)
    layers[2] = Geometry(2, 2, 16).layer(slidingWindow: 8)
    layers[3] = Geometry(4, 1, 16).layer()
    let shape = ModelShape(layers: layers, rotary: try RotaryEmbedding(headDim: 16))
    let traffic = Traffic(shape, tokens: 150)
    let cache = try makeCache("xkv(layers=2,rank_k=4,rank_v=6)", shape)
    #expect(cache.groups.map(\.layers) == [[0, 1], [3], [4, 5]])
    for layer in 0..<6 {
      try traffic.append(cache, layer, 0..<150)
      try traffic.attend(cache, layer, 0..<150)
      try cache.finishPrefill(layer: layer)
      if layer == 0 { #expect(cache.layers[0].segments[0] is RowSegment) }
      if layer == 1 { #expect(cache.layers[0].segments[0] is LowRankSegment) }
    }
    #expect(cache.layers[2].segments[0] is RowSegment)
    #expect(cache.status[4].reason.contains("layers 5"))
  }

  /// Tokens that heads drop while decoding are gone; latents of tokens that all dropped are freed.
  @Test func dropsWhileDecoding() throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 2, rotary: true)
    let traffic = Traffic(shape, tokens: 500)
    for store in ["svd(rank_k=6,rank_v=6,scope=head)", "xkv(layers=2,rank_k=6,rank_v=6,new=project,keep=2)"] {
      let cache = try makeCache("streaming(recent=100,sinks=2,positions=keep)+\(store)", shape)
      try traffic.run(cache, prompt: 300, decoded: 10)
      let bytes = cache.bytes.total
      for token in 310..<500 { try traffic.step(cache, token..<token + 1) }
      #expect(try cache.rows(layer: 0, head: 0) == [0, 1] + Array(400..<500))
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
      if store.hasPrefix("xkv") { #expect(cache.bytes.total < bytes * 3 / 2) }
    }
  }

  @Test func refusals() throws {
    let bare = Geometry(2, 2, 16).shape(layers: 2)
    expectError(.missingInput, "rotary") { _ = try makeCache("svd", bare) }
    expectError(.missingInput, "rotary") { _ = try makeCache("xkv", bare) }
    for text in ["svd(rank_k=0)", "svd(rank_v=5000)", "svd(rank_k=1.5)", "xkv(layers=0)", "svd(latents=int5)"] {
      #expect(throws: KVError.self, "\(text)") { _ = try PolicyRegistry.standard.policy(text) }
    }
    // Latents are as long as rows of all heads together.
    let shape = try Geometry(2, 2, 16).shape(layers: 1, rotary: true)
    var traffic = Traffic(shape, tokens: 100)
    traffic.values[0] = traffic.values[0].map { $0 == 0 ? 60000 : 60000 * $0 / abs($0) }
    let cache = try makeCache("svd(rank_k=4,rank_v=4)", shape)
    try traffic.append(cache, 0, 0..<100)
    let before = try Snapshot(cache).heads
    expectError(.unrepresentable, "latents of values", "bf16", layer: 0) { try cache.finishPrefill() }
    #expect(try Snapshot(cache).heads == before)
    let wide = try makeCache("svd(rank_k=4,rank_v=4,latents=bf16)", shape)
    try traffic.append(wide, 0, 0..<100)
    try wide.finishPrefill()
    #expect(wide.layers[0].segments[0] is LowRankSegment)
  }
}
