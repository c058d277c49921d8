internal import Foundation
package import KVCompression

/// A JSON value that prints its keys in the order they were given, so that files can be compared line by line.
package indirect enum JSONText: Sendable, Hashable {
  case null
  case bool(Bool)
  case integer(Int)
  /// NaN and infinities print as null.
  case number(Double)
  case string(String)
  case array([JSONText])
  case object([Member])
  /// Text that is JSON already.
  case raw(String)

  package struct Member: Sendable, Hashable {
    package var key: String
    package var value: JSONText

    package init(_ key: String, _ value: JSONText) {
      self.key = key
      self.value = value
    }
  }

  /// Keys of an object, in order; empty for anything else.
  package var keys: [String] {
    guard case .object(let members) = self else { return [] }
    return members.map(\.key)
  }

  package subscript(key: String) -> JSONText? {
    guard case .object(let members) = self else { return nil }
    return members.first { $0.key == key }?.value
  }

  /// On one line.
  package var compact: String {
    var text = ""
    write(into: &text, indent: nil)
    return text
  }

  /// Objects and their arrays over several lines, two spaces a level.
  package var pretty: String {
    var text = ""
    write(into: &text, indent: 0)
    return text + "\n"
  }

  private func write(into text: inout String, indent: Int?) {
    switch self {
    case .null: text += "null"
    case .bool(let value): text += value ? "true" : "false"
    case .integer(let value): text += String(value)
    case .number(let value): text += value.isFinite ? "\(value)" : "null"
    case .string(let value): text += Self.quoted(value)
    case .raw(let value): text += value
    case .array(let items):
      let flat = !items.contains { if case .object = $0 { true } else { false } }
      list(items, "[", "]", into: &text, indent: flat ? nil : indent) { item, text, indent in
        item.write(into: &text, indent: indent)
      }
    case .object(let members):
      list(members, "{", "}", into: &text, indent: indent) { member, text, indent in
        text += Self.quoted(member.key) + (indent == nil ? ":" : ": ")
        member.value.write(into: &text, indent: indent)
      }
    }
  }

  private func list<Item>(
    _ items: [Item], _ open: String, _ close: String, into text: inout String, indent: Int?,
    _ write: (Item, inout String, Int?) -> Void
  ) {
    text += open
    for (index, item) in items.enumerated() {
      if index > 0 { text += "," }
      if let indent { text += "\n" + String(repeating: "  ", count: indent + 1) }
      write(item, &text, indent.map { $0 + 1 })
    }
    if let indent, !items.isEmpty { text += "\n" + String(repeating: "  ", count: indent) }
    text += close
  }

  static func quoted(_ text: String) -> String {
    var result = "\""
    for scalar in text.unicodeScalars {
      switch scalar {
      case "\"": result += "\\\""
      case "\\": result += "\\\\"
      case "\n": result += "\\n"
      case "\t": result += "\\t"
      case "\r": result += "\\r"
      case "\u{0}"..<"\u{20}": result += String(format: "\\u%04x", Int(scalar.value))
      default: result.unicodeScalars.append(scalar)
      }
    }
    return result + "\""
  }
}

/// Files that kvlab writes.
package enum TextFile {
  /// - Throws: `inputOutput` that names the file.
  package static func write(_ text: String, to path: String) throws(KVError) {
    do {
      try Data(text.utf8).write(to: URL(fileURLWithPath: path), options: .atomic)
    } catch {
      throw KVError(.inputOutput, "could not write \(path): \(error.localizedDescription)")
    }
  }

  /// - Throws: `inputOutput`, also for text that is not UTF-8.
  package static func read(_ path: String) throws(KVError) -> String {
    do {
      return try String(contentsOf: URL(fileURLWithPath: path), encoding: .utf8)
    } catch {
      throw KVError(.inputOutput, "could not read \(path) as UTF-8 text: \(error.localizedDescription)")
    }
  }
}
