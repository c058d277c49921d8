import Foundation
import KVCompression
import KVTensorFiles
import Testing

@testable import KVCore

/// Calibrations in files: read back as they were, and nothing else taken in.
@Suite struct CalibrationFileTests {
  static func sample() throws -> Calibration {
    try Calibration(
      [
        .init(layer: 0, side: .keys, quantity: "basis"): .init(shape: [2, 1, 3], numbers: [1, 0, 0, 0, -0.5, 2]),
        .init(layer: 0, side: .values, quantity: "ranks"): .init(shape: [2], integers: [1, 2]),
        .init(layer: 11, side: .keys, quantity: "order"): .init(shape: [2, 3], integers: [2, 0, 1, 0, 1, 2]),
      ], metadata: ["method": "test", "rope": "pre", "tokens": "17", "länge": "\"\n\\"])
  }

  @Test func readsWhatItWrote() throws {
    let made = try Self.sample()
    let bytes = try made.serialized()
    let read = try Calibration(SafeTensorsFile(bytes: bytes))
    #expect(read == made && read.checksum == made.checksum)
    #expect(try read.serialized() == bytes)
    #expect(try read.channelOrders(of: .keys, layer: 11, units: 2, width: 3) == [[2, 0, 1], [0, 1, 2]])
    #expect(read.layers(with: "order", of: .keys) == [11] && read.layers(with: "order", of: .values) == [])
    #expect(try read.numbers("basis", of: .keys, layer: 0, shape: [2, nil, 3]).shape == [2, 1, 3])
    #expect(try read.integers("ranks", of: .values, layer: 0, shape: [2], in: 1...2) == [1, 2])
  }

  /// Any change shows in the checksum.
  @Test func checksumSeesEverything() throws {
    let name = Calibration.Name(layer: 0, side: .keys, quantity: "order")
    func sum(
      _ name: Calibration.Name, _ shape: [Int], _ values: [Int32], _ texts: [String: String] = [:]
    ) throws -> UInt64 {
      try Calibration([name: .init(shape: shape, integers: values)], metadata: texts).checksum
    }
    let sums = [
      try sum(name, [4], [0, 1, 2, 3]), try sum(name, [2, 2], [0, 1, 2, 3]), try sum(name, [4], [0, 1, 3, 2]),
      try sum(.init(layer: 1, side: .keys, quantity: "order"), [4], [0, 1, 2, 3]),
      try sum(.init(layer: 0, side: .values, quantity: "order"), [4], [0, 1, 2, 3]),
      try sum(name, [4], [0, 1, 2, 3], ["a": "b"]), try sum(name, [4], [0, 1, 2, 3], ["ab": ""]),
      try Calibration([name: .init(shape: [4], numbers: [0, 1, 2, 3])]).checksum,
    ]
    #expect(Set(sums).count == sums.count)
    #expect(try Self.sample().checksumText.count == 22)
  }

  @Test func refusesWhatIsNoCalibration() throws {
    func file(_ change: (inout SafeTensorsWriter) throws -> Void) throws -> SafeTensorsFile {
      var writer = SafeTensorsWriter(metadata: ["format": "kv-calibration", "version": "1"])
      try change(&writer)
      return try SafeTensorsFile(bytes: writer.serialized())
    }
    func refused(
      _ code: KVError.Code, _ text: String, layer: Int? = nil, _ change: (inout SafeTensorsWriter) throws -> Void
    ) throws {
      let file = try file(change)
      expectError(code, text, layer: layer) { _ = try Calibration(file) }
    }
    _ = try Calibration(file { try $0.add("layers.0.keys.basis", shape: [1, 1], floats: [1], as: .f16) })
    try refused(.corruptFile, "no format") { $0.metadata = [:] }
    try refused(.corruptFile, "version 1; found 2") { $0.metadata["version"] = "2" }
    try refused(.invalidOption, "at least one tensor") { _ in }
    for name in ["weights", "layers.0.keys", "layers.00.keys.basis", "layers.0.query.basis", "layers.-1.keys.a"] {
      try refused(.corruptFile, "'\(name)'") { try $0.add(name, shape: [1], floats: [1]) }
    }
    for name in ["Basis", "", "two words"] {
      try refused(.invalidOption, "small letters", layer: 0) {
        try $0.add("layers.0.keys.\(name)", shape: [1], floats: [1])
      }
    }
    try refused(.invalidOption, "layers of a calibration") {
      try $0.add("layers.65536.keys.basis", shape: [1], floats: [1])
    }
    try refused(.nonFinite, "element 1", layer: 0) {
      try $0.add("layers.0.keys.basis", shape: [2], floats: [1, .nan])
    }
    try refused(.shapeMismatch, "0 elements", layer: 0) {
      try $0.add("layers.0.keys.basis", shape: [0, 3], floats: [])
    }
    try refused(.unrepresentable, "32 bits") {
      try $0.add("layers.0.keys.order", type: .i64, shape: [1], bytes: [0, 0, 0, 0, 0, 1, 0, 0])
    }
    try refused(.corruptFile, "texts") { $0.metadata["note"] = String(repeating: "x", count: 2 << 20) }
  }

  /// What is asked for is checked against the model, with the layer and the head.
  @Test func answersWithTypedErrors() throws {
    let made = try Self.sample()
    expectError(.missingInput, "layers.3.keys.order", layer: 3) {
      _ = try made.channelOrders(of: .keys, layer: 3, units: 2, width: 3)
    }
    expectError(.shapeMismatch, "[4, 3] expected; found [2, 3]", layer: 11) {
      _ = try made.channelOrders(of: .keys, layer: 11, units: 4, width: 3)
    }
    expectError(.shapeMismatch, "integers expected", layer: 0) {
      _ = try made.integers("basis", of: .keys, layer: 0, shape: [2, 1, 3], in: 0...1)
    }
    expectError(.shapeMismatch, "numbers expected", layer: 0) {
      _ = try made.numbers("ranks", of: .values, layer: 0, shape: [2])
    }
    expectError(.invalidOption, "found 2", layer: 0) {
      _ = try made.integers("ranks", of: .values, layer: 0, shape: [2], in: 1...1)
    }
    expectError(.invalidOption, "rope=post") { try made.require(keysBeforeRotation: false) }
    try made.require(keysBeforeRotation: true)
    let twice = try Calibration([
      .init(layer: 2, side: .keys, quantity: "order"): .init(shape: [2, 2], integers: [0, 1, 1, 1])
    ])
    do {
      _ = try twice.channelOrders(of: .keys, layer: 2, units: 2, width: 2)
      Issue.record("an order with a channel twice was taken")
    } catch {
      #expect(error.code == .invalidOption && error.layer == 2 && error.head == 1)
    }
    expectError(.shapeMismatch, "do not have the shape", layer: 0) {
      _ = try Calibration([
        .init(layer: 0, side: .keys, quantity: "a"): .init(shape: [1 << 40, 1 << 40], numbers: [])
      ])
    }
  }

  /// No cut and no changed byte of a file traps or is taken for the whole.
  @Test func survivesDamage() throws {
    let bytes = try Self.sample().serialized()
    for length in stride(from: 0, to: bytes.count, by: 7) {
      #expect(throws: KVError.self) { _ = try Calibration(SafeTensorsFile(bytes: Array(bytes[..<length]))) }
    }
    let whole = try Self.sample()
    for at in bytes.indices {
      var damaged = bytes
      damaged[at] ^= 0x11
      if let read = try? Calibration(SafeTensorsFile(bytes: damaged)) { #expect(read.checksum != whole.checksum) }
    }
  }
}
