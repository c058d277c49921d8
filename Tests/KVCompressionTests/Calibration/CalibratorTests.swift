import KVBackendCPU
import KVCalibration
import KVCompression
import Testing

@testable import KVCore

/// Calibrations of samples: worked examples, and what they do not depend on.
@Suite struct CalibratorTests {
  private func numbers(
    _ made: Calibration, _ quantity: String, _ side: Calibration.Side, layer: Int = 0
  ) throws -> [Float] {
    guard case .numbers(let values)? = made.tensor(quantity, of: side, layer: layer)?.elements else {
      Issue.record("no numbers \(quantity)")
      return []
    }
    return values
  }

  private func near(_ a: [Float], _ b: [Float], _ bound: Float = 1e-5) -> Bool {
    a.count == b.count && zip(a, b).allSatisfy { abs($0 - $1) <= bound }
  }

  /// The published example: four keys of two channels.
  @Test func principalComponentsOfFourRows() throws {
    let shape = ModelShape(layerCount: 1, queryHeads: 2, kvHeads: 1, headDim: 2)
    let rows: [Float] = [2, 1, 4, 2, 6, 3, 4, 3]
    for parts in [[0, 4], [0, 1, 4], [0, 3, 4]] {
      let calibrator = try Calibrator(.principalComponents(), shape: shape)
      for (first, end) in zip(parts, parts.dropFirst()) {
        let part = Array(rows[2 * first..<2 * end])
        try calibrator.add(
          layer: 0, keys: TensorView(part.span, heads: 1, tokens: end - first, dim: 2),
          values: TensorView(part.span, heads: 1, tokens: end - first, dim: 2), firstPosition: first)
      }
      let queries: [Float] = [1, 0, 0, 1, 3, 4, 0, 0]
      try calibrator.add(layer: 0, queries: TensorView(queries.span, heads: 2, tokens: 2, dim: 2))
      let made = try calibrator.finish()
      for side in Calibration.Side.allCases {
        #expect(near(try numbers(made, "mean", side), [4, 2.25]))
        #expect(near(try numbers(made, "variance", side), [2.539854, 0.147646]))
        let basis = try numbers(made, "basis", side)
        #expect(near(Array(basis.prefix(2)), [0.879959, 0.475049]))
      }
      #expect(try numbers(made, "weight", .keys) == [6.75])
      #expect(made.metadata["rope"] == "post" && made.metadata["method"] == "pca" && made.metadata["tokens"] == "4")
    }
  }

  /// Second moments about zero: the first row of the basis is the direction of the mean when that is all there is.
  @Test func withoutCentring() throws {
    let shape = ModelShape(layerCount: 1, queryHeads: 1, kvHeads: 1, headDim: 2)
    let rows: [Float] = [3, 4, 3, 4, 3, 4]
    let calibrator = try Calibrator(.principalComponents(centred: false), shape: shape)
    try calibrator.add(
      layer: 0, keys: TensorView(rows.span, heads: 1, tokens: 3, dim: 2),
      values: TensorView(rows.span, heads: 1, tokens: 3, dim: 2), firstPosition: 0)
    let made = try calibrator.finish()
    #expect(near(Array(try numbers(made, "basis", .keys).prefix(2)), [0.6, 0.8]))
    #expect(near(try numbers(made, "variance", .keys), [25, 0]))
    #expect(made.tensor("mean", of: .keys, layer: 0) == nil)
  }

  /// Keys are turned back: the order does not depend on where the text stands.
  @Test func channelOrders() throws {
    let shape = ModelShape(
      layerCount: 1, queryHeads: 2, kvHeads: 2, headDim: 4, rotary: try RotaryEmbedding(headDim: 4))
    let before: [Float] = [1, -8, 2, 4, 1, -8, 2, 4, -1, 7, 3, 2, 1, -7, 3, 2]
    func order(_ method: CalibrationMethod, at position: Int) throws -> Calibration {
      var rows = before
      var span = rows.mutableSpan
      let positions: [Int32] = [0, 1, 0, 1].map { $0 + Int32(position) }
      try #require(shape.rotary).rotate(&span, stride: 4, positions: positions.span)
      let calibrator = try Calibrator(method, shape: shape)
      try calibrator.add(
        layer: 0, keys: TensorView(rows.span, heads: 2, tokens: 2, dim: 4),
        values: TensorView(rows.span, heads: 2, tokens: 2, dim: 4), firstPosition: position)
      return try calibrator.finish()
    }
    for position in [0, 900] {
      let own = try order(.channelOrder(rotatedHeads: 0, perHead: true), at: position)
      #expect(
        try own.channelOrders(of: .keys, layer: 0, units: 2, width: 4) == [[0, 2, 3, 1], [0, 3, 2, 1]])
      #expect(near(try numbers(own, "magnitude", .keys), [1, 8, 2, 4, 1, 7, 3, 2], 1e-3))
      let all = try order(.channelOrder(by: .sum, rotatedHeads: 0), at: position)
      // Sums with signs: the channel of head 1 that changes sign counts as nothing.
      #expect(try all.channelOrders(of: .keys, layer: 0, units: 1, width: 8)[0].first == 1)
    }
    // One transform over both heads: of a single spike every channel gets the same share.
    let spike: [Float] = [8, 0, 0, 0, 0, 0, 0, 0]
    let calibrator = try Calibrator(.channelOrder(rotatedHeads: 2), shape: shape)
    try calibrator.add(
      layer: 0, keys: TensorView(spike.span, heads: 2, tokens: 1, dim: 4),
      values: TensorView(spike.span, heads: 2, tokens: 1, dim: 4), firstPosition: 0)
    let made = try calibrator.finish()
    #expect(near(try numbers(made, "magnitude", .keys), Array(repeating: 8 / Float(8).squareRoot(), count: 8)))
    #expect(try made.channelOrders(of: .keys, layer: 0, units: 1, width: 8) == [Array(0..<8)])
  }

  /// Relative error of samples through factors of some rank.
  private func error(_ made: Calibration, _ x: [Float], width: Int, rank: Int) throws -> Double {
    let basis = try numbers(made, "basis", .values)
    let encoder =
      made.tensor("encoder", of: .values, layer: 0) == nil ? basis : try numbers(made, "encoder", .values)
    var (sum, norm) = (0.0, 0.0)
    for row in 0..<x.count / width {
      var restored = [Double](repeating: 0, count: width)
      for r in 0..<rank {
        var latent = 0.0
        for c in 0..<width { latent += Double(encoder[r * width + c]) * Double(x[row * width + c]) }
        for c in 0..<width { restored[c] += latent * Double(basis[r * width + c]) }
      }
      for c in 0..<width {
        sum += (restored[c] - Double(x[row * width + c])) * (restored[c] - Double(x[row * width + c]))
        norm += Double(x[row * width + c]) * Double(x[row * width + c])
      }
    }
    return (sum / norm).squareRoot()
  }

  /// Of the three starts, samples are the best on the samples; a fit makes every other better, never worse.
  @Test func factorsOnTheirSamples() throws {
    let (inputs, width, tokens, rank) = (6, 6, 400, 2)
    let shape = ModelShape(
      layerCount: 1, queryHeads: 2, kvHeads: 2, headDim: 3 + 1, rotary: try RotaryEmbedding(headDim: 4))
    let values = LayerShape(queryHeads: 2, kvHeads: 2, keyDim: 4, valueDim: 3)
    let own = ModelShape(layers: [values], rotary: shape.rotary)
    var generator = SeededNumbers(7)
    let weight = (0..<width * inputs).map { _ in generator.next() }
    let x = (0..<tokens * inputs).map { generator.next() * [4, 0.2, 1, 0.1, 2, 0.5][$0 % inputs] }
    let rows = LinearAlgebra.product(x, weight, rows: tokens, columns: inputs, width: width, transposed: true)
    // [head][token][3].
    let heads = (0..<2).flatMap { head in
      (0..<tokens).flatMap { token in (0..<3).map { rows[token * width + head * 3 + $0] } }
    }
    let keys = [Float](repeating: 1, count: 2 * tokens * 4)
    let keyWeight = [Float](repeating: 1, count: 8 * inputs)
    func made(_ start: FactorStart, refit: Bool) throws -> Calibration {
      let calibrator = try Calibrator(
        .shrunkChannels(start: start, keys: 0.25, values: 0.34, refit: refit), shape: own)
      try calibrator.setProjection(layer: 0, .values, weight: weight)
      try calibrator.setProjection(layer: 0, .keys, weight: keyWeight)
      try calibrator.add(layer: 0, inputs: x, channels: inputs)
      try calibrator.add(
        layer: 0, keys: TensorView(keys.span, heads: 2, tokens: tokens, dim: 4),
        values: TensorView(heads.span, heads: 2, tokens: tokens, dim: 3), firstPosition: 0)
      return try calibrator.finish()
    }
    let best = try error(made(.samples, refit: false), rows, width: width, rank: rank)
    let (_, _, optimum) = try LinearAlgebra.lowRank(rows, rows: tokens, columns: width, rank: rank)
    #expect(abs(best - optimum) < 1e-4)
    for start in FactorStart.allCases {
      let plain = try error(made(start, refit: false), rows, width: width, rank: rank)
      let fitted = try error(made(start, refit: true), rows, width: width, rank: rank)
      #expect(plain >= best - 1e-5 && fitted <= plain + 1e-5 && fitted >= best - 1e-5, "\(start): \(plain), \(fitted)")
    }
    let (weights, scaled) = (
      try error(made(.weights, refit: false), rows, width: width, rank: rank),
      try error(made(.scaledWeights, refit: false), rows, width: width, rank: rank)
    )
    #expect(scaled < weights, "\(scaled) with the inputs' sizes, \(weights) without")
  }

  @Test func refusesWhatDoesNotFit() throws {
    let rotary = try RotaryEmbedding(headDim: 4)
    let shape = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 2, headDim: 4, rotary: rotary)
    let plain = ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 2, headDim: 4)
    expectError(.missingInput, "rotary embedding") { _ = try Calibrator(.channelOrder(), shape: plain) }
    expectError(.invalidOption, "above 0") { _ = try CalibrationMethod.shrunkChannels(keys: 0) }
    let calibrator = try Calibrator(.shrunkChannels(start: .weights), shape: shape)
    expectError(.missingInput, "samples") { _ = try calibrator.finish() }
    var rows = [Float](repeating: 1, count: 16)
    func add(_ layer: Int, tokens: Int = 2, dim: Int = 4) throws {
      try calibrator.add(
        layer: layer, keys: TensorView(rows.span, heads: 8 / dim, tokens: tokens, dim: dim),
        values: TensorView(rows.span, heads: 8 / dim, tokens: tokens, dim: dim), firstPosition: 0)
    }
    expectError(.shapeMismatch, "got 2", layer: 2) { try add(2) }
    expectError(.shapeMismatch, "got 1 x 8", layer: 0) { try add(0, dim: 8) }
    rows[5] = .infinity
    expectError(.nonFinite, "channel 1", layer: 0, head: 0, position: 1) { try add(0) }
    #expect(calibrator.tokens(layer: 0) == 0)
    rows[5] = 1
    try add(0)
    expectError(.missingInput, "projection", layer: 0) { _ = try calibrator.finish() }
    expectError(.wrongPhase, "bias", layer: 0) {
      try calibrator.setProjection(
        layer: 0, .keys, weight: [Float](repeating: 1, count: 24), bias: [Float](repeating: 0, count: 8))
    }
    expectError(.shapeMismatch, "8 rows", layer: 0) { try calibrator.setProjection(layer: 0, .keys, weight: [1, 2]) }
  }

  /// One token, one head, constant rows: numbers, no traps.
  @Test func degenerateSamples() throws {
    let shape = ModelShape(layerCount: 1, queryHeads: 1, kvHeads: 1, headDim: 5)
    for rows in [[Float](repeating: 0, count: 5), [1, 2, 3, 4, 5], [Float](repeating: 1e18, count: 5)] {
      let calibrator = try Calibrator(.principalComponents(), shape: shape)
      try calibrator.add(
        layer: 0, keys: TensorView(rows.span, heads: 1, tokens: 1, dim: 5),
        values: TensorView(rows.span, heads: 1, tokens: 1, dim: 5), firstPosition: 3)
      let made = try calibrator.finish()
      #expect(near(try numbers(made, "mean", .keys), rows, 0))
      #expect(try numbers(made, "variance", .keys) == [0, 0, 0, 0, 0])
    }
  }
}

/// Normal numbers from a seed.
private struct SeededNumbers {
  private var state: UInt64
  init(_ seed: UInt64) { state = seed }

  /// The sum of twelve uniform numbers, less six.
  mutating func next() -> Float {
    var sum: Float = -6
    for _ in 0..<12 {
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      sum += Float(state >> 40) / Float(1 << 24)
    }
    return sum
  }
}
