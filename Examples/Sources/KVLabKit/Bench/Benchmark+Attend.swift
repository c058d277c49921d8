internal import KVCompression

extension Benchmark {
  private struct Contestant {
    let store: String
    let cache: KVCache
    let layers: Int
    /// By number of queries.
    var seconds: [Int: [Double]] = [:]
    var checked: [Int: Bool] = [:]
    var bytes: Int
  }

  /// Decode attention over every store at one context length: one query, and eight at once.
  func decodeAttention(tokens: Int, _ machine: Machine) throws(KVError) {
    let counts = [1, 8]
    let chosen = Self.stores.filter { store in
      counts.contains { wanted("attend", store, tokens, $0, machine) }
    }
    if chosen.isEmpty { return }
    // f16 is what the others are compared with, and plain forms.
    let plain = Set(chosen.compactMap { Self.plainForms[$0] })
    let stores = Self.stores.filter { chosen.contains($0) || $0 == "f16" || plain.contains($0) }
    var contestants: [Contestant] = []
    for store in stores { contestants.append(try contestant(store, tokens, machine)) }
    var bandwidth: [Double] = []
    for count in counts {
      let queries = data.queries(count, of: Self.allHeads)
      var output = [Float](repeating: 0, count: queries.count)
      for index in contestants.indices {
        let cache = contestants[index].cache
        try attend(cache, layer: 0, queries, count, heads: 8, into: &output)
        let heads = Self.checkedHeads(contestants[index].store, tokens: tokens)
        let reference = try reference(contestants[index].store, tokens, count, heads)
        contestants[index].checked[count] = Self.agree(
          Self.part(output, of: heads), reference, within: options.backend.tolerance)
      }
      try time(&contestants, count, queries, &output, machine, &bandwidth)
    }
    for count in counts {
      func median(_ store: String) -> Double? {
        contestants.first { $0.store == store }?.seconds[count].map(BenchRecord.median)
      }
      let f16 = median("f16")
      for contestant in contestants where wanted("attend", contestant.store, tokens, count, machine) {
        let seconds = contestant.seconds[count] ?? []
        report(
          BenchRecord(
            name: "attend", store: contestant.store, tokens: tokens, queries: count, threads: machine.threads,
            seconds: seconds, bytes: contestant.bytes, readBandwidth: BenchRecord.median(bandwidth),
            ratioToF16: f16.map { BenchRecord.median(seconds) / $0 },
            ratioToPlain: Self.plainForms[contestant.store].flatMap(median).map { BenchRecord.median(seconds) / $0 },
            checked: contestant.checked[count] ?? false))
      }
    }
  }

  private func contestant(_ store: String, _ tokens: Int, _ machine: Machine) throws(KVError) -> Contestant {
    let policy = try PolicyRegistry.standard.policy(store)
    let predicted = try policy.estimate(
      shape: ModelShape(layers: [BenchData.shape], rotary: BenchData.rotary()), prompt: tokens,
      chunk: BenchData.blockTokens)
    let layers = coldLayers(bytesPerLayer: predicted.total)
    let cache = try cache(policy, layers: layers, heads: Self.allHeads, machine.backend)
    for layer in 0..<layers { try data.fill(cache, layer: layer, tokens: tokens, heads: Self.allHeads) }
    let bytes = cache.bytes(layer: 0)
    return Contestant(store: store, cache: cache, layers: layers, bytes: bytes.payload + bytes.metadata)
  }

  /// The portable kernels' attention over a portable cache of the same data.
  private func reference(
    _ store: String, _ tokens: Int, _ count: Int, _ heads: [Int]
  ) throws(KVError) -> [Float] {
    let key = "\(store)/\(tokens)/\(count)"
    if let known = references[key] { return known }
    let portable = try cache(
      PolicyRegistry.standard.policy(store), layers: 1, heads: heads, .cpu(level: "portable"))
    try data.fill(portable, layer: 0, tokens: tokens, heads: heads)
    for queries in [1, 8] {
      let rows = data.queries(queries, of: heads)
      var output = [Float](repeating: 0, count: rows.count)
      try attend(portable, layer: 0, rows, queries, heads: heads.count, into: &output)
      references["\(store)/\(tokens)/\(queries)"] = output
    }
    return references[key] ?? []
  }

  private func time(
    _ contestants: inout [Contestant], _ count: Int, _ queries: [Float], _ output: inout [Float], _ machine: Machine,
    _ bandwidth: inout [Double]
  ) throws(KVError) {
    let clock = ContinuousClock()
    let start = clock.now
    var round = 0
    // The output of the last call of each round comes from the same bits as the checked one: contents never change.
    while round < 5 || (round < 101 && start.duration(to: clock.now).seconds < options.secondsPerGroup / 2) {
      bandwidth.append(machine.probe.measure())
      for turn in contestants.indices {
        // Another one begins each round.
        let index = (turn + round) % contestants.count
        let (cache, layer) = (contestants[index].cache, (round + 1) % contestants[index].layers)
        let seconds = try Self.seconds { () throws(KVError) in
          try attend(cache, layer: layer, queries, count, heads: 8, into: &output)
        }
        contestants[index].seconds[count, default: []].append(seconds)
      }
      round += 1
    }
  }
}
