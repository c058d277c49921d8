import KVCompression

/// A strict JSON parser for files that are not trusted: nesting is bounded, UTF-8 is checked, and every error names the
/// file and the byte where it stopped. O(bytes).
struct JSONParser {
  /// Deeper nesting than any model file has, and far from exhausting the stack.
  static let deepestNesting = 64

  private let bytes: [UInt8]
  private let file: String
  private var index = 0

  private init(bytes: [UInt8], file: String) {
    self.bytes = bytes
    self.file = file
  }

  static func parse(_ bytes: [UInt8], file: String) throws(KVError) -> JSONValue {
    var parser = JSONParser(bytes: bytes, file: file)
    let value = try parser.value(depth: 0)
    parser.skipSpace()
    guard parser.index == bytes.count else { throw parser.failure("nothing more after the value") }
    return value
  }

  private func failure(_ expected: String) -> KVError {
    let came = index < bytes.count ? "byte 0x" + String(bytes[index], radix: 16) : "the end of the file"
    return KVError(.corruptFile, "\(file) is not JSON: expected \(expected), got \(came)", offset: index)
  }

  private mutating func skipSpace() {
    while index < bytes.count, [0x20, 0x0A, 0x0D, 0x09].contains(bytes[index]) { index += 1 }
  }

  private func peek() -> UInt8? { index < bytes.count ? bytes[index] : nil }

  private mutating func take(_ byte: UInt8) -> Bool {
    guard peek() == byte else { return false }
    index += 1
    return true
  }

  private mutating func value(depth: Int) throws(KVError) -> JSONValue {
    guard depth < Self.deepestNesting else { throw failure("at most \(Self.deepestNesting) levels of nesting") }
    skipSpace()
    switch peek() {
    case UInt8(ascii: "{"): return try object(depth: depth)
    case UInt8(ascii: "["): return try array(depth: depth)
    case UInt8(ascii: "\""): return .string(try string())
    case UInt8(ascii: "t"): return try literal("true", .bool(true))
    case UInt8(ascii: "f"): return try literal("false", .bool(false))
    case UInt8(ascii: "n"): return try literal("null", .null)
    default: return try number()
    }
  }

  private mutating func literal(_ text: StaticString, _ value: JSONValue) throws(KVError) -> JSONValue {
    for byte in "\(text)".utf8 {
      guard take(byte) else { throw failure("\(text)") }
    }
    return value
  }

  private mutating func object(depth: Int) throws(KVError) -> JSONValue {
    index += 1
    var members: [JSONMember] = []
    skipSpace()
    if take(UInt8(ascii: "}")) { return .object(members) }
    while true {
      skipSpace()
      guard peek() == UInt8(ascii: "\"") else { throw failure("a member name") }
      let key = try string()
      skipSpace()
      guard take(UInt8(ascii: ":")) else { throw failure("':'") }
      members.append(JSONMember(key: key, value: try value(depth: depth + 1)))
      skipSpace()
      if take(UInt8(ascii: ",")) { continue }
      guard take(UInt8(ascii: "}")) else { throw failure("',' or '}'") }
      return .object(members)
    }
  }

  private mutating func array(depth: Int) throws(KVError) -> JSONValue {
    index += 1
    var items: [JSONValue] = []
    skipSpace()
    if take(UInt8(ascii: "]")) { return .array(items) }
    while true {
      items.append(try value(depth: depth + 1))
      skipSpace()
      if take(UInt8(ascii: ",")) { continue }
      guard take(UInt8(ascii: "]")) else { throw failure("',' or ']'") }
      return .array(items)
    }
  }

  private mutating func number() throws(KVError) -> JSONValue {
    let start = index
    _ = take(UInt8(ascii: "-"))
    let leading = index
    let digits = takeDigits()
    guard digits > 0, digits == 1 || bytes[leading] != UInt8(ascii: "0") else {
      index = start
      throw failure("a value")
    }
    var whole = true
    if take(UInt8(ascii: ".")) {
      whole = false
      guard takeDigits() > 0 else { throw failure("digits after the point") }
    }
    if take(UInt8(ascii: "e")) || take(UInt8(ascii: "E")) {
      whole = false
      if !take(UInt8(ascii: "+")) { _ = take(UInt8(ascii: "-")) }
      guard takeDigits() > 0 else { throw failure("digits of an exponent") }
    }
    let text = String(decoding: bytes[start..<index], as: UTF8.self)
    if whole, let integer = Int(text) { return .integer(integer) }
    guard let double = Double(text), double.isFinite else {
      index = start
      throw failure("a number within the range of a double")
    }
    return .number(double)
  }

  private mutating func takeDigits() -> Int {
    let start = index
    while let byte = peek(), (0x30...0x39).contains(byte) { index += 1 }
    return index - start
  }

  private mutating func string() throws(KVError) -> String {
    index += 1
    let start = index
    // Most strings have no escape: one validated copy.
    while let byte = peek(), byte != UInt8(ascii: "\""), byte != UInt8(ascii: "\\"), byte >= 0x20 { index += 1 }
    if peek() == UInt8(ascii: "\"") {
      let text = try checked(bytes[start..<index], at: start)
      index += 1
      return text
    }
    var content = Array(bytes[start..<index])
    while let byte = peek() {
      if byte == UInt8(ascii: "\"") {
        index += 1
        return try checked(content[...], at: start)
      }
      guard byte >= 0x20 else { throw failure("no control character in a string") }
      index += 1
      if byte == UInt8(ascii: "\\") {
        try escape(into: &content)
      } else {
        content.append(byte)
      }
    }
    throw failure("the end of a string")
  }

  private func checked(_ content: ArraySlice<UInt8>, at start: Int) throws(KVError) -> String {
    guard let text = String(validating: content, as: UTF8.self) else {
      throw KVError(.corruptFile, "\(file) is not JSON: a string is not valid UTF-8", offset: start)
    }
    return text
  }

  private mutating func escape(into content: inout [UInt8]) throws(KVError) {
    guard let byte = peek() else { throw failure("an escape") }
    let plain: [UInt8: UInt8] = [
      0x22: 0x22, 0x5C: 0x5C, 0x2F: 0x2F, 0x62: 0x08, 0x66: 0x0C, 0x6E: 0x0A, 0x72: 0x0D, 0x74: 0x09,
    ]
    if let character = plain[byte] {
      index += 1
      content.append(character)
      return
    }
    guard take(UInt8(ascii: "u")) else { throw failure("an escape") }
    var code = try hex4()
    if (0xD800...0xDBFF).contains(code) {
      guard take(UInt8(ascii: "\\")), take(UInt8(ascii: "u")) else { throw failure("the second half of a pair") }
      let low = try hex4()
      guard (0xDC00...0xDFFF).contains(low) else { throw failure("the second half of a surrogate pair") }
      code = 0x10000 + (code - 0xD800) << 10 + (low - 0xDC00)
    }
    guard let scalar = Unicode.Scalar(code) else { throw failure("a Unicode scalar") }
    content.append(contentsOf: Array(String(Character(scalar)).utf8))
  }

  private mutating func hex4() throws(KVError) -> UInt32 {
    var code: UInt32 = 0
    for _ in 0..<4 {
      guard let byte = peek(), let digit = Character(Unicode.Scalar(byte)).hexDigitValue, byte < 0x80 else {
        throw failure("four hexadecimal digits")
      }
      code = code << 4 | UInt32(digit)
      index += 1
    }
    return code
  }
}
