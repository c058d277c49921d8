internal import KVCompression

extension Benchmark {
  private static let pass = 8192
  private static let step = 1024

  /// Appending blocks to a cache in use: conversion or quantization on the fly, memory included.
  func appending(_ machine: Machine) throws(KVError) {
    let stores = Self.stores.filter { wanted("append", $0, Self.pass, 0, machine) }
    if stores.isEmpty { return }
    let timed = Self.stores.filter { stores.contains($0) || $0 == "f16" }
    var caches: [KVCache] = []
    var checked: [Bool] = []
    for store in timed {
      let policy = try PolicyRegistry.standard.policy(store)
      caches.append(try cache(policy, layers: 1, heads: Self.allHeads, machine.backend))
      checked.append(try checkAppend(store, caches[caches.count - 1]))
    }
    var seconds = [[Double]](repeating: [], count: timed.count)
    var bandwidth: [Double] = []
    let clock = ContinuousClock()
    let start = clock.now
    var round = 0
    while round < 5 || (round < 51 && start.duration(to: clock.now).seconds < options.secondsPerGroup) {
      bandwidth.append(machine.probe.measure())
      for turn in timed.indices {
        let index = (turn + round) % timed.count
        seconds[index].append(try appendPass(caches[index], heads: Self.allHeads))
      }
      round += 1
    }
    let f16 = timed.firstIndex(of: "f16").map { BenchRecord.median(seconds[$0]) }
    for (index, store) in timed.enumerated() where stores.contains(store) {
      report(
        BenchRecord(
          name: "append", store: store, tokens: Self.pass, queries: 0, threads: machine.threads,
          seconds: seconds[index], bytes: Self.pass * BenchData.shape.kvHeads * BenchData.dim * 2 * 4,
          readBandwidth: BenchRecord.median(bandwidth), ratioToF16: f16.map { BenchRecord.median(seconds[index]) / $0 },
          checked: checked[index]))
    }
  }

  /// Seconds of `pass` tokens after a prompt of one step; the cache begins empty.
  @discardableResult
  private func appendPass(_ cache: KVCache, heads: [Int]) throws(KVError) -> Double {
    cache.reset()
    try data.append(0..<Self.step, to: cache, layer: 0, heads: heads)
    try cache.finishPrefill()
    return try Self.seconds { () throws(KVError) in
      for first in stride(from: Self.step, to: Self.step + Self.pass, by: Self.step) {
        try data.append(first..<first + Self.step, to: cache, layer: 0, heads: heads)
        try cache.commit(layer: 0)
      }
    }
  }

  /// What is stored must be the same to the bit whatever kernels stored it.
  private func checkAppend(_ store: String, _ cache: KVCache) throws(KVError) -> Bool {
    let heads = Self.checkedHeads(store, tokens: .max)
    let portable = try self.cache(
      PolicyRegistry.standard.policy(store), layers: 1, heads: heads, .cpu(level: "portable"))
    try appendPass(cache, heads: Self.allHeads)
    try appendPass(portable, heads: heads)
    for (index, head) in heads.enumerated() {
      if try cache.read(layer: 0, head: head) != portable.read(layer: 0, head: index) { return false }
    }
    return true
  }
}
