public import KVCompression

extension Tokenizer {
  /// Reads a `tokenizer.json`.
  ///
  /// - Throws: `inputOutput`; `corruptFile` for missing, malformed or contradicting parts; `unsupported` for a model,
  ///   pre-tokenizer or normalizer this engine lacks, naming it.
  public init(path: String) throws(KVError) {
    try self.init(FileReading.json(at: path, atMost: 1 << 28))
  }

  /// The same from the bytes of a file called `file` in messages.
  public init(json bytes: [UInt8], file: String) throws(KVError) {
    try self.init(JSONObject(JSONParser.parse(bytes, file: file), file: file))
  }

  init(_ json: JSONObject) throws(KVError) {
    let model = try json.object("model")
    try Self.checkModel(model)
    var table = try TokenTable(vocabulary: model.object("vocab"))
    let added = try table.add(json.optionalArray("added_tokens") ?? [], of: json)
    encoder = BytePairEncoder(byteTokens: try table.byteTokens(), merges: try table.merges(model))
    prefersWholeWords = try model.bool("ignore_merges", default: false)
    wholeWords = prefersWholeWords ? table.wholeWords : [:]
    bytesOfToken = table.decodedBytes
    idOfText = table.idOfText
    rawAdded = AddedTokenMatcher(added.raw)
    normalizedAdded = AddedTokenMatcher(added.normalized)
    specialIDs = Set((added.raw + added.normalized).filter(\.special).map(\.id))
    normalization = try Self.normalization(json)
    preTokenizer = try PreTokenizerReader.read(json)
    template = try TemplateReader.read(json, tokens: bytesOfToken)
    if let decoder = try json.optionalObject("decoder") {
      let type = try decoder.string("type")
      guard type == "ByteLevel" else {
        throw decoder.unsupported("type", "\"\(type)\"", supported: "ByteLevel")
      }
    }
  }

  private static func checkModel(_ model: JSONObject) throws(KVError) {
    // Very old files leave the type out; only BPE has merges.
    let type = try model.optionalString("type") ?? "BPE"
    guard type == "BPE" else { throw model.unsupported("type", "\"\(type)\"", supported: "BPE") }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
      if let text = try model.optionalString(key), !text.isEmpty {
        throw model.unsupported(key, "\"\(text)\"", supported: "byte-level BPE without it")
      }
    }
    if try model.bool("byte_fallback", default: false) {
      throw model.unsupported("byte_fallback", "true", supported: "byte-level BPE, which needs none")
    }
    if let dropout = try model.optionalNumber("dropout", in: 0...1), dropout > 0 {
      throw model.unsupported("dropout", "\(dropout)", supported: "0: equal texts give equal tokens")
    }
  }

  private static func normalization(_ json: JSONObject) throws(KVError) -> Normalization {
    guard let normalizer = try json.optionalObject("normalizer") else { return .none }
    let type = try normalizer.string("type")
    guard type == "Sequence" else {
      guard type == "NFC" else { throw normalizer.unsupported("type", "\"\(type)\"", supported: "NFC") }
      return .composed
    }
    var result = Normalization.none
    for (index, item) in (try normalizer.optionalArray("normalizers") ?? []).enumerated() {
      let step = try JSONObject(item, file: json.file, path: "normalizer.normalizers.\(index)")
      let type = try step.string("type")
      guard type == "NFC" else { throw step.unsupported("type", "\"\(type)\"", supported: "NFC") }
      result = .composed
    }
    return result
  }
}
