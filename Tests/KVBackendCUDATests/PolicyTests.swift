import CCUDAEmulation
import KVBackendCPU
import KVBackendCUDA
import KVCompression
import KVCore
import KVExperiments
import Testing

extension CUDATests {
  /// Every registered method over the emulated card, from the registry itself: a new row is compared the day it is
  /// registered. CPU and card must choose the same rows and hold the same codes.
  @Suite struct PolicyTests {
    static func shape(layers: Int = 1) throws(KVError) -> ModelShape {
      ModelShape(
        layers: Array(repeating: LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 32), count: layers),
        rotary: try RotaryEmbedding(headDim: 32))
    }

    /// One policy for every registered method.
    static func registered() throws(KVError) -> [Conformance.Case] {
      try Conformance.cases(
        of: .standard, layer: LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 32),
        rotary: RotaryEmbedding(headDim: 32))
    }

    @Test func noRegisteredMethodIsLeftOut() throws {
      let methods = try Self.registered().map(\.method)
      #expect(methods == PolicyRegistry.standard.methods.map(\.name))
      #expect(Set(methods).isSuperset(of: ["cskv", "matryoshka", "minicache", "xkv", "rotatekv", "positions"]))
    }

    @Test func everyRegisteredMethod() throws {
      for item in try Self.registered() {
        try compare(item.policy, item.text, layers: item.layers)
        // What stores do beside evictions.
        guard PolicyRegistry.standard.method(named: item.method)?.role == .store, item.layers == 1 else { continue }
        let selection = try PolicyRegistry.standard.policy("h2o(budget=40)").selection
        try compare(Policy(selection, tiers: item.policy.tiers), "h2o+" + item.text)
      }
    }

    static let selections = [
      // Window statistics, reductions and positions that no default asks for.
      "streaming(sinks=2,recent=20)", "cam(budget=24,positions=slot)", "snapkv(budget=24,window=5,reduction=sum)",
      "streaming(sinks=3,recent=12,positions=rerotate)+f16", "h2o(budget=20)+positions+bf16",
      "tova(budget=20)+positions(policy=slot)", "snapkv(budget=20,window=4)+adakv+positions+f16",
      "knorm(budget=20)+schedule(chunks=true,every=3)+positions+f32",
    ]

    static let stores =
      [
        "f32", "bf16", "kivi(bits=3,residual=32)", "kivi(bits=8,residual=32,metadata=f32)",
        "kivi(key_bits=4,value_bits=2,residual=64)", "int8(scale=head,group=32)",
        "int8(format=int4,group=16,metadata=f16)", "int8(scale=tensor,factor=0.016)", "fp8(scale=token)",
        "fp8(key_format=e5m2,value_scale=head,value_group=32)", "ggml(keys=q8_0,values=q8_0)",
        "ggml(keys=q5_1,values=iq4_nl)", "ggml(keys=dense,values=q4_1)", "ggml(keys=q4_0,values=q5_0,residual=7)",
        "quant(keys=q8_0,values=int4)", "quant(keys=token,key_bits=3,values=f16)", "cst(key_bits=2,value_bits=3)",
        "kivi(bits=2,residual=32)+rotated(signs=true)", "pertoken(key_bits=2,value_bits=8)+rotated(keys=false)",
        "cst(key_bits=4,value_bits=4)+rotated(key_block=8)", "ggml(keys=q4_0,values=q8_0)+rotated",
        "fp8(scale=token)+rotated",
        "kivi(bits=2,residual=32)+layers(first=1,last=0)+ggml(keys=q4_0)",
        "svd(rank_k=0.2,rank_v=full,new=project,keep=3,latents=int4)",
        "svd(rank_k=full,rank_v=0.5,scope=head,new=refresh,keep=2,every=5)", "svd(rank_k=0.5,rope=post)",
      ]

    @Test(arguments: stores)
    func store(text: String) throws {
      try compare(PolicyRegistry.standard.policy(text), text)
      try compare(PolicyRegistry.standard.policy("h2o(budget=40)+" + text), "h2o+" + text)
    }

    @Test(arguments: selections)
    func selection(text: String) throws { try compare(PolicyRegistry.standard.policy(text), text) }

    func compare(_ policy: Policy, _ text: String, layers: Int = 1) throws {
      let before = cuda_emulation_allocated()
      do {
        let conformance = try Conformance(
          emulated(), against: .cpu(threads: 1, level: "portable"), shape: Self.shape(layers: layers))
        let outcome = try conformance.run(policy)
        #expect(outcome.complaint == nil, "\(text): \(outcome)")
      }
      #expect(cuda_emulation_allocated() == before, "\(text) leaks")
    }

    /// Layers that hold their rows together.
    @Test(arguments: [
      "xkv(rank_k=0.4,rank_v=0.6)", "minicache", "minicache(from=0,lengths=f32)", "h2o(budget=40)+minicache",
    ])
    func layersTogether(text: String) throws {
      let layer = LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 32)
      let shape = ModelShape(layers: [layer, layer, layer, layer], rotary: try RotaryEmbedding(headDim: 32))
      let policy = try PolicyRegistry.standard.policy(text)
      let reference = try FedCache(policy, shape, .cpu(threads: 1, level: "portable"))
      let subject = try FedCache(policy, shape, emulated())
      for (turn, tokens) in [60, 1, 1, 1].enumerated() {
        for layer in 0..<4 {
          let seed = UInt64(10 * turn + layer)
          let a = try subject.step(tokens, seed: seed, layer: layer)
          let b = try reference.step(tokens, seed: seed, layer: layer)
          #expect(
            FedCache.distance(a, b) <= 1e-5,
            "\(text): off by \(FedCache.distance(a, b)) in turn \(turn), layer \(layer)")
        }
        if turn == 0 {
          try subject.cache.finishPrefill()
          try reference.cache.finishPrefill()
        }
      }
      #expect(subject.cache.bytes.total == reference.cache.bytes.total || text.hasPrefix("h2o"))
    }

    /// Rows enough for several pieces a head, which are merged: 40 rows and 640, in one extent and in many.
    @Test(arguments: [
      "f16", "kivi(bits=4,residual=32)", "cst(key_bits=4,value_bits=2)",
      "quant(keys=channel,key_bits=3,values=token,value_bits=8)",
      "ggml(keys=q8_0,values=q4_0)+rotated", "svd(rank_k=0.5,rank_v=0.5)", "svd(rank_k=0.5,rope=post)",
      "rotatekv(key_bits=2)",
    ])
    func splitRows(text: String) throws {
      let shape = ModelShape(
        layers: [LayerShape(queryHeads: 6, kvHeads: 2, keyDim: 32, valueDim: 64)],
        rotary: try RotaryEmbedding(headDim: 32))
      let policy = try PolicyRegistry.standard.policy(text)
      let reference = try FedCache(policy, shape, .cpu(threads: 1, level: "portable"))
      let subject = try FedCache(policy, shape, emulated())
      for life in [reference, subject] {
        for turn in 0..<4 { try life.append(turn == 0 ? 40 : 200, seed: UInt64(turn)) }
        try life.cache.finishPrefill()
      }
      for turn in 4..<7 { try step(1, turn, subject, reference, text) }
    }

    private func step(_ tokens: Int, _ turn: Int, _ subject: FedCache, _ reference: FedCache, _ text: String) throws {
      let (a, b) = (
        try subject.step(tokens, seed: UInt64(turn)), try reference.step(tokens, seed: UInt64(turn))
      )
      let worst = FedCache.distance(a, b)
      // Sums of 77 products of numbers below 2, in another order: measured below 2e-6.
      #expect(worst <= 1e-5, "\(text): output of turn \(turn) is off by \(worst)")
    }
  }
}
