import KVCore
import Testing

#if canImport(Darwin)
  import Darwin
#elseif canImport(Glibc)
  import Glibc
#elseif canImport(Musl)
  import Musl
#endif

private let shape = Container.Tag("SHAP")
private let keys = Container.Tag("KEYS")

/// A small file with an empty section, padding and payloads of odd lengths.
private func sample() -> ContainerWriter {
  var writer = ContainerWriter(flags: 5)
  var first = ByteWriter()
  first.string("model")
  first.count(3)
  first.array([1, 2, 3] as [Float])
  writer.add(shape, first)
  writer.add(keys, index: 0, [])
  writer.add(keys, index: 7, (0..<70).map { UInt8($0) })
  return writer
}

private struct Random: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
    return (state ^ state >> 29) &* 0xBF58_476D_1CE4_E5B9
  }
}

@Suite struct ContainerTests {
  private func readAll(_ bytes: [UInt8]) throws(KVError) {
    try ContainerReader(bytes: bytes).verify()
  }

  @Test func roundTrip() throws {
    let bytes = sample().bytes()
    #expect(bytes.count == sample().byteCount)
    let reader = try ContainerReader(bytes: bytes)
    try reader.verify()
    #expect(reader.flags == 5)
    #expect(reader.entries.map(\.tag) == [shape, keys, keys])
    #expect(reader.entries.allSatisfy { $0.offset % 64 == 0 })
    #expect(reader.entry(keys, index: 7)?.length == 70)
    #expect(reader.entry(keys, index: 1) == nil)
    #expect(reader.entry(keys, index: -1) == nil)
    var section = try reader.section(shape)
    #expect(try section.string() == "model")
    let count = try section.count("floats", of: 4)
    #expect(try section.array(of: Float.self, count: count) == [1, 2, 3])
    try section.finish()
    let error = #expect(throws: KVError.self) { try reader.section(Container.Tag("NONE"), index: 2) }
    #expect(error?.message.contains("NONE 2") == true)
    let empty = ContainerWriter().bytes()
    #expect(empty.count == 40)
    try readAll(empty)
  }

  /// The bytes of version 1 never change.
  @Test func layoutIsFrozen() throws {
    var writer = ContainerWriter()
    writer.add(keys, index: 2, [0xAB])
    let bytes = writer.bytes()
    #expect(bytes.count == 129)
    let head: [UInt8] = [
      0x89, 0x4B, 0x56, 0x43, 0x0D, 0x0A, 0x1A, 0x0A, 1, 0, 0, 0, 0, 0, 0, 0, 129, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,
      0, 0, 0, 0x4B, 0x45, 0x59, 0x53, 2, 0, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    ]
    #expect(Array(bytes[..<56]) == head)
    #expect(bytes[128] == 0xAB)
  }

  @Test func everyTruncationIsNoticed() {
    let bytes = sample().bytes()
    for length in 0..<bytes.count {
      let error = #expect(throws: KVError.self, "cut to \(length)") { try readAll(Array(bytes[..<length])) }
      #expect(error?.code == .corruptFile && error?.offset != nil, "cut to \(length)")
    }
    #expect(throws: KVError.self) { try readAll(bytes + [0]) }
  }

  @Test func everyFlipIsNoticed() {
    let bytes = sample().bytes()
    for index in bytes.indices {
      for bit in 0..<8 {
        var altered = bytes
        altered[index] ^= 1 << bit
        let error = #expect(throws: KVError.self, "bit \(bit) of byte \(index)") { try readAll(altered) }
        #expect(error?.code == .corruptFile && error?.offset != nil, "bit \(bit) of byte \(index)")
      }
    }
  }

  @Test func errorsNameTheSection() throws {
    let bytes = sample().bytes()
    let entry = try #require(try ContainerReader(bytes: bytes).entry(keys, index: 7))
    var altered = bytes
    altered[entry.offset + 3] ^= 0x40
    let error = #expect(throws: KVError.self) { try readAll(altered) }
    #expect(error?.message.hasPrefix("section KEYS 7") == true)
    #expect(error?.offset == entry.offset)
    // The other sections of the file can still be read.
    _ = try ContainerReader(bytes: altered).section(shape)
    altered = bytes
    altered[entry.offset - 1] = 1
    #expect(throws: KVError.self) { try readAll(altered) }
  }

  /// Damage with a header checksum that fits again, as a hostile writer would make it.
  @Test func forgedHeadersAreRefused() {
    let bytes = sample().bytes()
    let covered = 32 + 3 * 32
    func forged(_ change: (inout [UInt8]) -> Void) -> [UInt8] {
      var altered = bytes
      change(&altered)
      var sum = ByteWriter()
      sum.u64(XXHash64.hash(Array(altered[..<covered])))
      altered.replaceSubrange(covered..<covered + 8, with: sum.bytes)
      return altered
    }
    #expect(throws: Never.self) { try readAll(forged { _ in }) }
    // Each field of each entry, to its largest values and to small ones.
    for entry in 0..<3 {
      for at in [8, 16] {
        for value: [UInt8] in [
          [UInt8](repeating: 0xFF, count: 8), [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F],
          [0, 0, 0, 0, 0, 0, 0, 0], [64, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0x40], [1, 0, 0, 0, 0, 0, 0, 0],
        ] {
          let start = 32 + entry * 32 + at
          if Array(bytes[start..<start + 8]) == value { continue }
          #expect(throws: KVError.self, "entry \(entry), field \(at), \(value)") {
            try readAll(forged { $0.replaceSubrange(start..<start + 8, with: value) })
          }
        }
      }
    }
    #expect(throws: KVError.self) { try readAll(forged { $0[28] = 1 }) }
    #expect(throws: KVError.self) { try readAll(forged { $0[32 + 64 + 4] = 0 }) }  // KEYS 0 twice
  }

  /// Random damage, also behind checksums that fit: an error or a value, never a trap.
  @Test func randomDamage() {
    var random = Random(state: 7)
    let bytes = sample().bytes()
    let payload = Array(bytes[128 + 64..<128 + 64 + 26])
    let clock = ContinuousClock()
    let end = clock.now + .seconds(2)
    var rounds = 0
    while rounds < 20_000, clock.now < end {
      rounds += 1
      var altered = bytes
      for _ in 0..<Int.random(in: 1...5, using: &random) {
        switch Int.random(in: 0..<3, using: &random) {
        case 0 where !altered.isEmpty:
          altered[Int.random(in: altered.indices, using: &random)] = UInt8.random(in: 0...255, using: &random)
        case 1 where !altered.isEmpty: altered.remove(at: Int.random(in: altered.indices, using: &random))
        default:
          altered.insert(
            UInt8.random(in: 0...255, using: &random), at: Int.random(in: 0...altered.count, using: &random))
        }
      }
      if altered != bytes { #expect(throws: KVError.self) { try readAll(altered) } }
      var inner = payload
      inner[Int.random(in: inner.indices, using: &random)] = UInt8.random(in: 0...255, using: &random)
      var reader = ByteReader(inner)
      do {
        _ = try reader.string()
        let count = try reader.count("floats", of: 4)
        _ = try reader.array(of: Float.self, count: count)
        try reader.finish()
      } catch {
        #expect(error.code == .corruptFile)
      }
    }
  }
}

@Suite struct ContainerFileTests {
  /// A folder of its own, removed at the end.
  private func withFolder(_ body: (String) throws -> Void) throws {
    let folder = "/tmp/kvcore-container-\(getpid())-\(UInt32.random(in: 0...UInt32.max))"
    #expect(mkdir(folder, 0o755) == 0)
    defer { rmdir(folder) }
    try body(folder)
  }

  @Test func filesRoundTripAndAreReplacedWhole() throws {
    try withFolder { folder in
      let path = folder + "/cache.kvc"
      defer { unlink(path) }
      try ContainerWriter(flags: 1).write(to: path)
      try sample().write(to: path)
      let reader = try ContainerReader(path: path)
      try reader.verify()
      #expect(reader.flags == 5)
      // Nothing is left beside it: the folder is empty once the file is gone.
      unlink(path)
      #expect(rmdir(folder) == 0)
      #expect(mkdir(folder, 0o755) == 0)
      // The open file outlives its name.
      try reader.verify()
    }
  }

  @Test func systemErrorsCarryTheText() throws {
    try withFolder { folder in
      let missing = #expect(throws: KVError.self) { try ContainerReader(path: folder + "/none") }
      #expect(missing?.code == .inputOutput)
      #expect(missing?.message.contains("No such file") == true && missing?.message.contains("errno 2") == true)
      let directory = #expect(throws: KVError.self) { try ContainerReader(path: folder) }
      #expect(directory?.code == .inputOutput)
      let nowhere = #expect(throws: KVError.self) { try sample().write(to: folder + "/no/where") }
      #expect(nowhere?.code == .inputOutput)
      // The name is a folder: the rename fails and the file beside it is removed again.
      let inner = folder + "/inner"
      #expect(mkdir(inner, 0o755) == 0)
      let taken = #expect(throws: KVError.self) { try sample().write(to: inner) }
      #expect(taken?.code == .inputOutput)
      #expect(rmdir(inner) == 0)
      let pipe = folder + "/pipe"
      #expect(mkfifo(pipe, 0o644) == 0)
      let fifo = #expect(throws: KVError.self) { try ContainerReader(path: pipe) }
      #expect(fifo?.code == .inputOutput)
      unlink(pipe)
    }
  }

  @Test func truncatedFilesAreNoticed() throws {
    try withFolder { folder in
      let path = folder + "/cache.kvc"
      defer { unlink(path) }
      try sample().write(to: path)
      for length in stride(from: sample().byteCount - 1, through: 0, by: -37) {
        #expect(truncate(path, off_t(length)) == 0)
        let error = #expect(throws: KVError.self) { try ContainerReader(path: path).verify() }
        #expect(error?.code == .corruptFile)
      }
    }
  }
}
