import Foundation
import KVCompression
import ReferenceEngine
import Testing

struct TokenCase: Decodable {
  let text: String
  let ids: [Int]
  let decoded: String
}

@Suite struct TokenizerTests {
  private struct Index: Decodable {
    struct Entries: Decodable { let tokenizer: Entry }
    struct Entry: Decodable { let outputs: Outputs }
    struct Outputs: Decodable { let cases: Cases }
    struct Cases: Decodable { let value: [TokenCase] }
    let entries: Entries
  }

  @Test func goldenCases() throws {
    let tokenizer = try Reference.engine.tokenizer
    let data = try Data(contentsOf: URL(fileURLWithPath: Paths.goldens + "/index.json"))
    let cases = try JSONDecoder().decode(Index.self, from: data).entries.tokenizer.outputs.cases.value
    #expect(cases.count == 15)
    for item in cases {
      #expect(tokenizer.encode(item.text) == item.ids, "\(item.text.debugDescription)")
      #expect(tokenizer.decode(item.ids) == item.decoded)
    }
  }

  /// Four small tokenizers trained and run by HuggingFace `tokenizers` 0.23.3, with the GPT-2, Llama 3 and Qwen2
  /// patterns, both forms of merges, NFC, prefix space and ignore_merges.
  @Test(arguments: ["gpt2", "gpt2prefix", "llama3", "qwen2"])
  func splitters(_ name: String) throws {
    let path = Paths.goldens + "/splitters.json"
    let root = try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: path)))
    let part = try #require((root as? [String: [String: Any]])?[name])
    let json = try JSONSerialization.data(withJSONObject: try #require(part["tokenizer"]))
    let tokenizer = try Tokenizer(json: Array(json), file: name)
    let cases = try JSONDecoder().decode(
      [TokenCase].self, from: JSONSerialization.data(withJSONObject: try #require(part["cases"])))
    #expect(cases.count >= 100)
    for item in cases {
      #expect(tokenizer.encode(item.text) == item.ids, "\(item.text.debugDescription)")
      #expect(sameUTF8(tokenizer.decode(item.ids), item.decoded), "\(item.text.debugDescription)")
    }
  }

  private func sameUTF8(_ a: String, _ b: String) -> Bool { Array(a.utf8) == Array(b.utf8) }

  @Test func everyTextComesBack() throws {
    let tokenizer = try Reference.engine.tokenizer
    let alphabet: [Unicode.Scalar] = [
      "a", "Z", " ", "\n", "\t", "7", "é", "\u{301}", "日", "😀", "'", "\u{A0}", "<", "|",
    ]
    var random = SplitMix64(seed: 3)
    for _ in 0..<500 {
      var text = String.UnicodeScalarView()
      for _ in 0..<Int.random(in: 0...40, using: &random) { text.append(alphabet.randomElement(using: &random) ?? "a") }
      let string = String(text)
      let ids = tokenizer.encode(string)
      #expect(sameUTF8(tokenizer.decode(ids), string))
      var decoder = StreamingDecoder(tokenizer)
      let streamed = ids.map { decoder.append($0) }.joined() + decoder.finish()
      #expect(sameUTF8(streamed, string))
    }
  }

  @Test func brokenUTF8IsRepaired() throws {
    let tokenizer = try Reference.engine.tokenizer
    let ids = tokenizer.encode("日")
    #expect(ids.count >= 2)
    #expect(tokenizer.decode(ids.dropLast()).unicodeScalars.contains("\u{FFFD}"))
    #expect(tokenizer.decode([999_999, -1]) == "")
    #expect(tokenizer.decode([0, 67, 1], skippingSpecial: true) == "a")
  }

  /// A word of many equal letters must not take quadratic time.
  @Test(.timeLimit(.minutes(1))) func longWords() throws {
    let tokenizer = try Reference.engine.tokenizer
    let text = String(repeating: "ab", count: 200_000)
    #expect(tokenizer.decode(tokenizer.encode(text)) == text)
  }

  @Test func templateAddsTokens() throws {
    var root = try #require(
      JSONSerialization.jsonObject(with: Data(Paths.bytes(Paths.referenceModel + "/tokenizer.json"))) as? [String: Any])
    root["post_processor"] = [
      "type": "Sequence",
      "processors": [
        ["type": "ByteLevel"],
        [
          "type": "TemplateProcessing",
          "single": [
            ["SpecialToken": ["id": "<|bos|>", "type_id": 0]], ["Sequence": ["id": "A", "type_id": 0]],
            ["SpecialToken": ["id": "<|eos|>", "type_id": 0]],
          ],
          "special_tokens": [
            "<|bos|>": ["id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]],
            "<|eos|>": ["id": "<|eos|>", "ids": [1], "tokens": ["<|eos|>"]],
          ],
        ],
      ],
    ]
    let tokenizer = try Tokenizer(json: Array(JSONSerialization.data(withJSONObject: root)), file: "t")
    #expect(tokenizer.encode("a", addingTemplate: true) == [0, 67, 1])
    #expect(tokenizer.encode("a") == [67])
  }
}
