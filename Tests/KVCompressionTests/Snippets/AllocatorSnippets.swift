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

  /// Each prints as a text that makes it again.
  private func check(_ policies: [Policy]) throws {
    for policy in policies { #expect(try PolicyRegistry.standard.policy(policy.spec).spec == policy.spec) }
  }
}
