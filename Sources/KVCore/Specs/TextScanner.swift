/// The lexical part that policy texts and JSON share: whitespace, numbers, quoted strings, and errors with offsets.
///
/// Works on bytes, never backtracks, and never reads past the end.
struct TextScanner {
  let bytes: [UInt8]
  var at = 0

  init(_ bytes: [UInt8]) { self.bytes = bytes }

  var current: UInt8? { at < bytes.count ? bytes[at] : nil }

  mutating func skipSpace() {
    while let byte = current, byte == 0x20 || (0x09...0x0D).contains(byte) && byte != 0x0B && byte != 0x0C { at += 1 }
  }

  /// Takes `byte` if it is next.
  mutating func take(_ byte: Character) -> Bool {
    guard current == byte.asciiValue else { return false }
    at += 1
    return true
  }

  func fail(_ expected: String, at offset: Int? = nil) -> KVError {
    let place = offset ?? at
    return KVError(.syntax, "expected \(expected), found \(found(at: place))", offset: place)
  }

  /// The character at an offset, in words.
  func found(at offset: Int) -> String {
    guard offset < bytes.count else { return "the end of the text" }
    let piece = bytes[offset..<min(offset + 4, bytes.count)]
    guard let character = String(decoding: piece, as: UTF8.self).unicodeScalars.first, character.value >= 0x20 else {
      return "byte \(bytes[offset])"
    }
    return "'\(character)'"
  }

  // MARK: - Numbers

  /// `-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?`
  struct Number {
    var text: String
    var isInteger: Bool
    var offset: Int
  }

  mutating func number() throws(KVError) -> Number {
    let start = at
    _ = take("-")
    if take("0") {
      if let next = current, TextScanner.isDigit(next) {
        throw KVError(.syntax, "a number must not start with a superfluous 0", offset: start)
      }
    } else {
      try digits("a digit")
    }
    var isInteger = true
    if take(".") {
      isInteger = false
      try digits("a digit after the decimal point")
    }
    if current == 0x65 || current == 0x45 {  // e, E
      isInteger = false
      at += 1
      if !take("-") { _ = take("+") }
      try digits("a digit of the exponent")
    }
    return Number(text: String(decoding: bytes[start..<at], as: UTF8.self), isInteger: isInteger, offset: start)
  }

  private mutating func digits(_ expected: String) throws(KVError) {
    let start = at
    while let byte = current, TextScanner.isDigit(byte) { at += 1 }
    if at == start { throw fail(expected) }
  }

  static func isDigit(_ byte: UInt8) -> Bool { (0x30...0x39).contains(byte) }

  // MARK: - Strings

  /// A string in JSON syntax, the opening quote being next.
  mutating func quotedString() throws(KVError) -> String {
    let start = at
    at += 1
    var content: [UInt8] = []
    while let byte = current {
      switch byte {
      case 0x22:
        at += 1
        return String(decoding: content, as: UTF8.self)
      case 0x5C:
        at += 1
        try escape(into: &content)
      case 0..<0x20:
        throw fail("a printable character in a quoted string (control characters are escaped)")
      default:
        content.append(byte)
        at += 1
      }
    }
    throw KVError(.syntax, "expected a closing '\"' for the string that starts here", offset: start)
  }

  private mutating func escape(into content: inout [UInt8]) throws(KVError) {
    guard let byte = current else { throw fail("an escape after '\\'") }
    switch byte {
    case 0x22, 0x5C, 0x2F: content.append(byte)
    case 0x62: content.append(0x08)
    case 0x66: content.append(0x0C)
    case 0x6E: content.append(0x0A)
    case 0x72: content.append(0x0D)
    case 0x74: content.append(0x09)
    case 0x75:
      content.append(contentsOf: Array(String(try unicodeEscape()).utf8))
      return
    default: throw fail("one of \" \\ / b f n r t u after '\\'")
    }
    at += 1
  }

  /// `uXXXX`, or a surrogate pair of two such escapes.
  private mutating func unicodeEscape() throws(KVError) -> Character {
    let start = at
    let first = try hexUnit()
    if let scalar = Unicode.Scalar(first) { return Character(scalar) }
    if first < 0xDC00, take("\\"), current == 0x75 {
      let second = try hexUnit()
      if (0xDC00...0xDFFF).contains(second),
        let scalar = Unicode.Scalar(0x10000 + (UInt32(first) - 0xD800) << 10 + (UInt32(second) - 0xDC00))
      {
        return Character(scalar)
      }
    }
    throw KVError(.syntax, "expected a pair of surrogate escapes, found half of one", offset: start)
  }

  private mutating func hexUnit() throws(KVError) -> UInt16 {
    at += 1
    var unit: UInt16 = 0
    for _ in 0..<4 {
      guard let byte = current, let digit = Character(Unicode.Scalar(byte)).hexDigitValue else {
        throw fail("4 hexadecimal digits after \\u")
      }
      unit = unit << 4 | UInt16(digit)
      at += 1
    }
    return unit
  }

  /// `text` in JSON syntax, quotes included.
  static func quoted(_ text: String) -> String {
    var result = "\""
    for scalar in text.unicodeScalars {
      switch scalar {
      case "\"": result += "\\\""
      case "\\": result += "\\\\"
      case "\n": result += "\\n"
      case "\r": result += "\\r"
      case "\t": result += "\\t"
      case let control where control.value < 0x20:
        let hex = String(control.value, radix: 16)
        result += "\\u" + String(repeating: "0", count: 4 - hex.count) + hex
      default: result.unicodeScalars.append(scalar)
      }
    }
    return result + "\""
  }

  // MARK: - UTF-8

  /// Offset of the first byte that is not well-formed UTF-8 (overlong forms and surrogates are not), or nil.
  static func firstInvalidUTF8(in bytes: [UInt8]) -> Int? {
    var index = 0
    while index < bytes.count {
      let lead = bytes[index]
      let (length, low, high): (Int, UInt8, UInt8)
      switch lead {
      case 0..<0x80: (length, low, high) = (1, 0, 0)
      case 0xC2...0xDF: (length, low, high) = (2, 0x80, 0xBF)
      case 0xE0: (length, low, high) = (3, 0xA0, 0xBF)
      case 0xED: (length, low, high) = (3, 0x80, 0x9F)
      case 0xE1...0xEF: (length, low, high) = (3, 0x80, 0xBF)
      case 0xF0: (length, low, high) = (4, 0x90, 0xBF)
      case 0xF1...0xF3: (length, low, high) = (4, 0x80, 0xBF)
      case 0xF4: (length, low, high) = (4, 0x80, 0x8F)
      default: return index
      }
      guard index + length <= bytes.count else { return index }
      for step in 1..<max(length, 1) {
        let allowed: ClosedRange<UInt8> = step == 1 ? low...high : 0x80...0xBF
        if !allowed.contains(bytes[index + step]) { return index }
      }
      index += length
    }
    return nil
  }
}
