internal import KVCompression

/// Stores that hold two layers together, both layers' decode attention against that of two dense ones.
extension Benchmark {
  static let layerStores = ["f16+minicache(from=0,retain=share)", "kivi(bits=4)+minicache(from=0,retain=share)"]

  private struct Pairs {
    let store: String
    let cache: KVCache
    var seconds: [Double] = []
    var checked: Bool
    var bytes: Int
  }

  func pairedLayers(tokens: Int, _ machine: Machine) throws(KVError) {
    let chosen = Self.layerStores.filter { wanted("two-layers", $0, tokens, 1, machine) }
    if chosen.isEmpty { return }
    let queries = data.queries(1, of: Self.allHeads)
    var output = [Float](repeating: 0, count: queries.count)
    // Two pairs at least take turns, so that neither finds its rows in a cache.
    let layers = max(4, (coldLayers(bytesPerLayer: tokens * BenchData.shape.kvHeads * BenchData.dim * 4) + 1) / 2 * 2)
    var contestants: [Pairs] = []
    for store in ["f16"] + chosen {
      let cache = try filled(store, layers: layers, tokens, heads: Self.allHeads, machine.backend)
      // Both layers read the directions, each its own lengths and exact rows.
      let base = try PolicyRegistry.standard.policy(store.prefix { $0 != "+" }.description)
      let directions = try base.estimate(shape: ModelShape(layers: [BenchData.shape]), prompt: tokens).total
      let bytes = cache.bytes.total / (layers / 2) + directions
      contestants.append(
        Pairs(store: store, cache: cache, checked: try check(store, cache, tokens, queries), bytes: bytes))
    }
    var bandwidth: [Double] = []
    let clock = ContinuousClock()
    let start = clock.now
    var round = 0
    while round < 5 || (round < 51 && start.duration(to: clock.now).seconds < options.secondsPerGroup) {
      bandwidth.append(machine.probe.measure())
      for turn in contestants.indices {
        let index = (turn + round) % contestants.count
        let cache = contestants[index].cache
        let first = round % (layers / 2) * 2
        contestants[index].seconds.append(
          try Self.seconds { () throws(KVError) in
            for layer in first..<first + 2 { try attend(cache, layer: layer, queries, 1, heads: 8, into: &output) }
          })
      }
      round += 1
    }
    let f16 = BenchRecord.median(contestants[0].seconds)
    for contestant in contestants.dropFirst() {
      report(
        BenchRecord(
          name: "two-layers", store: contestant.store, tokens: tokens, queries: 1, threads: machine.threads,
          seconds: contestant.seconds, bytes: contestant.bytes, readBandwidth: BenchRecord.median(bandwidth),
          ratioToF16: BenchRecord.median(contestant.seconds) / f16, checked: contestant.checked))
    }
  }

  private func filled(
    _ store: String, layers: Int, _ tokens: Int, heads: [Int], _ backend: Backend
  ) throws(KVError) -> KVCache {
    let cache = try cache(PolicyRegistry.standard.policy(store), layers: layers, heads: heads, backend)
    // Pair by pair: no more than two layers are ever held in full.
    for layer in 0..<layers {
      for first in stride(from: 0, to: tokens, by: BenchData.blockTokens) {
        try data.append(
          first..<min(first + BenchData.blockTokens, tokens), to: cache, layer: layer, heads: heads,
          nearby: layer % 2 == 1)
      }
      try cache.finishPrefill(layer: layer)
    }
    return cache
  }

  private func check(_ store: String, _ cache: KVCache, _ tokens: Int, _ queries: [Float]) throws(KVError) -> Bool {
    let heads = Self.checkedHeads(store, tokens: tokens)
    let portable = try filled(store, layers: 2, tokens, heads: heads, .cpu(level: "portable"))
    let own = data.queries(1, of: heads)
    var (output, expected) = ([Float](repeating: 0, count: queries.count), [Float](repeating: 0, count: own.count))
    for layer in 0..<2 {
      try attend(cache, layer: layer, queries, 1, heads: 8, into: &output)
      try attend(portable, layer: layer, own, 1, heads: heads.count, into: &expected)
      if !Self.agree(Self.part(output, of: heads), expected) { return false }
    }
    return true
  }
}
