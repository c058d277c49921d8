public import KVCore

/// LagKV: how much a token spreads, measured in the ranges of the tokens that follow. arXiv 2504.04704.
///
/// Needs: keys and values only. Runs: after the prompt; with `every`, while decoding too.
///
/// Behind the sinks, rows are cut into partitions of `lag`. In each, keys and values are scaled channel by channel to the
/// range they have in the next partition; the standard deviation over the channels says how much a row stands out. The
/// last whole partition and what follows it are kept first.
///
/// Differs from the authors' code: a channel that is constant in the next partition counts 0 where theirs divides by
/// zero; equal scores keep the lower position; the newest `lag` rows are protected whatever the budget.
extension Selection {
  /// - Parameters:
  ///   - sinks: first tokens that always stay.
  ///   - lag: rows of a partition.
  ///   - cross: compare scores of different partitions as they are; otherwise ranks within each.
  public static func lagKV(
    budget: Budget = .fraction(0.5), sinks: Int = 4, lag: Int = 128, cross: Bool = false, every: Int? = nil
  ) throws(KVError) -> Selection {
    guard (1...65_536).contains(lag) else {
      throw KVError(.invalidOption, "lagkv's lag must lie in 1...65536; got \(lag)")
    }
    var selection = try RowOptions(budget: budget, sinks: sinks, recent: lag, every: every)
      .selection(named: "lagkv", scorer: LagSpread(sinks: sinks, lag: lag, cross: cross))
    selection.spec = StageSpec(
      name: "lagkv",
      options: [
        SpecOption("budget", budget.specValue), SpecOption("sinks", .integer(sinks)), SpecOption("lag", .integer(lag)),
        SpecOption("cross", .bool(cross)), SpecOption("every", .integer(every ?? 0)),
      ])
    return selection
  }

  /// `lagkv(budget=0.5,lag=128)`.
  public static let lagKVMethod = MethodDescription(
    name: "lagkv", role: .selection, summary: "tokens that spread wide in the ranges of those that follow",
    paper: "arXiv 2504.04704",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept in all"),
      .init("sinks", "first tokens that always stay"), .init("lag", "rows of a partition; the newest always stay"),
      .init("cross", "compare partitions by their scores, not by ranks within each"),
      .init("every", "decoded tokens between further selections; 0 for never"),
    ]
  ) { (reader) throws(KVError) in
    let budget = try reader.budget("budget", default: .fraction(0.5))
    let sinks = try reader.int("sinks", default: 4, in: 0...1_048_576)
    let lag = try reader.int("lag", default: 128, in: 1...65_536)
    let cross = try reader.bool("cross", default: false)
    let every = try reader.int("every", default: 0, in: 0...1_048_576)
    return .selection(
      try .lagKV(budget: budget, sinks: sinks, lag: lag, cross: cross, every: every == 0 ? nil : every))
  }
}

/// The spread of rows relative to the next partition, of keys and values in the mean.
public struct LagSpread: Scorer {
  public let sinks: Int
  public let lag: Int
  public let cross: Bool

  public init(sinks: Int, lag: Int, cross: Bool = false) {
    self.sinks = sinks
    self.lag = lag
    self.cross = cross
  }

  public var inputs: RequiredInputs { .none }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    for head in 0..<layer.kvHeads {
      let count = layer.rowCount(head: head)
      guard count >= sinks + 2 * lag else {
        // Nothing to compare with: the newest.
        for row in 0..<count { scores[head, row] = Float(row) / Float(count) }
        continue
      }
      for row in 0..<sinks { scores[head, row] = 1 }
      let partitions = (count - sinks) / lag
      for partition in 0..<partitions - 1 {
        let rows = sinks + partition * lag..<sinks + (partition + 1) * lag
        let keys = shares(layer, head, .keys, rows)
        let values = shares(layer, head, .values, rows)
        let means = zip(keys, values).map { ($0 + $1) / 2 }
        let own = cross ? means : ranks(means)
        for (offset, score) in own.enumerated() { scores[head, rows.lowerBound + offset] = score }
      }
      for row in sinks + (partitions - 1) * lag..<count { scores[head, row] = 1 }
    }
  }

  /// Softmax of the spreads of some rows in the ranges of as many that follow.
  private func shares(_ layer: LayerView, _ head: Int, _ side: LayerView.Side, _ rows: Range<Int>) -> [Float] {
    let next = layer.channelRange(head: head, side, rows: rows.upperBound..<rows.upperBound + lag)
    let inverse = zip(next.low, next.high).map { $1 > $0 ? 1 / ($1 - $0) : 0 }
    var spreads = layer.spread(head: head, side, rows: rows, low: next.low, inverse: inverse)
    softmax(&spreads)
    return spreads
  }

  /// 0, 1/lag, … from the smallest up; of equal scores the lower row ranks higher.
  private func ranks(_ scores: [Float]) -> [Float] {
    var result = scores
    let order = scores.indices.sorted { scores[$0] != scores[$1] ? scores[$0] < scores[$1] : $0 > $1 }
    for (rank, index) in order.enumerated() { result[index] = Float(rank) / Float(lag) }
    return result
  }
}
