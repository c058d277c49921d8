import KVCompression
import KVCore
import Testing

@Suite struct SaveLoadCorruptionTests {
  /// One head of one channel, three tokens: the fields of its segment lie at the offsets used below.
  private func tiny(_ text: String = "f32", tokens: Int = 3) throws -> (KVCache, [UInt8]) {
    let shape = ModelShape(layerCount: 1, queryHeads: 1, kvHeads: 1, headDim: text == "f32" ? 1 : 2)
    let cache = try KVCache(shape: shape, policy: SavedCases.policy(text), backend: .cpu(threads: 1))
    try SavedStep.tokens(tokens).run(cache, seed: 5)
    return (cache, try cache.saved())
  }

  /// The file with one section changed and every checksum right again.
  private func edited(
    _ bytes: [UInt8], _ tag: String, index: Int = 0, _ change: (inout [UInt8]) -> Void
  ) throws -> [UInt8] {
    let reader = try ContainerReader(bytes: bytes)
    var writer = ContainerWriter(flags: reader.flags)
    for entry in reader.entries {
      var section = Array(bytes[entry.offset..<entry.offset + entry.length])
      if "\(entry.tag)" == tag, Int(entry.index) == index { change(&section) }
      writer.add(entry.tag, index: Int(entry.index), section)
    }
    return writer.bytes()
  }

  private func refusal(_ bytes: [UInt8], of cache: KVCache) -> KVError? {
    do {
      _ = try KVCache.load(saved: bytes, policy: cache.policy, shape: cache.shape, backend: cache.backend)
      return nil
    } catch {
      return error
    }
  }

  @Test func everyTruncationIsRefused() throws {
    let (cache, bytes) = try tiny("h2o(heavy=20,recent=20)+kivi(bits=2,residual=32)", tokens: 80)
    for length in Array(0..<min(bytes.count, 700)) + Array(stride(from: 700, to: bytes.count, by: 13)) {
      #expect(refusal(Array(bytes[..<length]), of: cache)?.code == .corruptFile, "\(length) bytes")
    }
    #expect(refusal(bytes + [0], of: cache)?.code == .corruptFile)
  }

  @Test func everyFlippedByteIsRefused() throws {
    let (cache, bytes) = try tiny()
    for index in bytes.indices {
      for flip: UInt8 in [1, 0x80, 0xFF] {
        var damaged = bytes
        damaged[index] ^= flip
        #expect(refusal(damaged, of: cache)?.code == .corruptFile, "byte \(index)")
      }
    }
  }

  @Test(
    arguments: [
      (0, [2], "all 1 KV heads"), (8, [4], "slots"), (16, [1], "dead slots"), (24, [1], "room for"),
      (24, [2], "room for"), (24, [3], "consecutive"),
      (25, [1], "first position"), (33, [1], "room for log biases"), (34, [1], "observed columns"),
      (35, [1], "expected rows in"), (35, [9], "body extents"), (43, [0], "expected 3 rows"), (43, [2], "encoding"),
      (43, [255, 255, 255, 255], "extents"), (51, [9], "known encoding"), (52, [1], "known encoding"),
      (53, [16], "known encoding"), (54, [1], "known encoding"), (55, [2], "known encoding"),
      (59, [2], "expected 3 rows"),
      (59, [0], "expected 3 rows"), (67, [2], "room for rows"), (67, [0, 0, 4], "room for rows"),
      (75, [62], "first row"),
      (83, [0, 0, 0xC0, 0x7F], "finite elements"), (83, [0, 0, 0x80, 0xFF], "finite elements"),
    ] as [(Int, [UInt8], String)])
  func everyFieldOfASegmentIsChecked(offset: Int, bytes: [UInt8], message: String) throws {
    let (cache, saved) = try tiny()
    let damaged = try edited(saved, "SEGM") { $0.replaceSubrange(offset..<offset + bytes.count, with: bytes) }
    let error = try #require(refusal(damaged, of: cache))
    #expect(error.code == .corruptFile)
    #expect(error.message.contains(message), "\(error)")
    #expect(error.layer == 0)
  }

  @Test(
    arguments: [
      ("CACH", 0, [3], "format"), ("LAYR", 0, [2], "settled tokens"), ("LAYR", 0, [4], "tokens seen"),
      ("LAYR", 16, [4], "observed queries"), ("LAYR", 24, [4], "settled"), ("LAYR", 38, [2], "since a compression"),
      ("LAYR", 40, [4], "cut off"), ("LAYR", 48, [4], "before the prompt"),
      ("LAYR", 56, [4], "decoded tokens"), ("LAYR", 64, [2], "phase"),
      ("LAYR", 65, [6], "outcome"), ("LAYR", 66, [1], "expected a window"), ("SHAP", 9, [2], "cached"),
    ] as [(String, Int, [UInt8], String)])
  func everyFieldOfALayerIsChecked(tag: String, offset: Int, bytes: [UInt8], message: String) throws {
    let (cache, saved) = try tiny()
    let damaged = try edited(saved, tag) { $0.replaceSubrange(offset..<offset + bytes.count, with: bytes) }
    let error = try #require(refusal(damaged, of: cache))
    #expect(error.code == .corruptFile)
    #expect(error.message.contains(message), "\(error)")
  }

  @Test func encodedGroupsAreChecked() throws {
    // 64 tokens, 2 channels: keys are one body extent of 64 rows behind the header of 51 + 32 bytes.
    let policy = "kivi(bits=8,group=32,residual=64)"
    let (cache, _) = try tiny(policy, tokens: 64)
    try cache.finishPrefill()
    let saved = try cache.saved()
    #expect(refusal(saved, of: cache) == nil)
    func message(_ offset: Int, _ bytes: [UInt8]) throws -> String {
      let damaged = try edited(saved, "SEGM") { $0.replaceSubrange(offset..<offset + bytes.count, with: bytes) }
      return refusal(damaged, of: cache)?.message ?? "loaded"
    }
    #expect(try message(59, [63]).contains("whole groups"))
    #expect(try message(67, [65]).contains("whole groups"))
    #expect(try message(75, [32]).contains("first row"))
    #expect(try message(55, [64]).contains("expected rows in"))
    #expect(try message(53, [5]).contains("known encoding"))
    // Codes of 64 rows x 2 channels, then scales and minima of 2 groups x 2 channels.
    #expect(try message(83 + 128, [0, 0x7C]).contains("finite scales"))
    #expect(try message(83 + 128 + 8, [0, 0xFE]).contains("finite minima"))
    #expect(try message(83, [1, 2, 3]) == "loaded")
  }

  @Test func sectionsAreAllThereAndNoOthers() throws {
    let (cache, saved) = try tiny()
    let reader = try ContainerReader(bytes: saved)
    func rebuilt(without tag: String = "", flags: UInt32 = 0, extra: Bool = false) -> [UInt8] {
      var writer = ContainerWriter(flags: flags)
      for entry in reader.entries where "\(entry.tag)" != tag {
        writer.add(entry.tag, index: Int(entry.index), Array(saved[entry.offset..<entry.offset + entry.length]))
      }
      if extra { writer.add(Container.Tag("MORE"), []) }
      return writer.bytes()
    }
    #expect(rebuilt() == saved)
    for tag in ["CACH", "SHAP", "LAYR", "SEGM"] {
      #expect(refusal(rebuilt(without: tag), of: cache)?.code == .corruptFile)
      let longer = try edited(saved, tag) { $0.append(0) }
      #expect(refusal(longer, of: cache)?.message.contains("1 bytes are left") == true)
    }
    #expect(refusal(rebuilt(flags: 1), of: cache)?.code == .corruptFile)
    #expect(refusal(rebuilt(extra: true), of: cache)?.code == .corruptFile)
  }

  @Test(arguments: [
    "f32", "kivi(bits=2,residual=32)", "h2o(heavy=20,recent=20)+kivi(bits=4,residual=32)",
    "snapkv(budget=40,window=8,every=4)", "streaming(sinks=2,recent=20)", "two tiers", "ragged heads",
  ])
  func whatSurvivesMutationAttends(text: String) throws {
    let shape = ModelShape(
      layers: [
        LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 4, valueDim: 6),
        LayerShape(queryHeads: 1, kvHeads: 1, keyDim: 4, slidingWindow: 16),
      ], rotary: try RotaryEmbedding(headDim: 4))
    let cache = try KVCache(shape: shape, policy: SavedCases.policy(text), backend: .cpu(threads: 1))
    for (index, step) in SavedStep.life[..<11].enumerated() { try step.run(cache, seed: UInt64(index)) }
    let saved = try cache.saved()
    let entries = try ContainerReader(bytes: saved).entries
    var random = SavedRandom(state: 11)
    var survivors = 0
    var tried = 0
    // Seven arguments, half a second each.
    let end = ContinuousClock.now + .milliseconds(450)
    while ContinuousClock.now < end {
      let entry = entries.randomElement(using: &random)!
      let damaged = try edited(saved, "\(entry.tag)", index: Int(entry.index)) { mutate(&$0, &random) }
      tried += 1
      _ = try? KVCache.savedDescription(of: damaged)
      guard
        let loaded = try? KVCache.load(saved: damaged, policy: cache.policy, shape: shape, backend: cache.backend)
      else { continue }
      survivors += 1
      try live(loaded)
    }
    #expect(tried > 20 && survivors > 0, "\(survivors) of \(tried)")
  }

  /// Everything a cache can do, whatever its numbers are; errors are fine.
  private func live(_ cache: KVCache) throws {
    let fork = cache.fork()
    for step in [SavedStep.tokens(1), .tokens(1), .tokens(34), .finish, .tokens(1), .begin, .tokens(2)] {
      _ = try? step.run(cache, seed: 3)
    }
    _ = cache.status
    try? cache.trim(to: cache.minimumTrim)
    try? fork.compress()
    try? fork.makeRoom(for: 4)
    for layer in cache.shape.layers.indices { _ = try fork.read(layer: layer, head: 0) }
    _ = try? SavedStep.tokens(1).run(fork, seed: 4)
  }

  /// Numbers that fields are most likely to trip over, or any bytes, in one or two places.
  private func mutate(_ section: inout [UInt8], _ random: inout SavedRandom) {
    for _ in 0..<Int.random(in: 1...2, using: &random) where !section.isEmpty {
      // Most of a section is rows; its fields are at the start, or anywhere.
      let limit = Bool.random(using: &random) ? min(section.count, 120) : section.count
      let at = Int.random(in: 0..<limit, using: &random)
      let numbers: [UInt64] = [
        0, 1, 2, 31, 32, 33, 63, 64, 65, 1023, 1025, 1 << 16, 1 << 31 - 1, 1 << 31, 1 << 32, 1 << 48, 1 << 62, 1 << 63,
        .max, .max - 1, 0x7FC0_0000, 0xFF80_0000, 0x7F80_0000,
      ]
      switch Int.random(in: 0..<7, using: &random) {
      case 0: section[at] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      case 1: section[at] = UInt8.random(in: 0...255, using: &random)
      case 2: section[at] = section[at] &+ (Bool.random(using: &random) ? 1 : 255)
      case 3, 4:
        let width = [1, 2, 4, 8].randomElement(using: &random)!
        let number = numbers.randomElement(using: &random)!
        for byte in 0..<width where at + byte < section.count {
          section[at + byte] = UInt8(truncatingIfNeeded: number >> UInt64(8 * byte))
        }
      case 5: section.removeSubrange(at..<min(section.count, at + Int.random(in: 1...9, using: &random)))
      default: section.insert(contentsOf: (0..<Int.random(in: 1...9, using: &random)).map { _ in 0 }, at: at)
      }
    }
  }
}
