import KVCore
import KVExperiments
import Testing

@Suite struct HostileSafeTensorsTests {
  private func refuse(
    _ bytes: [UInt8], _ parts: String..., offset: Int? = nil, sourceLocation: SourceLocation = #_sourceLocation
  ) {
    let error = expectError(.corruptFile, sourceLocation: sourceLocation) { try SafeTensorsFile(bytes: bytes) }
    guard let error else { return }
    for part in parts {
      #expect(error.message.contains(part), "'\(part)' is not in: \(error)", sourceLocation: sourceLocation)
    }
    #expect(error.offset != nil, "\(error)", sourceLocation: sourceLocation)
    if let offset { #expect(error.offset == offset, "\(error)", sourceLocation: sourceLocation) }
  }

  private func tensor(_ type: String = "U8", _ shape: String = "[4]", _ offsets: String = "[0,4]") -> String {
    #"{"dtype":"\#(type)","shape":\#(shape),"data_offsets":\#(offsets)}"#
  }

  @Test func lengthsThatLie() {
    for count in 0..<8 { refuse(Array(repeating: 0, count: count), "8 bytes", offset: 0) }
    refuse([3, 0, 0, 0, 0, 0, 0, 0] + Array("{}".utf8), "claims 3", "only 2", offset: 0)
    refuse([1, 225, 245, 5, 0, 0, 0, 0] + Array("{}".utf8), "100000001", "100000000", offset: 0)
    refuse(Array(repeating: 255, count: 64), "18446744073709551615", offset: 0)
    refuse(Array(repeating: 0, count: 8), "'{'", offset: 8)
  }

  @Test func textThatIsNoHeader() {
    refuse(file(" {}"), "'{'", offset: 8)
    refuse(file("[]"), "'{'", offset: 8)
    refuse(file("{"), "end of the header", offset: 9)
    refuse(file("{}x"), "'x'", offset: 10)
    refuse(file("{} {}"), "'{'", offset: 11)
    refuse(file("{,}"), "string", offset: 9)
    refuse(file(#"{"a"}"#), "':'", offset: 12)
    refuse(file(#"{"a":1}"#), "tensor 'a'", "'1'", offset: 13)
    refuse(file(#"{"a":\#(tensor()),}"#, data: 4), "string")
    refuse(file(#"{"a":\#(tensor()) "b":\#(tensor())}"#, data: 4), "','")
    refuse(file(#"{"a"#), "not closed", offset: 9)
    refuse(file(Array(#"{"a"#.utf8) + [0xFF, 0x22] + Array(":1}".utf8)), "UTF-8", offset: 9)
    refuse(file(Array(#"{"a"#.utf8) + [0xC0, 0x80, 0x22] + Array(":1}".utf8)), "UTF-8")
    refuse(file(Array(#"{"a"#.utf8) + [0xED, 0xA0, 0x80, 0x22] + Array(":1}".utf8)), "UTF-8")
    refuse(file("{\"a\n\":1}"), "control byte 10", offset: 11)
    refuse(file(#"{"\x":1}"#), "escape", offset: 10)
    refuse(file(#"{"\ud83d":1}"#), "surrogate", offset: 10)
    refuse(file(#"{"\udc00":1}"#), "surrogate")
    refuse(file(#"{"\ud83dA":1}"#), "surrogate")
    refuse(file(#"{"\ud83d\u0041":1}"#), "surrogate")
    refuse(file(#"{"\u00g0":1}"#), "hexadecimal")
    refuse(file(#"{"\u00"#), "hexadecimal")
    refuse(file(#"{"\"#), "escape")
  }

  @Test func namesTwice() {
    refuse(file(#"{"a":\#(tensor()),"a":\#(tensor())}"#, data: 4), "'a'", "twice", offset: 61)
    refuse(file(#"{"a":\#(tensor()),"\u0061":\#(tensor())}"#, data: 4), "twice")
    refuse(file(#"{"__metadata__":{},"__metadata__":{}}"#), "__metadata__", "twice")
    refuse(file(#"{"__metadata__":{"k":"1","k":"2"}}"#), "'k'", "twice")
    refuse(file(#"{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, data: 4), "dtype", "twice")
    refuse(file(#"{"a":{"x":{"y":1,"y":1}}}"#), "'y'", "twice")
    // One accented letter, two spellings: Swift strings cannot tell them apart, so neither may be in a file.
    let (one, two) = (tensor("U8", "[2]", "[0,2]"), tensor("U8", "[2]", "[2,4]"))
    refuse(file(#"{"\u00e9":\#(one),"e\u0301":\#(two)}"#, data: 4), "two tensors")
  }

  @Test func metadataOfOtherThings() {
    refuse(file(#"{"__metadata__":{"k":1}}"#), "'k'", "string", offset: 29)
    refuse(file(#"{"__metadata__":[]}"#), "__metadata__")
    refuse(file(#"{"__metadata__":{"k":null}}"#), "string")
  }

  @Test func tensorsThatDisagreeWithThemselves() {
    refuse(file(#"{"a":{}}"#), "tensor 'a'", "missing: dtype, shape, data_offsets", offset: 9)
    refuse(file(#"{"a":{"dtype":"U8","shape":[4]}}"#, data: 4), "missing: data_offsets", offset: 9)
    refuse(file(#"{"a":\#(tensor("U9"))}"#, data: 4), "'a'", "'U9'", "BF16", offset: 22)
    refuse(file(#"{"a":\#(tensor("u8"))}"#, data: 4), "'u8'")
    refuse(file(#"{"a":\#(tensor("U8", "[5]"))}"#, data: 4), "'a'", "5 bytes", "give 4", offset: 9)
    refuse(file(#"{"a":\#(tensor("F32", "[4]"))}"#, data: 4), "16 bytes")
    refuse(file(#"{"a":\#(tensor("U8", "[4]", "[4,0]"))}"#, data: 4), "begin <= end", "[4, 0]")
    refuse(file(#"{"a":\#(tensor("U8", "[4]", "[0]"))}"#, data: 4), "[0]")
    refuse(file(#"{"a":\#(tensor("U8", "[4]", "[0,4,8]"))}"#, data: 4), "[0, 4, 8]")
    refuse(file(#"{"a":\#(tensor("U8", "[4]", "[]"))}"#, data: 4), "begin <= end")
    refuse(file(#"{"a":\#(tensor("U8", "[8]", "[0,8]"))}"#, data: 4), "'a'", "beyond the 4 bytes")
    refuse(file(#"{"a":\#(tensor("U8", "[4]", "[0,9223372036854775807]"))}"#, data: 4), "beyond")
    refuse(file(#"{"a":\#(tensor("U8", "[9223372036854775807,2]", "[0,4]"))}"#, data: 4), "countable")
    refuse(file(#"{"a":\#(tensor("F64", "[9223372036854775807]", "[0,4]"))}"#, data: 4), "countable")
    refuse(file(#"{"a":\#(tensor("F4", "[3]", "[0,2]"))}"#, data: 2), "countable")
  }

  @Test func numbersThatAreNoSizes() {
    for (number, part) in [
      ("-1", "0 or more"), ("1.0", "fraction"), ("1e3", "exponent"), ("1E3", "exponent"), ("01", "leading zero"),
      ("9223372036854775808", "beyond"), ("99999999999999999999999999", "beyond"), ("\"4\"", "0 or more"),
      ("null", "0 or more"), ("NaN", "0 or more"), ("[4]", "0 or more"), ("+4", "0 or more"), ("0x4", "','"),
    ] {
      let (shape, offsets) = ("[\(number)]", "[0,\(number)]")
      refuse(file(#"{"a":\#(tensor("U8", shape))}"#, data: 4), "'a': shape", part)
      refuse(file(#"{"a":\#(tensor("U8", "[4]", offsets))}"#, data: 4), "'a': data_offsets", part)
    }
    refuse(file(#"{"a":\#(tensor("U8", "4"))}"#, data: 4), "'a': shape")
    refuse(file(#"{"a":\#(tensor("U8", "[4,]"))}"#, data: 4), "'a': shape")
  }

  @Test func tensorsThatDoNotCoverTheData() {
    let (a, b) = (tensor("U8", "[4]", "[0,4]"), tensor("U8", "[4]", "[2,6]"))
    refuse(file(#"{"a":\#(a),"b":\#(b)}"#, data: 6), "'b'", "overlaps by 2", "'a'", offset: 61)
    refuse(file(#"{"a":\#(a),"b":\#(a)}"#, data: 4), "'b'", "overlaps by 4")
    refuse(file(#"{"a":\#(a),"b":\#(tensor("U8", "[4]", "[6,10]"))}"#, data: 10), "'b'", "gap of 2", "'a'")
    refuse(file(#"{"a":\#(tensor("U8", "[4]", "[1,5]"))}"#, data: 5), "gap of 1", "start of the data")
    refuse(file(#"{"a":\#(a)}"#, data: 5), "after tensor 'a'")
    refuse(file("{}", data: 1), "end at byte 10", offset: 10)
    refuse(file(#"{"a":\#(a),"b":\#(tensor("U8", "[0]", "[2,2]"))}"#, data: 4), "overlaps")
  }

  @Test func nestingIsBounded() {
    let deep = String(repeating: "[", count: 1_000_000)
    refuse(file(#"{"a":{"x":\#(deep)"#), "deeper than 32")
    refuse(file(#"{"a":{"x":\#(String(repeating: #"{"k":"#, count: 100_000))"#), "deeper than 32")
    refuse(file(#"{"a":\#(deep)"#), "tensor 'a'")
    refuse(file(#"{"a":{"shape":\#(deep)"#), "shape")
    refuse(file(#"{"a":{"x":tru}}"#), "JSON value")
    refuse(file(#"{"a":{"x":-}}"#), "JSON value")
    refuse(file(#"{"a":{"x":01}}"#), "JSON value")
    refuse(file(#"{"a":{"x":1.}}"#), "JSON value")
    refuse(file(#"{"a":{"x":1e}}"#), "JSON value")
  }

  @Test func everyTruncationIsRefused() throws {
    var writer = SafeTensorsWriter(metadata: ["k": "v"])
    try writer.add("a", shape: [2, 3], floats: [1, 2, 3, 4, 5, 6])
    try writer.add("b", shape: [3], uint8s: [1, 2, 3])
    let whole = try writer.serialized()
    for count in 0..<whole.count { refuse(Array(whole[..<count])) }
    refuse(whole + [0])
  }

  /// Seeded mutations of a good file: any outcome but a trap or another error type is right, and a file that still
  /// opens can be read to the end.
  @Test func randomMutations() throws {
    var writer = SafeTensorsWriter(metadata: ["rope_theta": "10000"])
    try writer.add("layers.0.keys", shape: [1, 2, 4], floats: Array(repeating: 0.5, count: 8))
    try writer.add("layers.0.values", shape: [1, 2, 4], floats: Array(repeating: 0.5, count: 8), as: .f16)
    try writer.add("layers.0.queries", shape: [2, 1, 4], floats: Array(repeating: 0.5, count: 8), as: .bf16)
    try writer.add("positions", shape: [3], int32s: [1, 2, 3])
    let good = try writer.serialized()
    let texts = ["{", "}", "[", "]", ",", ":", "\"", "0", "9", "-", "e", ".", "\\u", "null", "F32", "BF16"]
    let snippets = texts.map { Array($0.utf8) }
    var random = SeededGenerator(seed: 20_26)
    let clock = ContinuousClock()
    let end = clock.now + .seconds(2)
    var (opened, refused) = (0, 0)
    for _ in 0..<60_000 {
      if clock.now > end { break }
      var bytes = good
      for _ in 0...random.integer(below: 4) {
        // Mostly in the header, where the decisions are.
        let at = random.integer(
          below: random.integer(below: 8) == 0 ? max(1, bytes.count) : max(1, min(bytes.count, 380)))
        guard at < bytes.count else { continue }
        switch random.integer(below: 6) {
        case 0: bytes[at] ^= 1 << UInt8(random.integer(below: 8))
        case 1: bytes[at] = UInt8(random.integer(below: 256))
        case 2: bytes.remove(at: at)
        case 3: bytes.insert(contentsOf: snippets[random.integer(below: snippets.count)], at: at)
        case 4:
          let other = random.integer(below: bytes.count)
          bytes.swapAt(at, other)
        default:
          let snippet = snippets[random.integer(below: snippets.count)]
          bytes.replaceSubrange(at..<min(bytes.count, at + snippet.count), with: snippet)
        }
        if random.integer(below: 3) > 0, bytes.count > 8 {
          // Keep the length right, so that the mutation reaches the parser: a header that ends where the data began.
          let length = max(0, bytes.count - (good.count - 8 - Int(good[0]) - Int(good[1]) << 8) - 8)
          for index in 0..<8 { bytes[index] = UInt8(truncatingIfNeeded: length >> (index * 8)) }
        }
      }
      do throws(KVError) {
        let file = try SafeTensorsFile(bytes: bytes)
        opened += 1
        for (name, entry) in file.tensors {
          #expect(try file.bytes(named: name).count == entry.byteRange.count)
          _ = try? file.floats(named: name)
          _ = try? file.int32s(named: name)
        }
        let dump = try CacheDump(file: file)
        for layer in dump.layers { _ = try dump.layer(layer) }
      } catch {
        refused += 1
        #expect(!error.message.isEmpty)
      }
    }
    #expect(refused > 100 && opened > 10, "\(opened) opened, \(refused) refused")
  }
}
