import Foundation
import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Attention over merged and biased rows, partials, sliding windows, softcaps: small cases with known answers.
@Suite struct WorkedExampleAttentionTests {
  private func tensor(_ rows: [[Float]]) throws -> HeadTensor {
    try HeadTensor(heads: 1, tokens: rows.count, dim: rows[0].count, elements: rows.flatMap { $0 })
  }

  private func isClose(_ actual: [Float], _ wanted: [Float], _ tolerance: Float = 2e-6) -> Bool {
    actual.count == wanted.count && zip(actual, wanted).allSatisfy { abs($0 - $1) <= tolerance }
  }

  // MARK: Merged rows (merging 0.3, selection S2)

  @Test(arguments: Backend.cpuLevels)
  func aMergedRowNeedsTheLogOfItsCount(level: String) throws {
    var kernel = KernelAttention(backend: try .cpu(level: level))
    kernel.scale = 1
    let query = try tensor([[1, 0]])
    func output(_ keys: [[Float]], _ values: [[Float]], _ bias: [Float]? = nil) throws -> [Float] {
      try kernel.attend(
        query, over: [kernel.segment(tensor(keys), tensor(values), bias: bias.map { [$0] })]
      ).output
    }
    let full = try output([[2, 0], [2, 0], [0, 1]], [[1, 0], [3, 0], [0, 2]])
    #expect(isClose(full, [1.873242, 0.126758]))
    let merged: ([[Float]], [[Float]]) = ([[2, 0], [0, 1]], [[2, 0], [0, 2]])
    #expect(isClose(try output(merged.0, merged.1), [1.761594, 0.238406]))
    #expect(isClose(try output(merged.0, merged.1, [logf(2), 0]), full))
    // A bias of minus infinity hides the row.
    #expect(isClose(try output(merged.0, merged.1, [-.infinity, 0]), [0, 2]))
  }

  /// RazorAttention's compensation token stands for three.
  @Test(arguments: Backend.cpuLevels)
  func aCompensationRow(level: String) throws {
    let kernel = KernelAttention(backend: try .cpu(level: level))
    let query = try tensor([[1, 0.5]])
    let keys: [[Float]] = [[2, 0], [0, 1], [0.2, 0.4], [-0.2, 0.6], [1, 1], [0, 2]]
    let values: [[Float]] = [[1, 0], [0, 1], [2, 2], [0, 4], [1, 1], [3, 0]]
    let full = try kernel.attend(query, over: [kernel.segment(tensor(keys), tensor(values))]).output
    #expect(isClose(full, [1.2245, 0.8759], 6e-5))
    let shortKeys = try tensor([[2, 0], [1, 1], [0, 2], [0, 2.0 / 3]])
    let shortValues = try tensor([[1, 0], [1, 1], [3, 0], [2.0 / 3, 7.0 / 3]])
    for (bias, wanted) in [
      (logf(3), [1.2175, 0.9159]), (0, [1.3530, 0.5674]), (-Float.infinity, [1.4492, 0.3199]),
    ] as [(Float, [Float])] {
      let output = try kernel.attend(
        query, over: [kernel.segment(shortKeys, shortValues, bias: [[0, 0, 0, bias]])]
      ).output
      #expect(isClose(output, wanted, 6e-5), "bias \(bias): \(output)")
    }
  }

  // MARK: Softcap and bias

  /// cap · tanh(l / cap) + bias, not cap · tanh((l + bias) / cap).
  @Test(arguments: Backend.cpuLevels)
  func theSoftcapComesBeforeTheBias(level: String) throws {
    var kernel = KernelAttention(backend: try .cpu(level: level))
    kernel.scale = 1
    kernel.softcap = 1.5
    let logits: [Float] = [2, -1, 0.25]
    let bias: [Float] = [logf(4), 3, -2]
    let keys = try tensor(logits.map { [$0, 0] })
    let values = try tensor([[1, 0], [0, 1], [1, 1]])
    let result = try kernel.attend(
      tensor([[1, 0]]), over: [kernel.segment(keys, values, bias: [bias])])
    let weights = zip(logits, bias).map { exp(1.5 * tanh(Double($0) / 1.5) + Double($1)) }
    let sum = weights.reduce(0, +)
    #expect(
      isClose(
        result.output, [Float((weights[0] + weights[2]) / sum), Float((weights[1] + weights[2]) / sum)]))
    #expect(isClose(result.logSumExp, [Float(log(sum))], 4e-6))
  }

  @Test(arguments: Backend.cpuLevels)
  func softcapsAgainstTheReference(level: String) throws {
    var kernel = KernelAttention(backend: try .cpu(level: level))
    for softcap: Float in [0.5, 5, 50] {
      kernel.softcap = softcap
      let (q, k, v) = (
        try normalTensor(4, 3, 16, seed: 1), try normalTensor(2, 70, 16, seed: 2), try normalTensor(2, 70, 8, seed: 3)
      )
      var bias: [[Float]] = [normals(70, seed: 4), normals(70, seed: 5)]
      bias[1][7] = -.infinity
      let wanted = try AttentionReference(causal: false, softcap: Double(softcap)).attend(
        queries: q, keys: k, values: v, logBias: bias.map { $0.map { Double($0) } })
      let result = try kernel.attend(q, over: [kernel.segment(k, v, bias: bias)])
      #expect(isClose(result.output, wanted.outputs.map { Float($0) }, 1e-5), "softcap \(softcap)")
      #expect(isClose(result.logSumExp, wanted.logSumExps.map { Float($0) }, 1e-5), "softcap \(softcap)")
    }
  }

  /// A softcap in the cache's conventions reaches attention and window scores.
  @Test func theModelsSoftcapIsUsed() throws {
    let cache = try KVCache(
      Policy(store: .dense(.f32)), queryHeads: 2, kvHeads: 1, dim: 8, attention: AttentionOptions(softcap: 2))
    let (k, v, q) = (
      try normalTensor(1, 20, 8, seed: 1), try normalTensor(1, 20, 8, seed: 2), try normalTensor(2, 20, 8, seed: 3)
    )
    try cache.append(k, v)
    let wanted = try AttentionReference(softcap: 2).attend(queries: q, keys: k, values: v)
    #expect(isClose(try cache.attend(q), wanted.outputs.map { Float($0) }, 1e-5))
  }

  // MARK: Sliding windows

  @Test func slidingWindowsOfEveryLength() throws {
    let (k, v, q) = (
      try normalTensor(2, 24, 8, seed: 1), try normalTensor(2, 24, 8, seed: 2), try normalTensor(4, 24, 8, seed: 3)
    )
    for window in [1, 2, 7, 23, 24, 100] {
      let wanted = try AttentionReference(slidingWindow: window).attend(queries: q, keys: k, values: v)
      for prompt in [1, 5, 12] {
        let cache = try KVCache(
          Policy(store: .dense(.f32)), queryHeads: 4, kvHeads: 2, dim: 8, slidingWindow: window)
        try cache.append(k.slice(tokens: 0..<prompt), v.slice(tokens: 0..<prompt))
        var outputs = [try cache.attend(q.slice(tokens: 0..<prompt))]
        try cache.finishPrefill()
        var starts = [0]
        for token in prompt..<24 {
          try cache.append(k.slice(tokens: token..<token + 1), v.slice(tokens: token..<token + 1))
          outputs.append(try cache.attend(q.slice(tokens: token..<token + 1)))
          starts.append(token)
        }
        for (output, start) in zip(outputs, starts) {
          let count = output.count / 32
          for head in 0..<4 {
            for i in 0..<count {
              let row = output[(head * count + i) * 8..<(head * count + i + 1) * 8]
              #expect(
                isClose(Array(row), wanted.output(head: head, query: start + i).map { Float($0) }, 1e-5),
                "window \(window), prompt \(prompt), token \(start + i), head \(head)")
            }
          }
        }
        #expect(cache.rowsHeld(layer: 0, head: 0) <= window)
      }
    }
  }

  // MARK: Partials (S1)

  private func partial(_ logits: [Float], _ values: [[Float]]) -> Partial {
    guard let top = logits.max(), top > -.infinity else { return Partial(valueDim: 2) }
    var accumulator: [Float] = [0, 0]
    var sum: Float = 0
    for (logit, value) in zip(logits, values) {
      sum += expf(logit - top)
      for c in 0..<2 { accumulator[c] += expf(logit - top) * value[c] }
    }
    return Partial(maximum: top, denominator: sum, accumulator: accumulator)
  }

  private func merged(_ parts: Partial...) -> Partial {
    parts.reduce(Partial(valueDim: 2)) {
      var sum = $0
      sum.merge($1)
      return sum
    }
  }

  private func same(_ a: Partial, _ b: Partial) -> Bool {
    isClose(a.output, b.output, 1e-5) && (a.logSumExp == b.logSumExp || abs(a.logSumExp - b.logSumExp) < 1e-5)
  }

  @Test func partialsObeyTheirLaws() {
    let empty = Partial(valueDim: 2)
    #expect(merged(empty, empty) == empty)
    #expect(empty.output == [0, 0] && empty.logSumExp == -.infinity)
    let logits = normals(12, seed: 1).map { $0 * 20 }
    let values = stride(from: 0, to: 24, by: 2).map { Array(normals(24, seed: 2)[$0..<$0 + 2]) }
    let whole = partial(logits, values)
    for cut in 0...12 {
      let a = partial(Array(logits[..<cut]), Array(values[..<cut]))
      let b = partial(Array(logits[cut...]), Array(values[cut...]))
      #expect(merged(a, empty) == a && merged(empty, a) == a, "identity")
      #expect(same(merged(a, b), whole) && same(merged(b, a), whole), "cut at \(cut)")
      for second in cut...12 {
        let m = partial(Array(logits[cut..<second]), Array(values[cut..<second]))
        let e = partial(Array(logits[second...]), Array(values[second...]))
        #expect(same(merged(merged(a, m), e), merged(a, merged(m, e))), "cuts at \(cut), \(second)")
      }
    }
    #expect(same(Partial(output: whole.output, logSumExp: whole.logSumExp), whole))
    #expect(Partial(output: [1, 2], logSumExp: -.infinity) == empty)
  }

  /// Logits far apart neither overflow nor lose the smaller side's NaN-freeness.
  @Test func partialsOfExtremeLogits() {
    let low = Partial(maximum: -3e38, denominator: 1, accumulator: [1, 1])
    let high = Partial(maximum: 3e38, denominator: 2, accumulator: [4, 6])
    #expect(merged(low, high).output == [2, 3])
    #expect(merged(high, low).output == [2, 3])
  }

  /// What the kernel gives over two segments is what partials of each give, merged: mixed representations rely on it.
  @Test(arguments: Backend.cpuLevels)
  func segmentsMergeLikePartials(level: String) throws {
    let kernel = KernelAttention(backend: try .cpu(level: level))
    let (q, k, v) = (
      try normalTensor(2, 1, 16, seed: 1), try normalTensor(1, 50, 16, seed: 2), try normalTensor(1, 50, 2, seed: 3)
    )
    let whole = try kernel.attend(q, over: [kernel.segment(k, v)])
    for cut in [1, 17, 49] {
      let parts = try [0..<cut, cut..<50].map { range in
        try kernel.segment(k.slice(tokens: range), v.slice(tokens: range))
      }
      let together = try kernel.attend(q, over: parts)
      #expect(isClose(together.output, whole.output) && isClose(together.logSumExp, whole.logSumExp))
      let (a, b) = (try kernel.attend(q, over: [parts[0]]), try kernel.attend(q, over: [parts[1]]))
      for head in 0..<2 {
        var sum = Partial(output: Array(a.output[head * 2..<head * 2 + 2]), logSumExp: a.logSumExp[head])
        sum.merge(Partial(output: Array(b.output[head * 2..<head * 2 + 2]), logSumExp: b.logSumExp[head]))
        #expect(isClose(sum.output, Array(whole.output[head * 2..<head * 2 + 2])))
        #expect(abs(sum.logSumExp - whole.logSumExp[head]) < 2e-6)
      }
    }
  }

  /// Every row hidden, by bias: zeros and minus infinity, no NaN.
  @Test(arguments: Backend.cpuLevels)
  func nothingVisibleGivesZeros(level: String) throws {
    let kernel = KernelAttention(backend: try .cpu(level: level))
    let hidden = try kernel.segment(
      normalTensor(1, 5, 4, seed: 1), normalTensor(1, 5, 4, seed: 2), bias: [[Float](repeating: -.infinity, count: 5)])
    let result = try kernel.attend(normalTensor(2, 1, 4, seed: 3), over: [hidden])
    #expect(result.output == [Float](repeating: 0, count: 8))
    #expect(result.logSumExp == [-.infinity, -.infinity])
  }
}
