/// A scorer whose scores are the attention of the last queries, pooled over the rows before them, and 0 for those queries'
/// own rows: a device can choose by such scores where it makes them.
package protocol WindowScorer: Scorer {
  var window: Int { get }
  /// Odd.
  var kernel: Int { get }
  var pooling: Pooling { get }
  var reduction: GroupReduction { get }
}

/// Such a scorer where nothing but a plain choice of the largest follows: found once, when the cache is made.
package struct WindowSelection {
  let scorer: any WindowScorer
  let router: TopKRouter

  /// Nil for a policy that moves rows between tiers, lets heads or layers compete or chooses by a rule.
  init?(_ policy: any CompressionPolicy) {
    guard policy.tiers.count == 1, let scorer = policy.scorer as? any WindowScorer,
      policy.allocator is UniformAllocator, let router = policy.router as? TopKRouter, router.others == .dropped,
      router.rule == nil
    else { return nil }
    self.scorer = scorer
    self.router = router
  }
}

extension LayerView {
  /// Routes by the scores of a window without bringing them to the host. Nil: they have to come.
  ///
  /// - Throws: as ``windowStatistics(_:window:reduction:totals:into:)``, and `nonFinite` for a score that is NaN.
  func route(_ selection: WindowSelection, kept: [Int]) throws(KVError) -> Routing? {
    let rows = rowCounts
    guard backend.selectsRows(of: rows.reduce(0, +)), segments.count == 1,
      (0..<kvHeads).allSatisfy({
        segments[0].slotCount(head: $0) == rows[$0] && segments[0].sortedFrom(head: $0) == 0
      })
    else { return nil }
    let scorer = selection.scorer
    let wanted = try windowQueries(scorer.window)
    let work = keyWork()
    // A head in several pieces has its scores in as many places.
    guard work.heads.count == kvHeads else { return nil }
    let splits = (0..<kvHeads).map { selection.router.protection.split(kept: kept[$0], of: rows[$0]) }
    let choice = WindowChoice(
      kernel: scorer.kernel, pooling: scorer.pooling,
      past: (0..<kvHeads).map { head in
        var past = rows[head]
        while past > 0, position(head: head, row: past - 1) >= tokensSeen - scorer.window { past -= 1 }
        return past
      }, candidates: splits.map(\.candidates), take: splits.map(\.chosen))
    guard
      let chosen = withWindowRequest(wanted, work, reduction: scorer.reduction, { backend.selectByWindow($0, choice) })
    else { return nil }
    if let nan = chosen.nan {
      throw KVError(.nonFinite, "the score of row \(nan.row) is NaN", layer: layer, head: nan.head)
    }
    var routing = Routing()
    routing.reset(like: ScoreTable(counts: rows))
    selection.router.send(splits, chosen.rows, others: .dropped, into: &routing)
    return routing
  }

  private func withWindowRequest<Result>(
    _ queries: [Float], _ work: KeyWork, reduction: GroupReduction, _ body: (WindowScoreRequest) -> Result?
  ) -> Result? {
    let count = queries.count / max(shape.queryHeads * shape.keyDim, 1)
    return queries.withUnsafeBufferPointer { buffer in
      guard let base = buffer.baseAddress else { return nil }
      return body(
        WindowScoreRequest(
          queries: base, window: count, firstPosition: tokensSeen - count, group: shape.group, keyDim: shape.keyDim,
          scale: options.scale ?? 1 / Float(shape.keyDim).squareRoot(), softcap: options.softcap ?? 0,
          reduction: reduction, heads: work.heads, slices: work.slices))
    }
  }
}
