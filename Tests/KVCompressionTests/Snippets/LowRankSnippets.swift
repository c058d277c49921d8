import KVCompression
import Testing

/// The code of the low-rank pages, compiled and run.
@Suite struct LowRankSnippets {
  @Test func stores() throws {
    let svd = Policy(store: try .svd(keyRank: .share(0.25), valueRank: .share(0.25), latents: .int8))
    let xkv = Policy(store: try .xKV(layers: 4, keyRank: .share(0.125), valueRank: .share(0.1875)))

    try check([svd, xkv])
  }

  /// Each prints as a text that makes it again.
  private func check(_ policies: [Policy]) throws {
    for policy in policies { #expect(try PolicyRegistry.standard.policy(policy.spec).spec == policy.spec) }
  }
}
