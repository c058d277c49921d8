import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// ZipCache's codec as a store.
@Suite struct CSTTests {
  static let stores = [
    "cst(bits=4,gap=32)", "cst(bits=2,gap=20,keys=separable)", "cst(key_bits=3,value_bits=8,gap=25,metadata=f32)",
    "cst(bits=4,gap=16,window=bf16,metadata=bf16)", "cst(bits=4,gap=32)+rotated",
  ]

  private func held(
    _ store: Store, _ rows: [[Float]]
  ) throws -> (contents: HeadContents, rows: RowStore, cache: KVCache) {
    let dim = rows[0].count
    let cache = try KVCache(
      Policy(store: store), queryHeads: 1, kvHeads: 1, dim: dim)
    let tensor = try HeadTensor(heads: 1, tokens: rows.count, dim: dim, elements: rows.flatMap { $0 })
    try cache.append(tensor, tensor)
    try cache.finishPrefill()
    return (try cache.read(layer: 0, head: 0), try cache.segment.heads[0].values, cache)
  }

  /// The specification's example at 4 bits.
  @Test func workedExample() throws {
    let rows: [[Float]] = [[1, -8, 0.5, 2], [2, 4, -0.25, -1], [-4, 2, 1, 0.5]]
    let store = try Store.cst(keyBits: 4, keys: .separable, gap: 1, window: .f32, metadata: .f32)
    let (contents, values, cache) = try held(store, rows)
    let body = EncodedBody(values)
    let near = { (a: [Float], b: [Float]) in a.count == b.count && zip(a, b).allSatisfy { abs($0 - $1) < 1e-5 } }
    #expect(near(body.scales, [0.282843, 0.141421, 0.2]))
    #expect(near(body.minima, [-2.828427, -0.707107, -2]))
    let codes: [[UInt32]] = [[12, 0, 12, 15], [12, 15, 3, 0], [0, 14, 15, 12]]
    #expect(body.words == codes.map { $0.reversed().reduce(0) { $0 << 4 | $1 } })
    let worst = zip(contents.values, rows.flatMap { $0 }).map { abs($0 - $1) }.max() ?? 0
    #expect(abs(worst - 0.26274) < 1e-5)
    #expect(near(contents.keys, contents.values))
    // Four factors a side; two numbers a token and side.
    #expect(cache.bytes.metadata == 2 * (4 * 4 + 3 * 2 * 4))
  }

  /// Keys per channel of the batch: the least and largest of each channel come back as they were.
  @Test(arguments: [2, 3, 4, 8])
  func channelExtremes(bits: Int) throws {
    var dice = Dice(7)
    let rows = (0..<150).map { _ in dice.normals(12) }
    let (contents, _, cache) = try held(try .cst(keyBits: bits, window: .f32, metadata: .f32), rows)
    for c in 0..<12 {
      let column = rows.map { $0[c] }
      let own = stride(from: c, to: contents.keys.count, by: 12).map { contents.keys[$0] }
      let (low, high) = (column.min() ?? 0, column.max() ?? 0)
      #expect(own.min() == low && abs((own.max() ?? 0) - high) < 1e-5)
      let half = (high - low) / Float(1 << bits - 1) / 2
      #expect(zip(own, column).allSatisfy { abs($0 - $1) <= half * 1.0001 })
    }
    // b bits an element; a step and a minimum a channel.
    let store = try cache.segment.heads[0].keys
    let body = EncodedBody(store)
    #expect(body.payloadBytes == 150 * RowEncoding.wordsPerRow(dim: 12, bits: bits) * 4 && body.metadataBytes == 0)
    #expect(store.extents.compactMap { $0.map?.numbers?.byteCount } == [2 * 12 * 4])
  }

  /// Traps: a channel of zeros, equal rows, one token, fewer than a batch, 65504 and denormals.
  @Test func edges() throws {
    let (zeros, _, _) = try held(try .cst(keyBits: 2, gap: 4), Array(repeating: [0, 1, -2], count: 9))
    let wanted: [Float] = [0, 1, -2]
    #expect(zeros.values.enumerated().allSatisfy { abs($1 - wanted[$0 % 3]) <= 0.5 })
    #expect(zeros.keys.enumerated().allSatisfy { $1 == wanted[$0 % 3] })
    let (one, values, cache) = try held(try .cst(), [[1, 2, 3]])
    #expect(one.keys == [1, 2, 3] && one.values == [1, 2, 3] && values.tailRows == 1)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    let far = (0..<40).map { Float($0 % 2 == 0 ? 65504 : -65504) }
    let (extreme, _, _) = try held(try .cst(keyBits: 8, metadata: .f32), far.map { [$0, 1e-7, $0 / 2] })
    #expect(extreme.keys.allSatisfy(\.isFinite) && extreme.values.allSatisfy(\.isFinite))
    #expect(abs(extreme.keys[0] - 65504) < 300)
    for bad in [Float.nan, .infinity] {
      let cache = try KVCache(Policy(store: .cst()), queryHeads: 1, kvHeads: 1, dim: 2)
      let tensor = try HeadTensor(heads: 1, tokens: 2, dim: 2, elements: [1, 2, 3, bad])
      expectError(.nonFinite, layer: 0, head: 0, position: 1) { try cache.append(tensor, tensor) }
    }
  }

  /// Rows far beyond those of the prompt get factors of their own instead of infinity.
  @Test func laterRowsBeyondTheFactors() throws {
    let cache = try KVCache(
      Policy(store: try .cst(keyBits: 8, keys: .separable, gap: 4)), queryHeads: 1, kvHeads: 1, dim: 4)
    for (round, size) in [Float(1e-4), 1, 1e4].enumerated() {
      let rows = (0..<32).map { size * Float($0 % 7 - 3) }
      let tensor = try HeadTensor(heads: 1, tokens: 8, dim: 4, elements: rows)
      try cache.append(tensor, tensor)
      if round == 0 { try cache.finishPrefill() } else { _ = try cache.attend(tensor) }
      let held = try cache.read(layer: 0, head: 0).keys.suffix(32)
      #expect(zip(held, rows).allSatisfy { $0.isFinite && abs($0 - $1) <= size * 0.1 }, "\(size)")
    }
    let maps = try cache.segment.heads[0].keys.extents.compactMap(\.map)
    // Those of the prompt, and of each of the two last batches.
    #expect(Set(maps.map(ObjectIdentifier.init)).count == 3)
  }

  /// Attention reads what `read` says; saving, forking, dropping and any cut into chunks change nothing.
  @Test(arguments: stores)
  func life(store: String) throws {
    withEvery("geometry", in: [Geometry(4, 2, 40, 24), Geometry(3, 1, 96), Geometry(16, 1, 16, 10)]) { geometry in
      withEvery("selection", in: ["", "h2o(budget=60)+"]) { selection in
        let shape = geometry.shape()
        let traffic = Traffic(shape, tokens: 150, seed: 5)
        let cache = try makeCache(selection + store, shape)
        try traffic.step(cache, 0..<90)
        try cache.finishPrefill()
        for token in 90..<131 { try traffic.checkedStep(cache, 0, token..<token + 1) }
        check(cache.bytes.total == cache.backend.memory.liveBytes, "bytes")
        let loaded = try KVCache.load(
          saved: cache.saved(), policy: cache.policy, shape: shape, backend: .cpu(threads: 1))
        check(try Snapshot(loaded) == Snapshot(cache), "what was saved differs")
        check(loaded.bytes.total == loaded.backend.memory.liveBytes, "bytes of the loaded cache")
        var outputs: [[Float]] = [[], []]
        for token in 131..<150 {
          outputs[0] += try traffic.checkedStep(cache, 0, token..<token + 1)
          outputs[1] += try traffic.checkedStep(loaded, 0, token..<token + 1)
        }
        checkSame(outputs[0], outputs[1], "after loading")
        let fork = cache.fork()
        check(KVCache.bytes(of: [cache, fork]).total == cache.backend.memory.liveBytes, "bytes of forks")
        if selection.isEmpty {
          let estimate = try cache.policy.estimate(shape: shape, prompt: 90, decoded: 60)
          check(estimate == cache.bytes, "estimated \(estimate), measured \(cache.bytes)")
          for by in [7, 60] {
            let other = try makeCache(store, shape)
            try traffic.run(other, prompt: 90, decoded: 60, chunk: 13, by: by)
            check(try Snapshot(other).heads == Snapshot(cache).heads, "decoded by \(by)")
          }
        }
      }
    }
  }

  /// Decoded rows are the same bits at every level.
  @Test(arguments: stores)
  func levels(store: String) throws {
    withEvery("dim", in: store.contains("rotated") ? [8, 40] : [1, 7, 16, 33, 40, 129]) { dim in
      let geometry = Geometry(2, 1, dim)
      let traffic = LevelTests.rough(geometry.shape(), tokens: 71, seed: UInt64(dim))
      var expected: HeadContents?
      withEvery("level", in: Backend.cpuLevels.reversed()) { level in
        let cache = try makeCache(store, traffic.shape, backend: .cpu(threads: 1, level: level))
        try traffic.append(cache, 0, 0..<70)
        try cache.finishPrefill()
        try traffic.checkedStep(cache, 0, 70..<71)
        let held = try cache.read(layer: 0, head: 0)
        guard let expected else {
          expected = held
          return
        }
        checkSame(held.keys, expected.keys, "keys")
        checkSame(held.values, expected.values, "values")
      }
    }
  }

  /// Scaling a channel scales its factor by the root: softer than tokenwise, not invariant.
  @Test func scaledChannel() throws {
    var dice = Dice(3)
    let rows = (0..<64).map { _ in dice.normals(16) }
    func error(_ store: Store, scale: Float) throws -> Float {
      let scaled = rows.map { row in row.enumerated().map { $0 == 5 ? $1 * scale : $1 } }
      let found = try held(store, scaled).contents.values
      return zip(found, scaled.flatMap { $0 }).enumerated().reduce(0) { sum, item in
        item.offset % 16 == 5 ? sum : sum + (item.element.0 - item.element.1) * (item.element.0 - item.element.1)
      }
    }
    let plain = Store(
      spec: StageSpec(name: "plain"), keys: .dense(.f32),
      values: try .newest(0, window: .f32, body: .affinePerToken(bits: 4, group: 16, metadata: .f32)))
    let cst = try Store.cst(keyBits: 4, window: .f32, metadata: .f32)
    #expect(try error(cst, scale: 16) < error(plain, scale: 16) / 4)
    #expect(try error(cst, scale: 16) > error(cst, scale: 1))
  }
}
