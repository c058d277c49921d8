import Foundation
import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Keys of several heads side by side before their rotary embedding, and codes around an integer zero point.
@Suite struct RotateKVTests {
  static let geometries = [
    Geometry(2, 2, 40), Geometry(4, 4, 64), Geometry(16, 1, 16, 9), Geometry(6, 3, 8, 33), Geometry(8, 8, 32),
  ]

  /// A permutation of n channels.
  static func order(_ n: Int, seed: UInt64) -> [Int] {
    var dice = Dice(seed)
    var order = Array(0..<n)
    for index in order.indices.dropFirst() { order.swapAt(index, dice.below(index + 1)) }
    return order
  }

  /// A calibration made in code, one order a layer.
  static func calibration(_ orders: [[Int]]) throws -> NamedCalibration {
    var tensors: [Calibration.Name: Calibration.Tensor] = [:]
    for (layer, order) in orders.enumerated() {
      tensors[Calibration.Name(layer: layer, side: .keys, quantity: "order")] =
        Calibration.Tensor(shape: [1, order.count], integers: order.map { Int32($0) })
    }
    return NamedCalibration(try Calibration(tensors, metadata: ["rope": "pre"]))
  }

  static func store(
    _ geometry: Geometry, bits: Int = 8, layers: Int = 2, gap: Int = 32, window: ElementType = .f32
  ) throws -> Store {
    try .rotateKV(
      keyBits: bits, group: 32, clip: 1,
      calibration: calibration(
        (0..<layers).map { Self.order(geometry.kvHeads * geometry.keyDim, seed: UInt64($0)) }), gap: gap,
      window: window, metadata: .f32)
  }

  /// Attention over the cache is attention over the rows it restores, for any head count and number of queries.
  @Test func attendsOverRestoredRows() throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      withEvery("queries", in: [1, 33]) { queries in
        let shape = try geometry.shape(layers: 2, rotary: true)
        let traffic = Traffic(shape, tokens: 90 + queries)
        let store = try Self.store(geometry, bits: 4)
        let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 2))
        try traffic.run(cache, prompt: 61, decoded: 29, chunk: 40)
        for layer in 0..<2 {
          let range = 90..<90 + queries
          try traffic.append(cache, layer, range)
          let held = try (0..<geometry.kvHeads).map { try cache.read(layer: layer, head: $0) }
          let output = try traffic.attend(cache, layer, range)
          let oracle = try Oracle(
            held, shape.layers[layer], queries: traffic.queries(layer, range), tokens: queries, firstPosition: 90)
          let worst = zip(output, oracle.outputs).map { abs(Double($0) - $1) }.max() ?? 0
          // Kernels over the codes of values round weights.
          check(output.count == oracle.outputs.count && worst < 2e-3, "off by \(worst)")
        }
      }
    }
  }

  /// Eight bits lose little, whatever the rotation and the order: rows come back in place.
  @Test func rowsComeBack() throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      let shape = try geometry.shape(layers: 2, rotary: true)
      let traffic = Traffic(shape, tokens: 70)
      let cache = try KVCache(shape: shape, policy: Policy(store: Self.store(geometry)), backend: .cpu(threads: 1))
      try traffic.run(cache, prompt: 70, decoded: 0, chunk: 40)
      for layer in 0..<2 {
        for head in 0..<geometry.kvHeads {
          let held = try cache.read(layer: layer, head: head)
          check(held.positions == Array(0..<70), "positions")
          let keys = (0..<70).flatMap { traffic.key(layer, head, $0) }
          let values = (0..<70).flatMap { traffic.value(layer, head, $0) }
          // A group of 32 spans at most 2·√32 times the largest row, in 255 steps; the way back adds up errors of a row.
          check(LowRankTests.worst(held.keys, keys) < 0.1, "keys off by \(LowRankTests.worst(held.keys, keys))")
          check(LowRankTests.worst(held.values, values) < 0.1, "values")
        }
      }
    }
  }

  /// The bytes of a store and of an estimate, and codes that depend on the tokens alone, not on how they came.
  @Test func bytesAndBatches() throws {
    let geometry = Geometry(8, 4, 32)
    let shape = try geometry.shape(layers: 1, rotary: true)
    let traffic = Traffic(shape, tokens: 84)
    withEvery("bits", in: [2, 3, 4, 8]) { bits in
      var bodies: [[UInt32]] = []
      withEvery("chunk", in: [1, 3, 7, 84]) { chunk in
        let store = try Self.store(geometry, bits: bits, layers: 1, gap: 1)
        let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 1))
        try traffic.run(cache, prompt: chunk, decoded: 0, chunk: chunk)
        for start in stride(from: chunk, to: 84, by: chunk) { try traffic.step(cache, start..<min(start + chunk, 84)) }
        let segment = try #require(cache.layers[0].segments[0] as? LowRankSegment)
        let sides = try #require(segment.lowRank.sides)
        let stores = sides.keys.stores + sides.values.stores
        check(stores.allSatisfy { $0.bodyRows == 84 }, "rows: \(stores.map(\.bodyRows))")
        let bodies_ = stores.map { EncodedBody($0) }
        check(bodies_[0].payloadBytes == 84 * 4 * 32 * bits / 8, "codes: \(bodies_[0].payloadBytes)")
        check(bodies_[0].metadataBytes == 84 * 4 * 2 * 4, "metadata: \(bodies_[0].metadataBytes)")
        bodies.append(bodies_.flatMap(\.words))
      }
      check(bodies.count == 4 && bodies.allSatisfy { $0 == bodies[0] }, "codes depend on how tokens came")
    }
  }

  // MARK: The integer zero point

  private func encode(_ row: [Float], _ encoding: RowEncoding) throws -> (codes: [UInt32], restored: [Float]) {
    let backend = try Backend.cpu(threads: 1).operations
    let dim = row.count
    let extent = try Extent(encoding: encoding, capacity: 1, dim: dim, backend: backend)
    var row = row
    row.withUnsafeMutableBytes {
      let run = RowRun(encoding: .dense(.f32), dim: dim, capacity: 1, base: $0.baseAddress!)
      backend.transcode([RunSlice(run: run, first: 0, count: 1)], to: extent.run(dim: dim), row: 0)
    }
    var restored = [Float](repeating: .nan, count: dim)
    restored.withUnsafeMutableBufferPointer {
      backend.read(RunSlice(run: extent.run(dim: dim), first: 0, count: 1), into: $0.baseAddress!, stride: dim)
    }
    let word = extent.buffer.base.load(as: UInt32.self)
    let mask = UInt32(1) << UInt32(encoding.bits) - 1
    return ((0..<dim).map { word >> UInt32($0 * encoding.bits) & mask }, restored)
  }

  private func zero(
    _ bits: Int, clip: Double = 1, squared: Bool = false, metadata: ElementType = .f32
  ) throws -> RowEncoding {
    try .affinePerToken(
      bits: bits, group: 8, zero: ZeroPoint(clip: clip, squaredLevels: squared), metadata: metadata)
  }

  @Test func zeroPoint() throws {
    // s = 2/3, z = 1.
    let two = try encode([0.1, 0.9, -0.5, 1.5], zero(2))
    #expect(two.codes == [1, 2, 0, 3])
    #expect(LowRankTests.worst(two.restored, [0, 2 / 3, -2 / 3, 4 / 3]) < 1e-6)
    // s = 2/15, z = 4 (3.75 rounded).
    let four = try encode([0.1, 0.9, -0.5, 1.5], zero(4))
    #expect(four.codes == [5, 11, 0, 15])
    // A range that holds zero represents it exactly.
    let row: [Float] = [0, -3.7, 1.9, 0.2, -0.4, 2.2, 0, 1]
    for bits in [2, 4] {
      let restored = try encode(row, zero(bits)).restored
      #expect(restored[0] == 0 && restored[6] == 0)
    }
    // One that does not keeps its zero point outside of the codes.
    let above = try encode([5, 5.1, 5.2, 5.3], zero(2))
    #expect(above.codes == [0, 1, 2, 3] && LowRankTests.worst(above.restored, [5, 5.1, 5.2, 5.3]) < 1e-5)
    // Far from zero rounding to integers has no bits left in f32 sums, and still loses half a step at most.
    let far: [Float] = [1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3]
    let restored = try encode(far, zero(2)).restored
    #expect(LowRankTests.worst(restored, far) <= 0.5)
  }

  @Test func clipShrinksExtremes() throws {
    let row: [Float] = [-2, -1, 0, 1, 2, 0.5, -0.5, 0.25]
    let clipped = try encode(row, zero(2, clip: 0.8)).restored
    let range = (clipped.max() ?? 0) - (clipped.min() ?? 0)
    #expect(abs(range - 0.8 * 4) < 1e-6, "the range is 0.8 of that of the row; got \(range)")
  }

  /// Three bits over 8 steps: the top code's range is lost, as in the authors' code.
  @Test func squaredLevels() throws {
    let row: [Float] = [0, 1, 2, 3, 4, 5, 6, 7]
    let exact = try encode(row, zero(3)).restored
    #expect(LowRankTests.worst(exact, row) < 1e-6)
    let squared = try encode(row, zero(3, squared: true)).restored
    #expect(abs((squared.max() ?? 0) - 7 * 7 / 8) < 1e-6)
    for bits in [2, 4] {
      let (exact, authors) = (try encode(row, zero(bits)), try encode(row, zero(bits, squared: true)))
      #expect(exact.restored == authors.restored)
    }
  }

  /// Groups without a range, at the end of f16, and of numbers that f16 steps cannot tell apart.
  @Test func extremeGroups() throws {
    for value: Float in [0, 1.5, -7, 65504, -65504, 0x1p-24] {
      for clip in [1, 0.8] {
        let restored = try encode(Array(repeating: value, count: 8), zero(2, clip: clip, metadata: .f16)).restored
        #expect(restored.allSatisfy { $0 == value })
      }
    }
    let ends = try encode([65504, -65504, 0, 1, 2, 3, 4, 5], zero(4, metadata: .f16)).restored
    #expect(ends.allSatisfy { $0.isFinite })
    let denormal = try encode([0x1p-149, 0, 0x1p-140, 0, 0, 0, 0, 0], zero(2, metadata: .f16)).restored
    #expect(denormal.allSatisfy { $0 == 0 })
  }

  @Test func refusals() throws {
    for clip in [0, -1, 1.01, 0.805, .nan] {
      expectError(.invalidOption, "clip") { _ = try ZeroPoint(clip: clip) }
    }
    expectError(.invalidOption, "once", layer: 0) {
      _ = try Store.rotateKV(calibration: Self.calibration([[0, 1, 1, 3]]))
    }
    let name = Calibration.Name(layer: 0, side: .keys, quantity: "order")
    let order = Calibration.Tensor(shape: [1, 2], integers: [1, 0])
    expectError(.invalidOption, "rope=pre") {
      _ = try Store.rotateKV(calibration: NamedCalibration(Calibration([name: order], metadata: ["rope": "post"])))
    }
    let other = Calibration.Name(layer: 0, side: .values, quantity: "order")
    expectError(.missingInput, "order") {
      _ = try Store.rotateKV(calibration: NamedCalibration(Calibration([other: order])))
    }
    let heads = Calibration.Tensor(shape: [2, 2], integers: [1, 0, 0, 1])
    expectError(.shapeMismatch, "[2, 2]", layer: 0) {
      _ = try Store.rotateKV(calibration: NamedCalibration(Calibration([name: heads])))
    }
    expectError(.invalidOption, "heads together") { _ = try Store.rotateKV(heads: 3) }
    let geometry = Geometry(4, 4, 16)
    let shape = try geometry.shape(layers: 2, rotary: true)
    let short = Policy(store: try .rotateKV(calibration: Self.calibration([Self.order(64, seed: 1)])))
    expectError(.missingInput, "order", layer: 1) { _ = try KVCache(shape: shape, policy: short, backend: .cpu()) }
    let narrow = Policy(
      store: try .rotateKV(calibration: Self.calibration([Self.order(32, seed: 1), Self.order(64, seed: 1)])))
    expectError(.shapeMismatch, "64", layer: 0) { _ = try KVCache(shape: shape, policy: narrow, backend: .cpu()) }
    let plain = geometry.shape(layers: 2)
    expectError(.missingInput, "rotary") {
      _ = try KVCache(shape: plain, policy: Policy(store: .rotateKV()), backend: .cpu())
    }
    // A rotation gathers a row in one channel: what could become infinite is refused when it comes.
    let cache = try KVCache(shape: shape, policy: Policy(store: .rotateKV()), backend: .cpu())
    let large = [Float](repeating: 60000, count: 4 * 16)
    expectError(.unrepresentable, "wider", layer: 0, head: 0, position: 0) {
      try cache.append(
        layer: 0, keys: TensorView(large.span, heads: 4, tokens: 1, dim: 16),
        values: TensorView(large.span, heads: 4, tokens: 1, dim: 16))
    }
    #expect(cache.tokensSeen(layer: 0) == 0)
  }

  /// An order by the path of its file: the text says which, a saved cache finds it again, and a file that changed is
  /// refused.
  @Test func calibrationByPath() throws {
    let path = FileManager.default.temporaryDirectory.appending(path: "rotatekv-\(UUID().uuidString).safetensors")
      .path()
    defer { try? FileManager.default.removeItem(atPath: path) }
    let geometry = Geometry(4, 2, 32)
    let shape = try geometry.shape(layers: 2, rotary: true)
    func orders(_ seed: UInt64) throws -> NamedCalibration {
      try Self.calibration([Self.order(64, seed: seed), Self.order(64, seed: seed + 1)])
    }
    try orders(1).calibration.write(to: path)
    let traffic = Traffic(shape, tokens: 50)
    let cache = try makeCache("rotatekv(bits=4,group=32,calibration=\"\(path)\")", shape)
    try traffic.run(cache, prompt: 40)
    let plain = try makeCache("rotatekv(bits=4,group=32)", shape)
    try traffic.run(plain, prompt: 40)
    #expect(try cache.read(layer: 1, head: 0) != plain.read(layer: 1, head: 0))
    let code = try KVCache(
      shape: shape, policy: Policy(store: .rotateKV(keyBits: 4, group: 32, calibration: orders(1))), backend: .cpu())
    try traffic.run(code, prompt: 40)
    #expect(try cache.read(layer: 1, head: 0) == code.read(layer: 1, head: 0))
    let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu())
    #expect(try loaded.read(layer: 1, head: 1) == cache.read(layer: 1, head: 1))
    // No text can name what was made in code.
    expectError(.missingInput, "in code") { _ = try KVCache.load(saved: code.saved(), backend: .cpu()) }
    try orders(5).calibration.write(to: path)
    expectError(.invalidOption, "xxh64-") { _ = try KVCache.load(saved: cache.saved(), backend: .cpu()) }
  }

  /// Sinks stay exact in a store of their own.
  @Test func sinksStayDense() throws {
    let geometry = Geometry(4, 4, 16)
    let shape = try geometry.shape(layers: 1, rotary: true)
    let traffic = Traffic(shape, tokens: 60)
    let cache = try makeCache("tiers(shares=[0,1],sinks=5,every=1)+f16+rotatekv(bits=2,group=32,gap=8)", shape)
    try traffic.run(cache, prompt: 40, decoded: 20)
    let counts = cache.layers[0].segments.map { $0.liveCount(head: 0) }
    #expect(counts == [5, 55])
    for head in 0..<4 {
      let held = try cache.read(layer: 0, head: head)
      #expect(held.positions == Array(0..<60))
      checkSame(Array(held.keys[..<(5 * 16)]), (0..<5).flatMap { traffic.key(0, head, $0) }, "sinks")
    }
  }

  /// A store per layer that heads share: rows leave when every head let them go, and forks and files hold the same.
  @Test func headsThatHoldDifferentTokens() throws {
    let geometry = Geometry(4, 2, 32)
    let shape = try geometry.shape(layers: 2, rotary: true)
    let traffic = Traffic(shape, tokens: 90)
    let cache = try makeCache("snapkv(budget=24,window=4)+rotatekv(bits=4,group=32,gap=4)", shape)
    try traffic.run(cache, prompt: 61, decoded: 20, chunk: 40)
    let copy = try KVCache.load(saved: cache.saved(), policy: cache.policy, shape: shape, backend: .cpu(threads: 2))
    let fork = cache.fork()
    for other in [copy, fork] {
      for layer in 0..<2 {
        for head in 0..<2 {
          let (a, b) = (try cache.read(layer: layer, head: head), try other.read(layer: layer, head: head))
          #expect(a.positions == b.positions)
          checkSame(a.keys, b.keys, "keys")
        }
      }
    }
    let outputs = try [cache, copy, fork].map { try traffic.step($0, 81..<82) }
    for output in outputs { #expect(output.count == outputs[0].count) }
    checkSame(outputs[1], outputs[0], "loaded")
    checkSame(outputs[2], outputs[0], "forked")
    #expect(cache.bytes.total > 0)
  }
}
