/// A JSON value. Strict: RFC 8259 and nothing more, duplicate keys refused, integers exact.
///
/// The order of an object's members is kept, so that printing what was parsed changes nothing but spaces.
package enum JSONValue: Hashable, Sendable {
  case null
  case bool(Bool)
  /// A number without fraction and exponent. One that does not fit 64 bits is refused, not rounded.
  case integer(Int)
  case number(Double)
  case string(String)
  case array([JSONValue])
  case object([Member])

  package struct Member: Hashable, Sendable {
    package var key: String
    package var value: JSONValue
    package init(_ key: String, _ value: JSONValue) {
      self.key = key
      self.value = value
    }
  }

  /// Nested arrays and objects a text may have.
  package static let maximumDepth = 64

  /// - Throws: `syntax` with the byte where parsing stopped.
  /// - Complexity: O(bytes), but O(keys log keys) within one object.
  package init(parsing text: String) throws(KVError) { try self.init(parsing: Array(text.utf8)) }

  package init(parsing bytes: [UInt8]) throws(KVError) {
    if let offset = TextScanner.firstInvalidUTF8(in: bytes) {
      throw KVError(.syntax, "expected UTF-8, found byte \(bytes[offset])", offset: offset)
    }
    var parser = JSONParser(scanner: TextScanner(bytes))
    self = try parser.document()
  }

  /// The member of that key; nil when there is none or this is no object.
  package subscript(key: String) -> JSONValue? {
    guard case .object(let members) = self else { return nil }
    return members.first { $0.key == key }?.value
  }

  /// What kind of value this is, for error messages.
  package var kindName: String {
    switch self {
    case .null: "null"
    case .bool: "a boolean"
    case .integer: "an integer"
    case .number: "a number"
    case .string: "a string"
    case .array: "an array"
    case .object: "an object"
    }
  }

  /// Compact text that parses to the same value.
  ///
  /// - Throws: `nonFinite` for a NaN or an infinity, which JSON cannot hold.
  package func text() throws(KVError) -> String {
    var result = ""
    try write(to: &result)
    return result
  }

  private func write(to result: inout String) throws(KVError) {
    switch self {
    case .null: result += "null"
    case .bool(let value): result += value ? "true" : "false"
    case .integer(let value): result += String(value)
    case .number(let value):
      guard value.isFinite else { throw KVError(.nonFinite, "JSON holds finite numbers only; got \(value)") }
      result += "\(value)"
    case .string(let value): result += TextScanner.quoted(value)
    case .array(let values):
      result += "["
      for (index, value) in values.enumerated() {
        if index > 0 { result += "," }
        try value.write(to: &result)
      }
      result += "]"
    case .object(let members):
      result += "{"
      for (index, member) in members.enumerated() {
        if index > 0 { result += "," }
        result += TextScanner.quoted(member.key) + ":"
        try member.value.write(to: &result)
      }
      result += "}"
    }
  }
}

/// Recursive descent with a bounded depth.
struct JSONParser {
  var scanner: TextScanner

  mutating func document() throws(KVError) -> JSONValue {
    scanner.skipSpace()
    let value = try value(depth: 0)
    scanner.skipSpace()
    if scanner.current != nil { throw scanner.fail("the end of the text after a JSON value") }
    return value
  }

  private mutating func value(depth: Int) throws(KVError) -> JSONValue {
    switch scanner.current {
    case 0x22: return .string(try scanner.quotedString())
    case 0x5B: return try array(depth: depth)
    case 0x7B: return try object(depth: depth)
    case 0x74: return try word("true", .bool(true))
    case 0x66: return try word("false", .bool(false))
    case 0x6E: return try word("null", .null)
    case .some(let byte) where byte == 0x2D || TextScanner.isDigit(byte): return try number()
    default: throw scanner.fail("a JSON value")
    }
  }

  private mutating func word(_ text: String, _ value: JSONValue) throws(KVError) -> JSONValue {
    let start = scanner.at
    for byte in text.utf8 {
      guard scanner.current == byte else { throw scanner.fail("\(text)", at: start) }
      scanner.at += 1
    }
    return value
  }

  private mutating func number() throws(KVError) -> JSONValue {
    let number = try scanner.number()
    if number.isInteger {
      guard let value = Int(number.text) else {
        throw KVError(.syntax, "the integer \(number.text) does not fit 64 bits", offset: number.offset)
      }
      return .integer(value)
    }
    guard let value = Double(number.text), value.isFinite else {
      throw KVError(.syntax, "the number \(number.text) does not fit a double", offset: number.offset)
    }
    return .number(value)
  }

  private func check(depth: Int) throws(KVError) {
    if depth >= JSONValue.maximumDepth {
      throw KVError(.syntax, "expected at most \(JSONValue.maximumDepth) nested values", offset: scanner.at)
    }
  }

  private mutating func array(depth: Int) throws(KVError) -> JSONValue {
    try check(depth: depth)
    scanner.at += 1
    scanner.skipSpace()
    var values: [JSONValue] = []
    if scanner.take("]") { return .array(values) }
    while true {
      scanner.skipSpace()
      values.append(try value(depth: depth + 1))
      scanner.skipSpace()
      if scanner.take("]") { return .array(values) }
      guard scanner.take(",") else { throw scanner.fail("',' or ']' in an array") }
    }
  }

  private mutating func object(depth: Int) throws(KVError) -> JSONValue {
    try check(depth: depth)
    scanner.at += 1
    scanner.skipSpace()
    var members: [JSONValue.Member] = []
    var keys: Set<String> = []
    if scanner.take("}") { return .object(members) }
    while true {
      scanner.skipSpace()
      let start = scanner.at
      guard scanner.current == 0x22 else { throw scanner.fail("a quoted key") }
      let key = try scanner.quotedString()
      guard keys.insert(key).inserted else {
        throw KVError(.syntax, "the key \(TextScanner.quoted(key)) occurs twice in one object", offset: start)
      }
      scanner.skipSpace()
      guard scanner.take(":") else { throw scanner.fail("':' after a key") }
      scanner.skipSpace()
      members.append(JSONValue.Member(key, try value(depth: depth + 1)))
      scanner.skipSpace()
      if scanner.take("}") { return .object(members) }
      guard scanner.take(",") else { throw scanner.fail("',' or '}' in an object") }
    }
  }
}
