internal import Foundation
internal import KVCompression

/// What the host does for a decoded token while a card would work: on a driver whose calls return at once.
extension Benchmark {
  private static let hostStores = [
    "f16", "kivi(bits=4)", "h2o(budget=2048)+f16", "snapkv(budget=2048,window=32)+kivi(bits=4)",
  ]
  /// Layers take turns, as in a model: nothing of one is at hand when it is its turn again.
  private static let hostLayers = 32
  /// Tokens of one mean: those between two batches of codes, and between two times that gaps are closed.
  private static let hostPeriod = 128

  /// The counters of the driver in `Tests/NullCUDA`; nil with any other.
  private struct NullDriver {
    let allocations: @convention(c) () -> Int
    let calls: @convention(c) (CInt) -> Int

    init?() {
      guard let program = dlopen(nil, RTLD_NOW), let first = dlsym(program, "null_cuda_allocations"),
        let second = dlsym(program, "null_cuda_calls")
      else { return nil }
      allocations = unsafeBitCast(first, to: (@convention(c) () -> Int).self)
      calls = unsafeBitCast(second, to: (@convention(c) (CInt) -> Int).self)
    }
  }

  func hostTime(tokens: Int, _ machine: Machine) throws(KVError) {
    guard options.backend == .cuda, let driver = NullDriver() else { return }
    for store in Self.hostStores where wanted("host", store, tokens, 1, machine) {
      try hostTime(store, tokens, sequences: 1, driver, machine)
    }
    for store in Self.hostStores where wanted("host-b16", store, tokens, 1, machine) {
      try hostTime(store, tokens, sequences: 16, driver, machine)
    }
  }

  private func hostTime(
    _ store: String, _ tokens: Int, sequences: Int, _ driver: NullDriver, _ machine: Machine
  ) throws(KVError) {
    let policy = try PolicyRegistry.standard.policy(store)
    let layers = sequences == 1 ? Self.hostLayers : 2
    var caches: [KVCache] = []
    for _ in 0..<sequences {
      let own = try cache(policy, layers: layers, heads: Self.allHeads, machine.backend)
      for layer in 0..<layers { try fillWhole(own, layer, tokens) }
      try own.finishPrefill()
      caches.append(own)
    }
    let one = data.queries(1, of: Self.allHeads)
    let queries = (0..<sequences).flatMap { _ in one }
    var output = [Float](repeating: 0, count: queries.count)
    let counts = [Int](repeating: 1, count: sequences)
    func step() throws(KVError) {
      for layer in 0..<layers {
        for cache in caches {
          let token = cache.tokensSeen(layer: layer)
          try data.append(token..<token + 1, to: cache, layer: layer, heads: Self.allHeads)
        }
        let heads = BenchData.shape.queryHeads
        let view = try TensorView(queries.span, heads: heads, tokens: sequences, dim: BenchData.dim)
        var span = output.mutableSpan
        var target = try MutableTensorView(&span, heads: heads, tokens: sequences, dim: BenchData.dim)
        if sequences == 1 {
          try caches[0].attend(layer: layer, queries: view, into: &target)
        } else {
          try KVCache.attend(caches, layer: layer, queries: view, tokens: counts, into: &target)
        }
      }
    }
    var seconds: [Double] = []
    var steps = 0
    var quiet = 0
    var calls = [0, 0, 0, 0, 0]
    let clock = ContinuousClock()
    for _ in 0..<Self.hostPeriod { try step() }
    let start = clock.now
    while seconds.count < 2 || start.duration(to: clock.now).seconds < options.secondsPerGroup {
      var sum = 0.0
      for _ in 0..<Self.hostPeriod {
        let before = driver.allocations()
        for index in calls.indices { calls[index] -= driver.calls(CInt(index)) }
        sum += try Self.seconds { () throws(KVError) in try step() }
        for index in calls.indices { calls[index] += driver.calls(CInt(index)) }
        steps += 1
        if driver.allocations() == before { quiet += 1 }
      }
      seconds.append(sum / Double(Self.hostPeriod * layers * sequences))
    }
    var record = BenchRecord(
      name: sequences == 1 ? "host" : "host-b\(sequences)", store: store, tokens: tokens, queries: 1,
      threads: machine.threads, seconds: seconds, bytes: caches.reduce(0) { $0 + $1.bytes(layer: 0).total },
      // Memory is extended after many tokens, in all layers after the same. A batch has lists of its own.
      readBandwidth: machine.probe.measure(), checked: sequences > 1 || Double(quiet) >= 0.9 * Double(steps))
    record.stepsWithoutAllocation = Double(quiet) / Double(steps)
    record.driverCalls = calls.map { Double($0) / Double(steps * layers * sequences) }
    report(record)
  }
}
