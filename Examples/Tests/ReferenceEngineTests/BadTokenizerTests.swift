import Foundation
import KVCompression
import ReferenceEngine
import Testing

@Suite struct BadTokenizerTests {
  /// A byte-level tokenizer with three merges.
  static func json() throws -> [String: Any] {
    let data = Data(try Paths.bytes(Paths.referenceModel + "/tokenizer.json"))
    var root = try #require(JSONSerialization.jsonObject(with: data) as? [String: Any])
    var model = try #require(root["model"] as? [String: Any])
    let vocabulary = try #require(model["vocab"] as? [String: Int])
    model["vocab"] = vocabulary.filter { $0.value < 263 }
    let kept = Set(vocabulary.filter { $0.value < 263 }.keys)
    model["merges"] = try #require(model["merges"] as? [[String]]).filter {
      kept.contains($0[0]) && kept.contains($0[1]) && kept.contains($0[0] + $0[1])
    }
    root["model"] = model
    return root
  }

  private static func load(_ root: [String: Any]) throws -> Tokenizer {
    try Tokenizer(json: Array(JSONSerialization.data(withJSONObject: root)), file: "tokenizer.json")
  }

  private static func change(_ root: inout [String: Any], _ path: [String], to value: Any?) {
    guard path.count > 1 else {
      root[path[0]] = value
      return
    }
    var inner = root[path[0]] as? [String: Any] ?? [:]
    change(&inner, Array(path.dropFirst()), to: value)
    root[path[0]] = inner
  }

  struct Mutation: Sendable {
    let path: [String]
    /// JSON text; empty removes the key.
    let value: String
    let code: KVError.Code
  }

  static let mutations: [Mutation] = [
    Mutation(path: ["model"], value: "", code: .corruptFile),
    Mutation(path: ["model"], value: "[]", code: .corruptFile),
    Mutation(path: ["model", "type"], value: "\"Unigram\"", code: .unsupported),
    Mutation(path: ["model", "byte_fallback"], value: "true", code: .unsupported),
    Mutation(path: ["model", "dropout"], value: "0.1", code: .unsupported),
    Mutation(path: ["model", "continuing_subword_prefix"], value: "\"##\"", code: .unsupported),
    Mutation(path: ["model", "ignore_merges"], value: "3", code: .corruptFile),
    Mutation(path: ["model", "vocab"], value: "", code: .corruptFile),
    Mutation(path: ["model", "vocab"], value: "{}", code: .unsupported),
    Mutation(path: ["model", "vocab", "a"], value: "", code: .unsupported),
    Mutation(path: ["model", "vocab", "a"], value: "\"67\"", code: .corruptFile),
    Mutation(path: ["model", "vocab", "a"], value: "-1", code: .corruptFile),
    Mutation(path: ["model", "vocab", "a"], value: "68", code: .corruptFile),
    Mutation(path: ["model", "vocab", "a"], value: "9000000000", code: .corruptFile),
    Mutation(path: ["model", "vocab", "a"], value: "1.5", code: .corruptFile),
    Mutation(path: ["model", "merges"], value: "", code: .corruptFile),
    Mutation(path: ["model", "merges"], value: "[\"a\"]", code: .corruptFile),
    Mutation(path: ["model", "merges"], value: "[\"a b c\"]", code: .corruptFile),
    Mutation(path: ["model", "merges"], value: "[[\"a\"]]", code: .corruptFile),
    Mutation(path: ["model", "merges"], value: "[3]", code: .corruptFile),
    Mutation(path: ["model", "merges"], value: "[\"a nothing\"]", code: .corruptFile),
    Mutation(path: ["model", "merges"], value: "[\"a q\"]", code: .corruptFile),
    Mutation(path: ["model", "merges"], value: "[[\"a\",\"\"]]", code: .corruptFile),
    Mutation(path: ["added_tokens"], value: "{}", code: .corruptFile),
    Mutation(path: ["added_tokens"], value: "[5]", code: .corruptFile),
    Mutation(path: ["added_tokens"], value: "[{\"id\":0}]", code: .corruptFile),
    Mutation(path: ["added_tokens"], value: "[{\"id\":-4,\"content\":\"x\"}]", code: .corruptFile),
    Mutation(path: ["added_tokens"], value: "[{\"id\":67,\"content\":\"<z>\"}]", code: .corruptFile),
    Mutation(path: ["added_tokens"], value: "[{\"id\":5,\"content\":\"<|bos|>\"}]", code: .corruptFile),
    Mutation(path: ["added_tokens"], value: "[{\"id\":300,\"content\":\"\"}]", code: .corruptFile),
    Mutation(path: ["added_tokens"], value: "[{\"id\":16000000,\"content\":\"x y\"}]", code: .corruptFile),
    Mutation(
      path: ["added_tokens"], value: "[{\"id\":0,\"content\":\"<|bos|>\",\"single_word\":true}]", code: .unsupported),
    Mutation(path: ["pre_tokenizer"], value: "", code: .corruptFile),
    Mutation(path: ["pre_tokenizer"], value: "{\"type\":\"Whitespace\"}", code: .unsupported),
    Mutation(path: ["pre_tokenizer"], value: "{\"type\":\"Sequence\",\"pretokenizers\":[]}", code: .unsupported),
    Mutation(path: ["pre_tokenizer"], value: "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a+\"}}", code: .unsupported),
    Mutation(path: ["pre_tokenizer"], value: "{\"type\":\"Split\",\"pattern\":{\"String\":\" \"}}", code: .unsupported),
    Mutation(path: ["normalizer"], value: "{\"type\":\"Lowercase\"}", code: .unsupported),
    Mutation(path: ["decoder"], value: "{\"type\":\"Metaspace\"}", code: .unsupported),
    Mutation(path: ["post_processor"], value: "{\"type\":\"BertProcessing\"}", code: .unsupported),
    Mutation(path: ["post_processor"], value: "{\"type\":\"TemplateProcessing\",\"single\":[]}", code: .corruptFile),
    Mutation(
      path: ["post_processor"],
      value: "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{\"Sequence\":{}}]}",
      code: .corruptFile),
  ]

  @Test func theUnchangedFileLoads() throws {
    #expect(try Self.load(Self.json()).encode("a") == [67])
  }

  @Test(arguments: mutations.indices)
  func mutation(_ index: Int) throws {
    let item = Self.mutations[index]
    var root = try Self.json()
    let value =
      item.value.isEmpty
      ? nil : try JSONSerialization.jsonObject(with: Data(item.value.utf8), options: .fragmentsAllowed)
    Self.change(&root, item.path, to: value)
    let error = try #require(throws: KVError.self) { try Self.load(root) }
    #expect(error.code == item.code, "\(error)")
    #expect(error.message.contains("tokenizer.json"))
  }

  @Test func duplicateKeysAreErrors() throws {
    let text = String(decoding: try JSONSerialization.data(withJSONObject: Self.json()), as: UTF8.self)
    let twice = text.replacingOccurrences(of: "\"vocab\":{", with: "\"vocab\":{\"a\":67,")
    #expect(throws: KVError.self) { try Tokenizer(json: Array(twice.utf8), file: "t") }
  }
}
