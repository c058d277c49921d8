/// Which tokens' queries stand for all of them when attention is estimated (ZipCache): a share of the tokens that came
/// since the last choice, the newest, any, both, or those the engine names.
///
/// Which tokens are drawn depends on the seed, the range and nothing else: not on chunks, layers or threads.
public struct ProbeQueries: Hashable, Sendable {
  public enum Strategy: String, Hashable, Sendable, CaseIterable {
    /// Every query.
    case all
    /// The newest.
    case recent
    /// Any, drawn without replacement.
    case random
    /// Half of the share newest, half of it drawn from the others: the paper's choice.
    case mixed
    /// Those ``KVCache/markProbes(_:)`` names: punctuation, separators, whatever the engine calls special.
    case special
  }

  public var strategy: Strategy
  /// Probes as a share of the tokens.
  public var share: Double
  public var seed: UInt64

  public init(_ strategy: Strategy = .mixed, share: Double = 0.1, seed: UInt64 = 0) {
    self.strategy = strategy
    self.share = share
    self.seed = seed
  }

  /// Newest probes and drawn ones, each as a share.
  private var shares: (recent: Double, drawn: Double) {
    switch strategy {
    case .all: (1, 0)
    case .recent: (share, 0)
    case .random: (0, share)
    case .mixed: (share / 2, share / 2)
    case .special: (0, 0)
    }
  }

  /// First of the newest probes of some tokens, and how many are drawn from those before it. ZipCache's rounding: the
  /// newest begin at `floor((1 - share) · count)`, `floor(share · count)` are drawn.
  private func split(count: Int) -> (recent: Int, drawn: Int) {
    let (recent, drawn) = shares
    let slack = 1e-9 * Double(count)
    return (
      Int(((1 - recent) * Double(count) + slack).rounded(.down)), Int((drawn * Double(count) + slack).rounded(.down))
    )
  }

  /// Small numbers are drawn first.
  private func lot(_ position: Int) -> UInt64 {
    var z = seed &+ UInt64(position + 1) &* 0x9E37_79B9_7F4A_7C15
    z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
    return z ^ z >> 31
  }

  /// Whether the query of a token may yet become a probe, `range` being the tokens so far. Drawn ones are foreseen with
  /// twice the room they need on average; of the first 512 tokens all are.
  func mayBecome(_ position: Int, of range: Range<Int>, marked: Set<Int>) -> Bool {
    if strategy == .special { return marked.contains(position) || position == range.upperBound - 1 }
    if position >= range.lowerBound + split(count: range.count).recent { return true }
    let (recent, drawn) = shares
    if drawn == 0 { return position == range.upperBound - 1 }
    if position < range.lowerBound + 512 { return true }
    return Double(lot(position)) < 2 * drawn / max(1 - recent, 1e-9) * 0x1p64
  }

  /// The probes of `range`, ascending, out of the tokens whose queries are there. Never none of a range with tokens: the
  /// newest stands in.
  func choose(of range: Range<Int>, from candidates: [Int], marked: Set<Int>) -> [Int] {
    if strategy == .special {
      let named = candidates.filter { marked.contains($0) && range.contains($0) }
      return named.isEmpty ? Array(range.suffix(1)) : named
    }
    let split = split(count: range.count)
    let first = range.lowerBound + split.recent
    let others = candidates.filter { range.contains($0) && $0 < first }
    let drawn = others.sorted { (lot($0), $0) < (lot($1), $1) }.prefix(split.drawn).sorted()
    let probes = drawn + Array(first..<range.upperBound)
    return probes.isEmpty ? Array(range.suffix(1)) : probes
  }
}

extension ProbeQueries: CustomStringConvertible {
  public var description: String { "\(strategy.rawValue) probes" }
}
