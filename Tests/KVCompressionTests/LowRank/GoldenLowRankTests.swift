import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Low-rank methods against their authors' code.
@Suite struct GoldenLowRankTests {
  /// Keys and values of the entry's layers.
  private struct Input {
    var layers: [Int]
    var tokens: Int
    var keys: [HeadTensor] = []
    var values: [HeadTensor] = []
    var probes: [HeadTensor] = []
    var beforeRotation: HeadTensor?

    init(_ entry: GoldenEntry) throws {
      let file = try Goldens.file(try #require(entry.input?["file"]?.string))
      layers = entry.input?["layers"]?.numbers.map { Int($0) } ?? []
      if let one = entry.input?["layer"]?.int { layers = [one] }
      tokens = try #require(entry.input?["tokens"]?.int)
      for layer in layers {
        func tensor(_ name: String) throws -> HeadTensor {
          let name = "layers.\(layer).\(name)"
          let shape = try file.entry(named: name).shape
          return try HeadTensor(heads: shape[0], tokens: shape[1], dim: shape[2], elements: file.floats(named: name))
        }
        keys.append(try tensor("keys").slice(tokens: 0..<tokens))
        values.append(try tensor("values").slice(tokens: 0..<tokens))
        probes.append(try tensor("probe_queries").slice(tokens: 0..<Goldens.index.get().outputProbes))
      }
    }
  }

  private func cache(_ store: Store, _ input: Input) throws -> KVCache {
    let dim = input.keys[0].dim
    let shape = ModelShape(
      layerCount: input.layers.count, queryHeads: input.probes[0].heads, kvHeads: input.keys[0].heads, headDim: dim,
      rotary: try RotaryEmbedding(headDim: dim, theta: 500_000))
    let cache = try KVCache(shape: shape, policy: Policy(store: store), backend: .cpu(threads: 2))
    for layer in input.layers.indices {
      let (k, v) = (input.keys[layer].elements, input.values[layer].elements)
      try cache.append(
        layer: layer, keys: TensorView(k.span, heads: input.keys[layer].heads, tokens: input.tokens, dim: dim),
        values: TensorView(v.span, heads: input.values[layer].heads, tokens: input.tokens, dim: dim))
    }
    try cache.finishPrefill()
    return cache
  }

  private func look(_ cache: KVCache, _ layer: Int, _ queries: HeadTensor) throws -> [Float] {
    let q = queries.elements
    var output = [Float](repeating: .nan, count: queries.heads * queries.tokens * queries.dim)
    var span = output.mutableSpan
    var view = try MutableTensorView(&span, heads: queries.heads, tokens: queries.tokens, dim: queries.dim)
    var options = AttentionOptions()
    options.causal = false
    options.commits = false
    try cache.attend(
      layer: layer, queries: TensorView(q.span, heads: queries.heads, tokens: queries.tokens, dim: queries.dim),
      into: &view, options: options)
    _ = consume view
    return output
  }

  /// Rows of all heads, rebuilt.
  private func rows(_ cache: KVCache, _ layer: Int, keys: Bool) throws -> [Float] {
    try (0..<cache.shape.layers[layer].kvHeads).flatMap { head in
      let held = try cache.read(layer: layer, head: head)
      return keys ? held.keys : held.values
    }
  }

  private func relativeError(_ x: [Float], _ reference: [Float]) -> Double {
    var (error, norm) = (0.0, 0.0)
    for (a, b) in zip(x, reference) {
      error += Double(a - b) * Double(a - b)
      norm += Double(b) * Double(b)
    }
    return (error / norm).squareRoot()
  }

  @Test(arguments: Goldens.names("xkv."))
  func xkv(name: String) throws {
    let run = try GoldenRun(name)
    let input = try Input(run.entry)
    let store = try Store.xKV(
      layers: run.entry.int("layers"), keyRank: .channels(run.entry.int("rankKeys")),
      valueRank: .channels(run.entry.int("rankValues")), latents: .f32, basis: .f32, window: .f32)
    let cache = try cache(store, input)
    var restored = (keys: [Float](), values: [Float]())
    for layer in input.layers.indices {
      restored.keys += try rows(cache, layer, keys: true)
      restored.values += try rows(cache, layer, keys: false)
      try run.expect("\(layer).output", look(cache, layer, input.probes[layer]))
    }
    // Turning is a rotation: errors and norms of keys are the same before and after it.
    let errors = (
      relativeError(restored.keys, input.keys.flatMap(\.elements)),
      relativeError(restored.values, input.values.flatMap(\.elements))
    )
    try run.expect("keys.relativeError", [errors.0])
    try run.expect("keys.optimalError", [errors.0])
    try run.expect("values.relativeError", [errors.1])
    try run.expect("values.optimalError", [errors.1])

    let last = input.layers.count - 1
    try run.expect("lastLayer.values", rows(cache, last, keys: false))
    var keys = try rows(cache, last, keys: true)
    let positions = (0..<input.keys[0].heads).flatMap { _ in (0..<Int32(input.tokens)) }
    var span = keys.mutableSpan
    try cache.shape.rotary?.unrotate(&span, stride: input.keys[0].dim, positions: positions.span)
    try run.expect("lastLayer.preRopeKeys", keys)

    let segment = try #require(cache.layers[0].segments[0] as? LowRankSegment)
    let sides = try #require(segment.lowRank.sides)
    for (side, what) in [(sides.keys, "keys"), (sides.values, "values")] {
      // Latents are U·S: their columns are as long as the singular values.
      let rank = side.stores[0].dim
      var squares = [Double](repeating: 0, count: rank)
      for slice in side.stores[0].slices(0..<input.tokens) {
        let base = (slice.run.base + slice.first * rank * 4).assumingMemoryBound(to: Float.self)
        for i in 0..<slice.count * rank { squares[i % rank] += Double(base[i]) * Double(base[i]) }
      }
      let reference = try Goldens.reference(run.entry, "\(what).singularValues").numbers
      for (index, square) in squares.enumerated() {
        check(
          abs(square.squareRoot() - reference[index]) < 1e-3 * reference[0], "singular value \(index) of \(what)")
      }
    }
    run.finish(except: ["keys.singularValues", "values.singularValues"])
  }

  /// CSKV's codes of latents around clamped integer zero points, here of keys per channel and of values per token.
  @Test(arguments: Goldens.names("cskv."))
  func cskvCodes(name: String) throws {
    let run = try GoldenRun(name)
    let input = try Input(run.entry)
    let (bits, window, dim) = (try run.entry.int("bits"), try run.entry.int("window"), input.keys[0].dim)
    let store = Store(
      spec: StageSpec(name: "cskv-codes"),
      keys: try .blocks(
        of: window, window: .f32,
        body: .affinePerChannel(bits: bits, group: window, zero: .clamped, metadata: .f32)),
      values: try .newest(
        0, window: .f32, body: .affinePerToken(bits: bits, group: dim, zero: .clamped, metadata: .f32)))
    let cache = try cache(store, input)
    try run.expect("channel", rows(cache, 0, keys: true))
    try run.expect("token", rows(cache, 0, keys: false))
    run.finish()
    // The store with this option has these formats.
    let option = try Store.cskv(calibration: nil, latents: .int4, integerZero: true)
    let format = try #require(option.factory as? LowRankFormat)
    #expect(format.keyLatents.body?.zeroPoint == .clamped && format.valueLatents.body?.zeroPoint == .clamped)
    let text = "cskv(latents=int4,zero=integer)"
    #expect(try PolicyRegistry.standard.policy(text).spec.description.contains("zero=integer"))
  }

  /// Where all values of a group have one sign the zero point is the first or the last code, and the far end is lost.
  @Test func clampedZeroPointsSaturate() throws {
    let rows: [Float] = (0..<32).map { 10 + Float($0) / 31 * 3 }
    let encoding = try RowEncoding.affinePerToken(bits: 4, group: 32, zero: .clamped, metadata: .f32)
    // Steps of 0.2 from 0 on: 15 of them end at 3.
    let restored = try FormatTests.encode(rows, dim: 32, encoding).restored
    #expect(restored.allSatisfy { abs($0 - 3) < 1e-5 })
    let below = try FormatTests.encode(rows.map { -$0 }, dim: 32, encoding).restored
    #expect(below.allSatisfy { abs($0 + 3) < 1e-5 })
    let open = try RowEncoding.affinePerToken(bits: 4, group: 32, zero: ZeroPoint(), metadata: .f32)
    let whole = try FormatTests.encode(rows, dim: 32, open).restored
    #expect(zip(whole, rows).allSatisfy { abs($0 - $1) < 0.21 })
    expectError(.invalidOption, "no other") {
      _ = try RowEncoding.affinePerChannel(bits: 4, group: 32, zero: ZeroPoint())
    }
  }

  /// Calibrated on the prompt it compresses, as the authors' function is run.
  @Test func matryoshka() throws {
    let run = try GoldenRun("matryoshka.r32.a5")
    let input = try Input(run.entry)
    let (dim, heads) = (input.keys[0].dim, input.keys[0].heads)
    let rank = try run.entry.int("rank")
    let shape = ModelShape(
      layerCount: 1, queryHeads: input.probes[0].heads, kvHeads: heads, headDim: dim,
      rotary: try RotaryEmbedding(headDim: dim, theta: 500_000))
    let calibrator = try Calibrator(.principalComponents(), shape: shape)
    let (k, v) = (input.keys[0].elements, input.values[0].elements)
    try calibrator.add(
      layer: 0, keys: TensorView(k.span, heads: heads, tokens: input.tokens, dim: dim),
      values: TensorView(v.span, heads: heads, tokens: input.tokens, dim: dim), firstPosition: 0)
    let made = try calibrator.finish()
    for side in Calibration.Side.allCases {
      func numbers(_ quantity: String) throws -> [Float] {
        guard case .numbers(let values)? = made.tensor(quantity, of: side, layer: 0)?.elements else { return [] }
        return values
      }
      try run.expect("\(side.rawValue).mean", numbers("mean"))
      try run.expect("\(side.rawValue).eigenvalues", numbers("variance"))
      let basis = try numbers("basis")
      var projector = [Float](repeating: 0, count: heads * dim * dim)
      for head in 0..<heads {
        for r in 0..<rank {
          let row = basis[(head * dim + r) * dim..<(head * dim + r + 1) * dim]
          for (i, a) in row.enumerated() {
            for (j, b) in row.enumerated() { projector[(head * dim + i) * dim + j] += a * b }
          }
        }
      }
      try run.expect("\(side.rawValue).projector", projector)
    }
    let store = try Store.matryoshka(
      calibration: NamedCalibration(made), share: Double(rank) / Double(dim), rates: .uniform, step: rank,
      floor: rank, latents: .f32, basis: .f32, window: .f32)
    let cache = try cache(store, input)
    try run.expect("keys.reconstruction", rows(cache, 0, keys: true))
    try run.expect("values.reconstruction", rows(cache, 0, keys: false))
    try run.expect("output", look(cache, 0, input.probes[0]))
    run.finish()
  }
}
