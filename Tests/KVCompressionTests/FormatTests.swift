import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Symmetric integers, FP8 and ggml's blocks as encodings: bytes, errors, edges. Every level, to the bit.
@Suite struct FormatTests {
  static let blocks = GGMLBlock.allCases
  static let encodings: [RowEncoding] = {
    var all = blocks.map { RowEncoding.ggml($0) }
    for code in ScaledCode.allCases {
      for metadata in ElementType.all {
        all.append(try! .scaledPerToken(code, metadata: metadata))
        all.append(try! .scaledPerToken(code, group: 16, metadata: metadata))
        all.append(try! .scaledPerBlock(code, tokens: 32, metadata: metadata))
      }
      all.append(try! .scaled(code, by: code.bits == 4 ? 0.5 : 0.0625))
    }
    return all
  }()

  /// Rows encoded by a backend: their bytes, then those of the scales, and what comes back.
  static func encode(
    _ rows: [Float], dim: Int, _ encoding: RowEncoding, level: String? = nil
  ) throws -> (bytes: [UInt8], restored: [Float]) {
    let backend = try Backend.cpu(threads: 1, level: level).operations
    let count = rows.count / dim
    let dense = try Extent(encoding: .dense(.f32), capacity: count, dim: dim, backend: backend)
    rows.withUnsafeBytes { dense.buffer.base.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
    let extent = try Extent(encoding: encoding, capacity: count, dim: dim, backend: backend)
    let run = extent.run(dim: dim)
    backend.transcode([RunSlice(run: dense.run(dim: dim), first: 0, count: count)], to: run, row: 0)
    let bytes = UnsafeRawBufferPointer(start: run.base, count: encoding.bytes(rows: count, dim: dim))
    var restored = [Float](repeating: .nan, count: rows.count)
    restored.withUnsafeMutableBufferPointer {
      backend.read(RunSlice(run: run, first: 0, count: count), into: $0.baseAddress!, stride: dim)
    }
    return (withExtendedLifetime(extent) { Array(bytes) }, restored)
  }

  static func relativeError(_ restored: [Float], _ rows: [Float]) -> Double {
    let error = zip(rows, restored).reduce(0.0) { $0 + Double($1.0 - $1.1) * Double($1.0 - $1.1) }
    return error / rows.reduce(0.0) { $0 + Double($1) * Double($1) }
  }

  // MARK: Vectors (2.2, 14)

  static let vector: [Float] = (0..<32).map { Float((37 * $0 + 11) % 64 - 32) / 8 }

  @Test(arguments: Backend.cpuLevels)
  func goldenVector(level: String) throws {
    let wanted: [(GGMLBlock, String)] = [
      (.q4_0, "0038730c953fc851ea841da63fd962fb842e"), (.q4_1, "113800c4730c952ec851ea731da63fc862fb841d"),
      (.q5_0, "00345aad546ae6083b5d80a2d5f72a4c7f91c4e6193b"),
      (.q5_1, "df3300c45aad546ae6083b5d80a2d5f72a4c7f91c4e6193b"),
      (.q8_0, "0828ad40d467fc9124b94be073089d30c457ec8114a93cd063f88d20b547dc6f0499"),
      (.iq4_nl, "1328620da42fc841eb731db52fd951fc831e"),
    ]
    for (block, text) in wanted {
      let bytes = try Self.encode(Self.vector, dim: 32, .ggml(block), level: level).bytes
      let hex = bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
      #expect(hex == text, "\(block)")
    }
  }

  /// All 256 codes come back as they are; steps, ties and saturation of the specification.
  @Test(arguments: Backend.cpuLevels)
  func fp8Codes(level: String) throws {
    for (code, exponentBits, bias) in [(ScaledCode.e4m3, 4, 7), (.e5m2, 5, 15)] {
      let encoding = try RowEncoding.scaled(code)
      var numbers: [Float] = []
      for byte in 0..<256 {
        let exponent = byte >> (7 - exponentBits) & (1 << exponentBits - 1)
        let mantissa = Float(byte & (1 << (7 - exponentBits) - 1)) / Float(1 << (7 - exponentBits))
        let power = Float(sign: .plus, exponent: max(exponent, 1) - bias, significand: 1)
        let magnitude = power * (exponent == 0 ? mantissa : 1 + mantissa)
        numbers.append(byte >= 128 ? -magnitude : magnitude)
      }
      let finite = (0..<256).filter { code == .e4m3 ? $0 & 0x7F != 0x7F : $0 & 0x7C != 0x7C }
      let rows = finite.map { numbers[$0] }
      let encoded = try Self.encode(rows, dim: rows.count, encoding, level: level)
      #expect(encoded.bytes == finite.map { UInt8($0) })
      checkSame(encoded.restored, rows, "\(code)")
      #expect(rows.max() == code.largest)

      // Midpoints go to the even code, everything else to the nearer one.
      let ascending = finite.filter { $0 < 128 }.map { numbers[$0] }
      for (index, (low, high)) in zip(ascending, ascending.dropFirst()).enumerated() {
        let middle = (low + high) / 2
        let got = try Self.encode([middle.nextDown, middle, middle.nextUp, -middle], dim: 4, encoding, level: level)
        let even = index % 2 == 0 ? low : high
        checkSame(got.restored, [low, even, high, -even], "\(code) between \(low) and \(high)")
      }
    }
    let some: [Float] = [0.0009, 0.001, 0.0009765625, 449, 1e30, -1e30, 464, 0.05]
    let restored = try Self.encode(some, dim: 8, .scaled(.e4m3), level: level).restored
    #expect(restored == [0, 0.001953125, 0, 448, 448, -448, 448, 0.05078125])
    #expect(
      try Self.encode([1e6, -61000, 57345], dim: 3, .scaled(.e5m2), level: level).restored == [57344, -57344, 57344])
  }

  @Test(arguments: Backend.cpuLevels)
  func symmetricVectors(level: String) throws {
    // amax 2.54: steps of 0.02 (f32); 0.05 is half way between 2 and 3 of a scale of 0.02, up to rounding.
    let x: [Float] = [2.54, -2.54, 0, 1, -0.02, 0.0099, 0.0101, -1.27]
    let eight = try Self.encode(x, dim: 8, .scaledPerToken(.int8), level: level)
    #expect(eight.bytes[..<7].map { Int8(bitPattern: $0) } == [127, -127, 0, 50, -1, 0, 1])
    // Exact halves: scale 1, to even.
    let halves: [Float] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]
    let even = try Self.encode(halves, dim: 8, .scaledPerToken(.int8), level: level)
    #expect(even.bytes[..<8].map { Int8(bitPattern: $0) } == [127, 0, 2, 2, 0, -2, -2, 4])
    let four = try Self.encode([7, -7, 0.5, 1.5, 3, -3, 6.4], dim: 7, .scaledPerToken(.int4), level: level)
    #expect(Array(four.bytes[..<4]) == [0x1F, 0xA8, 0x5B, 0x8E])
    #expect(four.restored == [7, -7, 0, 2, 3, -3, 6])
    // A given scale saturates.
    let fixed = try Self.encode([1, 10, -10, 0.26], dim: 4, .scaled(.int8, by: 0.0625), level: level)
    #expect(fixed.restored == [1, 7.9375, -7.9375, 0.25])
  }

  // MARK: Relative errors (2.1)

  @Test func relativeErrors() throws {
    let rows = normals(2048 * 256, seed: 20)
    func expect(_ encoding: RowEncoding, _ wanted: Double, _ what: String) throws {
      let error = Self.relativeError(try Self.encode(rows, dim: 256, encoding).restored, rows)
      #expect(abs(error / wanted - 1) < 0.03, "\(what): \(error) instead of \(wanted)")
      GoldenTrace.print("yardstick \(what): \(error), specification \(wanted)")
    }
    let affine: [(Int, [Double])] = [
      (16, [0.1068, 0.01944, 0.004227, 1.47e-5]), (32, [0.1545, 0.02814, 0.006112, 2.12e-5]),
      (64, [0.2025, 0.03689, 0.008033, 2.78e-5]), (128, [0.2516, 0.04582, 0.009905, 3.45e-5]),
      (256, [0.2989, 0.05448, 0.01186, 4.11e-5]),
    ]
    for (group, errors) in affine {
      for (bits, wanted) in zip([2, 3, 4, 8], errors) {
        try expect(.affinePerToken(bits: bits, group: group), wanted, "P1 G=\(group) b=\(bits)")
        // Groups of an odd length along tokens would be no groups: 16 is too few there.
        if group >= 32 {
          try expect(.affinePerChannel(bits: bits, group: group), wanted, "P1 per channel G=\(group) b=\(bits)")
        }
      }
    }
    for (group, four, eight) in [(32, 0.009414, 2.86e-5), (128, 0.01377, 4.18e-5)] {
      try expect(.scaledPerToken(.int8, group: group, metadata: .f16), eight, "P3 G=\(group) b=8")
      try expect(.scaledPerToken(.int4, group: group, metadata: .f16), four, "P3 G=\(group) b=4")
    }
    let blocks: [(GGMLBlock, Double)] = [
      (.q8_0, 2.86e-5), (.q5_0, 0.001822), (.q4_0, 0.007363), (.iq4_nl, 0.006177),
    ]
    for (block, wanted) in blocks { try expect(.ggml(block), wanted, block.name) }
    // P1 with the same group, but for half-up rounding.
    try expect(.ggml(.q4_1), 0.006112, "q4_1")
    try expect(.scaled(.e4m3), 7.06e-4, "e4m3")
    try expect(.scaled(.e5m2), 2.79e-3, "e5m2")
    // Section 14, of vectors of 128.
    try expect(.scaledPerToken(.e4m3, group: 128), 6.6e-4, "e4m3 by absmax")
  }

  /// Underflow of E4M3 at scale 1, and none of E5M2.
  @Test func smallNumbers() throws {
    let rows = normals(1024 * 128, seed: 3).map { $0 * 0.001 }
    let e4m3 = Self.relativeError(try Self.encode(rows, dim: 128, .scaled(.e4m3)).restored, rows)
    #expect(abs(e4m3 / 0.315 - 1) < 0.03)
    let e5m2 = Self.relativeError(try Self.encode(rows, dim: 128, .scaled(.e5m2)).restored, rows)
    #expect(abs(e5m2 / 2.79e-3 - 1) < 0.05)
  }

  // MARK: Levels and edges

  /// Bytes and restored rows do not depend on the level, whatever the numbers.
  @Test(arguments: encodings)
  func levelsAgree(encoding: RowEncoding) throws {
    withEvery("dim", in: encoding.kind == .ggml ? [32, 64, 128, 160] : [1, 2, 7, 16, 33, 40, 67, 128]) { dim in
      withEvery("data", in: ["normal", "large", "tiny", "subnormal", "zeros", "mixed", "ties"]) { data in
        let rows = Self.rows(data, 32 * dim)
        let expected = try Self.encode(rows, dim: dim, encoding, level: "portable")
        check(expected.restored.allSatisfy(\.isFinite), "not finite")
        for level in Backend.cpuLevels where level != "portable" {
          let encoded = try Self.encode(rows, dim: dim, encoding, level: level)
          check(encoded.bytes == expected.bytes, "bytes of \(level)")
          checkSame(encoded.restored, expected.restored, level)
        }
      }
    }
  }

  static func rows(_ data: String, _ count: Int) -> [Float] {
    var dice = Dice(11)
    return (0..<count).map { i in
      let x = dice.normal()
      return switch data {
      case "large": max(-65504, min(65504, x * 40000))
      case "tiny": x * 1e-6
      case "subnormal": x * 0x1p-140
      case "zeros": i % 64 < 32 ? (i % 3 == 0 ? -0.0 : 0) : x
      case "mixed": i % 7 == 0 ? x * 1000 : i % 5 == 0 ? 0 : x * 0x1p-130
      case "ties": Float(Int(x * 8)) / 2
      default: x
      }
    }
  }

  /// Zeros come back as zeros, and the largest numbers within a step.
  @Test(arguments: encodings)
  func zerosAndEnds(encoding: RowEncoding) throws {
    for level in Backend.cpuLevels {
      let zeros = [Float](repeating: 0, count: 32 * 32)
      #expect(try Self.encode(zeros, dim: 32, encoding, level: level).restored == zeros)
      if encoding.kind == .scaledFixed { continue }
      let ends = (0..<1024).map { Float($0 % 2 == 0 ? 65504 : -65504) }
      let restored = try Self.encode(ends, dim: 32, encoding, level: level).restored
      let worst = zip(restored, ends).map { abs($0 - $1) }.max() ?? 0
      // q4_0 and q5_0 have no positive twin of their lowest code; bf16 scales are off by up to 1/256.
      let steps: Float = encoding.bits == 8 ? 130 : encoding.bits == 5 ? 16 : 7
      #expect(worst <= 65504 / steps * 1.02, "\(worst) at \(level)")
    }
  }

  /// Scaling by a power of two scales exactly, where scales are found from the values. Not scales of E5M2 in f16: largest
  /// magnitudes divided by 57344 are subnormal there.
  @Test(arguments: encodings.filter { $0.kind != .scaledFixed && !($0.scaledCode == .e5m2 && $0.type == .f16) })
  func powersOfTwo(encoding: RowEncoding) throws {
    let rows = Self.rows("normal", 32 * 64)
    let once = try Self.encode(rows, dim: 64, encoding).restored
    for factor: Float in [4, 0.5, 0x1p-3] {
      checkSame(
        try Self.encode(rows.map { $0 * factor }, dim: 64, encoding).restored, once.map { $0 * factor }, "\(factor)")
    }
  }

  /// Permuting blocks of channels permutes what comes back; a block knows nothing of its neighbours.
  @Test(arguments: blocks)
  func blocksAreIndependent(block: GGMLBlock) throws {
    let rows = Self.rows("mixed", 8 * 96)
    let whole = try Self.encode(rows, dim: 96, .ggml(block)).bytes
    let single = try Self.encode(rows, dim: 32, .ggml(block)).bytes
    #expect(whole == single)
  }

  /// Restored rows encode to the same codes when the scale survives f16: -8 (-127, …) times a power of two is there.
  @Test func encodingAgain() throws {
    for block in Self.blocks where block != .iq4_nl {
      let exact: [Float] = (0..<2048).map { (i: Int) in Float(i % 32 == 5 ? -16 : i * 7 % 31 - 15) }
      let once = try Self.encode(exact, dim: 32, .ggml(block))
      #expect(try Self.encode(once.restored, dim: 32, .ggml(block)).bytes == once.bytes, "\(block)")
    }
  }

  // MARK: Caches

  static let stores = [
    "int8", "int8(scale=head,group=32)", "int8(format=int4,group=16,metadata=f16)", "int8(scale=tensor,factor=0.05)",
    "fp8", "fp8(format=e5m2,scale=token)", "fp8(scale=head,group=64,metadata=bf16)", "ggml",
    "ggml(keys=q5_0,values=q5_1)", "ggml(keys=q4_0,values=q4_1)", "ggml(keys=iq4_nl,values=iq4_nl,residual=5)",
    "quant(keys=channel,key_bits=3,key_residual=64,values=e4m3)",
    "quant(keys=q8_0,values=token,value_bits=2,value_group=16)",
  ]

  /// Appending by 1, 3, 7 or all at once: the same rows, the same bytes, the same attention.
  @Test(arguments: stores)
  func anyStep(store: String) throws {
    let traffic = Traffic(Geometry(4, 2, 64).shape(), tokens: 140, seed: 5)
    var expected: [HeadContents]?
    for step in [140, 1, 3, 7] {
      let cache = try makeCache(store, traffic.shape)
      for start in stride(from: 0, to: 140, by: step) {
        try traffic.append(cache, 0, start..<min(start + step, 140))
        if start == 0 { try cache.finishPrefill() } else { try cache.commit(layer: 0) }
      }
      let held = try (0..<2).map { try cache.read(layer: 0, head: $0) }
      #expect(held == expected ?? held, "by \(step)")
      expected = held
    }
  }

  /// Heads know nothing of each other.
  @Test(arguments: stores)
  func headsPermute(store: String) throws {
    let traffic = Traffic(Geometry(3, 3, 32).shape(), tokens: 80, seed: 6)
    var turned = traffic
    let size = 80 * 32
    turned.keys[0] = Array(traffic.keys[0][size...] + traffic.keys[0][..<size])
    turned.values[0] = Array(traffic.values[0][size...] + traffic.values[0][..<size])
    turned.queries[0] = Array(traffic.queries[0][size...] + traffic.queries[0][..<size])
    let (a, b) = (try makeCache(store, traffic.shape), try makeCache(store, traffic.shape))
    let (x, y) = (try traffic.run(a, prompt: 70, decoded: 10), try turned.run(b, prompt: 70, decoded: 10))
    for head in 0..<3 {
      #expect(try a.read(layer: 0, head: (head + 1) % 3) == b.read(layer: 0, head: head))
    }
    // The last token's output of heads 1 and 2, and of the heads that are 1 and 2 turned.
    let (old, new) = (Array(x.suffix(96)), Array(y.suffix(96)))
    checkSame(Array(old[32...]), Array(new[..<64]), "outputs")
  }

  /// NaN, infinity and what f16 cannot hold are refused with layer, head and token; nothing changes.
  @Test(arguments: stores)
  func badNumbers(store: String) throws {
    let shape = Geometry(2, 2, 32).shape(layers: 2)
    let cache = try makeCache(store, shape)
    let traffic = Traffic(shape, tokens: 8)
    try traffic.append(cache, 1, 0..<4)
    for bad: Float in [.nan, .infinity, -.infinity] {
      var keys = traffic.keys(1, 4..<8)
      keys[4 * 32 + 2 * 32 + 7] = bad
      let values = traffic.values(1, 4..<8)
      expectError(.nonFinite, "channel 7 of a key", layer: 1, head: 1, position: 6) {
        try cache.append(
          layer: 1, keys: TensorView(keys.span, heads: 2, tokens: 4, dim: 32),
          values: TensorView(values.span, heads: 2, tokens: 4, dim: 32))
      }
    }
    var keys = traffic.keys(1, 4..<8)
    keys[3] = 70000
    let values = traffic.values(1, 4..<8)
    expectError(.unrepresentable, "channel 3 of a key", layer: 1, head: 0, position: 4) {
      try cache.append(
        layer: 1, keys: TensorView(keys.span, heads: 2, tokens: 4, dim: 32),
        values: TensorView(values.span, heads: 2, tokens: 4, dim: 32))
    }
    #expect(cache.tokensSeen(layer: 1) == 4)
  }

  /// The byte formulas of the pages, per token and head.
  @Test(arguments: [
    ("int8", 132, 132), ("int8(metadata=f16)", 130, 130), ("int8(scale=tensor,factor=1)", 128, 128),
    ("int8(format=int4,group=32,metadata=f16)", 72, 72), ("fp8", 128, 128), ("fp8(scale=token)", 132, 132),
    ("ggml", 136, 136), ("ggml(keys=q5_1,values=q5_0)", 96, 88), ("ggml(keys=q4_1,values=q4_0)", 80, 72),
    ("ggml(keys=iq4_nl,values=dense)", 72, 256), ("int8(scale=head,group=128)", 128, 128),
  ])
  func byteFormulas(store: String, keys: Int, values: Int) throws {
    let shape = Geometry(1, 1, 128).shape()
    let policy = try PolicyRegistry.standard.policy(store)
    let a = try policy.estimate(shape: shape, prompt: 1024)
    let b = try policy.estimate(shape: shape, prompt: 2048)
    let scales = store.contains("scale=head") ? 2 * 1024 / 128 * 4 : 0
    #expect(b.total - a.total == 1024 * (keys + values) + scales)
  }

  @Test func headsThatAreNoBlocks() {
    expectError(.unsupported, "q8_0", "40 channels", "keys", layer: 0) {
      _ = try makeCache("ggml", Geometry(2, 2, 40, 32).shape())
    }
    expectError(.unsupported, "q4_1", "33 channels", "values", layer: 1) {
      _ = try makeCache(
        "ggml(keys=q8_0,values=q4_1)",
        ModelShape(layers: [Geometry(2, 2, 32).layer(), Geometry(2, 2, 32, 33).layer()]))
    }
  }

  @Test(arguments: [
    "int8(scale=tensor)", "int8(factor=2)", "int8(format=e4m3)", "int8(scale=tensor,factor=1,group=32)",
    "fp8(group=32)",
    "int8(group=12)", "int8(scale=head,group=48)", "fp8(scale=tensor,factor=0)", "ggml(keys=q2_k)",
    "quant(keys=q8_0,key_bits=4)", "quant(keys=f16,key_window=f32)", "quant(keys=channel,key_scale=head)",
    "quant(keys=int8,key_factor=1)", "quant(values=token,value_bits=5)", "quant(keys=q8_0,key_metadata=f32)",
  ])
  func textsThatContradictThemselves(text: String) {
    #expect { _ = try PolicyRegistry.standard.policy(text) } throws: { ($0 as? KVError)?.code == .invalidOption }
  }

  @Test(
    arguments: stores + [
      "int8(key_scale=tensor,key_factor=0.1,value_scale=head,value_group=64)",
      "quant(keys=e5m2,key_scale=head,values=int4,value_group=16)", "quant(keys=bf16,values=iq4_nl,value_residual=9)",
    ])
  func specsMakeTheSamePolicy(text: String) throws {
    let policy = try PolicyRegistry.standard.policy(text)
    let again = try PolicyRegistry.standard.policy(policy.spec.description)
    #expect(again.spec == policy.spec)
    #expect((again.tiers[0].factory as? RowFormat) == (policy.tiers[0].factory as? RowFormat))
  }
}

/// Rows that an engine has encoded.
@Suite struct EncodedRowsTests {
  private static let shape = Geometry(4, 2, 64).shape(layers: 2)

  private func blocks(_ tokens: Int, seed: UInt64, _ block: GGMLBlock) throws -> [UInt8] {
    try FormatTests.encode(normals(2 * tokens * 64, seed: seed), dim: 64, .ggml(block)).bytes
  }

  /// Head-major, token-major and strided views of the same rows.
  @Test func layouts() throws {
    let cache = try makeCache("ggml(keys=q8_0,values=q4_0)", Self.shape)
    let (keys, values) = (try blocks(9, seed: 1, .q8_0), try blocks(9, seed: 2, .q4_0))
    try cache.append(
      layer: 0, keys: EncodedRows(keys.span, .ggml(.q8_0), heads: 2, tokens: 9, dim: 64),
      values: EncodedRows(values.span, .ggml(.q4_0), heads: 2, tokens: 9, dim: 64))
    let expected = try (0..<2).map { try cache.encodedRows(layer: 0, head: $0) }
    #expect(expected[1].keys == Array(keys[(9 * 68)...]) && expected[0].values == Array(values[..<(9 * 36)]))
    #expect(expected[0].positions == Array(0..<9))

    // [token][head], behind a header of 3 bytes, one token at a time.
    var mixed: [UInt8] = [1, 2, 3]
    for t in 0..<9 { for h in 0..<2 { mixed += keys[(h * 9 + t) * 68..<(h * 9 + t + 1) * 68] } }
    var mixedValues: [UInt8] = []
    for t in 0..<9 { for h in 0..<2 { mixedValues += values[(h * 9 + t) * 36..<(h * 9 + t + 1) * 36] } }
    for t in 0..<9 {
      try cache.append(
        layer: 1,
        keys: EncodedRows(
          mixed.span.extracting((3 + t * 136)...), .ggml(.q8_0), heads: 2, tokens: 1, dim: 64, headStride: 68,
          tokenStride: 136),
        values: EncodedRows(
          mixedValues.span.extracting((t * 72)..<((t + 1) * 72)), .ggml(.q4_0), heads: 2, tokens: 1, dim: 64,
          layout: .tokenMajor), firstPosition: t)
    }
    #expect(try (0..<2).map { try cache.encodedRows(layer: 1, head: $0) } == expected)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// Adopted rows, then tokens of our own: the same as if all had been our own; also after a fork and a file.
  @Test func continues() throws {
    let traffic = Traffic(Self.shape, tokens: 60)
    for text in [
      "ggml(keys=q8_0,values=q4_0)", "ggml(keys=q5_1,values=dense)", "fp8", "int8(scale=tensor,factor=0.02)",
    ] {
      let plain = try makeCache(text, Self.shape)
      for layer in 0..<2 { try traffic.append(plain, layer, 0..<40) }
      try plain.finishPrefill()
      let cache = try makeCache(text, Self.shape)
      for layer in 0..<2 {
        let held = try (0..<2).map { try plain.encodedRows(layer: layer, head: $0) }
        let (keys, values) = (held.flatMap(\.keys), held.flatMap(\.values))
        try cache.append(
          layer: layer, keys: EncodedRows(keys.span, held[0].keyEncoding, heads: 2, tokens: 40, dim: 64),
          values: EncodedRows(values.span, held[0].valueEncoding, heads: 2, tokens: 40, dim: 64), firstPosition: 0)
      }
      try cache.finishPrefill()
      #expect(try Snapshot(cache).heads == Snapshot(plain).heads)
      let fork = cache.fork()
      let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu(threads: 1))
      var outputs: [[Float]] = []
      for each in [plain, cache, fork, loaded] {
        var own: [Float] = []
        for token in 40..<60 { own += try traffic.step(each, token..<token + 1) }
        outputs.append(own)
      }
      // Rows lie in other extents, and weights are rounded relative to the largest of 128 rows of one extent.
      for other in outputs.dropFirst() {
        let worst = zip(other, outputs[0]).map { abs($0 - $1) }.max() ?? 0
        #expect(other.count == outputs[0].count && worst <= 4 * 2 / 32639, "\(text): off by \(worst)")
      }
      #expect(cache.minimumTrim == plain.minimumTrim)
    }
  }

  @Test func badRowsAreRefused() throws {
    let cache = try makeCache("ggml(keys=q8_0,values=q4_0)", Self.shape)
    let (keys, values) = (try blocks(3, seed: 1, .q8_0), try blocks(3, seed: 2, .q4_0))
    func append(
      _ keys: [UInt8], _ values: [UInt8], _ block: GGMLBlock = .q8_0, heads: Int = 2, tokens: Int = 3, dim: Int = 64,
      first: Int? = nil, layer: Int = 1
    ) throws {
      try cache.append(
        layer: layer, keys: EncodedRows(keys.span, .ggml(block), heads: heads, tokens: tokens, dim: dim),
        values: EncodedRows(values.span, .ggml(.q4_0), heads: 2, tokens: 3, dim: 64), firstPosition: first)
    }
    expectError(.shapeMismatch, "68 bytes", "holds 407") { try append(Array(keys.dropLast()), values) }
    expectError(.unsupported, "q8_0", "48 channels") { try append(keys, values, dim: 48) }
    expectError(.shapeMismatch, "2 heads x 64", "got 1 x 128", layer: 1) {
      try append(keys, values, heads: 1, dim: 128)
    }
    expectError(.shapeMismatch, "4 keys and 3 values", layer: 1) {
      try append(blocks(4, seed: 1, .q8_0), values, tokens: 4)
    }
    expectError(.invalidOption, "holds keys as q8_0", "rows are q5_0", layer: 1) {
      try append(blocks(3, seed: 1, .q5_0), values, .q5_0)
    }
    expectError(.shapeMismatch, "position 0", "got 2", layer: 1, position: 2) { try append(keys, values, first: 2) }
    expectError(.shapeMismatch, "layer 7", layer: 7) { try append(keys, values, layer: 7) }
    var broken = keys
    broken[4 * 68 + 34] = 0
    broken[4 * 68 + 35] = 0x7C
    expectError(.nonFinite, "byte 34 of an encoded key", "q8_0", layer: 1, head: 1, position: 1) {
      try append(broken, values)
    }
    broken[4 * 68 + 34] = 1
    expectError(.nonFinite, layer: 1, head: 1, position: 1) { try append(broken, values) }
    expectError(.shapeMismatch, "reach beyond") {
      let view = try EncodedRows(
        keys.span, .ggml(.q8_0), heads: 2, tokens: 3, dim: 64, headStride: 68, tokenStride: 170)
      _ = view.tokens
    }
    expectError(.unsupported, "apart from its rows") {
      let view = try EncodedRows(keys.span, .scaledPerToken(.int8), heads: 2, tokens: 3, dim: 64)
      _ = view.tokens
    }
    #expect(cache.tokensSeen(layer: 1) == 0 && cache.bytes.total == 0)

    // Dense tokens in the way.
    let traffic = Traffic(Self.shape, tokens: 4)
    try traffic.append(cache, 1, 0..<1)
    expectError(.wrongPhase, "1 tokens are still dense", layer: 1, head: 0) { try append(keys, values) }
    expectError(.wrongPhase, "1 tokens are not q8_0 yet", layer: 1, head: 0) {
      _ = try cache.encodedRows(layer: 1, head: 0)
    }
    let kivi = try makeCache("kivi", Self.shape)
    expectError(.invalidOption, "holds keys as affine", layer: 0) {
      try kivi.append(
        layer: 0, keys: EncodedRows(keys.span, .ggml(.q8_0), heads: 2, tokens: 3, dim: 64),
        values: EncodedRows(values.span, .ggml(.q4_0), heads: 2, tokens: 3, dim: 64))
    }
  }
}

/// Other stores for some layers.
@Suite struct LayersTests {
  private static let shape = Geometry(2, 1, 64).shape(layers: 5)

  private func payload(_ text: String, layer: Int) throws -> Int {
    let cache = try makeCache(text, Self.shape)
    let traffic = Traffic(Self.shape, tokens: 128)
    for layer in 0..<5 { try traffic.append(cache, layer, 0..<128) }
    try cache.finishPrefill()
    return cache.bytes(layer: layer).total
  }

  @Test func everyLayerHasItsStore() throws {
    let text =
      "kivi(bits=2,residual=32)+layers(first=1,last=2)+kivi(bits=8,residual=32)+layers(first=0,last=0,list=[0,1])+f32"
    let wanted = [
      "kivi(bits=8,residual=32)", "f32", "kivi(bits=2,residual=32)", "kivi(bits=8,residual=32)",
      "kivi(bits=8,residual=32)",
    ]
    for (layer, store) in wanted.enumerated() {
      #expect(try payload(text, layer: layer) == payload(store, layer: layer), "layer \(layer)")
    }
    let policy = try PolicyRegistry.standard.policy(text)
    #expect(policy.tiers.count == 1)
    #expect(try PolicyRegistry.standard.policy(policy.spec.description).spec == policy.spec)
    let traffic = Traffic(Self.shape, tokens: 100)
    let cache = try KVCache(shape: Self.shape, policy: policy, backend: .cpu(threads: 1))
    let outputs = try traffic.run(cache, prompt: 80, decoded: 10)
    #expect(!outputs.contains { !$0.isFinite })
    #expect(try policy.estimate(shape: Self.shape, prompt: 80, decoded: 10) == cache.bytes)
    let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu(threads: 1))
    checkSame(try traffic.step(loaded, 90..<91), try traffic.step(cache, 90..<91), "after loading")
    // The same store in layers of both kinds, by hand.
    let made = try Store.kivi(keyBits: 2, residual: 32).except(
      in: LayerChoice(first: 1, last: 2), .kivi(keyBits: 8, residual: 32)
    )
    .except(in: LayerChoice(list: [0, 1]), .dense(.f32))
    #expect(Policy(store: made).spec == policy.spec)
  }

  /// With tiers and selections: an exception belongs to the store it stands behind.
  @Test func withASelection() throws {
    let text = "snapkv(budget=40,window=8)+ggml+layers(first=1,last=1)+f16"
    let cache = try makeCache(text, Self.shape)
    try Traffic(Self.shape, tokens: 90).run(cache, prompt: 80, decoded: 5)
    #expect((0..<5).allSatisfy { cache.rowsHeld(layer: $0, head: 0) == 45 })
    // Scales of blocks are metadata; dense rows have none.
    #expect((0..<5).map { cache.bytes(layer: $0).metadata > 0 } == [false, true, true, true, false])
  }

  @Test(arguments: [
    "layers", "layers+f16", "f16+layers", "f16+layers+layers+f32", "h2o+layers+f16", "f16+layers(first=-1)+f32",
    "f16+layers(list=[-2])+f32",
  ])
  func misplaced(text: String) {
    #expect { _ = try PolicyRegistry.standard.policy(text) } throws: { ($0 as? KVError)?.code == .invalidOption }
  }

  /// What a layer's store refuses is refused with the layer.
  @Test func refusalsNameTheLayer() {
    expectError(.unsupported, "q8_0", layer: 1) {
      _ = try makeCache(
        "f16+layers(first=0,last=1)+ggml", ModelShape(layers: [Geometry(2, 2, 40).layer(), Geometry(2, 2, 40).layer()]))
    }
  }
}
