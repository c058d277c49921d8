package import KVCompression

/// A policy with the text a person wrote for it.
package struct NamedPolicy: Sendable {
  package let name: String
  package let policy: Policy

  /// - Throws: what the registry throws; the offset is the byte in `text`.
  package init(_ text: String) throws(KVError) {
    policy = try PolicyRegistry.standard.policy(text)
    name = text.trimmed
  }

  /// Every option with its value.
  package var spec: String { policy.spec.description }

  /// Policies separated by commas: commas inside parentheses, brackets, braces and quotes belong to a policy.
  ///
  /// - Throws: as ``init(_:)``; the offset counts from the start of the whole list. `syntax` for an empty place.
  package static func list(_ text: String) throws(KVError) -> [NamedPolicy] {
    var policies: [NamedPolicy] = []
    for piece in split(text) {
      guard !piece.text.trimmed.isEmpty else {
        throw KVError(.syntax, "expected a policy between the commas, found nothing", offset: piece.offset)
      }
      do throws(KVError) {
        policies.append(try NamedPolicy(piece.text))
      } catch {
        var error = error
        error.offset = error.offset.map { $0 + piece.offset }
        throw error
      }
    }
    return policies
  }

  private static func split(_ text: String) -> [(text: String, offset: Int)] {
    var pieces: [(String, Int)] = []
    let bytes = Array(text.utf8)
    var depth = 0
    var start = 0
    var quoted = false
    var escaped = false
    for (index, byte) in bytes.enumerated() {
      if quoted {
        if !escaped, byte == UInt8(ascii: "\"") { quoted = false }
        escaped = !escaped && byte == UInt8(ascii: "\\")
        continue
      }
      switch byte {
      case UInt8(ascii: "\""): quoted = true
      case UInt8(ascii: "("), UInt8(ascii: "["), UInt8(ascii: "{"): depth += 1
      case UInt8(ascii: ")"), UInt8(ascii: "]"), UInt8(ascii: "}"): depth -= 1
      case UInt8(ascii: ",") where depth <= 0:
        pieces.append((String(decoding: bytes[start..<index], as: UTF8.self), start))
        start = index + 1
      default: break
      }
    }
    pieces.append((String(decoding: bytes[start...], as: UTF8.self), start))
    return pieces
  }

  /// What `kvlab compare` runs when nobody says: every store, every selection at a quarter, and both together.
  package static let defaults = [
    "f32", "f16", "bf16", "kivi(bits=8)", "kivi(bits=4)", "kivi(bits=2)", "streaming(budget=0.25)", "h2o(budget=0.25)",
    "snapkv(budget=0.25)", "snapkv(budget=0.25,kernel=13)", "snapkv(budget=0.25,kernel=13)+kivi(bits=4)",
    "h2o(budget=0.25)+kivi(bits=4)",
  ]

  /// A shorter list for continuous integration.
  package static let quickDefaults = [
    "f32", "f16", "kivi(bits=4)", "streaming(budget=0.25)", "h2o(budget=0.25)",
    "snapkv(budget=0.25,kernel=13)+kivi(bits=4)",
  ]
}

extension String {
  /// Without blanks at either end.
  var trimmed: String {
    let blank: (Character) -> Bool = { $0 == " " || $0 == "\t" || $0 == "\n" || $0 == "\r" || $0 == "\r\n" }
    guard let first = firstIndex(where: { !blank($0) }), let last = lastIndex(where: { !blank($0) }) else { return "" }
    return String(self[first...last])
  }
}
