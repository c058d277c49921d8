import KVCompression
import Testing

/// The code of the pages about scores, budgets and rules, compiled and run.
@Suite struct AllocatorSnippets {
  @Test func layersAndHeads() throws {
    let pyramid = Policy(try .pyramidKV(budget: .tokens(512), form: .exact), store: .dense(.f16))
    let broadFirst = Policy(try .h2o(budget: .fraction(0.25)).pyramid(beta: 8), store: .dense(.f16))
    let adaptive = Policy(try .h2o(budget: .fraction(0.25)).adaKV(floor: 0.2), store: .dense(.f16))
    let adaSnapKV = Policy(try .adaSnapKV(budget: .tokens(512), floor: 0.2), store: .dense(.f16))
    let adaPyramidKV = Policy(try .adaPyramidKV(budget: .tokens(512)), store: .dense(.f16))

    try check([pyramid, broadFirst, adaptive, adaSnapKV, adaPyramidKV])
  }

  @Test func scores() throws {
    let knorm = Policy(try .knorm(budget: .fraction(0.5), sinks: 4), store: .dense(.f16))
    let keyDiff = Policy(try .keyDiff(budget: .tokens(2048)), store: .dense(.f16))
    let lagKV = Policy(try .lagKV(budget: .fraction(0.5), lag: 64), store: .dense(.f16))
    let expected = Policy(try .expectedAttention(budget: .fraction(0.5), queries: 256), store: .dense(.f16))
    let critical = Policy(try .h2o(budget: .fraction(0.25)).critical(first: 0.5), store: .dense(.f16))
    let criticalKV = Policy(try .criticalKV(budget: .fraction(0.25)), store: .dense(.f16))

    try check([knorm, keyDiff, lagKV, expected, critical, criticalKV])
  }

  @Test func rulesAndBudgets() throws {
    let phrases = Policy(try .h2o(budget: .fraction(0.25)).chunks(length: 10), store: .dense(.f16))
    let chunkKV = Policy(try .chunkKV(budget: .fraction(0.25), length: 10), store: .dense(.f16))
    let evenly = Policy(try .knorm(budget: .fraction(0.5)).even(length: 512), store: .dense(.f16))
    let together = Policy(try .h2o(budget: .fraction(0.25)).shared(), store: .dense(.f16))
    let enough = Policy(try .h2o(budget: .unlimited).threshold(mass: 0.95), store: .dense(.f16))
    let prefixKV = Policy(try .prefixKV(budget: .fraction(0.5)), store: .dense(.f16))
    let byLayer = Policy(try .snapKV(budget: .fraction(0.25)).prefix(), store: .dense(.f16))
    let random = Policy(try .random(budget: .fraction(0.5), seed: 2), store: .dense(.f16))
    let duo = Policy(
      try .duoAttention(table: HeadTable([[0.9, 0.1], [0.2, 0.8]]), sinks: 4, recent: 64), store: .dense(.f16))
    let retrieval = Policy(
      try .snapKV(budget: .fraction(0.5)).heads(table: HeadTable([[0.9, 0.1], [0.2, 0.8]])), store: .dense(.f16))

    try check([phrases, chunkKV, evenly, together, enough, prefixKV, byLayer, random, duo, retrieval])
  }

  /// Each prints as a text that makes it again.
  private func check(_ policies: [Policy]) throws {
    for policy in policies { #expect(try PolicyRegistry.standard.policy(policy.spec).spec == policy.spec) }
  }
}
