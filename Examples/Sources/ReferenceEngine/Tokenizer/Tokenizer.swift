import Foundation

/// A byte-level BPE tokenizer as `tokenizer.json` of the Llama 3, Qwen and GPT-2 families describes it.
///
/// Immutable; safe to share between threads. Encoding never fails: every byte has a token, which loading has checked.
public struct Tokenizer: Sendable {
  enum Normalization: Sendable, Hashable { case none, composed }

  /// Tokens up to the highest id, whether or not every id below it is used.
  public var count: Int { bytesOfToken.count }
  /// Ids that decode to nothing when special tokens are skipped.
  public let specialIDs: Set<Int>

  /// Bytes each id stands for; nil for an id that is not used.
  let bytesOfToken: [[UInt8]?]
  let idOfText: [[UInt8]: Int]
  let encoder: BytePairEncoder
  /// A word that is a token as it stands needs no merges (`ignore_merges`).
  let prefersWholeWords: Bool
  let wholeWords: [[UInt8]: Int32]
  let normalization: Normalization
  let preTokenizer: PreTokenizer
  /// Looked for before normalisation, and after it.
  let rawAdded: AddedTokenMatcher
  let normalizedAdded: AddedTokenMatcher
  /// What the post-processor puts around one sequence; nil: the file has no template.
  let template: (prefix: [Int], suffix: [Int])?

  /// The id of a token as it is written in the vocabulary or among the added tokens (`<|eos|>`, `Ġthe`).
  public func id(ofToken text: String) -> Int? { idOfText[Array(text.utf8)] }

  /// Token ids of a text. Added tokens found in the text become their ids.
  ///
  /// - Parameter addingTemplate: adds the tokens the file's post-processor puts before and after a sequence.
  /// - Complexity: O(bytes · log of the longest word); equal words are merged once.
  public func encode(_ text: String, addingTemplate: Bool = false) -> [Int] {
    var ids = addingTemplate ? template?.prefix ?? [] : []
    var cache: [ArraySlice<UInt8>: [Int32]] = [:]
    for piece in rawAdded.split(text) {
      switch piece {
      case .token(let id): ids.append(id)
      case .text(let raw):
        let normalized = normalization == .composed ? raw.precomposedStringWithCanonicalMapping : raw
        for piece in normalizedAdded.split(normalized) {
          switch piece {
          case .token(let id): ids.append(id)
          case .text(let plain): append(plain, to: &ids, cache: &cache)
          }
        }
      }
    }
    if addingTemplate { ids += template?.suffix ?? [] }
    return ids
  }

  private func append(_ text: String, to ids: inout [Int], cache: inout [ArraySlice<UInt8>: [Int32]]) {
    preTokenizer.forEachWord(of: text) { word in
      if let known = cache[word] {
        for id in known { ids.append(Int(id)) }
        return
      }
      let tokens = tokens(of: word)
      for id in tokens { ids.append(Int(id)) }
      // Long words do not come again, and would keep whole texts alive.
      if word.count <= 64 { cache[ArraySlice(Array(word))] = tokens }
    }
  }

  private func tokens(of word: ArraySlice<UInt8>) -> [Int32] {
    if prefersWholeWords, let whole = wholeWords[Array(word)] { return [whole] }
    return encoder.encode(word)
  }

  /// The bytes of one token; empty for an id without a token.
  public func bytes(of id: Int) -> [UInt8] {
    bytesOfToken.indices.contains(id) ? bytesOfToken[id] ?? [] : []
  }

  /// The text of ids. Bytes that are not valid UTF-8 become U+FFFD; ids without a token (models pad their vocabulary)
  /// become nothing.
  public func decode(_ ids: some Sequence<Int>, skippingSpecial: Bool = false) -> String {
    var bytes: [UInt8] = []
    for id in ids where !(skippingSpecial && specialIDs.contains(id)) { bytes += self.bytes(of: id) }
    return String(decoding: bytes, as: UTF8.self)
  }
}

/// Decodes ids one by one for streaming: gives text as soon as its bytes are whole characters.
public struct StreamingDecoder: Sendable {
  private let tokenizer: Tokenizer
  private let skippingSpecial: Bool
  private var pending: [UInt8] = []

  public init(_ tokenizer: Tokenizer, skippingSpecial: Bool = true) {
    self.tokenizer = tokenizer
    self.skippingSpecial = skippingSpecial
  }

  /// The text that `id` completes; empty while a character is still open.
  public mutating func append(_ id: Int) -> String {
    if !(skippingSpecial && tokenizer.specialIDs.contains(id)) { pending += tokenizer.bytes(of: id) }
    let whole = pending.count - Self.openBytes(pending)
    defer { pending.removeFirst(whole) }
    return String(decoding: pending[..<whole], as: UTF8.self)
  }

  /// What is left at the end of a text, repaired.
  public mutating func finish() -> String {
    defer { pending = [] }
    return String(decoding: pending, as: UTF8.self)
  }

  /// Bytes at the end that begin a character and do not yet complete it.
  private static func openBytes(_ bytes: [UInt8]) -> Int {
    for back in 1...3 where back <= bytes.count {
      let byte = bytes[bytes.count - back]
      if byte & 0xC0 == 0x80 { continue }
      let length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1
      return length > back ? back : 0
    }
    return 0
  }
}
