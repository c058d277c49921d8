import KVCompression

/// Reads the `pre_tokenizer` part of a tokenizer file.
enum PreTokenizerReader {
  private static let supported = "Sequence, Digits, ByteLevel and Split with the GPT-2, Llama 3 or Qwen2 pattern"

  static func read(_ json: JSONObject) throws(KVError) -> PreTokenizer {
    guard let object = try json.optionalObject("pre_tokenizer") else {
      throw json.failure("pre_tokenizer", expected: "an object (\(supported))", got: nil)
    }
    var result = PreTokenizer(steps: [], addsPrefixSpace: false)
    var sawByteLevel = false
    let parts = try steps(object)
    for part in parts {
      // ByteLevel turns text into its byte alphabet: a step after it would see letters that are not there.
      guard !sawByteLevel else { throw part.unsupported("type", "a step after ByteLevel", supported: "it as the last") }
      switch try part.string("type") {
      case "Digits":
        result.steps.append(try part.bool("individual_digits", default: false) ? .singleDigits : .digitRuns)
      case "Split": result.steps.append(.words(try splitter(part)))
      case "ByteLevel":
        sawByteLevel = true
        try readByteLevel(part, into: &result)
      case let type: throw part.unsupported("type", "\"\(JSONValue.shortened(type))\"", supported: supported)
      }
    }
    guard sawByteLevel else {
      throw json.unsupported("pre_tokenizer", "without ByteLevel", supported: "byte-level BPE")
    }
    return result
  }

  private static func steps(_ object: JSONObject) throws(KVError) -> [JSONObject] {
    guard try object.string("type") == "Sequence" else { return [object] }
    guard let list = try object.optionalArray("pretokenizers") else {
      throw object.failure("pretokenizers", expected: "a list", got: nil)
    }
    var steps: [JSONObject] = []
    for (index, item) in list.enumerated() {
      steps.append(try JSONObject(item, file: object.file, path: "\(object.path).pretokenizers.\(index)"))
    }
    return steps
  }

  private static func readByteLevel(_ part: JSONObject, into result: inout PreTokenizer) throws(KVError) {
    let usesRegex = try part.bool("use_regex", default: true)
    result.addsPrefixSpace = try part.bool("add_prefix_space", default: true)
    if usesRegex { result.steps.append(.words(WordSplitter(.gpt2))) }
    guard !result.addsPrefixSpace || usesRegex else {
      throw part.unsupported("add_prefix_space", "true without use_regex", supported: "false there")
    }
  }

  private static func splitter(_ part: JSONObject) throws(KVError) -> WordSplitter {
    let pattern = try part.object("pattern")
    guard let regex = try pattern.optionalString("Regex") else {
      throw part.unsupported("pattern", "not a Regex", supported: "the GPT-2, Llama 3 and Qwen2 patterns")
    }
    guard let splitter = WordSplitter(regex: regex) else {
      throw pattern.unsupported("Regex", "\"\(regex)\"", supported: "the GPT-2, Llama 3 and Qwen2 patterns")
    }
    // The patterns match every character, so keeping the matches and keeping what an inverted split leaves are one.
    let behavior = try part.optionalString("behavior") ?? "Isolated"
    let inverted = try part.bool("invert", default: false)
    guard (behavior == "Isolated" && !inverted) || (behavior == "Removed" && inverted) else {
      throw part.unsupported(
        "behavior", "\"\(JSONValue.shortened(behavior))\" with invert \(inverted)",
        supported: "Isolated, and Removed with invert")
    }
    return splitter
  }
}

/// Reads what the `post_processor` puts around a single sequence.
enum TemplateReader {
  static func read(
    _ json: JSONObject, tokens: [[UInt8]?]
  ) throws(KVError) -> (prefix: [Int], suffix: [Int])? {
    guard let object = try json.optionalObject("post_processor") else { return nil }
    switch try object.string("type") {
    case "ByteLevel": return nil
    case "TemplateProcessing": return try template(object, tokens: tokens)
    case "Sequence":
      var result: (prefix: [Int], suffix: [Int])?
      for (index, item) in (try object.optionalArray("processors") ?? []).enumerated() {
        let part = try JSONObject(item, file: json.file, path: "post_processor.processors.\(index)")
        switch try part.string("type") {
        case "ByteLevel": continue
        case "TemplateProcessing": result = try template(part, tokens: tokens)
        case let type:
          throw part.unsupported(
            "type", "\"\(JSONValue.shortened(type))\"", supported: "ByteLevel and TemplateProcessing")
        }
      }
      return result
    case let type:
      throw object.unsupported(
        "type", "\"\(JSONValue.shortened(type))\"", supported: "ByteLevel, TemplateProcessing and Sequence")
    }
  }

  private static func template(
    _ object: JSONObject, tokens: [[UInt8]?]
  ) throws(KVError) -> (prefix: [Int], suffix: [Int]) {
    guard let single = try object.optionalArray("single") else {
      throw object.failure("single", expected: "a list", got: nil)
    }
    let special = try object.optionalObject("special_tokens")
    var prefix: [Int] = []
    var suffix: [Int] = []
    var sequences = 0
    for (index, item) in single.enumerated() {
      let part = try JSONObject(item, file: object.file, path: "\(object.path).single.\(index)")
      if try part.optionalObject("Sequence") != nil {
        sequences += 1
        continue
      }
      let name = try part.object("SpecialToken").string("id")
      guard let ids = try special?.optionalObject(name)?.integerOrList("ids", in: SizeLimit.tokenID), !ids.isEmpty
      else {
        throw object.failure(
          "special_tokens", expected: "ids of \"\(JSONValue.shortened(name))\"", got: nil)
      }
      for id in ids where !tokens.indices.contains(id) || tokens[id] == nil {
        throw object.failure("special_tokens", expected: "ids of known tokens", got: .integer(id))
      }
      if sequences == 0 { prefix += ids } else { suffix += ids }
    }
    guard sequences == 1 else {
      throw object.failure("single", expected: "a list with one Sequence", got: .array(single))
    }
    return (prefix, suffix)
  }
}
