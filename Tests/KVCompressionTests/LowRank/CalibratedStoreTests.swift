import Foundation
import KVBackendCPU
import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Calibrations of the traffic that tests use.
enum Samples {
  static func calibration(
    _ method: CalibrationMethod, _ shape: ModelShape, tokens: Int = 160, seed: UInt64 = 9
  ) throws -> Calibration {
    let traffic = Traffic(shape, tokens: tokens, seed: seed)
    let calibrator = try Calibrator(method, shape: shape)
    for (index, layer) in shape.layers.enumerated() where layer.cached {
      let (keys, values) = (traffic.keys[index], traffic.values[index])
      try calibrator.add(
        layer: index,
        keys: TensorView(keys.span, heads: layer.kvHeads, tokens: tokens, dim: layer.keyDim),
        values: TensorView(values.span, heads: layer.kvHeads, tokens: tokens, dim: layer.valueDim),
        firstPosition: 0)
    }
    return try calibrator.finish()
  }
}

/// Stores whose bases were there before the prompt.
@Suite struct CalibratedStoreTests {
  static let geometries = [Geometry(2, 2, 20), Geometry(4, 1, 24, 40), Geometry(16, 1, 16, 9), Geometry(6, 3, 8, 33)]

  private static func matryoshka(
    _ shape: ModelShape, share: Double = 1, rates: RankRates = .greedy, latents: LatentFormat = .f32,
    type: ElementType = .f32, keeping: Int = 0, centred: Bool = true
  ) throws -> Store {
    try .matryoshka(
      calibration: NamedCalibration(Samples.calibration(.principalComponents(centred: centred), shape)), share: share,
      rates: rates, step: 1, floor: 1, latents: latents, basis: type, window: type, keeping: keeping)
  }

  private static func cskv(
    _ shape: ModelShape, keys: Rank = .share(1), values: Rank = .share(1), window: Int = 32, rolling: Bool = false,
    latents: LatentFormat = .f32, type: ElementType = .f32, method: CalibrationMethod? = nil
  ) throws -> Store {
    try .cskv(
      calibration: NamedCalibration(Samples.calibration(method ?? .shrunkChannels(), shape)), keyRank: keys,
      valueRank: values, window: window, rolling: rolling, latents: latents, basis: type, dense: type)
  }

  /// All channels restore every row, whatever text the bases come from.
  @Test func fullRankIsExact() throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      let shape = try geometry.shape(layers: 2, rotary: true)
      let refit = try CalibrationMethod.shrunkChannels(keys: 1, values: 1, refit: true)
      let stores = try [
        Self.matryoshka(shape), Self.matryoshka(shape, keeping: 5), Self.matryoshka(shape, centred: false),
        Self.cskv(shape), Self.cskv(shape, window: 7, rolling: true), Self.cskv(shape, method: refit),
      ]
      withEvery("store", in: Array(stores.enumerated())) { _, store in
        let traffic = Traffic(shape, tokens: 150)
        let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 2))
        let dense = try makeCache("f32", shape)
        let a = try traffic.run(cache, prompt: 61, decoded: 70, chunk: 40)
        let b = try traffic.run(dense, prompt: 61, decoded: 70, chunk: 40)
        check(LowRankTests.worst(a, b) < 5e-4, "\(store.spec): off by \(LowRankTests.worst(a, b))")
        let (x, y) = (try cache.read(layer: 1, head: 0), try dense.read(layer: 1, head: 0))
        check(x.positions == y.positions, "positions")
        check(LowRankTests.worst(x.keys, y.keys) < 2e-4 && LowRankTests.worst(x.values, y.values) < 2e-4, "rows")
      }
    }
  }

  /// Attention over latents is attention over the rows they stand for; heads of different ranks, means, encoders.
  @Test func absorbedIsMaterialised() throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      let shape = try geometry.shape(layers: 2, rotary: true)
      let refit = try CalibrationMethod.shrunkChannels(keys: 0.5, values: 0.5, refit: true)
      let half = (
        keys: max(1, geometry.keyDim / 2) * geometry.kvHeads, values: max(1, geometry.valueDim / 2) * geometry.kvHeads
      )
      let stores = try [
        Self.matryoshka(shape, share: 0.5), Self.matryoshka(shape, share: 0.4, latents: .int8, type: .f16),
        Self.matryoshka(shape, share: 0.3, rates: .uniform, keeping: 3, centred: false),
        Self.cskv(shape, keys: .share(0.25), values: .share(0.75)),
        Self.cskv(shape, keys: .full, values: .share(0.3), window: 8, rolling: true),
        Self.cskv(shape, keys: .share(0.4), values: .full, latents: .int4, type: .bf16),
        Self.cskv(shape, keys: .channels(half.keys), values: .channels(half.values), method: refit),
      ]
      withEvery("store", in: stores) { store in
        let traffic = Traffic(shape, tokens: 113)
        let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 2))
        try traffic.run(cache, prompt: 77, decoded: 3)
        for layer in 0..<2 {
          let range = 80..<113
          try traffic.append(cache, layer, range)
          let held = try (0..<geometry.kvHeads).map { try cache.read(layer: layer, head: $0) }
          let output = try traffic.attend(cache, layer, range)
          let oracle = try Oracle(
            held, shape.layers[layer], queries: traffic.queries(layer, range), tokens: 33, firstPosition: 80)
          let worst = zip(output, oracle.outputs).map { abs(Double($0) - $1) }.max() ?? 0
          // Kernels over codes round queries too.
          let bound = store.spec.description.contains("latents=int") ? 2e-3 : 5e-5
          check(output.count == oracle.outputs.count && worst < bound, "\(store.spec): off by \(worst)")
        }
      }
    }
  }

  /// What is lost of the samples is the variance of the channels that went, whatever the heads keep.
  @Test func lossIsTheDroppedVariance() throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 2, rotary: true)
    let made = try Samples.calibration(.principalComponents(), shape)
    let store = try Store.matryoshka(
      calibration: NamedCalibration(made), share: 0.5, step: 1, floor: 1, latents: .f32, basis: .f32, window: .f32)
    let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 1))
    let traffic = Traffic(shape, tokens: 160, seed: 9)
    try traffic.run(cache, prompt: 160)
    let format = try #require(store.factory as? LowRankFormat)
    let calibrated = try #require(format.calibrated)
    var kept = 0
    for layer in 0..<2 {
      for head in 0..<2 {
        let rows = try cache.read(layer: layer, head: head)
        for side in Calibration.Side.allCases {
          let bases = try #require(side == .keys ? calibrated[layer]?.keys : calibrated[layer]?.values)
          let rank = bases.decoders[head].count / 16
          kept += rank
          let variance = try #require(made.tensor("variance", of: side, layer: layer))
          guard case .numbers(let all) = variance.elements else { continue }
          let dropped = all[head * 16 + rank..<(head + 1) * 16].reduce(0) { $0 + Double($1) }
          let original = Traffic.cut(
            side == .keys ? traffic.keys[layer] : traffic.values[layer], heads: 2, total: 160, dim: 16, 0..<160)
          let own = original[head * 160 * 16..<(head + 1) * 160 * 16]
          let error = zip(side == .keys ? rows.keys : rows.values, own).reduce(0) {
            $0 + Double($1.0 - $1.1) * Double($1.0 - $1.1)
          }
          #expect(abs(error / 160 - dropped) < 1e-4 * max(1, dropped), "\(error / 160) lost, \(dropped) dropped")
        }
      }
    }
    #expect(kept == 2 * 2 * 2 * 16 / 2)
  }

  /// A calibration of one layer of two heads with given variances.
  private func variances(_ keys: [[Float]], _ values: [[Float]], ranks: [Int32]? = nil) throws -> Calibration {
    var tensors: [Calibration.Name: Calibration.Tensor] = [:]
    for (side, all) in [(Calibration.Side.keys, keys), (.values, values)] {
      let dim = all[0].count
      func add(_ quantity: String, _ tensor: Calibration.Tensor) {
        tensors[.init(layer: 0, side: side, quantity: quantity)] = tensor
      }
      let identity = (0..<dim * dim).map { Float($0 / dim == $0 % dim ? 1 : 0) }
      add("basis", .init(shape: [all.count, dim, dim], numbers: all.flatMap { _ in identity }))
      add("variance", .init(shape: [all.count, dim], numbers: all.flatMap { $0 }))
      add("weight", .init(shape: [all.count], numbers: all.indices.map { Float($0 + 1) }))
      if let ranks { add("ranks", .init(shape: [all.count], integers: ranks)) }
    }
    return try Calibration(tensors, metadata: ["rope": "post"])
  }

  /// Ranks of keys and values of each head.
  private func ranks(_ made: Calibration, _ share: Double, _ rates: RankRates, step: Int = 1, floor: Int = 1) throws
    -> [[Int]]
  {
    let store = try Store.matryoshka(
      calibration: NamedCalibration(made), share: share, rates: rates, step: step, floor: floor)
    let found = try #require((store.factory as? LowRankFormat)?.calibrated?[0])
    return try [#require(found.keys), #require(found.values)].map { bases in bases.decoders.map { $0.count / 4 } }
  }

  @Test func ratesAreGreedy() throws {
    let made = try variances(
      [[8, 1, 0.5, 0.5], [4, 4, 4, 4]], [[100, 90, 9, 1], [1, 0, 0, 0]], ranks: [3, 2])
    // Shares lost: values 1 loses nothing three times, then values 0 half a percent, keys 0 five, and so on.
    #expect(try ranks(made, 0.8, .greedy) == [[4, 4], [4, 1]])
    #expect(try ranks(made, 0.75, .greedy) == [[4, 4], [3, 1]])
    #expect(try ranks(made, 0.625, .greedy) == [[3, 4], [2, 1]])
    #expect(try ranks(made, 0.5, .greedy) == [[1, 4], [2, 1]])
    // Two at a time, two at least.
    #expect(try ranks(made, 0.75, .greedy, step: 2, floor: 2) == [[4, 4], [2, 2]])
    // Head 1 counts twice: 2·0 first, then 0.5 and 0.5 of keys 0, 1 of values 0 and of keys 0.
    #expect(try ranks(made, 0.7, .weighted) == [[2, 4], [4, 1]])
    #expect(try ranks(made, 0.5, .uniform) == [[2, 2], [2, 2]])
    #expect(try ranks(made, 0.3, .uniform, step: 2) == [[2, 2], [2, 2]])
    #expect(try ranks(made, 0.1, .file) == [[3, 2], [3, 2]])
    expectError(.invalidOption, "cannot be reached") { _ = try ranks(made, 0.3, .greedy, step: 2, floor: 2) }
    let equal = try variances([[0, 0, 0, 0]], [[0, 0, 0, 0]])
    #expect(try ranks(equal, 0.5, .greedy) == [[1], [3]])
  }

  /// Bytes are the closed form of the pages, and the estimate before any token.
  @Test func bytesAreTheClosedForm() throws {
    let shape = ModelShape(
      layerCount: 2, queryHeads: 4, kvHeads: 2, headDim: 32, rotary: try RotaryEmbedding(headDim: 32))
    let pca = NamedCalibration(try Samples.calibration(.principalComponents(), shape))
    let factors = NamedCalibration(try Samples.calibration(.shrunkChannels(), shape))
    let tokens = 96
    for (store, latents, bases) in [
      (
        try Store.matryoshka(calibration: pca, share: 0.5, step: 1, floor: 1), tokens * 128 * 2 * 2,
        // Bases in f16, means in f32.
        128 * 32 * 2 + 2 * 2 * 2 * 32 * 4
      ),
      (
        try .cskv(calibration: factors, keyRank: .channels(16), valueRank: .channels(48)), 2 * tokens * 64 * 2,
        2 * 64 * 64 * 2
      ),
    ] {
      let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 1))
      let traffic = Traffic(shape, tokens: tokens)
      try traffic.run(cache, prompt: tokens)
      let expected = ByteCount(
        payload: store.spec.name == "cskv" ? latents : tokens * 128 * 2, metadata: bases)
      #expect(cache.bytes == expected, "\(store.spec.name): \(cache.bytes)")
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
      #expect(try cache.policy.estimate(shape: shape, prompt: tokens) == cache.bytes)
    }
  }

  /// Which tokens are exact: 0 to 31 of them in blocks, always the newest in a rolling window.
  @Test func windows() throws {
    let shape = try Geometry(2, 2, 8).shape(layers: 1, rotary: true)
    for (prompt, counts) in [(70, [64, 64, 96, 96]), (5, [0, 0, 0, 32]), (96, [96, 96, 96, 96])] {
      let cache = try KVCache(
        shape: shape, policy: Policy(store: Self.cskv(shape, keys: .share(0.5))), backend: .cpu(threads: 1))
      let traffic = Traffic(shape, tokens: 140)
      try traffic.run(cache, prompt: prompt)
      for (index, end) in [prompt, prompt + 25, prompt + 26, prompt + 27].enumerated() {
        let seen = cache.tokensSeen(layer: 0)
        for token in seen..<end {
          try traffic.append(cache, 0, token..<token + 1)
          _ = try traffic.attend(cache, 0, token..<token + 1)
        }
        let frozen = (cache.layers[0].segments[0] as? LowRankSegment)?.frozen ?? [0, 0]
        #expect(frozen == [counts[index], counts[index]], "\(prompt) and \(end - prompt) tokens: \(frozen)")
      }
    }
    let rolling = try KVCache(
      shape: shape, policy: Policy(store: Self.cskv(shape, keys: .share(0.5), window: 20, rolling: true)),
      backend: .cpu(threads: 1))
    let traffic = Traffic(shape, tokens: 140)
    try traffic.run(rolling, prompt: 70, decoded: 40)
    let frozen = try #require(rolling.layers[0].segments[0] as? LowRankSegment).frozen
    #expect(frozen == [82, 82])
  }

  /// A life in every geometry: prompts in chunks, decoding, trimming, forks, saving, all against the oracle.
  @Test func lives() throws {
    let geometries = Geometry.all.filter { $0.keyDim % 2 == 0 && $0.valueDim > 1 }
    withEvery("geometry", in: geometries) { geometry in
      let shape = try geometry.shape(layers: 2, rotary: true)
      let stores = try [
        Self.matryoshka(shape, share: 0.5, latents: .f16, type: .f16),
        Self.cskv(shape, keys: .share(0.5), values: .share(0.5), window: 16, latents: .f16, type: .f16),
      ]
      for store in stores {
        try ProductTests.life(
          Policy(store: store), geometry, prompt: 61, decoded: 38, chunk: 23, oracle: true)
        try ProductTests.life(
          Policy(try .h2o(budget: .tokens(30)), store: store), geometry, prompt: 61, decoded: 9, chunk: 23, oracle: true
        )
      }
    }
  }

  /// Bases of the prompt lose what is least, to rounding; calibrated ones at least that.
  @Test func errorsAgainstTheBest() throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 4, rotary: true)
    let traffic = Traffic(shape, tokens: 90)
    let exact = try makeCache("f32", shape)
    try traffic.run(exact, prompt: 90)
    func errors(_ store: Store) throws -> [LatentError] {
      let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 2))
      try traffic.run(cache, prompt: 90)
      return try LatentError.measure(cache, against: exact)
    }
    let svd = try errors(.svd(keyRank: .share(0.25), valueRank: .full, latents: .f32, basis: .f32, window: .f32))
    #expect(svd.map(\.layers) == [[0], [1], [2], [3]] && svd.allSatisfy { $0.side == .keys && $0.rank == 8 })
    let heads = try errors(
      .svd(
        keyRank: .share(0.25), valueRank: .share(0.5), beforeRotation: false, perHead: true, latents: .f32, basis: .f32,
        window: .f32))
    #expect(heads.count == 16 && heads.map(\.head).prefix(2) == [0, 1])
    let xkv = try errors(
      .xKV(layers: 2, keyRank: .share(0.25), valueRank: .share(0.25), latents: .f32, basis: .f32, window: .f32))
    #expect(xkv.map(\.layers) == [[0, 1], [0, 1], [2, 3], [2, 3]])
    for error in svd + heads + xkv {
      #expect(error.tokens == 90 && error.optimum > 0 && error.optimum < error.energy)
      #expect(abs(error.error / error.optimum - 1) < 0.02, "\(error)")
    }
    let calibrated = try errors(Self.matryoshka(shape, share: 0.5)) + errors(Self.cskv(shape, keys: .share(0.5)))
    #expect(calibrated.count == 16 + 8)
    for error in calibrated { #expect(error.error >= error.optimum * 0.9999 - 1e-6, "\(error)") }
    #expect(try LatentError.measure(exact, against: exact) == [])
    let short = try makeCache("f32", shape)
    try traffic.run(short, prompt: 50)
    let cache = try makeCache("svd(rank_k=4,rank_v=4)", shape)
    try traffic.run(cache, prompt: 90)
    expectError(.invalidOption, "lacks this one", layer: 0, head: 0, position: 50) {
      _ = try LatentError.measure(cache, against: short)
    }
  }

  /// A text names the file and means its contents; a saved cache loads through it.
  @Test func textsAndSavedCaches() throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 2, rotary: true)
    let path = FileManager.default.temporaryDirectory.appending(path: "pca-\(UUID()).safetensors").path()
    defer { try? FileManager.default.removeItem(atPath: path) }
    for (method, options) in [
      (CalibrationMethod.principalComponents(), "share=0.5,step=4,floor=4"), (try .shrunkChannels(), "density_k=0.5"),
    ] {
      let name = method.keysBeforeRotation ? "cskv" : "matryoshka"
      try Samples.calibration(method, shape).write(to: path)
      let policy = try PolicyRegistry.standard.policy("\(name)(calibration=\"\(path)\",\(options))")
      #expect(policy.spec.description.contains("checksum=xxh64-"))
      #expect(try PolicyRegistry.standard.policy(policy.spec.description).spec == policy.spec)
      let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))
      let traffic = Traffic(shape, tokens: 140)
      // Saved while no row has met the bases, and after.
      for tokens in [20, 50] {
        for layer in 0..<2 { try traffic.append(cache, layer, (tokens == 20 ? 0 : 20)..<tokens) }
        if tokens == 50 { try cache.finishPrefill() }
        let saved = try cache.saved()
        let restored = try KVCache.load(saved: saved, backend: .cpu(threads: 1))
        #expect(try restored.saved() == saved)
        try Samples.calibration(method, shape, seed: 3).write(to: path)
        expectError(.invalidOption, "the text means") { _ = try KVCache.load(saved: saved, backend: .cpu(threads: 1)) }
        try FileManager.default.removeItem(atPath: path)
        expectError(.inputOutput, path) { _ = try KVCache.load(saved: saved, backend: .cpu(threads: 1)) }
        // A calibration that lies elsewhere goes in by code.
        #expect(
          try KVCache.load(saved: saved, policy: policy, shape: shape, backend: .cpu(threads: 1)).saved() == saved)
        try Samples.calibration(method, shape).write(to: path)
      }
    }
  }

  @Test func refusesWhatDoesNotFit() throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 2, rotary: true)
    let other = try Geometry(4, 4, 16).shape(layers: 2, rotary: true)
    let pca = NamedCalibration(try Samples.calibration(.principalComponents(), shape))
    let factors = NamedCalibration(try Samples.calibration(.shrunkChannels(), shape))
    func cache(_ store: Store, _ shape: ModelShape) throws {
      _ = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 1))
    }
    for name in ["matryoshka", "cskv"] {
      expectError(.missingInput, "\(name) needs a calibration") {
        _ = try KVCache(shape: shape, policy: PolicyRegistry.standard.policy(name), backend: .cpu(threads: 1))
      }
      let path = "/nonexistent/file.safetensors"
      expectError(.inputOutput, path) {
        _ = try PolicyRegistry.standard.policy("\(name)(calibration=\"\(path)\")")
      }
    }
    expectError(.shapeMismatch, "units", layer: 0) {
      try cache(.matryoshka(calibration: pca, step: 4, floor: 4), other)
    }
    expectError(.missingInput, "none for this layer", layer: 2) {
      try cache(.cskv(calibration: factors), Geometry(4, 2, 16).shape(layers: 3, rotary: true))
    }
    expectError(.invalidOption, "rope=post") { _ = try Store.matryoshka(calibration: factors) }
    expectError(.invalidOption, "rope=pre") { _ = try Store.cskv(calibration: pca) }
    expectError(.missingInput, "rotary") { try cache(.cskv(calibration: factors), Geometry(4, 2, 16).shape(layers: 2)) }
    expectError(.invalidOption, "used whole", layer: 0) {
      let refit = try Samples.calibration(.shrunkChannels(keys: 0.5, values: 0.5, refit: true), shape)
      _ = try Store.cskv(calibration: NamedCalibration(refit))
    }
    expectError(.missingInput, "variance", layer: 0) {
      var tensors = pca.calibration.tensors
      tensors[.init(layer: 0, side: .keys, quantity: "variance")] = nil
      _ = try Store.matryoshka(calibration: NamedCalibration(Calibration(tensors)))
    }
    expectError(.missingInput, "one is missing", layer: 1) {
      var tensors = pca.calibration.tensors
      tensors[.init(layer: 1, side: .values, quantity: "basis")] = nil
      _ = try Store.matryoshka(calibration: NamedCalibration(Calibration(tensors)))
    }
    for share in [0, -1, 1.5, Double.nan] {
      expectError(.invalidOption, "share") { _ = try Store.matryoshka(calibration: pca, share: share) }
    }
    expectError(.invalidOption, "window") { _ = try Store.cskv(calibration: factors, window: 0) }
  }
}
