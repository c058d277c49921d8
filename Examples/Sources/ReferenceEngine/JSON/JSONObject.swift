import KVCompression

/// An object of a JSON file, read key by key; every error names the file, the key, what was expected and what came.
///
/// A member that is `null` counts as absent, as HuggingFace's configuration classes treat it.
struct JSONObject: Sendable {
  let file: String
  /// Keys from the root to this object, for messages.
  let path: String
  let members: [JSONMember]

  init(_ value: JSONValue, file: String, path: String = "") throws(KVError) {
    guard case .object(let members) = value else {
      let place = path.isEmpty ? "the file" : path
      throw KVError(.corruptFile, "\(file): \(place) must be an object; got \(value.summary)")
    }
    self.file = file
    self.path = path
    self.members = members
  }

  func fullKey(_ key: String) -> String { path.isEmpty ? "\"\(key)\"" : "\"\(path).\(key)\"" }

  func failure(_ key: String, expected: String, got value: JSONValue?) -> KVError {
    KVError(.corruptFile, "\(file): \(fullKey(key)) must be \(expected); got \(value?.summary ?? "nothing")")
  }

  func unsupported(_ key: String, _ value: String, supported: String) -> KVError {
    KVError(
      .unsupported,
      "\(file): \(fullKey(key)) is \(JSONValue.shortened(value)); this engine supports \(supported)")
  }

  /// Nil when absent or null. A key that stands twice is an error: two programs would read two models.
  func value(_ key: String) throws(KVError) -> JSONValue? {
    var found: JSONValue?
    var count = 0
    for member in members where sameBytes(member.key, key) {
      found = member.value
      count += 1
    }
    guard count <= 1 else { throw KVError(.corruptFile, "\(file): \(fullKey(key)) stands \(count) times") }
    if case .null? = found { return nil }
    return found
  }

  func optionalInteger(_ key: String, in range: ClosedRange<Int>) throws(KVError) -> Int? {
    guard let value = try value(key) else { return nil }
    guard case .integer(let integer) = value, range.contains(integer) else {
      throw failure(key, expected: "an integer in \(range.lowerBound)...\(range.upperBound)", got: value)
    }
    return integer
  }

  func integer(_ key: String, in range: ClosedRange<Int>) throws(KVError) -> Int {
    guard let integer = try optionalInteger(key, in: range) else {
      throw failure(key, expected: "an integer in \(range.lowerBound)...\(range.upperBound)", got: nil)
    }
    return integer
  }

  func optionalNumber(_ key: String, in range: ClosedRange<Double>) throws(KVError) -> Double? {
    guard let value = try value(key) else { return nil }
    let number: Double
    switch value {
    case .integer(let integer): number = Double(integer)
    case .number(let double): number = double
    default: throw failure(key, expected: "a number in \(range.lowerBound)...\(range.upperBound)", got: value)
    }
    guard range.contains(number) else {
      throw failure(key, expected: "a number in \(range.lowerBound)...\(range.upperBound)", got: value)
    }
    return number
  }

  func number(_ key: String, in range: ClosedRange<Double>) throws(KVError) -> Double {
    guard let number = try optionalNumber(key, in: range) else {
      throw failure(key, expected: "a number in \(range.lowerBound)...\(range.upperBound)", got: nil)
    }
    return number
  }

  func bool(_ key: String, default standard: Bool) throws(KVError) -> Bool {
    guard let value = try value(key) else { return standard }
    guard case .bool(let bool) = value else { throw failure(key, expected: "true or false", got: value) }
    return bool
  }

  func optionalString(_ key: String) throws(KVError) -> String? {
    guard let value = try value(key) else { return nil }
    guard case .string(let string) = value else { throw failure(key, expected: "a string", got: value) }
    return string
  }

  func string(_ key: String) throws(KVError) -> String {
    guard let string = try optionalString(key) else { throw failure(key, expected: "a string", got: nil) }
    return string
  }

  func optionalArray(_ key: String) throws(KVError) -> [JSONValue]? {
    guard let value = try value(key) else { return nil }
    guard case .array(let array) = value else { throw failure(key, expected: "a list", got: value) }
    return array
  }

  func optionalObject(_ key: String) throws(KVError) -> JSONObject? {
    guard let value = try value(key) else { return nil }
    guard case .object = value else { throw failure(key, expected: "an object", got: value) }
    return try JSONObject(value, file: file, path: path.isEmpty ? key : "\(path).\(key)")
  }

  func object(_ key: String) throws(KVError) -> JSONObject {
    guard let object = try optionalObject(key) else { throw failure(key, expected: "an object", got: nil) }
    return object
  }

  /// One non-negative integer or a list of them, as `eos_token_id` comes.
  func integerOrList(_ key: String, in range: ClosedRange<Int>) throws(KVError) -> [Int] {
    let expected = "an integer in \(range.lowerBound)...\(range.upperBound) or a list of them"
    switch try value(key) {
    case nil: return []
    case .integer(let integer)? where range.contains(integer): return [integer]
    case .array(let items)?:
      var list: [Int] = []
      for item in items {
        guard case .integer(let integer) = item, range.contains(integer) else {
          throw failure(key, expected: expected, got: item)
        }
        list.append(integer)
      }
      return list
    case let other: throw failure(key, expected: expected, got: other)
    }
  }
}
