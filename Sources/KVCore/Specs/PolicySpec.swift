/// A policy as text: named stages with options, before anything knows what the names mean.
///
/// ```
/// snapkv(budget=0.25,window=32)+kivi(bits=2)
/// ```
///
/// Grammar. Spaces, tabs and line ends may stand between any two tokens.
///
/// ```
/// policy   = stage *("+" stage)
/// stage    = name ["(" [option *("," option)] ")"]
/// option   = name "=" value
/// value    = number | percent | size | "true" | "false" | name | string | list
/// list     = "[" [value *("," value)] "]"                lists nest twice: [[[1,2],[3]]]
/// name     = letter *(letter | digit | "_" | "-")        any case; kept in lower case
/// number   = ["-"] ("0" | nonzero *digit) ["." 1*digit] [("e" | "E") ["+" | "-"] 1*digit]
/// percent  = number "%"                                  25% is 0.25
/// size     = number unit                                 64MiB, 1.5GB; a whole number of bytes
/// unit     = B | KB | MB | GB | TB | KiB | MiB | GiB | TiB   any case; KB is 1000, KiB 1024
/// string   = a JSON string; one that reads as a percent or a size is that value
/// ```
///
/// Trailing commas, options given twice, texts above 64 KiB and lists nested deeper are errors that name the byte.
/// ``description`` prints the canonical text, and parsing that gives an equal value. The twin in JSON:
///
/// ```
/// {"stages":[{"name":"snapkv","options":{"budget":0.25,"window":32}},{"name":"kivi","options":{"bits":2}}]}
/// ```
///
/// or the array alone, or a JSON string that holds a policy text.
public struct PolicySpec: Hashable, Sendable {
  public var stages: [StageSpec]

  public init(stages: [StageSpec]) { self.stages = stages }

  /// Longest text that is parsed, in bytes.
  public static let maximumLength = 65_536

  /// - Throws: `syntax`, with the byte where it stopped, what was expected and what came.
  /// - Complexity: O(bytes).
  public init(parsing text: String) throws(KVError) {
    var parser = try SpecParser(text)
    self = try parser.policy()
  }

  /// A policy text or its JSON twin, whichever the first character says.
  public init(configuration text: String) throws(KVError) {
    var scanner = TextScanner(Array(text.utf8.prefix(PolicySpec.maximumLength)))
    scanner.skipSpace()
    switch scanner.current {
    case 0x7B, 0x5B, 0x22: try self.init(json: text)
    default: try self.init(parsing: text)
    }
  }
}

extension PolicySpec: CustomStringConvertible {
  public var description: String { stages.map(\.description).joined(separator: "+") }
}

/// One stage of a policy text: a name and its options.
public struct StageSpec: Sendable {
  /// Lower case.
  public var name: String
  public var options: [SpecOption]
  /// Byte where the stage starts in the text it came from. No part of its value.
  public var offset: Int?

  public init(name: String, options: [SpecOption] = [], offset: Int? = nil) {
    self.name = name
    self.options = options
    self.offset = offset
  }
}

extension StageSpec: Hashable, CustomStringConvertible {
  public static func == (left: StageSpec, right: StageSpec) -> Bool {
    left.name == right.name && left.options == right.options
  }

  public func hash(into hasher: inout Hasher) {
    hasher.combine(name)
    hasher.combine(options)
  }

  public var description: String {
    options.isEmpty ? name : "\(name)(\(options.map(\.description).joined(separator: ",")))"
  }
}

/// One option of a stage: `window=32`.
public struct SpecOption: Sendable {
  /// Lower case.
  public var name: String
  public var value: SpecValue
  /// Byte where the value starts in the text it came from. No part of its value.
  public var offset: Int?

  public init(_ name: String, _ value: SpecValue, offset: Int? = nil) {
    self.name = name
    self.value = value
    self.offset = offset
  }
}

extension SpecOption: Hashable, CustomStringConvertible {
  public static func == (left: SpecOption, right: SpecOption) -> Bool {
    left.name == right.name && left.value == right.value
  }

  public func hash(into hasher: inout Hasher) {
    hasher.combine(name)
    hasher.combine(value)
  }

  public var description: String { "\(name)=\(value)" }
}
