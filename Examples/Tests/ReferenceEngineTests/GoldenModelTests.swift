import Foundation
import KVCompression
import KVExperiments
import ReferenceEngine
import Testing

/// The reference model against transformers' LlamaForCausalLM in f32.
@Suite struct GoldenModelTests {
  private struct Index: Decodable {
    struct Values<Value: Decodable>: Decodable { let value: Value }
    struct Compare: Decodable { let margins: [Float] }
    struct Greedy: Decodable {
      let value: [Int]
      let compare: Compare
    }
    struct ModelOutputs: Decodable {
      let argmax: Values<[Int]>
      let greedy: Greedy
    }
    struct Parameters: Decodable { let positions: [Int] }
    struct Model: Decodable {
      let parameters: Parameters
      let outputs: ModelOutputs
    }
    struct NLLOutputs: Decodable { let mean: Values<Float> }
    struct NLL: Decodable { let outputs: NLLOutputs }
    struct Entries: Decodable {
      let model: Model
      let nll: NLL
      enum CodingKeys: String, CodingKey {
        case model
        case nll = "model.nll"
      }
    }
    let entries: Entries
  }

  private let engine: Engine
  private let file: SafeTensorsFile
  private let index: Index

  init() throws {
    engine = try Reference.engine
    file = try SafeTensorsFile(path: Paths.goldens + "/model.safetensors")
    index = try JSONDecoder().decode(
      Index.self, from: Data(contentsOf: URL(fileURLWithPath: Paths.goldens + "/index.json")))
  }

  /// The library's cache with rows in f32, or the definition of attention in double precision.
  enum Provider: CaseIterable { case library, definition }

  private func session(_ provider: Provider = .library) throws -> InferenceSession {
    switch provider {
    case .library: try InferenceSession(engine.model, policy: Policies.exact, backend: .cpu())
    case .definition: try InferenceSession(engine.model, attention: FullAttention(engine.model.config.shape))
    }
  }

  private func tokens(_ name: String) throws -> [Int] {
    try file.int32s(named: "inputs_\(name)/tokens").map { Int($0) }
  }

  @Test(arguments: Provider.allCases) func logitsAndHiddenStates(_ provider: Provider) throws {
    let session = try session(provider)
    let recorder = Recorder()
    session.observer = recorder
    let logits = try session.forward(try tokens("a"), logits: .all)
    let positions = index.entries.model.parameters.positions
    let picked = positions.map { Array(logits[$0 * 4096..<($0 + 1) * 4096]) }
    let error = rowError(picked.flatMap { $0 }, try file.floats(named: "model/logits"), width: 4096)
    print("\(provider): logits: largest row-relative error \(error)")
    #expect(error <= 2e-4)
    for (row, expected) in zip(picked, index.entries.model.outputs.argmax.value) {
      #expect(try Sampler.argmax(row) == expected)
    }
    let states = recorder.layers.map(\.hidden) + [recorder.final]
    var hidden: [Float] = []
    for state in states {
      for position in positions { hidden += state[position * 256..<(position + 1) * 256] }
    }
    let hiddenError = rowError(hidden, try file.floats(named: "model/hidden"), width: 256)
    print("\(provider): hidden: largest row-relative error \(hiddenError)")
    #expect(hiddenError <= 2e-4)
  }

  @Test func attentionInputs() throws {
    let session = try session()
    let recorder = Recorder()
    session.observer = recorder
    _ = try session.forward(Array(try tokens("a").prefix(288)), logits: .none)
    var worst = 0.0
    for (layer, seen) in recorder.layers.enumerated() {
      let n = seen.tokens
      func check(_ name: String, _ values: [Float], heads: Int) throws {
        let all = headMajor(values, tokens: n, heads: heads, dim: 64)
        var early: [Float] = []
        for head in 0..<heads { early += all[head * n * 64..<head * n * 64 + 8 * 64] }
        let expected = try file.floats(named: "model.early/early.\(layer).\(name)")
        worst = max(worst, relativeError(early, expected))
        let long = "inputs_a/layers.\(layer).\(name == "keys_pre" ? "keys_pre_rope" : name)"
        if file.tensors[long] != nil { worst = max(worst, relativeError(all, try file.floats(named: long))) }
      }
      try check("queries", seen.attention.queries, heads: 4)
      try check("keys", seen.attention.keys, heads: 2)
      try check("values", seen.attention.values, heads: 2)
      try check("keys_pre", seen.keysBeforeRotary, heads: 2)
    }
    print("queries, keys, values: largest relative error \(worst)")
    #expect(recorder.layers.count == 8)
    #expect(worst <= 1e-4)
  }

  @Test func negativeLogLikelihood() throws {
    let losses = try session().losses(of: try tokens("b"), chunk: 200)
    let expected = try file.floats(named: "model.nll/nll")
    #expect(losses.count == expected.count)
    for (index, (loss, reference)) in zip(losses, expected).enumerated() {
      #expect(abs(loss - reference) <= 2e-3 + 1e-3 * abs(reference), "token \(index)")
    }
    let mean = losses.reduce(0, +) / Float(losses.count)
    let reference = index.entries.nll.outputs.mean.value
    print("mean loss \(mean), reference \(reference)")
    #expect(abs(mean - reference) <= 2e-4 + 1e-4 * reference)
  }

  @Test func greedyContinuation() throws {
    let session = try session()
    let logits = try session.prefill(try tokens("a"), chunk: 128)
    let golden = index.entries.model.outputs.greedy
    let result = try session.generate(after: logits, GenerationOptions(maximumTokens: golden.value.count))
    // Beyond a near tie both continuations are right.
    let firm = golden.compare.margins.prefix { $0 >= 1e-2 }.count
    #expect(firm >= 1)
    #expect(result.tokens.prefix(firm) == golden.value.prefix(firm))
    #expect(result.end == .maximumTokens)
  }

  /// What the README of the model promises it has learnt: the code after "is" (full cache, generated greedily).
  @Test func recallsANote() throws {
    let text =
      "Some words.\nNote: The secret code of amber falcon is 52071.\nMore words about other things.\n"
      + "Question: What is the secret code of amber falcon?\nAnswer: The secret code of amber falcon is"
    let session = try session()
    let logits = try session.prefill(engine.encodePrompt(text))
    let result = try session.generate(after: logits, GenerationOptions(maximumTokens: 7))
    #expect(engine.tokenizer.decode(result.tokens).hasPrefix(" 52071"))
  }
}
