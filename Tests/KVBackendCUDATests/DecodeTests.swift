import CCUDAEmulation
import KVBackendCPU
import KVBackendCUDA
import KVCompression
import KVCore
import KVExperiments
import Testing

extension CUDATests {
  /// The kernels for tensor cores, whose fragments the emulation lays out as the instruction set does.
  @Suite struct DecodeTests {
    static func shape(_ queryHeads: Int, _ dim: Int, window: Int? = nil) throws -> ModelShape {
      ModelShape(
        layers: [
          LayerShape(queryHeads: queryHeads, kvHeads: 1, keyDim: dim, valueDim: dim, slidingWindow: window)
        ],
        rotary: try RotaryEmbedding(headDim: dim))
    }

    struct Case: CustomStringConvertible, Sendable {
      var policy: String
      var queryHeads: Int
      var dim = 128
      var window: Int?
      var kernel: String
      var description: String { "\(policy), \(queryHeads) heads of \(dim), \(kernel)" }
    }

    static let cases = [
      Case(policy: "f16", queryHeads: 4, kernel: "kv_decode_f16_128"),
      Case(policy: "f16", queryHeads: 8, dim: 64, window: 50, kernel: "kv_decode_f16_64"),
      Case(policy: "bf16", queryHeads: 3, kernel: "kv_decode_bf16_128"),
      Case(policy: "bf16", queryHeads: 12, dim: 64, kernel: "kv_decode_bf16_64"),
      Case(policy: "h2o(budget=60)+f16", queryHeads: 5, kernel: "kv_decode_f16_128"),
      Case(policy: "streaming(sinks=2,recent=50)+f16", queryHeads: 1, kernel: "kv_decode_f16_128"),
      Case(policy: "kivi(bits=2,residual=32)", queryHeads: 4, kernel: "kv_decode_affine2_128"),
      Case(policy: "kivi(bits=4,residual=32)", queryHeads: 8, kernel: "kv_decode_affine4_128"),
      Case(policy: "kivi(bits=4,group=64,residual=64)", queryHeads: 2, window: 70, kernel: "kv_decode_affine4_128"),
      Case(policy: "kivi(bits=8,group=128,residual=128)", queryHeads: 4, kernel: "kv_decode_affine8_128"),
      Case(policy: "h2o(budget=150)+kivi(bits=2,residual=32)", queryHeads: 4, kernel: "kv_decode_affine2_128"),
    ]

    @Test(arguments: cases)
    func agrees(_ item: Case) throws {
      let policy = try PolicyRegistry.standard.policy(item.policy)
      let model = try Self.shape(item.queryHeads, item.dim, window: item.window)
      let reference = try FedCache(policy, model, .cpu(threads: 1, level: "portable"))
      let subject = try FedCache(policy, model, emulated())
      let before = cuda_emulation_launches(item.kernel)
      var turn: UInt64 = 0
      func step(_ tokens: Int) throws {
        turn += 1
        let (a, b) = (try subject.step(tokens, seed: turn), try reference.step(tokens, seed: turn))
        #expect(FedCache.distance(a, b) <= 1e-5, "\(item): off by \(FedCache.distance(a, b)) in turn \(turn)")
      }
      try step(9)
      // Rows that are encoded while nobody looks, in several extents of odd lengths.
      for tokens in policy.selection.schedule == .never ? [150, 131] : [] {
        turn += 1
        try subject.append(tokens, seed: turn)
        try reference.append(tokens, seed: turn)
      }
      if policy.selection.schedule != .never { try step(170) }
      try subject.cache.finishPrefill()
      try reference.cache.finishPrefill()
      for tokens in [1, 1, 3, 1] { try step(tokens) }
      #expect(cuda_emulation_launches(item.kernel) > before, "\(item.kernel) did not run")
    }

    /// Magnitudes at both ends of what the stores hold: parts of f16 would vanish or overflow without their scaling.
    @Test(
      arguments: ["f16", "bf16", "kivi(bits=2,residual=32)", "kivi(bits=8,residual=32)"], [1e-4, 1, 300] as [Float])
    func magnitudes(policy: String, size: Float) throws {
      let made = try PolicyRegistry.standard.policy(policy)
      let model = try Self.shape(2, 128)
      let reference = try FedCache(made, model, .cpu(threads: 1, level: "portable"))
      let subject = try FedCache(made, model, emulated())
      for life in [subject, reference] {
        life.size = size
        life.querySize = 1 / size
        try life.append(100, seed: 1)
        try life.cache.finishPrefill()
      }
      let (a, b) = (try subject.step(1, seed: 2), try reference.step(1, seed: 2))
      #expect(FedCache.distance(a, b) <= 1e-5 * size, "\(policy) x \(size): off by \(FedCache.distance(a, b))")
    }
  }
}
