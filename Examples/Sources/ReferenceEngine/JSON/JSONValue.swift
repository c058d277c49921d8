/// A parsed JSON value. Members keep their order and their duplicates, so that a reader can refuse duplicates where
/// they would be ambiguous.
enum JSONValue: Sendable {
  case null
  case bool(Bool)
  /// A number written without fraction and exponent that fits `Int`.
  case integer(Int)
  case number(Double)
  case string(String)
  case array([JSONValue])
  case object([JSONMember])

  /// The kind and, for scalars, the value: what came, in an error message.
  var summary: String {
    switch self {
    case .null: "null"
    case .bool(let value): "\(value)"
    case .integer(let value): "\(value)"
    case .number(let value): "\(value)"
    case .string(let value): "\"\(JSONValue.shortened(value))\""
    case .array(let items): "a list of \(items.count)"
    case .object(let members): "an object of \(members.count) members"
    }
  }

  /// Text from a file is cut before it enters a message: a hostile file may hold megabytes in one string.
  static func shortened(_ text: String) -> String {
    let scalars = text.unicodeScalars
    return scalars.count <= 48 ? text : String(String.UnicodeScalarView(scalars.prefix(45))) + "..."
  }
}

struct JSONMember: Sendable {
  var key: String
  var value: JSONValue
}

/// Swift compares strings by canonical equivalence; JSON keys and tokens are equal only when their bytes are.
func sameBytes(_ a: String, _ b: String) -> Bool {
  a.utf8.elementsEqual(b.utf8)
}
