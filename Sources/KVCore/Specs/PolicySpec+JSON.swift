extension PolicySpec {
  /// The JSON twin of a policy text: an object with `stages`, an array of stages, or a string with a policy text.
  ///
  /// - Throws: `syntax`; the offset is the byte for malformed JSON, and missing where the JSON is well-formed but is no
  ///   policy (the message then names the stage and the option).
  public init(json text: String) throws(KVError) {
    let count = text.utf8.count
    guard count <= PolicySpec.maximumLength else {
      throw KVError(
        .syntax, "the JSON of a policy has at most \(PolicySpec.maximumLength) bytes; got \(count)",
        offset: PolicySpec.maximumLength)
    }
    try self.init(try JSONValue(parsing: text))
  }

  package init(_ json: JSONValue) throws(KVError) {
    switch json {
    case .string(let text): try self.init(parsing: text)
    case .array(let items): try self.init(items)
    case .object(let members):
      for member in members where member.key != "stages" {
        throw KVError(
          .syntax, "expected \"stages\" as the only key of a policy, found \(TextScanner.quoted(member.key))")
      }
      guard case .array(let items)? = json["stages"] else {
        throw KVError(
          .syntax, "expected \"stages\" with an array of stages, found \(json["stages"]?.kindName ?? "no such key")")
      }
      try self.init(items)
    default:
      throw KVError(.syntax, "expected a policy as an object, an array or a string, found \(json.kindName)")
    }
  }

  private init(_ items: [JSONValue]) throws(KVError) {
    if items.isEmpty { throw KVError(.syntax, "expected at least one stage in a policy, found none") }
    stages = []
    for (index, item) in items.enumerated() { stages.append(try StageSpec(item, place: "stage \(index)")) }
  }

  package var jsonValue: JSONValue {
    .object([JSONValue.Member("stages", .array(stages.map(\.jsonValue)))])
  }

  /// The long JSON form, compact. Parsing it gives an equal value.
  ///
  /// - Throws: `nonFinite` when an option holds a NaN or an infinity.
  public func json() throws(KVError) -> String { try jsonValue.text() }
}

extension StageSpec {
  init(_ json: JSONValue, place: String) throws(KVError) {
    guard case .object(let members) = json else {
      throw KVError(.syntax, "\(place): expected an object with \"name\" and \"options\", found \(json.kindName)")
    }
    for member in members where member.key != "name" && member.key != "options" {
      throw KVError(
        .syntax, "\(place): expected the keys \"name\" and \"options\", found \(TextScanner.quoted(member.key))")
    }
    guard case .string(let given)? = json["name"] else {
      throw KVError(
        .syntax, "\(place): expected \"name\" with a string, found \(json["name"]?.kindName ?? "no such key")")
    }
    name = try StageSpec.checked(given, place: place)
    options = []
    offset = nil
    switch json["options"] {
    case nil: break
    case .object(let members)?:
      for member in members {
        let name = try StageSpec.checked(member.key, place: "\(place) (\(name))")
        // Keys that differ in case only are one option.
        if options.contains(where: { $0.name == name }) {
          throw KVError(.syntax, "\(place) (\(self.name)): the option \"\(name)\" is given twice")
        }
        options.append(
          SpecOption(name, try SpecValue(member.value, depth: 0, place: "\(place) (\(self.name)), option \"\(name)\"")))
      }
    case let other?:
      throw KVError(.syntax, "\(place) (\(name)): expected \"options\" with an object, found \(other.kindName)")
    }
  }

  private static func checked(_ text: String, place: String) throws(KVError) -> String {
    guard let first = text.utf8.first, SpecParser.isLetter(first), text.utf8.allSatisfy(SpecParser.isNameByte) else {
      throw KVError(
        .syntax,
        "\(place): expected a name (a letter, then letters, digits, '_' and '-'), found \(TextScanner.quoted(text))")
    }
    return text.lowercased()
  }

  var jsonValue: JSONValue {
    var members = [JSONValue.Member("name", .string(name))]
    if !options.isEmpty {
      members.append(JSONValue.Member("options", .object(options.map { .init($0.name, $0.value.jsonValue) })))
    }
    return .object(members)
  }
}

extension SpecValue {
  init(_ json: JSONValue, depth: Int, place: String) throws(KVError) {
    switch json {
    case .bool(let value): self = .bool(value)
    case .integer(let value): self = .integer(value)
    case .number(let value): self = .decimal(value)
    case .string(let value): self = .text(value)
    case .array(let items):
      if depth == 3 { throw KVError(.syntax, "\(place): lists nest twice, as in [[[1,2],[3]]]; this one is deeper") }
      var values: [SpecValue] = []
      for item in items { values.append(try SpecValue(item, depth: depth + 1, place: place)) }
      self = .list(values)
    case .null, .object:
      throw KVError(.syntax, "\(place): expected a number, a boolean, a string or an array, found \(json.kindName)")
    }
  }

  /// Percentages and byte sizes become the strings that parse to them.
  var jsonValue: JSONValue {
    switch kind {
    case .integer(let value): .integer(value)
    case .decimal(let value): .number(value)
    case .percent, .bytes: .string(description)
    case .bool(let value): .bool(value)
    case .text(let value): .string(value)
    case .list(let values): .array(values.map(\.jsonValue))
    }
  }
}
