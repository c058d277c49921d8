import KVCore
import Testing

@Suite struct JSONValueTests {
  @Test(arguments: [
    "null", "true", "false", "0", "-1", "9223372036854775807", "-9223372036854775808", "1.5", "1e+20", "-0.0",
    "5e-324", #""""#, #""a\"\\\n\r\t\u0001é😀""#, "[]", "{}", #"[1,[2,{"a":null}]]"#, #"{"b":1,"a":[true,false]}"#,
  ])
  func roundTrip(text: String) throws {
    #expect(try JSONValue(parsing: text).text() == text)
    #expect(try JSONValue(parsing: " \t\r\n" + text + " ").text() == text)
  }

  @Test(arguments: [
    ("", 0), ("nul", 0), ("tru e", 0), ("01", 0), ("+1", 0), (".5", 0), ("1.", 2), ("-", 1), ("1e", 2), ("1e999", 0),
    ("9223372036854775808", 0), ("NaN", 0), ("[1,]", 3), ("[1 2]", 3), ("[", 1), ("{\"a\"}", 4), ("{\"a\":}", 5),
    ("{\"a\":1,}", 7), ("{a:1}", 1), ("{\"a\":1,\"a\":2}", 7), ("\"a", 0), ("\"\\x\"", 2), ("\"\\ud800x\"", 2),
    ("\"\\udc00\"", 2), ("1 2", 2), ("\u{FEFF}1", 0), ("\"\n\"", 1), ("'a'", 0), ("[1}", 2), ("/**/1", 0),
    ("{\"a\":1,\"\\u0061\":2}", 7), ("\u{B}1", 0),
  ])
  func refused(text: String, offset: Int) {
    let error = #expect(throws: KVError.self, "\(text)") { try JSONValue(parsing: text) }
    #expect(error?.code == .syntax)
    #expect(error?.offset == offset, "\(text): \(error.map(String.init(describing:)) ?? "")")
  }

  @Test func depthIsBounded() throws {
    let deep = String(repeating: "[", count: 64) + String(repeating: "]", count: 64)
    _ = try JSONValue(parsing: deep)
    let error = #expect(throws: KVError.self) { try JSONValue(parsing: "[" + deep + "]") }
    #expect(error?.offset == 64)
    #expect(throws: KVError.self) { try JSONValue(parsing: String(repeating: "{\"a\":", count: 100_000)) }
  }

  @Test func badUTF8NamesItsByte() {
    for (bytes, offset) in [
      ([0x22, 0xFF, 0x22], 1), ([0x22, 0xC0, 0x80, 0x22], 1), ([0x22, 0xED, 0xA0, 0x80, 0x22], 1),
      ([0x22, 0x61, 0xE2, 0x82], 2), ([0x22, 0xF4, 0x90, 0x80, 0x80, 0x22], 1), ([0x22, 0x80, 0x22], 1),
      ([0x22, 0xE0, 0x9F, 0xBF, 0x22], 1), ([0x22, 0xF8, 0x88, 0x80, 0x80, 0x80, 0x22], 1),
    ] as [([UInt8], Int)] {
      let error = #expect(throws: KVError.self) { try JSONValue(parsing: bytes) }
      #expect(error?.offset == offset)
    }
  }

  @Test func nonFiniteIsNotPrinted() {
    for value in [Double.nan, .infinity, -.infinity] {
      let error = #expect(throws: KVError.self) { try JSONValue.array([.number(value)]).text() }
      #expect(error?.code == .nonFinite)
    }
  }
}
