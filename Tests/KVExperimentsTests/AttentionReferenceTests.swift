import Foundation
import KVCore
import KVExperiments
import Testing

@Suite struct AttentionReferenceTests {
  private func tensor(_ heads: Int, _ tokens: Int, _ dim: Int, seed: UInt64 = 1) throws -> HeadTensor {
    var random = SeededGenerator(seed: seed)
    return try HeadTensor(
      heads: heads, tokens: tokens, dim: dim, elements: (0..<heads * tokens * dim).map { _ in Float(random.normal()) })
  }

  @Test func oneKeyGivesItsValue() throws {
    let (q, k, v) = (try tensor(4, 1, 8), try tensor(2, 1, 8, seed: 2), try tensor(2, 1, 3, seed: 3))
    let result = try AttentionReference().attend(queries: q, keys: k, values: v, keepWeights: true)
    for head in 0..<4 {
      #expect(Array(result.output(head: head, query: 0)) == v.row(head: head / 2, token: 0).map { Double($0) })
      #expect(Array(result.weights(head: head, query: 0)) == [1])
      let dot = zip(q.row(head: head, token: 0), k.row(head: head / 2, token: 0)).reduce(0) {
        $0 + Double($1.0) * Double($1.1)
      }
      #expect(abs(result.logSumExps[head] - dot / 8.0.squareRoot()) < 1e-12)
    }
  }

  @Test func equalLogitsGiveTheMean() throws {
    try withEvery("tokens", in: 1...9) { tokens in
      let zero = try HeadTensor(heads: 1, tokens: tokens, dim: 4, elements: Array(repeating: 0, count: tokens * 4))
      let values = try tensor(1, tokens, 2)
      let result = try AttentionReference().attend(queries: zero, keys: zero, values: values)
      for query in 0..<tokens {
        #expect(abs(result.logSumExps[query] - log(Double(query + 1))) < 1e-12)
        for c in 0..<2 {
          let mean = (0...query).reduce(0.0) { $0 + Double(values[0, $1, c]) } / Double(query + 1)
          #expect(abs(result.output(head: 0, query: query)[query * 2 + c] - mean) < 1e-12)
        }
      }
    }
  }

  /// Every mask against the definition, written the other way round.
  @Test func masks() throws {
    let (k, v) = (try tensor(2, 6, 4), try tensor(2, 6, 4, seed: 2))
    let q = try tensor(2, 3, 4, seed: 3)
    let positions = [[0, 2, 3, 7, 9, 11], [11, 9, 4, 3, 1, 0]]
    for causal in [true, false] {
      for window in [nil, 1, 3, 100] {
        let reference = AttentionReference(causal: causal, slidingWindow: window)
        let result = try reference.attend(
          queries: q, keys: k, values: v, queryPositions: [3, 9, 20], keyPositions: positions, keepWeights: true)
        for head in 0..<2 {
          for (query, p) in [3, 9, 20].enumerated() {
            let weights = Array(result.weights(head: head, query: query))
            for (slot, at) in positions[head].enumerated() {
              let visible = (!causal || at <= p) && (window == nil || at > p - window!)
              #expect((weights[slot] > 0) == visible)
            }
            let total = weights.reduce(0, +)
            #expect(total == 0 || abs(total - 1) < 1e-12)
            #expect((total == 0) == (result.logSumExps[head * 3 + query] == -.infinity))
            if total == 0 { #expect(result.output(head: head, query: query).allSatisfy { $0 == 0 }) }
          }
        }
      }
    }
  }

  @Test func biasScaleAndSoftcap() throws {
    let q = try HeadTensor(heads: 1, tokens: 1, dim: 2, elements: [2, 0])
    let k = try HeadTensor(heads: 1, tokens: 2, dim: 2, elements: [3, 1, -1, 5])
    let v = try HeadTensor(heads: 1, tokens: 2, dim: 1, elements: [1, 0])
    func first(_ reference: AttentionReference, _ bias: [Double]? = nil) throws -> Double {
      try reference.attend(queries: q, keys: k, values: v, logBias: bias.map { [$0] }).outputs[0]
    }
    func sigmoid(_ x: Double) -> Double { 1 / (1 + exp(-x)) }
    #expect(abs(try first(.init()) - sigmoid(8 / 2.0.squareRoot())) < 1e-12)
    #expect(abs(try first(.init(scale: 0.25)) - sigmoid(2)) < 1e-12)
    #expect(abs(try first(.init(scale: 1, softcap: 2)) - sigmoid(2 * tanh(3) + 2 * tanh(1))) < 1e-12)
    #expect(abs(try first(.init(scale: 0.25), [0, 2]) - 0.5) < 1e-12)
    #expect(try first(.init(), [-.infinity, 0]) == 0)
    #expect(try first(.init(), [-.infinity, -.infinity]) == 0)
    // A slot that stands for n equal tokens.
    let four = try HeadTensor(heads: 1, tokens: 4, dim: 2, elements: [3, 1, 3, 1, 3, 1, -1, 5])
    let values = try HeadTensor(heads: 1, tokens: 4, dim: 1, elements: [1, 1, 1, 0])
    let all = try AttentionReference(scale: 0.1).attend(queries: q, keys: four, values: values)
    #expect(abs(try first(.init(scale: 0.1), [log(3), 0]) - all.outputs[0]) < 1e-12)
  }

  @Test func rowsStreamAndAddUp() throws {
    let (q, k, v) = (try tensor(4, 5, 8), try tensor(2, 7, 8, seed: 2), try tensor(2, 7, 8, seed: 3))
    let result = try AttentionReference().attend(queries: q, keys: k, values: v, keepWeights: true)
    var rows = 0
    try AttentionReference().forEachRow(queries: q, keys: k) { row in
      #expect(row.weights == Array(result.weights(head: row.queryHead, query: row.query)))
      rows += 1
    }
    #expect(rows == 20)
    let sums = try AttentionReference().columnSums(queries: q, keys: k)
    for head in 0..<4 { #expect(abs(sums[head].reduce(0, +) - 5) < 1e-12) }
  }

  @Test func hugeLogitsDoNotOverflow() throws {
    let q = try HeadTensor(heads: 1, tokens: 1, dim: 1, elements: [1e30])
    let k = try HeadTensor(heads: 1, tokens: 2, dim: 1, elements: [1e30, -1e30])
    let result = try AttentionReference().attend(queries: q, keys: k, values: k, keepWeights: true)
    #expect(result.weights == [1, 0] && result.logSumExps[0].isFinite)
    let bad = try HeadTensor(heads: 1, tokens: 2, dim: 1, elements: [1, .nan])
    let error = expectError(.nonFinite, "slot 1") { try AttentionReference().attend(queries: q, keys: bad, values: k) }
    #expect(error?.position == 1)
  }

  @Test func whatDoesNotFitIsRefused() throws {
    let (q, k) = (try tensor(4, 2, 8), try tensor(2, 3, 8))
    let attention = AttentionReference()
    expectError(.shapeMismatch, "values") { try attention.attend(queries: q, keys: k, values: tensor(2, 4, 8)) }
    expectError(.shapeMismatch, "channels") { try attention.attend(queries: tensor(4, 2, 7), keys: k, values: k) }
    expectError(.shapeMismatch, "multiple") { try attention.attend(queries: tensor(3, 2, 8), keys: k, values: k) }
    expectError(.shapeMismatch, "4 queries") { try attention.attend(queries: tensor(4, 4, 8), keys: k, values: k) }
    expectError(.shapeMismatch, "1 query positions") {
      try attention.attend(queries: q, keys: k, values: k, queryPositions: [1])
    }
    expectError(.shapeMismatch, "[3]") {
      try attention.attend(queries: q, keys: k, values: k, keyPositions: [[0, 1, 2]])
    }
    expectError(.shapeMismatch, "[3, 2]") {
      try attention.attend(queries: q, keys: k, values: k, logBias: [[0, 1, 2], [0, 0]])
    }
    expectError(.invalidOption, "bias") {
      try attention.attend(queries: q, keys: k, values: k, logBias: [[0, 1, 2], [0, 0, .nan]])
    }
    expectError(.invalidOption, "scale") { try AttentionReference(scale: 0).attend(queries: q, keys: k, values: k) }
    expectError(.invalidOption, "softcap") {
      try AttentionReference(softcap: .nan).attend(queries: q, keys: k, values: k)
    }
    expectError(.invalidOption, "slidingWindow") {
      try AttentionReference(slidingWindow: 0).attend(queries: q, keys: k, values: k)
    }
  }
}
