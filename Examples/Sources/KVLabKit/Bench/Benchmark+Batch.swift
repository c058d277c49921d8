internal import KVCompression

extension Benchmark {
  private static let sequences = 16
  private static let batchStores = ["f16", "kivi(bits=8)", "kivi(bits=4)", "kivi(bits=2)"]

  /// One new token of many sequences in one call: what a card is for.
  func batch(tokens: Int, _ machine: Machine) throws(KVError) {
    var f16: Double?
    for store in Self.batchStores where wanted("attend-b16", store, tokens, 1, machine) {
      let policy = try PolicyRegistry.standard.policy(store)
      var caches: [KVCache] = []
      for _ in 0..<Self.sequences {
        let own = try cache(policy, layers: 1, heads: Self.allHeads, machine.backend)
        try data.fill(own, layer: 0, tokens: tokens, heads: Self.allHeads)
        caches.append(own)
      }
      let one = data.queries(1, of: Self.allHeads)
      let dim = BenchData.dim
      // [head][sequence][channel]
      var queries: [Float] = []
      for head in 0..<one.count / dim {
        for _ in caches { queries += one[head * dim..<(head + 1) * dim] }
      }
      var output = [Float](repeating: 0, count: queries.count)
      try attend(caches, queries, into: &output)
      var alone = [Float](repeating: 0, count: one.count)
      try attend(caches[0], layer: 0, one, 1, heads: 8, into: &alone)
      var checked = true
      for head in 0..<one.count / dim {
        for index in caches.indices {
          let first = (head * caches.count + index) * dim
          checked = checked && output[first..<first + dim] == alone[head * dim..<(head + 1) * dim]
        }
      }
      var seconds: [Double] = []
      var bandwidth: [Double] = []
      for _ in 0..<21 {
        bandwidth.append(machine.probe.measure())
        seconds.append(try Self.seconds { () throws(KVError) in try attend(caches, queries, into: &output) })
      }
      let median = BenchRecord.median(seconds)
      if store == "f16" { f16 = median }
      let bytes = caches.reduce(0) { $0 + $1.bytes(layer: 0).payload + $1.bytes(layer: 0).metadata }
      report(
        BenchRecord(
          name: "attend-b16", store: store, tokens: tokens, queries: 1, threads: machine.threads, seconds: seconds,
          bytes: bytes, readBandwidth: BenchRecord.median(bandwidth), ratioToF16: f16.map { median / $0 },
          checked: checked))
    }
  }

  private func attend(_ caches: [KVCache], _ queries: [Float], into output: inout [Float]) throws(KVError) {
    let heads = queries.count / caches.count / BenchData.dim
    let view = try TensorView(queries.span, heads: heads, tokens: caches.count, dim: BenchData.dim)
    var span = output.mutableSpan
    var target = try MutableTensorView(&span, heads: heads, tokens: caches.count, dim: BenchData.dim)
    try KVCache.attend(
      caches, layer: 0, queries: view, tokens: Array(repeating: 1, count: caches.count), into: &target,
      options: AttentionOptions(commits: false))
  }
}
