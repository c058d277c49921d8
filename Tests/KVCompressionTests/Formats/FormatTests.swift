import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Affine codes, symmetric integers, FP8 and ggml's blocks as encodings: bytes, errors, edges. Every level, to the bit.
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
    for bits in [2, 3, 4, 8] {
      for metadata in ElementType.all {
        all.append(try! .affinePerToken(bits: bits, group: 16, metadata: metadata))
        all.append(try! .affinePerToken(bits: bits, group: 4096, metadata: metadata))
        all.append(try! .affinePerToken(bits: bits, group: 32, zero: ZeroPoint(), metadata: metadata))
        all.append(try! .affinePerToken(bits: bits, group: 32, zero: .clamped, metadata: metadata))
        all.append(try! .affinePerChannel(bits: bits, group: 32, zero: .clamped, metadata: metadata))
        all.append(try! .affinePerChannel(bits: bits, group: 32, metadata: metadata))
      }
      all.append(try! .affinePerToken(bits: bits, group: 32, zero: ZeroPoint(clip: 0.8)))
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

  /// One scale for a million numbers, by their largest.
  @Test func oneScaleForAll() throws {
    let rows = normals(1 << 20, seed: 21)
    let largest = rows.reduce(0) { max($0, abs($1)) }
    let error = Self.relativeError(
      try Self.encode(rows, dim: 128, .scaled(.int8, by: largest / 127)).restored, rows)
    // The largest of a million is a matter of luck: 4.9 within a tenth, and the error goes with its square.
    #expect(abs(error / 1.4e-4 - 1) < 0.2, "\(error)")
  }

  /// Codes are made once: with other groups every round adds its error (0.1).
  @Test func otherGroupsDrift() throws {
    let wanted = [0.153, 0.223, 0.275, 0.316, 0.351, 0.385]
    let rows = normals(1 << 17, seed: 22)
    let encoding = try RowEncoding.affinePerToken(bits: 2, group: 32, metadata: .f32)
    var current = rows
    for (round, drift) in wanted.enumerated() {
      // Each round begins its groups seven numbers later; what does not fill a group stays.
      let shift = 7 * round % 32
      let end = shift + (current.count - shift) / 32 * 32
      let restored = try Self.encode(Array(current[shift..<end]), dim: 32, encoding).restored
      current.replaceSubrange(shift..<end, with: restored)
      let error = Self.relativeError(current, rows)
      // How ends are treated is not said, and tells by a few percent.
      #expect(abs(error / drift - 1) < 0.05, "round \(round + 1): \(error) instead of \(drift)")
    }
  }

  /// Bytes per token and KV head, for head sizes of 64 and 128 (1).
  @Test func byteTable() throws {
    var table: [(RowEncoding, Int, Int)] = [
      (.dense(.f16), 128, 256), (.dense(.bf16), 128, 256), (try .scaled(.e4m3), 64, 128), (try .scaled(.int8), 64, 128),
      (try .scaledPerToken(.int8), 68, 132), (try .scaledPerToken(.e4m3), 68, 132),
      (try .scaledPerToken(.int8, metadata: .f16), 66, 130),
      (try .affinePerToken(bits: 4, group: 4096), 36, 68),
      (.ggml(.q8_0), 68, 136), (.ggml(.q5_1), 48, 96), (.ggml(.q5_0), 44, 88), (.ggml(.q4_1), 40, 80),
      (.ggml(.q4_0), 36, 72), (.ggml(.iq4_nl), 36, 72),
    ]
    let affine = [
      (8, 32, 72, 144), (8, 64, 68, 136), (4, 32, 40, 80), (4, 64, 36, 72), (3, 32, 32, 64), (3, 64, 28, 56),
      (2, 32, 24, 48), (2, 64, 20, 40),
    ]
    for (bits, group, narrow, wide) in affine {
      table.append((try .affinePerToken(bits: bits, group: group), narrow, wide))
      // A group of tokens charges each of them as much as a group of channels of that length.
      table.append((try .affinePerChannel(bits: bits, group: group), narrow, wide))
    }
    for (encoding, narrow, wide) in table {
      let rows = encoding.rowsPerUnit
      #expect(encoding.bytes(rows: rows, dim: 64) == narrow * rows, "\(encoding), 64 channels")
      #expect(encoding.bytes(rows: rows, dim: 128) == wide * rows, "\(encoding), 128 channels")
    }
    // A group of 128 at a head size of 64 spans two heads side by side.
    for (bits, bytes) in [(8, 66), (4, 34), (3, 26), (2, 18)] {
      #expect(try RowEncoding.affinePerToken(bits: bits, group: 128).bytes(rows: 1, dim: 2 * 64) == 2 * bytes)
    }
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
      if encoding.kind == .scaledFixed || (encoding.zeroPoint?.clip ?? 1) < 1 { continue }
      // The channels below have one sign each, which a clamped zero point loses.
      if encoding.kind == .affinePerChannel, encoding.zeroPoint != nil { continue }
      let ends = (0..<1024).map { Float($0 % 2 == 0 ? 65504 : -65504) }
      let restored = try Self.encode(ends, dim: 32, encoding, level: level).restored
      let worst = zip(restored, ends).map { abs($0 - $1) }.max() ?? 0
      // q4_0 and q5_0 have no positive twin of their lowest code; bf16 scales are off by up to 1/256.
      // A zero point moves the ends by half a step.
      let narrow: Float = encoding.bits == 2 ? 3 : 7
      let steps: Float = encoding.bits == 8 ? 130 : encoding.bits == 5 ? 16 : narrow
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
}
