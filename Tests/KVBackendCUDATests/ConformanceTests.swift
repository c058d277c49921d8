import CCUDAEmulation
import KVBackendCPU
import KVBackendCUDA
import KVCompression
import KVCore
import KVExperiments
import Testing

extension CUDATests {
  /// The CUDA kernels, thread by thread on the CPU, against the portable CPU kernels: whole lives of caches.
  @Suite struct ConformanceTests {
    struct Geometry: CustomStringConvertible, Sendable {
      var queryHeads: Int
      var kvHeads: Int
      var keyDim: Int
      var valueDim: Int
      var slidingWindow: Int?
      var description: String { "\(queryHeads)/\(kvHeads)x\(keyDim):\(valueDim)" }

      var shape: ModelShape {
        ModelShape(
          layers: [
            LayerShape(
              queryHeads: queryHeads, kvHeads: kvHeads, keyDim: keyDim, valueDim: valueDim,
              slidingWindow: slidingWindow)
          ])
      }
    }

    static let geometries = [
      Geometry(queryHeads: 4, kvHeads: 2, keyDim: 64, valueDim: 64),
      Geometry(queryHeads: 2, kvHeads: 2, keyDim: 40, valueDim: 24),
      Geometry(queryHeads: 16, kvHeads: 1, keyDim: 16, valueDim: 9),
      Geometry(queryHeads: 3, kvHeads: 1, keyDim: 130, valueDim: 300),
      Geometry(queryHeads: 2, kvHeads: 1, keyDim: 1, valueDim: 3, slidingWindow: 20),
    ]

    static let policies = [
      "f32", "f16", "bf16", "kivi(bits=8,residual=32)", "kivi(bits=4,residual=32)", "kivi(bits=3,residual=32)",
      "kivi(bits=2,residual=32,metadata=f32)", "h2o(budget=24)+f16", "h2o(budget=24)+kivi(bits=4,residual=32)",
      "snapkv(budget=20,window=4,kernel=3)+f32", "snapkv(budget=40,window=4,reduction=max)+kivi(residual=32)",
      "streaming(sinks=2,recent=20,positions=keep)+bf16",
    ]

    /// Every policy meets the first shape and one of the odd ones.
    static let cases = policies.enumerated().flatMap { index, policy in
      [(policy, geometries[0]), (policy, geometries[1 + index % (geometries.count - 1)])]
    }

    @Test(arguments: cases)
    func life(policy: String, geometry: Geometry) throws {
      let before = cuda_emulation_allocated()
      do {
        let reference = try FedCache(policy, geometry, .cpu(threads: 1, level: "portable"))
        let subject = try FedCache(policy, geometry, emulated())
        for (turn, tokens) in [33, 1, 70].enumerated() {
          compare(try subject.step(tokens, seed: UInt64(turn)), try reference.step(tokens, seed: UInt64(turn)))
        }
        try subject.cache.finishPrefill()
        try reference.cache.finishPrefill()
        for turn in 3..<12 {
          compare(try subject.step(1, seed: UInt64(turn)), try reference.step(1, seed: UInt64(turn)))
        }
        // Where rows leave, the CPU compacts in place and keeps the column that marks them; both count what they hold.
        if geometry.slidingWindow == nil, try PolicyRegistry.standard.policy(policy).selection.schedule == .never {
          #expect(subject.cache.bytes == reference.cache.bytes)
        }
        #expect(subject.cache.backend.memory.liveBytes == subject.cache.bytes.total)
        for head in 0..<geometry.kvHeads {
          let (a, b) = (try subject.cache.read(layer: 0, head: head), try reference.cache.read(layer: 0, head: head))
          #expect(a.positions == b.positions)
          #expect(a.keys == b.keys, "keys of head \(head)")
          #expect(a.values == b.values, "values of head \(head)")
        }
      }
      #expect(cuda_emulation_allocated() == before)
    }

    private func compare(_ a: [Float], _ b: [Float]) {
      let worst = zip(a, b).map { abs($0 - $1) }.max() ?? 0
      #expect(a.count == b.count && worst <= 2e-5, "off by \(worst)")
    }
  }
}

extension FedCache {
  convenience init(_ text: String, _ geometry: CUDATests.ConformanceTests.Geometry, _ backend: Backend) throws(KVError)
  {
    try self.init(PolicyRegistry.standard.policy(text), geometry.shape, backend)
  }
}
