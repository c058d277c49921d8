/// Attention of chosen queries over the rows of a layer.
extension LayerView {
  /// Attention of the probe queries over all rows, causally, summed over the probes and the query heads of each KV head.
  ///
  /// - Parameter newestOnly: of the probes the newest token alone.
  /// - Returns: the tokens that were probes, ascending, none when no token came: those of the policy's `inputs.probes` among the tokens that came
  ///   since its last choice.
  /// - Throws: `missingInput` when queries of these tokens were not observed.
  public func probeAttention(newestOnly: Bool = false, into scores: inout ScoreTable) throws(KVError) -> [Int] {
    let range = probeRange
    // Nothing came since: no row is new.
    if range.isEmpty { return [] }
    guard let store = probeStore, let probes, store.first <= range.lowerBound else {
      throw KVError(
        .missingInput,
        "needs the queries of tokens \(range.lowerBound)..<\(range.upperBound); those from "
          + "\(probeStore.map { String($0.first) } ?? "none") on were observed. Attend through the cache, or call "
          + "observe(layer:queries:) for every append", layer: layer)
    }
    if probes.strategy == .special, markedProbes.isDisjoint(with: range), tokensChosen == 0 {
      throw KVError(
        .missingInput, "needs the tokens that are special: call markProbes(_:) before they are attended", layer: layer)
    }
    let chosen =
      newestOnly ? Array(range.suffix(1)) : probes.choose(of: range, from: store.held, marked: markedProbes)
    let work = keyWork()
    var start = 0
    while start < chosen.count {
      // Neighbours share every key row they meet.
      var end = start + 1
      while end < chosen.count, chosen[end] == chosen[end - 1] + 1 { end += 1 }
      let queries = store.queries(of: Array(chosen[start..<end]))
      addWindow(queries, count: end - start, firstPosition: chosen[start], reduction: .sum, work, into: &scores)
      start = end
    }
    return chosen
  }
}
