/// A token that stands outside the merges and is recognised in a text as it is written.
struct AddedToken: Sendable, Hashable {
  let id: Int
  let content: String
  /// A special token can be left out when ids are decoded.
  let special: Bool
  /// White space before or after the token is swallowed by it.
  let stripsLeft: Bool
  let stripsRight: Bool
}

/// Finds added tokens in a text, leftmost first and longest of those that begin together.
struct AddedTokenMatcher: Sendable {
  let tokens: [AddedToken]
  /// A byte trie: node and byte to node; and the token that ends at a node, -1 for none.
  private var edges: [UInt64: Int] = [:]
  private var tokenAt: [Int] = [-1]

  init(_ tokens: [AddedToken]) {
    self.tokens = tokens
    for (index, token) in tokens.enumerated() {
      var node = 0
      for byte in token.content.utf8 {
        let key = UInt64(node) << 8 | UInt64(byte)
        if let known = edges[key] {
          node = known
        } else {
          tokenAt.append(-1)
          edges[key] = tokenAt.count - 1
          node = tokenAt.count - 1
        }
      }
      tokenAt[node] = index
    }
  }

  /// The pieces of a text in order: plain text, or the id of an added token.
  enum Piece {
    case text(String)
    case token(Int)
  }

  func split(_ text: String) -> [Piece] {
    if tokens.isEmpty { return text.isEmpty ? [] : [.text(text)] }
    let bytes = Array(text.utf8)
    var pieces: [Piece] = []
    var plain = 0
    var index = 0
    while index < bytes.count {
      guard let (token, length) = match(bytes, at: index) else {
        index += 1
        continue
      }
      var start = index
      var end = index + length
      if tokens[token].stripsLeft {
        while start > plain, Self.isASCIISpace(bytes[start - 1]) { start -= 1 }
      }
      if tokens[token].stripsRight {
        while end < bytes.count, Self.isASCIISpace(bytes[end]) { end += 1 }
      }
      if start > plain { pieces.append(.text(String(decoding: bytes[plain..<start], as: UTF8.self))) }
      pieces.append(.token(tokens[token].id))
      plain = end
      index = end
    }
    if plain < bytes.count { pieces.append(.text(String(decoding: bytes[plain...], as: UTF8.self))) }
    return pieces
  }

  private static func isASCIISpace(_ byte: UInt8) -> Bool { byte == 32 || (9...13).contains(byte) }

  private func match(_ bytes: [UInt8], at start: Int) -> (token: Int, length: Int)? {
    var node = 0
    var best: (Int, Int)?
    var index = start
    while index < bytes.count, let next = edges[UInt64(node) << 8 | UInt64(bytes[index])] {
      node = next
      index += 1
      if tokenAt[node] >= 0 { best = (tokenAt[node], index - start) }
    }
    return best
  }
}
