import Foundation
import KVCore
import KVExperiments
import Testing

@Suite struct SafeTensorsTests {
  @Test func roundTripOfEveryType() throws {
    try withEvery("shape", in: [[], [0], [2], [3, 4], [2, 0, 5], [1, 2, 3, 4]]) { shape in
      try withEvery("type", in: SafeTensorsType.all) { type in
        guard let count = type.byteCount(shape: shape) else { return }
        let bytes = (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 37 &+ 11) }
        var writer = SafeTensorsWriter(metadata: ["a": "b"])
        try writer.add("t", type: type, shape: shape, bytes: bytes)
        let back = try SafeTensorsFile(bytes: writer.serialized())
        let entry = try #require(back.tensors["t"])
        #expect(entry.type == type && entry.shape == shape)
        #expect(entry.elementCount == shape.reduce(1, *))
        #expect(try back.bytes(named: "t") == bytes)
        #expect(back.metadata == ["a": "b"])
      }
    }
  }

  @Test func numbersOfEveryType() throws {
    let floats: [Float] = [0, -0.0, 1, -1.5, 65504, 0x1p-24, 0x1p-14, .infinity, -.infinity, 0.333251953125]
    var writer = SafeTensorsWriter()
    for type in [SafeTensorsType.f64, .f32, .f16] {
      try writer.add("\(type)", shape: [2, 5], floats: floats, as: type)
    }
    try writer.add("BF16", shape: [3], floats: [1, -2.5, 0x1.04p3], as: .bf16)
    try writer.add("I32", shape: [3], int32s: [.min, 0, .max])
    try writer.add("U8", shape: [1, 2], uint8s: [0, 255])
    try writer.add("I64", type: .i64, shape: [1], bytes: [254, 255, 255, 255, 255, 255, 255, 255])
    try writer.add("I16", type: .i16, shape: [1], bytes: [0, 128])
    try writer.add("I8", type: .i8, shape: [1], bytes: [255])
    try writer.add("U32", type: .u32, shape: [1], bytes: [255, 255, 255, 255])
    try writer.add("BOOL", type: .bool, shape: [2], bytes: [0, 1])
    let back = try SafeTensorsFile(bytes: writer.serialized())
    for type in ["F64", "F32", "F16"] {
      let read = try back.floats(named: type, shape: [2, 5])
      #expect(read.map(\.bitPattern) == floats.map(\.bitPattern), "\(type)")
    }
    #expect(try back.floats(named: "BF16") == [1, -2.5, 0x1.04p3])
    #expect(try back.int32s(named: "I32") == [.min, 0, .max])
    #expect(try back.int32s(named: "I64") == [-2])
    #expect(try back.int32s(named: "I16") == [-32768])
    #expect(try back.int32s(named: "I8") == [-1])
    #expect(try back.int32s(named: "BOOL", shape: [2]) == [0, 1])
    #expect(try back.uint8s(named: "U8", shape: [1, 2]) == [0, 255])
    expectError(.unrepresentable, "U32", "4294967295") { try back.int32s(named: "U32") }
    expectError(.shapeMismatch, "'I32'", "F32", "found I32") { try back.floats(named: "I32") }
    expectError(.shapeMismatch, "'F32'", "[2, 4]", "[2, 5]") { try back.floats(named: "F32", shape: [2, 4]) }
    expectError(.shapeMismatch, "'F32'", "integer") { try back.int32s(named: "F32") }
    expectError(.shapeMismatch, "'I8'", "U8 or BOOL") { try back.uint8s(named: "I8") }
    expectError(.missingInput, "'none'", "11 tensors") { try back.bytes(named: "none") }
  }

  /// All 65536 patterns widen and narrow back to themselves; NaN stays NaN.
  @Test func halfTypesAreExact() throws {
    let patterns = (0...UInt16.max).flatMap { [UInt8(truncatingIfNeeded: $0), UInt8($0 >> 8)] }
    for type in [SafeTensorsType.f16, .bf16] {
      var writer = SafeTensorsWriter()
      try writer.add("t", type: type, shape: [65536], bytes: patterns)
      let floats = try SafeTensorsFile(bytes: writer.serialized()).floats(named: "t")
      var again = SafeTensorsWriter()
      try again.add("t", shape: [65536], floats: floats, as: type)
      let file = try SafeTensorsFile(bytes: again.serialized())
      let (bytes, back) = (try file.bytes(named: "t"), try file.floats(named: "t"))
      for index in 0..<65536 {
        if floats[index].isNaN {
          #expect(back[index].isNaN)
        } else if bytes[2 * index] != patterns[2 * index] || bytes[2 * index + 1] != patterns[2 * index + 1] {
          Issue.record("\(type) \(index) became \(bytes[2 * index + 1]) \(bytes[2 * index])")
        }
      }
    }
  }

  /// A number between two neighbours of a 16-bit type goes to the nearer one, a tie to the even one.
  @Test func narrowingRoundsToNearestEven() throws {
    func store(_ values: [Float], _ type: SafeTensorsType) throws -> [Float] {
      var writer = SafeTensorsWriter()
      try writer.add("t", shape: [values.count], floats: values, as: type)
      return try SafeTensorsFile(bytes: writer.serialized()).floats(named: "t")
    }
    let half = try store([0x1.002p0, 0x1.006p0, 0x1.0021p0, 65519, 0x1p-25, 0x1.8p-24, 0x1.ffep-15], .f16)
    let nearestHalf: [Float] = [1, 0x1.008p0, 0x1.004p0, 65504, 0, 0x1p-23, 0x1p-14]
    #expect(half == nearestHalf)
    let brain = try store([0x1.01p0, 0x1.03p0, 0x1.011p0], .bf16)
    let nearestBrain: [Float] = [1, 0x1.04p0, 0x1.02p0]
    #expect(brain == nearestBrain)
    expectError(.unrepresentable, "'t'", "65520", "index 1", "F16") { try store([0, 65520], .f16) }
    expectError(.unrepresentable, "BF16") { try store([.greatestFiniteMagnitude], .bf16) }
    expectError(.invalidOption, "I8") { try store([1], .i8) }
  }

  @Test func orderOfCallsDoesNotMatterAndDataIsAligned() throws {
    var one = SafeTensorsWriter(metadata: ["x": "1", "y": "2"])
    try one.add("bytes", shape: [3], uint8s: [1, 2, 3])
    try one.add("b", shape: [3], floats: [1, 2, 3], as: .f16)
    try one.add("a", shape: [3], floats: [1, 2, 3])
    var two = SafeTensorsWriter(metadata: ["y": "2", "x": "1"])
    try two.add("a", shape: [3], floats: [1, 2, 3])
    try two.add("bytes", shape: [3], uint8s: [1, 2, 3])
    try two.add("b", shape: [3], floats: [1, 2, 3], as: .f16)
    #expect(try one.serialized() == two.serialized())
    for entry in try SafeTensorsFile(bytes: one.serialized()).tensors.values {
      #expect(entry.byteRange.lowerBound % (entry.type.bits / 8) == 0)
    }
    #expect(one.names == ["a", "b", "bytes"])
  }

  @Test func writerRefusesWhatDoesNotFit() throws {
    var writer = SafeTensorsWriter()
    try writer.add("a", shape: [1], floats: [1])
    let before = try writer.serialized()
    expectError(.invalidOption, "'a'") { try writer.add("a", shape: [1], floats: [1]) }
    expectError(.invalidOption, "__metadata__") { try writer.add("__metadata__", shape: [1], floats: [1]) }
    expectError(.shapeMismatch, "'b'", "[2]") { try writer.add("b", shape: [2], floats: [1]) }
    expectError(.shapeMismatch, "'b'") { try writer.add("b", shape: [-1], floats: [1]) }
    expectError(.shapeMismatch, "'b'", "8 bytes", "7") {
      try writer.add("b", type: .f32, shape: [2], bytes: Array(repeating: 0, count: 7))
    }
    expectError(.shapeMismatch) { try writer.add("b", type: .f32, shape: [.max, .max], bytes: []) }
    #expect(try writer.serialized() == before)
  }

  @Test func filesOnDisk() throws {
    try withTemporaryPath { path in
      let floats = (0..<40_000).map { Float($0) / 7 }  // more than one piece of the reader
      var writer = SafeTensorsWriter(metadata: ["ünï": "\"\\\n\t\u{1}/😀"])
      try writer.add("läyer.\"0\"", shape: [200, 200], floats: floats)
      try writer.write(to: path)
      let file = try SafeTensorsFile(path: path)
      #expect(try file.floats(named: "läyer.\"0\"", shape: [200, 200]) == floats)
      #expect(file.metadata == ["ünï": "\"\\\n\t\u{1}/😀"])
      // Replaced as a whole; the open reader keeps the old file.
      var second = SafeTensorsWriter()
      try second.add("t", shape: [1], int32s: [7])
      try second.write(to: path)
      #expect(try SafeTensorsFile(path: path).int32s(named: "t") == [7])
      #expect(try file.floats(named: "läyer.\"0\"") == floats)
      let directory = (path as NSString).deletingLastPathComponent
      #expect(try FileManager.default.contentsOfDirectory(atPath: directory) == ["file.safetensors"])
      expectError(.inputOutput, "none") { try SafeTensorsFile(path: directory + "/none") }
      expectError(.inputOutput, "regular") { try SafeTensorsFile(path: directory) }
      expectError(.inputOutput) { try second.write(to: directory + "/no/such/file") }
      expectError(.inputOutput) { try second.write(to: directory) }
      expectError(.inputOutput) { try second.write(to: "") }
      #expect(try FileManager.default.contentsOfDirectory(atPath: directory) == ["file.safetensors"])
    }
  }

  @Test func fileThatShrinksWhileOpenIsAnError() throws {
    try withTemporaryPath { path in
      var writer = SafeTensorsWriter()
      try writer.add("t", shape: [1000], floats: Array(repeating: 1, count: 1000))
      try writer.write(to: path)
      let file = try SafeTensorsFile(path: path)
      let handle = try #require(FileHandle(forWritingAtPath: path))
      try handle.truncate(atOffset: 500)
      try handle.close()
      expectError(.inputOutput, "shorter") { try file.floats(named: "t") }
    }
  }

  /// The layout the golden files have, spelled out: metadata first, spaces after the header.
  @Test func readsTheFormatOtherWritersUse() throws {
    let header =
      #"{"__metadata__":{"split":"public"},"layers.4.keys":{"dtype":"F32","shape":[1,2,1],"data_offsets":[0,8]},"#
      + #""tokens":{"dtype":"I32","shape":[1],"data_offsets":[8,12]},"#
      + #""w":{"dtype":"BF16","shape":[2,1],"data_offsets":[12,16],"extra":[{"a":null},-1.5e3,true]}}     "#
    let bytes = Array(file(header)) + [0, 0, 128, 63, 0, 0, 0, 192, 5, 0, 0, 0, 128, 63, 0, 192]
    let back = try SafeTensorsFile(bytes: bytes)
    #expect(back.metadata == ["split": "public"])
    #expect(try back.floats(named: "layers.4.keys", shape: [1, 2, 1]) == [1, -2])
    #expect(try back.int32s(named: "tokens") == [5])
    #expect(try back.floats(named: "w") == [1, -2])
    #expect(try SafeTensorsFile(bytes: file("{}")).tensors.isEmpty)
    let escaped = file(#"{"\u00e9\ud83d\ude00\/":{"shape":[],"dtype":"U8","data_offsets":[0,1]}}"#, data: 1)
    #expect(try SafeTensorsFile(bytes: escaped).tensors["é😀/"]?.shape == [])
  }
}
