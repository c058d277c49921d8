import KVCore
import Testing

@Suite struct ByteCodingTests {
  @Test func everythingRoundTrips() throws {
    var writer = ByteWriter()
    writer.u8(200)
    writer.u16(0x1234)
    writer.u32(0x1234_5678)
    writer.u64(.max)
    writer.i32(-5)
    writer.i64(.min)
    writer.f32(-0.0)
    writer.f64(.pi)
    writer.bool(true)
    writer.count(77)
    for value: UInt64 in [0, 127, 128, 16_384, .max] { writer.varuint(value) }
    writer.string("é😀")
    writer.align(8)
    writer.array([1.5, -2] as [Float])
    writer.array([-1, 300] as [Int16])
    writer.raw([9, 8, 7] as [UInt8])
    writer.raw(([6, 5] as [UInt8]).span)
    #expect(Array(writer.bytes[1..<3]) == [0x34, 0x12])

    var reader = ByteReader(writer.bytes, baseOffset: 1000)
    #expect(try reader.u8() == 200)
    #expect(try reader.u16() == 0x1234)
    #expect(try reader.u32() == 0x1234_5678)
    #expect(try reader.u64() == .max)
    #expect(try reader.i32() == -5)
    #expect(try reader.i64() == .min)
    #expect(try reader.f32().bitPattern == Float(-0.0).bitPattern)
    #expect(try reader.f64() == .pi)
    #expect(try reader.bool())
    #expect(try reader.count("things", in: 0...77) == 77)
    for value: UInt64 in [0, 127, 128, 16_384, .max] { #expect(try reader.varuint() == value) }
    #expect(try reader.string() == "é😀")
    try reader.align(8)
    #expect(try reader.array(of: Float.self, count: 2) == [1.5, -2])
    #expect(try reader.array(of: Int16.self, count: 2) == [-1, 300])
    #expect(try reader.raw(3) == [9, 8, 7])
    var rest = [UInt8](repeating: 0, count: 2)
    let before = reader.fileOffset
    let target = 2
    unsafe rest.withUnsafeMutableBytes { raw in
      #expect(raw.count == target)
      #expect(throws: Never.self) { try reader.raw(into: raw) }
    }
    #expect(rest == [6, 5] && reader.fileOffset == before + 2)
    try reader.finish()
  }

  private func refused(
    _ bytes: [UInt8], at offset: Int = 100, _ read: (inout ByteReader) throws -> Void,
    sourceLocation: SourceLocation = #_sourceLocation
  ) {
    var reader = ByteReader(bytes, baseOffset: 100, place: "section TEST 0")
    let error = #expect(throws: KVError.self, sourceLocation: sourceLocation) { try read(&reader) }
    #expect(error?.code == .corruptFile, sourceLocation: sourceLocation)
    #expect(error?.offset == offset, sourceLocation: sourceLocation)
    #expect(error?.message.hasPrefix("section TEST 0: ") == true, sourceLocation: sourceLocation)
    #expect(reader.remaining == bytes.count, "a failed read moves nothing", sourceLocation: sourceLocation)
  }

  @Test func everyReadIsChecked() {
    refused([]) { _ = try $0.u8() }
    refused([1]) { _ = try $0.u16() }
    refused([1, 2, 3]) { _ = try $0.u32() }
    refused([1, 2, 3, 4, 5, 6, 7]) { _ = try $0.f64() }
    refused([2]) { _ = try $0.bool() }
    refused([0x80]) { _ = try $0.varuint() }
    refused([0x80, 0]) { _ = try $0.varuint() }
    refused([UInt8](repeating: 0xFF, count: 11)) { _ = try $0.varuint() }
    refused([0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 2]) { _ = try $0.varuint() }
    refused([5, 0x61], at: 100) { _ = try $0.string() }
    refused([1, 0xFF]) { _ = try $0.string() }
    refused([2, 0x61, 0x62]) { _ = try $0.string(atMost: 1) }
    refused([0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1]) { _ = try $0.string() }
    refused([1, 2]) { _ = try $0.raw(3) }
    refused([1, 2]) { _ = try $0.raw(-1) }
    refused([1, 2]) { _ = try $0.array(of: Float.self, count: 1) }
    refused([1, 2]) { _ = try $0.array(of: Float.self, count: Int.max) }
    refused([1, 2]) { _ = try $0.array(of: UInt8.self, count: -1) }
    refused([1, 2]) { try $0.finish() }
    refused([UInt8](repeating: 0xFF, count: 8)) { _ = try $0.count("things") }
    refused([9, 0, 0, 0, 0, 0, 0, 0]) { _ = try $0.count("things", in: 0...8) }
    refused([9, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]) { _ = try $0.count("things", of: 4) }
    refused([UInt8](repeating: 0x7F, count: 9)) { _ = try $0.count("things", of: 4) }
  }

  @Test func paddingMustBeZero() throws {
    var reader = ByteReader([1, 0, 3, 0])
    _ = try reader.u8()
    let error = #expect(throws: KVError.self) { try reader.align(4) }
    #expect(error?.offset == 2)
    var short = ByteReader([1, 0])
    _ = try short.u8()
    #expect(throws: KVError.self) { try short.align(4) }
  }
}
