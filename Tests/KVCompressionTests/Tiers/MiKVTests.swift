import KVCompression
import Testing

@testable import KVCore

/// MiKV: heavy hitters and newest tokens in the first store, the rest in the second.
@Suite struct MiKVTests {
  private static let shape = Geometry(4, 2, 40, 24).shape()

  /// After the prompt the first store holds what H2O with that budget keeps.
  @Test func importanceIsThatOfH2O() throws {
    withEvery("share", in: [0.2, 0.35, 0.5]) { share in
      let traffic = Traffic(Self.shape, tokens: 100, seed: 3)
      let h2o = try makeCache("h2o(budget=\(share))+f32", Self.shape)
      let mikv = try makeCache("mikv(important=\(share))+f32+f16", Self.shape)
      try traffic.run(h2o, prompt: 100)
      try traffic.run(mikv, prompt: 100)
      check(TierShareTests.tiers(mikv).map { $0[0] } == (try positions(h2o)[0]), "heavy hitters")
      check(try positions(mikv)[0] == Array(repeating: Array(0..<100), count: 2), "no token left behind")
    }
  }

  /// While decoding the share of the current length holds, the newest stay, nobody comes back, nothing is lost.
  @Test func demotedTokensStayDown() throws {
    withEvery(
      "stores", in: ["f32+f16", "f16+pertoken(bits=4,group=20)", "kivi(bits=8,residual=32)+kivi(bits=2,residual=32)"]
    ) { stores in
      let traffic = Traffic(Self.shape, tokens: 140, seed: 4)
      let backend = try Backend.cpu(threads: 1)
      let cache = try makeCache("mikv(important=0.3)+\(stores)", Self.shape, backend: backend)
      try traffic.run(cache, prompt: 60)
      var low = TierShareTests.tiers(cache).map { Set($0[1]) }
      for token in 60..<140 {
        try traffic.checkedStep(cache, 0, token..<token + 1)
        check(cache.bytes.total == backend.memory.liveBytes, "bytes")
        for (head, tiers) in TierShareTests.tiers(cache).enumerated() {
          let rows = token + 1
          let important = rows - Int(0.7 * Double(rows) + 1e-6)
          check(tiers.joined().sorted() == Array(0..<rows), "rows")
          check(tiers[0].count == important, "\(tiers[0].count) of \(important)")
          check(tiers[0].suffix(important / 2) == Array(rows - important / 2..<rows)[...], "the newest")
          check(low[head].isSubset(of: tiers[1]), "a token came back")
          low[head] = Set(tiers[1])
        }
      }
    }
  }

  /// The spec's sizes: d 128, a fifth important, codes of 2 bits with groups of 64 in 2.5 bits an element.
  @Test func bytesAreTheFormula() throws {
    let shape = ModelShape(layerCount: 1, queryHeads: 8, kvHeads: 2, headDim: 128)
    let traffic = Traffic(shape, tokens: 1000)
    for (high, share) in [
      ("f16", 0.325), ("pertoken(bits=8,group=64)", 0.23125), ("pertoken(bits=4,group=64)", 0.18125),
    ] {
      let cache = try makeCache("mikv+\(high)+pertoken(bits=2,group=64)", shape)
      try traffic.run(cache, prompt: 1000)
      let dense = 1000 * 2 * 128 * 2 * 2
      let found = Double(cache.bytes.payload + cache.bytes.metadata) / Double(dense)
      // Room that a tier is given for the rows to come is no part of the formula.
      #expect(abs(found - share) < 0.02, "\(high): \(found), not \(share)")
    }
  }

  @Test func edges() throws {
    let traffic = Traffic(Self.shape, tokens: 20)
    for text in [
      "mikv(important=0)", "mikv(important=1)", "mikv(every=0)", "mikv(recent_share=0)", "mikv(recent_share=1)",
    ] {
      let cache = try makeCache("\(text)+f32+f16", Self.shape)
      try traffic.run(cache, prompt: 1)
      for token in 1..<20 { try traffic.checkedStep(cache, 0, token..<token + 1) }
      #expect(try positions(cache)[0][0] == Array(0..<20))
    }
    expectError(.invalidOption, "2 stores") { _ = try PolicyRegistry.standard.policy("mikv+f16") }
    expectError(.invalidOption, "0.0...1.0") { _ = try PolicyRegistry.standard.policy("mikv(important=1.5)") }
  }
}
