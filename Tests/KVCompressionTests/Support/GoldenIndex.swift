import Foundation
import KVCompression
import KVExperiments
import Testing

/// A JSON value of the golden index.
enum JSONNode: Decodable, Sendable {
  case object([String: JSONNode])
  case array([JSONNode])
  case number(Double)
  case text(String)
  case bool(Bool)
  case null

  init(from decoder: any Decoder) throws {
    let value = try decoder.singleValueContainer()
    if value.decodeNil() {
      self = .null
    } else if let bool = try? value.decode(Bool.self) {
      self = .bool(bool)
    } else if let number = try? value.decode(Double.self) {
      self = .number(number)
    } else if let text = try? value.decode(String.self) {
      self = .text(text)
    } else if let array = try? value.decode([JSONNode].self) {
      self = .array(array)
    } else {
      self = .object(try value.decode([String: JSONNode].self))
    }
  }

  subscript(key: String) -> JSONNode? {
    if case .object(let fields) = self { fields[key] } else { nil }
  }

  var double: Double? { if case .number(let number) = self { number } else { nil } }
  var int: Int? { double.flatMap { Int(exactly: $0) } }
  var string: String? { if case .text(let text) = self { text } else { nil } }
  var flag: Bool? { if case .bool(let flag) = self { flag } else { nil } }

  /// All numbers, depth first. Empty when anything else is among them.
  var numbers: [Double] {
    switch self {
    case .number(let number): [number]
    case .array(let nodes): nodes.flatMap(\.numbers)
    default: []
    }
  }
}

/// One golden: what a public implementation gave for a method's parameters and an input.
struct GoldenEntry: Decodable, Sendable {
  struct Output: Decodable, Sendable {
    let file: String?
    let tensor: String?
    let shape: [Int]?
    let value: JSONNode?
    let compare: [String: JSONNode]

    var rule: String { compare["rule"]?.string ?? "" }
    func number(_ name: String) -> Double? { compare[name]?.double }
  }

  let name: String
  let parameters: JSONNode?
  let outputs: [String: Output]
  let input: JSONNode?
  let notes: String?

  /// A parameter that must be there.
  func int(_ name: String) throws -> Int {
    try #require(parameters?[name]?.int, "\(self.name) has no number \(name)")
  }

  func text(_ name: String) throws -> String {
    try #require(parameters?[name]?.string, "\(self.name) has no text \(name)")
  }
}

/// Numbers of the index or of a tensor; integers are exact in f64.
struct GoldenTensor: Sendable {
  var shape: [Int]
  var numbers: [Double]
  /// How many numbers one index of axis 0 covers.
  var stride: Int { shape.dropFirst().reduce(1, *) }
}

/// What `Goldens/` holds.
enum Goldens {
  static let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .appendingPathComponent("Goldens")

  struct Index: Decodable, Sendable {
    let model: JSONNode
    let outputProbes: Int
    let entries: [GoldenEntry]
  }

  static let index: Result<Index, any Error> = Result {
    try JSONDecoder().decode(Index.self, from: Data(contentsOf: folder.appendingPathComponent("index.json")))
  }

  private static let files: [String: Result<SafeTensorsFile, any Error>] = {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
    var files: [String: Result<SafeTensorsFile, any Error>] = [:]
    for name in names where name.hasSuffix(".safetensors") {
      files[name] = Result { try SafeTensorsFile(path: folder.appendingPathComponent(name).path) }
    }
    return files
  }()

  /// Names of the entries that begin with any of `prefixes`. Empty when the index cannot be read; `GoldenIndexTests`
  /// says so.
  static func names(_ prefixes: String...) -> [String] {
    let entries = (try? index.get().entries) ?? []
    return entries.map(\.name).filter { name in prefixes.contains { name.hasPrefix($0) } }
  }

  static func entry(_ name: String) throws -> GoldenEntry {
    try #require(try index.get().entries.first { $0.name == name }, "no golden is called \(name)")
  }

  static func file(_ name: String) throws -> SafeTensorsFile {
    try #require(files[name], "\(name) is not among the goldens").get()
  }

  /// The reference numbers of an output.
  static func reference(_ entry: GoldenEntry, _ output: String) throws -> GoldenTensor {
    let output = try #require(entry.outputs[output], "\(entry.name) has no output \(output)")
    guard let name = output.file, let tensor = output.tensor else {
      let numbers = try #require(output.value, "\(entry.name): neither tensor nor value").numbers
      return GoldenTensor(shape: [numbers.count], numbers: numbers)
    }
    let file = try file(name)
    let found = try file.entry(named: tensor, shape: output.shape)
    let isFloat = [.f64, .f32, .f16, .bf16].contains(found.type)
    let numbers =
      isFloat ? try file.floats(named: tensor).map { Double($0) } : try file.int32s(named: tensor).map { Double($0) }
    return GoldenTensor(shape: found.shape, numbers: numbers)
  }

  /// Positions of an output, one list per row of its last axis, padding removed.
  static func positions(_ entry: GoldenEntry, _ output: String) throws -> [[Int]] {
    let tensor = try reference(entry, output)
    let width = max(tensor.shape.last ?? 1, 1)
    return stride(from: 0, to: tensor.numbers.count, by: width).map { start in
      tensor.numbers[start..<start + width].filter { $0 >= 0 }.map { Int($0) }
    }
  }
}

/// What the reference model put into a layer's cache, and the next tokens of the same text.
struct GoldenInput: Sendable {
  /// Prompt tokens.
  let tokens: Int
  /// [kvHeads, tokens, d].
  let keys: HeadTensor
  let values: HeadTensor
  /// [queryHeads, n, d] of the last n prompt tokens: all of them in text a, 64 in text b.
  let queries: HeadTensor
  let probeKeys: HeadTensor
  let probeValues: HeadTensor
  let probeQueries: HeadTensor
  /// Absent in text b.
  let probeQueriesBeforeRotation: HeadTensor?
  /// [queryHeads][tokens]: attention every token received from all prompt queries.
  let columnSums: [[Float]]

  /// The input of an entry of one layer.
  init(_ entry: GoldenEntry) throws {
    let file = try Goldens.file(try #require(entry.input?["file"]?.string, "\(entry.name) has no input file"))
    let layer = try #require(entry.input?["layer"]?.int, "\(entry.name) is not of one layer")
    func tensor(_ name: String) throws -> HeadTensor {
      let name = "layers.\(layer).\(name)"
      let shape = try file.entry(named: name).shape
      return try HeadTensor(heads: shape[0], tokens: shape[1], dim: shape[2], elements: file.floats(named: name))
    }
    let all = try tensor("keys")
    tokens = entry.input?["tokens"]?.int ?? all.tokens
    let tokens = tokens
    keys = try all.slice(tokens: 0..<tokens)
    values = try tensor("values").slice(tokens: 0..<tokens)
    let queries = try tensor("queries")
    self.queries = try queries.slice(tokens: 0..<max(0, queries.tokens - (all.tokens - tokens)))
    probeKeys = try tensor("probe_keys")
    probeValues = try tensor("probe_values")
    probeQueries = try tensor("probe_queries")
    let before = "layers.\(layer).probe_queries_pre_rope"
    probeQueriesBeforeRotation = file.tensors[before] == nil ? nil : try tensor("probe_queries_pre_rope")
    let sums = try file.floats(named: "layers.\(layer).column_sums")
    columnSums = stride(from: 0, to: sums.count, by: all.tokens).map { Array(sums[$0..<$0 + tokens]) }
  }

  var hasAllQueries: Bool { queries.tokens == tokens }
  /// The first probes, as many as the `output` of an entry covers.
  func outputProbes() throws -> HeadTensor { try probeQueries.slice(tokens: 0..<Goldens.index.get().outputProbes) }
}

extension HeadTensor {
  /// Every head `count` times in a row: what official code without grouped attention caches.
  func repeatingHeads(_ count: Int) throws -> HeadTensor {
    var copy: [Float] = []
    for head in 0..<heads {
      for _ in 0..<count { copy += elements[head * tokens * dim..<(head + 1) * tokens * dim] }
    }
    return try HeadTensor(heads: heads * count, tokens: tokens, dim: dim, elements: copy)
  }

  /// The heads of `range` only.
  func slice(heads range: Range<Int>) throws -> HeadTensor {
    try HeadTensor(
      heads: range.count, tokens: tokens, dim: dim,
      elements: Array(elements[range.lowerBound * tokens * dim..<range.upperBound * tokens * dim]))
  }

  /// Tokens of one head, in the order given.
  func gather(head: Int, tokens wanted: [Int]) throws -> HeadTensor {
    try HeadTensor(
      heads: 1, tokens: wanted.count, dim: dim, elements: wanted.flatMap { Array(row(head: head, token: $0)) })
  }
}
