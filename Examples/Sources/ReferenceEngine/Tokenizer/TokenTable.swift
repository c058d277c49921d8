import KVCompression

/// Vocabulary and added tokens while a tokenizer is read: ids checked, unique, and bounded.
struct TokenTable {
  private let vocabulary: JSONObject
  private(set) var idOfText: [[UInt8]: Int] = [:]
  /// Token texts by id.
  private var texts: [String?] = []
  /// How many ids belong to the vocabulary proper.
  private var vocabularyIDs: [Int] = []

  init(vocabulary: JSONObject) throws(KVError) {
    self.vocabulary = vocabulary
    guard vocabulary.members.count <= SizeLimit.tokenID.upperBound else {
      throw KVError(.corruptFile, "\(vocabulary.file): the vocabulary has \(vocabulary.members.count) tokens")
    }
    idOfText.reserveCapacity(vocabulary.members.count)
    // Ids may leave holes, but not so many that a small file makes a large table.
    let highest = SizeLimit.sparseIDs(count: vocabulary.members.count)
    for member in vocabulary.members {
      let text = JSONValue.shortened(member.key)
      guard case .integer(let id) = member.value, (0...highest).contains(id) else {
        throw vocabulary.failure(text, expected: "an id in 0...\(highest)", got: member.value)
      }
      guard idOfText.updateValue(id, forKey: Array(member.key.utf8)) == nil else {
        throw KVError(.corruptFile, "\(vocabulary.file): the vocabulary holds \"\(text)\" twice")
      }
      if id >= texts.count { texts += [String?](repeating: nil, count: id + 1 - texts.count) }
      if let other = texts[id] {
        throw KVError(
          .corruptFile,
          "\(vocabulary.file): id \(id) belongs to \"\(JSONValue.shortened(other))\" and to \"\(text)\"")
      }
      texts[id] = member.key
      vocabularyIDs.append(id)
    }
  }

  // MARK: Added tokens

  mutating func add(
    _ list: [JSONValue], of json: JSONObject
  ) throws(KVError) -> (raw: [AddedToken], normalized: [AddedToken]) {
    var raw: [AddedToken] = []
    var normalized: [AddedToken] = []
    let highest = SizeLimit.sparseIDs(count: vocabularyIDs.count + list.count)
    for (index, item) in list.enumerated() {
      let object = try JSONObject(item, file: json.file, path: "added_tokens.\(index)")
      let token = AddedToken(
        id: try object.integer("id", in: 0...highest), content: try object.string("content"),
        special: try object.bool("special", default: false), stripsLeft: try object.bool("lstrip", default: false),
        stripsRight: try object.bool("rstrip", default: false))
      guard !token.content.isEmpty else { throw object.failure("content", expected: "not empty", got: .string("")) }
      if try object.bool("single_word", default: false) {
        throw object.unsupported("single_word", "true", supported: "false")
      }
      try insert(token, object)
      if try object.bool("normalized", default: !token.special) { normalized.append(token) } else { raw.append(token) }
    }
    return (raw, normalized)
  }

  private mutating func insert(_ token: AddedToken, _ object: JSONObject) throws(KVError) {
    let text = JSONValue.shortened(token.content)
    if let known = idOfText[Array(token.content.utf8)] {
      guard known == token.id else {
        throw object.failure("id", expected: "\(known), the id \"\(text)\" has already", got: .integer(token.id))
      }
      return
    }
    if token.id >= texts.count { texts += [String?](repeating: nil, count: token.id + 1 - texts.count) }
    if let other = texts[token.id] {
      throw object.failure(
        "id", expected: "an id that \"\(JSONValue.shortened(other))\" does not have", got: .integer(token.id))
    }
    texts[token.id] = token.content
    idOfText[Array(token.content.utf8)] = token.id
  }

  // MARK: What the encoder needs

  /// The token of every byte. All 256 must be there, so that no text can fail to encode.
  func byteTokens() throws(KVError) -> [Int32] {
    var result: [Int32] = []
    for (byte, scalar) in ByteAlphabet.scalars.enumerated() {
      guard let id = idOfText[Array(String(Character(scalar)).utf8)] else {
        throw KVError(
          .unsupported,
          "\(vocabulary.file): the vocabulary has no token for byte 0x\(String(byte, radix: 16)); this engine supports "
            + "byte-level vocabularies, which have all 256")
      }
      result.append(Int32(id))
    }
    return result
  }

  /// Every merge by its pair. A pair listed twice has its last rank, as in the tokenizers library.
  func merges(_ model: JSONObject) throws(KVError) -> [UInt64: BytePairEncoder.Merge] {
    guard let list = try model.optionalArray("merges") else {
      throw model.failure("merges", expected: "a list of pairs", got: nil)
    }
    var merges: [UInt64: BytePairEncoder.Merge] = [:]
    merges.reserveCapacity(list.count)
    for (rank, item) in list.enumerated() {
      guard let (left, right) = Self.pair(item) else {
        throw model.failure("merges.\(rank)", expected: "\"left right\" or [left, right]", got: item)
      }
      // The result is longer than both parts, so merges cannot run in a circle.
      guard !left.isEmpty, !right.isEmpty, let leftID = idOfText[left], let rightID = idOfText[right],
        let result = idOfText[left + right]
      else {
        throw model.failure(
          "merges.\(rank)", expected: "two tokens of the vocabulary whose concatenation is a token", got: item)
      }
      merges[BytePairEncoder.key(Int32(leftID), Int32(rightID))] = BytePairEncoder.Merge(
        rank: Int32(rank), result: Int32(result))
    }
    return merges
  }

  private static func pair(_ item: JSONValue) -> ([UInt8], [UInt8])? {
    switch item {
    case .string(let text):
      let parts = Array(text.utf8).split(separator: UInt8(ascii: " "), omittingEmptySubsequences: false)
      return parts.count == 2 ? (Array(parts[0]), Array(parts[1])) : nil
    case .array(let items):
      guard items.count == 2, case .string(let left) = items[0], case .string(let right) = items[1] else { return nil }
      return (Array(left.utf8), Array(right.utf8))
    default: return nil
    }
  }

  /// Tokens of the vocabulary by the bytes they stand for.
  var wholeWords: [[UInt8]: Int32] {
    var result: [[UInt8]: Int32] = [:]
    result.reserveCapacity(vocabularyIDs.count)
    for id in vocabularyIDs {
      if let text = texts[id], let bytes = ByteAlphabet.decode(text) { result[bytes] = Int32(id) }
    }
    return result
  }

  /// What each id decodes to. A token with characters outside the byte alphabet (an added one) stands for itself.
  var decodedBytes: [[UInt8]?] {
    texts.map { text in text.map { ByteAlphabet.decode($0) ?? Array($0.utf8) } }
  }
}

extension SizeLimit {
  /// The highest id a vocabulary of `count` tokens may use.
  static func sparseIDs(count: Int) -> Int { min(tokenID.upperBound, 2 * count + 65_536) }
}
