import KVCompression
import Testing

/// The code of the pages on methods that observe attention, and on schedules.
@Suite struct ObserverSnippets {
  @Test func methods() throws {
    let tova = Policy(try .tova(budget: .tokens(512), recent: 1), store: .dense(.f16))
    let lazy = Policy(try .lazyEviction(budget: .tokens(1334), window: 52, alpha: 5e-4), store: .dense(.f16))
    let decoding = Policy(
      try .snapKV(budget: .tokens(2048)).rescheduled(chunks: true, every: 64), store: .dense(.f16))
    let scissors = Policy(try .scissorhands(buffer: .tokens(1024), drop: 0.5), store: .dense(.f16))
    let cake = Policy(try .cake(budget: .tokens(1024), tau1: 1.6, tau2: 0.4), store: .dense(.f16))
    let crush = Policy(
      try .kvCrush(budget: .tokens(1024), rule: RepresentativeRule(block: 16, share: 0.5, anchor: .mean)),
      store: .dense(.f16))
    let represented = Policy(try .h2o(budget: .fraction(0.25)).crush(), store: .dense(.f16))
    let turned = Policy(try .snapKV(budget: .fraction(0.25)).positioned(.rerotate), store: .dense(.f16))
    for policy in [tova, lazy, decoding, scissors, cake, crush, represented, turned] {
      #expect(try PolicyRegistry.standard.policy(policy.spec).spec == policy.spec)
    }
  }
}
