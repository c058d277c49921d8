import Foundation
import KVCompression
import ReferenceEngine
import Testing

/// Seeded random damage: whatever the bytes, loading either works or throws, and what loaded can be used.
@Suite struct FuzzTests {
  private static let inserted: [[UInt8]] =
    [
      "0", "-1", "999999999999", "1e999", "null", "\"\"", "[]", "{}", "true", ",", "}", "]", "\\u0000", "\u{120}",
    ].map { Array($0.utf8) } + [[0xFF], [0]]

  private static func damaged(_ bytes: [UInt8], _ random: inout SplitMix64) -> [UInt8] {
    var result = bytes
    for _ in 0..<Int.random(in: 1...3, using: &random) where !result.isEmpty {
      let at = Int.random(in: 0..<result.count, using: &random)
      switch Int.random(in: 0..<5, using: &random) {
      case 0: result[at] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      case 1: result.removeSubrange(at..<min(result.count, at + Int.random(in: 1...12, using: &random)))
      case 2: result.insert(contentsOf: inserted.randomElement(using: &random) ?? [], at: at)
      case 3: result.removeLast(result.count - at)
      default: result.insert(contentsOf: result[at..<min(result.count, at + 30)], at: at)
      }
    }
    return result
  }

  private static func run(
    _ bytes: [UInt8], seconds: Double, _ body: ([UInt8], inout SplitMix64) throws -> Void
  ) throws {
    var random = SplitMix64(seed: 77)
    let end = ContinuousClock.now + .seconds(seconds)
    var rounds = 0
    while rounds < 3000, ContinuousClock.now < end {
      rounds += 1
      do {
        try body(damaged(bytes, &random), &random)
      } catch is KVError {
        continue
      }
    }
    #expect(rounds > 10)
  }

  @Test func configuration() throws {
    let config = TinyModel(
      "qwen3", extra: ["rope_scaling": ["rope_type": "yarn", "factor": 4, "beta_fast": 32] as [String: Any]]
    ).config
    let bytes = Array(try JSONSerialization.data(withJSONObject: config, options: .sortedKeys))
    try Self.run(bytes, seconds: 3) { bytes, _ in
      let read = try ModelConfig(json: bytes, file: "config.json")
      #expect(read.shape.layers.count == read.layerCount)
    }
  }

  @Test func tokenizer() throws {
    let bytes = Array(
      try JSONSerialization.data(withJSONObject: BadTokenizerTests.json(), options: .sortedKeys))
    try Self.run(bytes, seconds: 5) { bytes, random in
      let read = try Tokenizer(json: bytes, file: "tokenizer.json")
      let ids = read.encode("Hello, <|bos|> world 42!\n")
      #expect(ids.allSatisfy { (0..<read.count).contains($0) })
      _ = read.decode((0..<20).map { _ in Int.random(in: -2...read.count + 2, using: &random) })
    }
  }
}
