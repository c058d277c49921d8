import Foundation
import KVCompression
import Testing

@testable import KVCore

/// Pairs of layers that share directions.
@Suite struct MiniCacheTests {
  static let geometries = [
    Geometry(2, 2, 40), Geometry(4, 1, 24, 40), Geometry(16, 1, 16, 9), Geometry(6, 3, 8, 33), Geometry(1, 1, 1, 3),
  ]

  /// Keys and values of the upper layer near those of the lower one.
  static func alike(_ shape: ModelShape, tokens: Int, by part: Float = 0.1, seed: UInt64 = 1) -> Traffic {
    var traffic = Traffic(shape, tokens: tokens, seed: seed)
    var dice = Dice(seed &+ 77)
    for layer in stride(from: 1, to: shape.layers.count, by: 2)
    where shape.layers[layer] == shape.layers[layer - 1] {
      traffic.keys[layer] = traffic.keys[layer - 1].map { 1.5 * $0 + part * dice.normal() }
      traffic.values[layer] = traffic.values[layer - 1].map { 0.5 * $0 + part * dice.normal() }
    }
    return traffic
  }

  /// A cache of one head and two layers, and what it holds of them.
  private func rows(
    _ x: [[Float]], _ y: [[Float]], _ options: String, store: String = "f32"
  ) throws -> (x: [Float], y: [Float], cache: KVCache) {
    let dim = x[0].count
    let shape = ModelShape(layerCount: 2, queryHeads: 1, kvHeads: 1, headDim: dim)
    let cache = try makeCache("\(store)+minicache(from=0,lengths=f32\(options.isEmpty ? "" : "," + options))", shape)
    for (layer, rows) in [x, y].enumerated() {
      let all = rows.flatMap { $0 }
      let view = try TensorView(all.span, heads: 1, tokens: rows.count, dim: dim)
      try cache.append(layer: layer, keys: view, values: TensorView(all.span, heads: 1, tokens: rows.count, dim: dim))
    }
    try cache.finishPrefill()
    return (try cache.read(layer: 0, head: 0).keys, try cache.read(layer: 1, head: 0).keys, cache)
  }

  private func expectRows(_ actual: [Float], _ wanted: [Float], within bound: Float = 2e-6) {
    #expect(actual.count == wanted.count && zip(actual, wanted).allSatisfy { abs($0 - $1) <= bound }, "\(actual)")
  }

  // MARK: Directions

  @Test func workedExamples() throws {
    let right = try rows([[3, 0, 0]], [[0, 4, 0]], "t=0.6,gamma=0")
    expectRows(right.x, [1.763356, 2.427051, 0])
    expectRows(right.y, [2.351141, 3.236068, 0])
    let near = try rows([[3, 4]], [[4, 3]], "t=0.6,gamma=0")
    expectRows(near.x, [3.634433, 3.433787])
    expectRows(near.y, [3.634433, 3.433787])
    // t = 0 is the lower layer's direction, t = 1 the upper's.
    expectRows(try rows([[3, 4]], [[4, 3]], "t=0,gamma=0").x, [3, 4])
    expectRows(try rows([[3, 4]], [[4, 3]], "t=1,gamma=0").y, [4, 3])
  }

  /// The shared direction stands at t times the angle from the lower row, and at the rest from the upper one.
  @Test func anglesFromBothLayers() throws {
    var dice = Dice(5)
    for _ in 0..<20 {
      let (x, y) = (dice.normals(16), dice.normals(16))
      let held = try rows([x], [y], "t=0.3,gamma=0")
      func angle(_ a: [Float], _ b: [Float]) -> Double {
        func dot(_ a: [Float], _ b: [Float]) -> Double { zip(a, b).reduce(0) { $0 + Double($1.0) * Double($1.1) } }
        return acos(min(1, dot(a, b) / (dot(a, a) * dot(b, b)).squareRoot()))
      }
      let whole = angle(x, y)
      #expect(abs(angle(held.x, x) - 0.3 * whole) < 1e-3)
      #expect(abs(angle(held.y, y) - 0.7 * whole) < 1e-3)
      func length(_ a: [Float]) -> Double { a.reduce(0) { $0 + Double($1) * Double($1) }.squareRoot() }
      #expect(abs(length(held.x) - length(x)) < 1e-5 && abs(length(held.y) - length(y)) < 1e-5)
    }
  }

  /// Identical and proportional layers come back as they were; so do rows of zeros, tiny angles and opposite rows.
  @Test func whatIsExact() throws {
    var dice = Dice(9)
    let x = (0..<40).map { _ in dice.normals(24) }
    let same = try rows(x, x, "")
    expectRows(same.x, x.flatMap { $0 })
    expectRows(same.y, x.flatMap { $0 })
    let scaled = x.map { $0.map { 3.5 * $0 } }
    let proportional = try rows(x, scaled, "")
    expectRows(proportional.x, x.flatMap { $0 })
    expectRows(proportional.y, scaled.flatMap { $0 }, within: 1e-5)
    // A zero row on either side, on both; opposite rows, which have no direction between them; nearly parallel ones.
    let zero: [Float] = [0, 0, 0]
    let edges = try rows(
      [zero, [1, 2, 3], zero, [1, 2, 3], [1, 0, 0]], [[1, 2, 3], zero, zero, [-2, -4, -6], [1, 1e-8, 0]],
      "retain=share,share=0")
    expectRows(edges.x, [0, 0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 3, 1, 0, 0])
    expectRows(edges.y, [1, 2, 3, 0, 0, 0, 0, 0, 0, -2, -4, -6, 1, 0, 0])
  }

  /// The keys of a pair may be turned by their position before or after they are merged.
  @Test func commutesWithRotation() throws {
    let rotary = try RotaryEmbedding(headDim: 16)
    var dice = Dice(3)
    let x = (0..<12).map { _ in dice.normals(16) }
    let y = (0..<12).map { row in x[row].map { $0 + 0.3 * dice.normal() } }
    func turned(_ rows: [Float]) throws -> [Float] {
      var rows = rows
      let positions = (0..<Int32(12)).map { $0 + 100 }
      var span = rows.mutableSpan
      try rotary.rotate(&span, stride: 16, positions: positions.span)
      return rows
    }
    let plain = try rows(x, y, "retain=share,share=0")
    func split(_ rows: [Float]) -> [[Float]] { (0..<12).map { Array(rows[$0 * 16..<$0 * 16 + 16]) } }
    let after = try rows(
      split(turned(x.flatMap { $0 })), split(turned(y.flatMap { $0 })), "retain=share,share=0")
    expectRows(after.x, try turned(plain.x), within: 1e-5)
    expectRows(after.y, try turned(plain.y), within: 1e-5)
  }

  // MARK: Retention

  private func kept(_ cache: KVCache) throws -> [Int] {
    let segment = try #require(cache.layers[0].segments[0] as? DirectionSegment)
    return segment.shared.heads[0].keys.exactSlots.withSpan { $0.map { Int($0) } }
  }

  @Test func retentionRules() throws {
    // Angles of 10, 20, 30, 40 and 50 degrees.
    let x: [[Float]] = Array(repeating: [2, 0], count: 5)
    let y = (1...5).map { [Float(cos(Double($0) * .pi / 18)), Float(sin(Double($0) * .pi / 18))] }
    for (options, wanted) in [
      ("retain=distant,gamma=0.3", [3, 4]), ("retain=distant,gamma=0", []),
      ("retain=distant,gamma=1", [0, 1, 2, 3, 4]),
      ("retain=literal,gamma=0.3", [0, 1]), ("retain=literal,gamma=0", []),
      ("retain=literal,gamma=1", [0, 1, 2, 3, 4]),
      ("retain=share,share=0.3", [3, 4]), ("retain=share,share=0", []), ("retain=share,share=1", [0, 1, 2, 3, 4]),
    ] {
      let held = try rows(x, y, options)
      #expect(try kept(held.cache) == wanted, "\(options)")
      for row in wanted {
        // To the bit.
        #expect(Array(held.x[row * 2..<row * 2 + 2]) == x[row] && Array(held.y[row * 2..<row * 2 + 2]) == y[row])
      }
    }
    // All as far apart: none is farther than the others; of equal ones a share takes the first.
    let even = Array(repeating: y[2], count: 5)
    #expect(try kept(rows(x, even, "retain=distant,gamma=0.3").cache).isEmpty)
    #expect(try kept(rows(x, even, "retain=share,share=0.3").cache) == [0, 1])
  }

  /// The prompt's threshold holds for the tokens that follow, and is one for all heads where that is asked for.
  @Test func thresholdsOfThePrompt() throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 2, headDim: 8)
    var traffic = Self.alike(shape, tokens: 60, by: 0.02)
    // The last ten tokens differ more than any of the prompt; those of head 0 differ little in the prompt.
    for token in 50..<60 {
      for head in 0..<2 {
        let row = (head * 60 + token) * 8
        for c in 0..<8 { traffic.keys[1][row + c] = traffic.keys[0][row + 7 - c] }
      }
    }
    for token in 0..<50 {
      for c in 0..<8 { traffic.keys[1][(60 + token) * 8 + c] = traffic.keys[0][(60 + token) * 8 + (c + 1) % 8] }
    }
    for (scope, same) in [("head", false), ("layer", true)] {
      let cache = try makeCache("f32+minicache(from=0,scope=\(scope))", shape)
      try traffic.run(cache, prompt: 50, decoded: 10)
      let segment = try #require(cache.layers[1].segments[0] as? DirectionSegment)
      let heads = segment.shared.heads
      #expect((heads[0].keys.threshold == heads[1].keys.threshold) == same)
      if !same {
        let later = heads[0].keys.exactSlots.withSpan { $0.count { $0 >= 50 } }
        #expect(later == 10)
      }
      #expect(segment.window.slotCount(head: 0) == 0)
    }
  }

  // MARK: Attention

  /// Attention over directions is attention over the rows they stand for.
  @Test(arguments: [
    "f32", "f16", "kivi(bits=4,residual=32)", "kivi(bits=2,residual=32)+rotated", "int8", "cst(bits=4,gap=20)",
    "ggml(keys=q8_0,values=q4_0)",
  ])
  func attentionIsThatOfTheRows(store: String) throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      withEvery("options", in: ["gamma=0.3", "retain=share,share=0.2,lengths=f32", "gamma=1"]) { options in
        let policy = try PolicyRegistry.standard.policy("\(store)+minicache(from=0,\(options))")
        let own = try geometry.fitting(policy)
        // A rotation takes channels in pairs.
        if store.contains("rotated"), own.keyDim % 2 == 1 || own.valueDim % 2 == 1 { return }
        let shape = own.shape(layers: 2)
        let traffic = Self.alike(shape, tokens: 140)
        let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 2))
        for layer in 0..<2 { try traffic.append(cache, layer, 0..<70) }
        try cache.finishPrefill()
        for queries in [1, 3, 40] {
          let first = cache.tokensSeen(layer: 0)
          for layer in 0..<2 { try traffic.checkedStep(cache, layer, first..<first + queries) }
        }
        check(cache.bytes.total == cache.backend.memory.liveBytes, "bytes")
      }
    }
  }

  /// Many blocks of rows, several extents, many and few queries; every CPU level.
  @Test func longPrompts() throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 4, kvHeads: 1, headDim: 16)
    let traffic = Self.alike(shape, tokens: 5010)
    var first: [[Float]] = []
    for level in Backend.cpuLevels.reversed() {
      let cache = try makeCache("f16+minicache(from=0)", shape, backend: .cpu(threads: 2, level: level))
      for layer in 0..<2 { try traffic.append(cache, layer, 0..<5000) }
      try cache.finishPrefill()
      for layer in 0..<2 { try traffic.checkedStep(cache, layer, 5000..<5001) }
      let held = try (0..<2).map { try cache.read(layer: $0, head: 0).keys }
      if first.isEmpty { first = held }
      checkSame(held[0], first[0], "lower rows at \(level)")
      checkSame(held[1], first[1], "upper rows at \(level)")
    }
  }

  /// A scorer's window attention and the sums that decoding observes read directions as attention does.
  @Test func scorersReadDirections() throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 4, kvHeads: 2, headDim: 16)
    let traffic = Self.alike(shape, tokens: 120)
    for selection in ["h2o(budget=30)", "snapkv(budget=30,window=5,kernel=3)+schedule(every=4)", "tova(budget=30)"] {
      // gamma=1: every row is exact, so both choose what the dense cache chooses.
      let cache = try makeCache("\(selection)+f32+minicache(from=0,gamma=1,lengths=f32)", shape)
      let dense = try makeCache("\(selection)+f32", shape)
      let a = try traffic.run(cache, prompt: 90, decoded: 30, chunk: 40)
      let b = try traffic.run(dense, prompt: 90, decoded: 30, chunk: 40)
      checkClose(a, b, "\(selection)")
      #expect(try positions(cache) == positions(dense), "\(selection)")
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    }
  }

  // MARK: Bytes

  /// One direction for two layers, a length each, exact rows of both and their slots.
  @Test func bytesAreTheClosedForm() throws {
    let (tokens, dim) = (1000, 64)
    let shape = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 2, headDim: dim)
    let traffic = Self.alike(shape, tokens: tokens)
    let cache = try makeCache("f16+minicache(from=0,retain=share,share=0.05)", shape)
    for layer in 0..<2 { try traffic.append(cache, layer, 0..<tokens) }
    try cache.finishPrefill()
    let exact = 50
    #expect(
      cache.bytes
        == ByteCount(
          payload: 2 * 2 * (tokens + 2 * exact) * dim * 2, metadata: 2 * 2 * 2 * tokens * 2,
          index: 2 * 2 * exact * 4))
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// A prompt of some dozen tokens is smaller too: exact rows take the room they need, and as more come a little more.
  @Test(arguments: [(64, 0.60), (96, 0.60), (200, 0.60)])
  func shortPromptsGain(tokens: Int, limit: Double) throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 2, headDim: 128)
    let traffic = Self.alike(shape, tokens: tokens + 40)
    func bytes(_ text: String, decoded: Int) throws -> ByteCount {
      let cache = try makeCache(text, shape)
      try traffic.run(cache, prompt: tokens, decoded: decoded)
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
      if decoded == 0 { #expect(try cache.policy.estimate(shape: shape, prompt: tokens) == cache.bytes) }
      return cache.bytes
    }
    let text = "f16+minicache(from=0,retain=share,share=0.05)"
    let ratio = Double(try bytes(text, decoded: 0).total) / Double(try bytes("f16", decoded: 0).total)
    #expect(ratio < limit, "\(ratio) of dense rows")
    let later = Double(try bytes(text, decoded: 40).total) / Double(try bytes("f16", decoded: 40).total)
    #expect(later < 0.75, "\(later) of dense rows after 40 tokens")
  }

  /// The paper's fivefold: four bits, and half of the layers share their directions.
  @Test func fourBitsOfAHalf() throws {
    let shape = ModelShape(layerCount: 4, queryHeads: 1, kvHeads: 1, headDim: 128)
    let tokens = 8192
    let traffic = Self.alike(shape, tokens: tokens)
    func bytes(_ text: String) throws -> Int {
      let cache = try makeCache(text, shape)
      for layer in 0..<4 { try traffic.append(cache, layer, 0..<tokens) }
      try cache.finishPrefill()
      return cache.bytes.total
    }
    let dense = 4 * 2 * tokens * 128 * 2
    // Exact rows are dense, and scales and minima are counted: 4.0 times 1.284, as the paper counts, is out of reach.
    for (store, share, least) in [
      ("kivi(bits=4,group=64,residual=64)", 0.01, 4.5), ("kivi(bits=4,group=128)", 0.01, 4.7),
      ("cst(bits=4)", 0.05, 4.49), ("cst(bits=4)", 0.01, 4.93), ("cst(bits=4)", 0, 5.05),
    ] {
      let ratio = Double(dense) / Double(try bytes("\(store)+minicache(retain=share,share=\(share))"))
      #expect(ratio > least, "\(store), \(share) exact: \(ratio)")
    }
    let alone = Double(dense) / Double(try bytes("f16+minicache(retain=share)"))
    #expect(abs(alone - 1.284) < 0.02, "\(alone)")
  }

  // MARK: Life

  static let lives = [
    "f16+minicache(from=0)", "kivi(bits=4,residual=32)+minicache(from=0,retain=share,share=0.2)",
    "int8+minicache(from=0,scope=layer,gamma=0.4,lengths=bf16)", "cst(bits=4,gap=16)+minicache(from=0,retain=literal)",
    "h2o(budget=40)+f16+minicache(from=0)", "streaming(recent=30,sinks=2,positions=slot)+f16+minicache(from=0)",
    "h2o(budget=40)+kivi(bits=4,residual=32)+minicache(from=0)",
  ]

  /// Forks go their own way over shared memory; a saved cache continues with the same bits.
  @Test(arguments: lives)
  func forksAndFiles(text: String) throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 5, rotary: true)
    let traffic = Self.alike(shape, tokens: 200)
    let cache = try makeCache(text, shape)
    try traffic.run(cache, prompt: 100, decoded: 20)
    #expect(cache.layers[0].segments[0] is DirectionSegment && cache.layers[4].segments[0] is RowSegment)
    #expect(cache.status[2].reason.contains("layers 3"))
    try checkForksAndFiles(cache, traffic, continuing: 120..<200, loadedWithin: 1e-4)
  }

  /// A cache saved before its pairs are complete waits on, loaded.
  @Test func filesOfAHalfFinishedPrompt() throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 1, headDim: 16)
    let traffic = Self.alike(shape, tokens: 60)
    let cache = try makeCache("kivi(bits=4,residual=32)+minicache(from=0)", shape)
    for layer in 0..<2 { try traffic.append(cache, layer, 0..<50) }
    try cache.finishPrefill(layer: 0)
    let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu(threads: 1))
    for one in [cache, loaded] {
      let waiting = try #require(one.layers[0].segments[0] as? RowSegment)
      #expect(waiting.heads[0].keys.bodyRows == 0)
      try one.finishPrefill(layer: 1)
      #expect(one.layers[0].segments[0] is DirectionSegment)
    }
    #expect(try Snapshot(loaded) == Snapshot(cache))
  }

  /// Merged tokens can be cut off where nothing else knows of them: directions are made token by token.
  @Test func trimming() throws {
    let shape = ModelShape(layerCount: 3, queryHeads: 2, kvHeads: 2, headDim: 16)
    let traffic = Self.alike(shape, tokens: 140)
    let cache = try makeCache("f16+minicache(from=0,gamma=0.5)", shape)
    try traffic.run(cache, prompt: 100, decoded: 5)
    let before = try Snapshot(cache).heads
    for token in 105..<140 { try traffic.step(cache, token..<token + 1) }
    #expect(cache.minimumTrim == 100)
    expectError(.irreversible, "compressed", layer: 0) { try cache.trim(to: 99) }
    try cache.trim(to: 105)
    #expect(try Snapshot(cache).heads == before)
    let other = try makeCache("f16+minicache(from=0,gamma=0.5)", shape)
    let outputs = try traffic.run(other, prompt: 100, decoded: 40)
    var again: [Float] = []
    for token in 105..<140 { again += try traffic.step(cache, token..<token + 1) }
    checkClose(again, Array(outputs.suffix(again.count)), "decoded again")
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)

    let coded = try makeCache("kivi(bits=4,residual=32)+minicache(from=0)", shape)
    try traffic.run(coded, prompt: 100, decoded: 40)
    #expect(coded.minimumTrim == 140 - 140 % 32 || coded.minimumTrim == 108)
    try coded.trim(to: coded.minimumTrim)
    #expect(coded.bytes.total == coded.backend.memory.liveBytes)
  }

  /// A second prompt joins the tokens of the first.
  @Test func secondPrompt() throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 2, headDim: 16)
    let traffic = Self.alike(shape, tokens: 120)
    let cache = try makeCache("kivi(bits=4,residual=32)+minicache(from=0)", shape)
    try traffic.run(cache, prompt: 50, decoded: 3)
    cache.beginPrefill()
    try traffic.step(cache, 53..<100)
    try cache.finishPrefill()
    for token in 100..<120 { for layer in 0..<2 { try traffic.checkedStep(cache, layer, token..<token + 1) } }
    let segment = try #require(cache.layers[0].segments[0] as? DirectionSegment)
    #expect(segment.frozen == [120, 120])
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// Layers that dropped different tokens share the directions of those both have; the others keep their own.
  @Test func tokensOfOneLayerAlone() throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 2, headDim: 16)
    let traffic = Self.alike(shape, tokens: 100)
    let cache = try makeCache("h2o(budget=20)+schedule(every=0)+f32+minicache(from=0,lengths=f32,gamma=0)", shape)
    let dense = try makeCache("h2o(budget=20)+schedule(every=0)+f32", shape)
    try traffic.run(cache, prompt: 80)
    try traffic.run(dense, prompt: 80)
    let kept = try positions(dense)
    #expect(try positions(cache) == kept && kept[0] != kept[1])
    for layer in 0..<2 {
      for head in 0..<2 {
        let held = try cache.read(layer: layer, head: head)
        for (row, position) in kept[layer][head].enumerated() where !kept[1 - layer][head].contains(position) {
          expectRows(Array(held.keys[row * 16..<row * 16 + 16]), Array(traffic.key(layer, head, position)))
        }
      }
    }
    for token in 80..<100 { for layer in 0..<2 { try traffic.checkedStep(cache, layer, token..<token + 1) } }
  }

  /// Memory of tokens that both layers dropped is given back.
  @Test func dropsWhileDecoding() throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 2, headDim: 16)
    let traffic = Self.alike(shape, tokens: 600)
    for store in ["f16", "kivi(bits=4,residual=32)"] {
      let cache = try makeCache(
        "streaming(recent=100,sinks=2,positions=keep)+\(store)+minicache(from=0,gamma=0.3)", shape)
      try traffic.run(cache, prompt: 300, decoded: 20)
      let bytes = cache.bytes.total
      for token in 320..<600 { try traffic.step(cache, token..<token + 1) }
      #expect(try cache.rows(layer: 0, head: 0) == [0, 1] + Array(500..<600))
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
      #expect(cache.bytes.total < bytes * 3 / 2, "\(bytes) became \(cache.bytes.total)")
    }
  }

  @Test func tokensOneByOneFromTheFirst() throws {
    for geometry in Self.geometries {
      let shape = geometry.shape(layers: 3)
      let traffic = Self.alike(shape, tokens: 20)
      for text in ["f16+minicache(from=0)", "streaming(recent=5,sinks=1,positions=keep)+f16+minicache(from=0)"] {
        let cache = try makeCache(text, shape)
        try traffic.run(cache, prompt: 1, decoded: 19)
        #expect(cache.bytes.total == cache.backend.memory.liveBytes)
        // An odd layer out stays as the store left of minicache says.
        #expect(cache.layers[2].segments[0] is RowSegment)
      }
    }
  }

  /// Which layers are pairs: the deeper half, of one shape, without a sliding window.
  @Test func pairs() throws {
    func groups(_ text: String, _ layers: [LayerShape]) throws -> [[Int]] {
      try makeCache(text, ModelShape(layers: layers)).groups.map(\.layers)
    }
    let layer = Geometry(2, 2, 16).layer()
    #expect(try groups("minicache", Array(repeating: layer, count: 8)) == [[4, 5], [6, 7]])
    #expect(try groups("minicache", Array(repeating: layer, count: 7)) == [[3, 4], [5, 6]])
    #expect(try groups("minicache(from=3)", Array(repeating: layer, count: 8)) == [[3, 4], [5, 6]])
    #expect(try groups("minicache", [layer]).isEmpty)
    let other = Geometry(4, 1, 16).layer()
    #expect(try groups("minicache(from=0)", [layer, layer, other, layer, layer]) == [[0, 1], [3, 4]])
    let sliding = Geometry(2, 2, 16).layer(slidingWindow: 8)
    #expect(try groups("minicache(from=0)", [sliding, layer, sliding, layer]) == [[1, 3]])
  }

  @Test func refusals() throws {
    for text in [
      "minicache(t=1.5)", "minicache(gamma=-1)", "minicache(share=2)", "minicache(retain=near)", "minicache(from=1.5)",
      "minicache(lengths=int8)", "minicache(scope=token)",
    ] {
      #expect(throws: KVError.self, "\(text)") { _ = try PolicyRegistry.standard.policy(text) }
    }
    for text in ["svd+minicache", "kivi(bits=2)+balanced+minicache", "minicache+minicache"] {
      #expect(throws: KVError.self, "\(text)") { _ = try PolicyRegistry.standard.policy(text) }
    }
    // No other store may take some layers: a pair could lose one of its two.
    #expect(throws: KVError.self) {
      _ = try makeCache("f16+minicache+layers(first=1,last=0)+f32", Geometry(2, 2, 16).shape(layers: 4))
    }
  }

  /// A length that its type cannot hold leaves both rows exact.
  @Test func longRows() throws {
    let shape = ModelShape(layerCount: 2, queryHeads: 1, kvHeads: 1, headDim: 16)
    var traffic = Self.alike(shape, tokens: 20)
    for c in 0..<16 {
      traffic.keys[0][5 * 16 + c] = 30000
      traffic.keys[1][5 * 16 + c] = 20000
    }
    let cache = try makeCache("f16+minicache(from=0,retain=share,share=0)", shape)
    for layer in 0..<2 { try traffic.append(cache, layer, 0..<20) }
    try cache.finishPrefill()
    #expect(try cache.read(layer: 0, head: 0).keys[5 * 16..<6 * 16].allSatisfy { $0 == 30000 })
    #expect(try cache.read(layer: 1, head: 0).keys[5 * 16..<6 * 16].allSatisfy { $0 == 20000 })
  }
}
