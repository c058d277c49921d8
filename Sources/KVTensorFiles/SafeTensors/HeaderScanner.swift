internal import KVCore

/// A strict JSON scanner for safetensors headers: UTF-8 only, no duplicate keys, integers only where integers belong,
/// bounded nesting. Every error names the byte of the file it stopped at.
package struct HeaderScanner {
  /// A value nobody asked for may nest this deep; nothing in the format nests deeper than three levels.
  static let deepestNesting = 32
  /// Longest excerpt of a header that goes into an error text.
  private static let longestExcerpt = 80

  private let bytes: [UInt8]
  private let base: Int
  private(set) var index = 0

  /// - Parameter base: where `bytes` begin in the file.
  init(_ bytes: [UInt8], base: Int) {
    self.bytes = bytes
    self.base = base
  }

  /// The scanner's place in the file.
  var offset: Int { base + index }

  func failure(_ message: String, at offset: Int? = nil) -> KVError {
    KVError(.corruptFile, message, offset: offset ?? self.offset)
  }

  private var here: String {
    guard index < bytes.count else { return "the end of the header" }
    let byte = bytes[index]
    return byte > 0x20 && byte < 0x7F ? "'\(Character(UnicodeScalar(byte)))'" : "byte \(byte)"
  }

  mutating func skipSpace() {
    while index < bytes.count, [0x20, 0x09, 0x0A, 0x0D].contains(bytes[index]) { index += 1 }
  }

  private mutating func peek() -> UInt8? {
    skipSpace()
    return index < bytes.count ? bytes[index] : nil
  }

  private mutating func expect(_ character: Character, _ place: String) throws(KVError) {
    guard let byte = peek(), byte == character.asciiValue else {
      throw failure("expected '\(character)' \(place), found \(here)")
    }
    index += 1
  }

  /// Calls `member` once for every key, with the scanner at the value. Refuses a key that came before.
  mutating func object(
    _ what: String, member: (inout HeaderScanner, _ key: String, _ keyOffset: Int) throws(KVError) -> Void
  ) throws(KVError) {
    try expect("{", "to open \(what)")
    var seen: Set<[UInt8]> = []
    if peek() == UInt8(ascii: "}") {
      index += 1
      return
    }
    while true {
      skipSpace()
      let keyOffset = offset
      let key = try string("a key of \(what)")
      // Compared byte by byte: two spellings of one accented letter are two names to every other reader.
      guard seen.insert(Array(key.utf8)).inserted else {
        throw failure("\(what) holds the key '\(HeaderScanner.excerpt(key))' twice", at: keyOffset)
      }
      try expect(":", "after the key '\(HeaderScanner.excerpt(key))'")
      skipSpace()
      try member(&self, key, keyOffset)
      guard try more("}", what) else { return }
    }
  }

  /// Calls `element` with the scanner at each value.
  mutating func array(
    _ what: String, element: (inout HeaderScanner) throws(KVError) -> Void
  ) throws(KVError) {
    try expect("[", "to open \(what)")
    if peek() == UInt8(ascii: "]") {
      index += 1
      return
    }
    while true {
      skipSpace()
      try element(&self)
      guard try more("]", what) else { return }
    }
  }

  /// True after a comma, false after `close`.
  private mutating func more(_ close: Character, _ what: String) throws(KVError) -> Bool {
    let byte = peek()
    guard byte == UInt8(ascii: ",") || byte == close.asciiValue else {
      throw failure("expected ',' or '\(close)' in \(what), found \(here)")
    }
    index += 1
    return byte == UInt8(ascii: ",")
  }

  mutating func naturals(_ what: String) throws(KVError) -> [Int] {
    var numbers: [Int] = []
    try array(what) { (scanner) throws(KVError) in numbers.append(try scanner.natural(what)) }
    return numbers
  }

  /// A number without sign, fraction, exponent or leading zero.
  mutating func natural(_ what: String) throws(KVError) -> Int {
    let start = offset
    guard let first = peek(), first >= 0x30, first <= 0x39 else {
      throw failure("\(what) must be a number of 0 or more, found \(here)")
    }
    var value = 0
    var digits = 0
    while index < bytes.count, bytes[index] >= 0x30, bytes[index] <= 0x39 {
      let (scaled, overflow1) = value.multipliedReportingOverflow(by: 10)
      let (sum, overflow2) = scaled.addingReportingOverflow(Int(bytes[index] - 0x30))
      guard !overflow1, !overflow2 else { throw failure("\(what) holds a number beyond \(Int.max)", at: start) }
      value = sum
      digits += 1
      index += 1
    }
    if first == 0x30, digits > 1 { throw failure("\(what) holds a number with a leading zero", at: start) }
    if index < bytes.count, [UInt8(ascii: "."), UInt8(ascii: "e"), UInt8(ascii: "E")].contains(bytes[index]) {
      throw failure("\(what) must be whole numbers, found a fraction or an exponent", at: start)
    }
    return value
  }

  mutating func string(_ what: String) throws(KVError) -> String {
    guard peek() == UInt8(ascii: "\"") else { throw failure("\(what) must be a string, found \(here)") }
    let start = offset
    index += 1
    var text: [UInt8] = []
    while index < bytes.count {
      let byte = bytes[index]
      if byte == UInt8(ascii: "\"") {
        index += 1
        guard let string = String(validating: text, as: UTF8.self) else {
          throw failure("\(what) is not valid UTF-8", at: start)
        }
        return string
      }
      if byte == UInt8(ascii: "\\") {
        text.append(contentsOf: Array(String(Character(try escape())).utf8))
        continue
      }
      guard byte >= 0x20 else { throw failure("\(what) holds the bare control byte \(byte)") }
      text.append(byte)
      index += 1
    }
    throw failure("\(what) is not closed by '\"' before the header ends", at: start)
  }

  /// Reads a backslash and what follows it.
  private mutating func escape() throws(KVError) -> UnicodeScalar {
    let start = offset
    index += 1
    guard index < bytes.count else { throw failure("a string ends inside an escape", at: start) }
    let byte = bytes[index]
    index += 1
    switch byte {
    case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return UnicodeScalar(byte)
    case UInt8(ascii: "b"): return "\u{8}"
    case UInt8(ascii: "f"): return "\u{C}"
    case UInt8(ascii: "n"): return "\n"
    case UInt8(ascii: "r"): return "\r"
    case UInt8(ascii: "t"): return "\t"
    case UInt8(ascii: "u"):
      var code = try hexQuad()
      if (0xD800..<0xDC00).contains(code) {
        guard index + 1 < bytes.count, bytes[index] == UInt8(ascii: "\\"), bytes[index + 1] == UInt8(ascii: "u") else {
          throw failure("half of a surrogate pair stands alone", at: start)
        }
        index += 2
        let low = try hexQuad()
        guard (0xDC00..<0xE000).contains(low) else {
          throw failure("half of a surrogate pair stands alone", at: start)
        }
        code = 0x10000 + (code - 0xD800) << 10 + (low - 0xDC00)
      }
      guard let scalar = UnicodeScalar(code) else {
        throw failure("half of a surrogate pair stands alone", at: start)
      }
      return scalar
    default: throw failure("a string holds an escape that JSON does not have", at: start)
    }
  }

  private mutating func hexQuad() throws(KVError) -> UInt32 {
    guard index + 4 <= bytes.count else { throw failure("an escape \\u needs four hexadecimal digits") }
    var code: UInt32 = 0
    for _ in 0..<4 {
      guard let digit = Character(UnicodeScalar(bytes[index])).hexDigitValue, bytes[index] < 0x80 else {
        throw failure("an escape \\u needs four hexadecimal digits, found \(here)")
      }
      code = code << 4 | UInt32(digit)
      index += 1
    }
    return code
  }

  /// Reads over a value of any kind.
  mutating func skipValue(depth: Int = 1) throws(KVError) {
    guard depth <= HeaderScanner.deepestNesting else {
      throw failure("the header nests deeper than \(HeaderScanner.deepestNesting) levels")
    }
    switch peek() {
    case UInt8(ascii: "{"):
      try object("a nested object") { (scanner, _, _) throws(KVError) in try scanner.skipValue(depth: depth + 1) }
    case UInt8(ascii: "["):
      try array("a nested array") { (scanner) throws(KVError) in try scanner.skipValue(depth: depth + 1) }
    case UInt8(ascii: "\""):
      _ = try string("a value")
    default:
      try skipScalar()
    }
  }

  private mutating func skipScalar() throws(KVError) {
    for literal in ["true", "false", "null"] where bytes[index...].starts(with: literal.utf8) {
      index += literal.utf8.count
      return
    }
    let start = index
    if index < bytes.count, bytes[index] == UInt8(ascii: "-") { index += 1 }
    let whole = digits()
    var valid = whole.count == 1 || (whole.count > 1 && !whole.startsWithZero)
    if valid, index < bytes.count, bytes[index] == UInt8(ascii: ".") {
      index += 1
      valid = digits().count > 0
    }
    if valid, index < bytes.count, bytes[index] | 0x20 == UInt8(ascii: "e") {
      index += 1
      if index < bytes.count, [UInt8(ascii: "+"), UInt8(ascii: "-")].contains(bytes[index]) { index += 1 }
      valid = digits().count > 0
    }
    if !valid {
      index = start
      throw failure("expected a JSON value, found \(here)")
    }
  }

  private mutating func digits() -> (count: Int, startsWithZero: Bool) {
    let start = index
    while index < bytes.count, bytes[index] >= 0x30, bytes[index] <= 0x39 { index += 1 }
    return (index - start, index > start && bytes[start] == 0x30)
  }

  /// The header may end in spaces, and in nothing else.
  mutating func end() throws(KVError) {
    skipSpace()
    if index < bytes.count { throw failure("expected nothing but spaces after the header's object, found \(here)") }
  }

  /// A name from a file, short enough for an error text.
  package static func excerpt(_ text: String) -> String {
    text.unicodeScalars.count <= longestExcerpt ? text : String(text.unicodeScalars.prefix(longestExcerpt)) + "…"
  }
}
