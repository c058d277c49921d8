public import KVCore

/// ZipCache: the tokens that received most attention per query that saw them in more bits, the others in fewer. arXiv
/// 2405.14256 (NeurIPS 2024).
///
/// Needs: the queries of probe tokens, a tenth of all; with `strategy=all` the attention weights of every token. Runs: after
/// the prompt, then on every 100 new tokens.
///
/// Saliency of a token is the attention it received divided by the number of queries that could see it: a running sum
/// alone favours tokens that have been there for long. Probe queries stand for all, so that the prompt's attention matrix
/// need not be formed: the newest twentieth of the tokens and as many drawn from the others.
///
/// Differs from the authors' code: saliency and ids are per KV head, as there; new tokens are ranked among themselves and
/// encoded once, while theirs decodes and encodes the whole cache again every 100 tokens; their probes are drawn with
/// replacement, ours without; they rank new tokens by the newest query alone (`streaming=last`), the paper and we by
/// probes of these tokens; equal scores keep the lower position.
extension Selection {
  /// By what attention sums are divided.
  public enum SaliencyNormaliser: String, Sendable, Hashable, CaseIterable {
    /// The tokens from a row's own to the newest: all queries that could see it. The authors' choice, also over probes.
    case causal
    /// The probes among these.
    case observers
  }

  /// Which queries rank tokens that came while decoding.
  public enum StreamingSaliency: String, Sendable, Hashable, CaseIterable {
    /// Probes of these tokens, as in a prompt.
    case probes
    /// The newest alone, not normalised: the authors' code.
    case last
  }

  /// - Parameters:
  ///   - salient: share of the tokens in the first store; the authors' demo has 0.6, the paper 0.6 to 0.7.
  ///   - probes: whose queries stand for all.
  ///   - every: new tokens that are ranked and encoded together.
  /// - Throws: `invalidOption` for shares outside 0...1 and an interval below 1.
  public static func zipCache(
    salient: Double = 0.6, probes: ProbeQueries = ProbeQueries(), normaliser: SaliencyNormaliser = .causal,
    streaming: StreamingSaliency = .probes, every: Int = 100
  ) throws(KVError) -> Selection {
    guard (0...1).contains(salient), (0...1).contains(probes.share), every >= 1, probes.seed <= UInt64(Int.max) else {
      throw KVError(
        .invalidOption,
        "zipcache needs shares of 0...1, an interval of at least 1 and a seed of at most \(Int.max); got \(salient), "
          + "\(probes.share), \(every) and \(probes.seed)")
    }
    var selection = Selection(
      spec: StageSpec(
        name: "zipcache",
        options: [
          SpecOption("salient", .decimal(salient)), SpecOption("strategy", .text(probes.strategy.rawValue)),
          SpecOption("probes", .decimal(probes.share)), SpecOption("seed", .integer(Int(probes.seed))),
          SpecOption("normaliser", .text(normaliser.rawValue)), SpecOption("streaming", .text(streaming.rawValue)),
          SpecOption("every", .integer(every)),
        ]),
      scorer: ProbeSaliency(probes: probes, normaliser: normaliser, streaming: streaming), budget: .unlimited,
      router: ShareRouter(shares: try TierShares([salient, 1 - salient]), settles: true),
      schedule: Schedule(decodeInterval: every))
    selection.stores = [try .cst(keyBits: 4, gap: every), try .cst(keyBits: 2, gap: every)]
    return selection
  }

  /// `zipcache(salient=0.6)+cst(bits=4)+cst(bits=2)`.
  public static let zipCacheMethod = MethodDescription(
    name: "zipcache", role: .selection,
    summary: "two stores by normalised attention, estimated from probe queries", paper: "arXiv 2405.14256",
    options: [
      .init("salient", "share of the tokens that goes to the first store"),
      .init("strategy", "probes: all, recent, random, mixed (recent and random) or special (named by the engine)"),
      .init("probes", "probe queries as a share of the tokens"),
      .init("seed", "which tokens are drawn"),
      .init("normaliser", "causal: all queries that could see a token; observers: the probes among them"),
      .init("streaming", "new tokens by probes, or by the last query alone"),
      .init("every", "new tokens that are ranked and encoded together"),
    ]
  ) { (reader) throws(KVError) in
    let salient = try reader.double("salient", default: 0.6, in: 0...1)
    let strategy = try reader.name(
      "strategy", default: "mixed", among: ProbeQueries.Strategy.allCases.map(\.rawValue))
    let share = try reader.double("probes", default: 0.1, in: 0...1)
    let seed = try reader.int("seed", default: 0, in: 0...Int.max)
    let normaliser = try reader.name(
      "normaliser", default: "causal", among: SaliencyNormaliser.allCases.map(\.rawValue))
    let streaming = try reader.name("streaming", default: "probes", among: StreamingSaliency.allCases.map(\.rawValue))
    return .selection(
      try .zipCache(
        salient: salient,
        probes: ProbeQueries(ProbeQueries.Strategy(rawValue: strategy) ?? .mixed, share: share, seed: UInt64(seed)),
        normaliser: SaliencyNormaliser(rawValue: normaliser) ?? .causal,
        streaming: StreamingSaliency(rawValue: streaming) ?? .probes,
        every: reader.int("every", default: 100, in: 1...1_048_576)))
  }
}

/// Attention received, divided by how many queries could see the row.
public struct ProbeSaliency: Scorer {
  public let probes: ProbeQueries
  public let normaliser: Selection.SaliencyNormaliser
  public let streaming: Selection.StreamingSaliency

  public init(
    probes: ProbeQueries, normaliser: Selection.SaliencyNormaliser = .causal,
    streaming: Selection.StreamingSaliency = .probes
  ) {
    self.probes = probes
    self.normaliser = normaliser
    self.streaming = streaming
  }

  public var inputs: RequiredInputs {
    // The attention that passes anyway is that of all queries.
    probes.strategy == .all ? RequiredInputs(attentionWeights: true) : RequiredInputs(probes: probes)
  }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    let last = streaming == .last && layer.tokensChosen > 0 && probes.strategy != .all
    let seen: [Int]?
    if probes.strategy == .all {
      layer.accumulatedAttention(into: &scores)
      seen = nil
    } else {
      seen = try layer.probeAttention(newestOnly: last, into: &scores)
    }
    if last { return }
    for head in 0..<layer.kvHeads {
      var hidden = 0
      for row in 0..<layer.rowCount(head: head) {
        let position = layer.position(head: head, row: row)
        var observers = layer.tokensSeen - position
        if normaliser == .observers, let seen {
          while hidden < seen.count, seen[hidden] < position { hidden += 1 }
          observers = seen.count - hidden
        }
        scores[head, row] = observers == 0 ? 0 : scores[head, row] / Float(observers)
      }
    }
  }
}
