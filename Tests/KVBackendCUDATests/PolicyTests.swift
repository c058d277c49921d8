import CCUDAEmulation
import KVBackendCPU
import KVBackendCUDA
import KVCompression
import KVCore
import Testing

extension CUDATests {
  /// Every registered method over the emulated card, from the registry itself: a new row is compared the day it is
  /// registered. CPU and card must choose the same rows and hold the same codes.
  @Suite struct PolicyTests {
    /// Small values for the options methods commonly have; the first fitting of these where a method needs more.
    static let small: [String: String] = [
      "budget": "24", "window": "5", "kernel": "3", "sinks": "2", "residual": "32", "lag": "7", "queries": "6",
      "length": "4", "rank_k": "0.3", "rank_v": "0.6", "table": "[[1,0]]",
    ]

    static func text(_ method: MethodDescription) -> String {
      let options = method.options.compactMap { option in
        option.name == "window" && method.role == .store ? nil : small[option.name].map { "\(option.name)=\($0)" }
      }
      return options.isEmpty ? method.name : "\(method.name)(\(options.joined(separator: ",")))"
    }

    static func texts(_ role: MethodDescription.Role) -> [String] {
      // Bases that were calibrated for one model come from files: those methods have tests of their own.
      PolicyRegistry.standard.methods.filter { $0.role == role && !needsFile($0) }.map(text)
    }

    static func shape() throws(KVError) -> ModelShape {
      ModelShape(
        layers: [LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 32)],
        rotary: try RotaryEmbedding(headDim: 32))
    }

    static func needsFile(_ method: MethodDescription) -> Bool {
      do {
        let policy = try PolicyRegistry.standard.policy(text(method))
        _ = try KVCache(shape: shape(), policy: policy, backend: .cpu(threads: 1))
        return false
      } catch {
        return error.code == .missingInput
      }
    }

    static let selections =
      texts(.selection)
      + texts(.modifier).enumerated().map { index, text in
        (index % 2 == 0 ? "snapkv(budget=24,window=5,kernel=3)+" : "h2o(budget=24)+") + text
      } + [
        // Window statistics, reductions and positions that no default asks for.
        "streaming(sinks=2,recent=20)", "cam(budget=24,positions=slot)", "snapkv(budget=24,window=5,reduction=sum)",
      ]

    static let stores =
      texts(.store) + texts(.storeModifier).map { "pertoken+" + $0 } + [
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

    static func policy(_ selection: String, _ store: String) throws -> Policy {
      let text = [selection, store].filter { !$0.isEmpty }.joined(separator: "+")
      if let made = try? PolicyRegistry.standard.policy(text) { return made }
      // A selection of several tiers has f16 before the store, as often as needed.
      for tiers in 2...4 {
        let stores = Array(repeating: "f16", count: tiers - 1) + [store.isEmpty ? "kivi(residual=32)" : store]
        if let made = try? PolicyRegistry.standard.policy(([selection] + stores).joined(separator: "+")) {
          return made
        }
      }
      return try PolicyRegistry.standard.policy(text)
    }

    @Test(arguments: stores)
    func store(text: String) throws {
      try compare(Self.policy("", text), text)
      try compare(Self.policy("h2o(budget=40)", text), "h2o+" + text)
    }

    @Test(arguments: selections)
    func selection(text: String) throws {
      // Keys that are turned where they lie: refused by name, not yet on the card.
      if text.hasSuffix("+positions") {
        #expect { try compare(Self.policy(text, ""), text) } throws: { ($0 as? KVError)?.code == .unsupported }
        return
      }
      try compare(Self.policy(text, ""), text)
    }

    func compare(_ policy: Policy, _ text: String) throws {
      let shape = try Self.shape()
      let before = cuda_emulation_allocated()
      do {
        let reference = try Life(policy, shape, .cpu(threads: 1, level: "portable"))
        let subject = try Life(policy, shape, emulated())
        for (turn, tokens) in [33, 1, 38].enumerated() {
          try step(tokens, turn, subject, reference, text)
        }
        try subject.cache.finishPrefill()
        try reference.cache.finishPrefill()
        for turn in 3..<8 { try step(1, turn, subject, reference, text) }
        for head in 0..<2 {
          let (a, b) = (try subject.cache.read(layer: 0, head: head), try reference.cache.read(layer: 0, head: head))
          #expect(a.positions == b.positions, "\(text): other rows of head \(head)")
          guard a.positions == b.positions else { continue }
          #expect(Life.distance(a.keys, b.keys) <= 1e-4, "\(text): keys of head \(head)")
          #expect(Life.distance(a.values, b.values) <= 1e-4, "\(text): values of head \(head)")
        }
        #expect(subject.cache.backend.memory.liveBytes == subject.cache.bytes.total, "\(text)")
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
      let reference = try Life(policy, shape, .cpu(threads: 1, level: "portable"))
      let subject = try Life(policy, shape, emulated())
      for (turn, tokens) in [60, 1, 1, 1].enumerated() {
        for layer in 0..<4 {
          let seed = UInt64(10 * turn + layer)
          let a = try subject.step(tokens, seed: seed, layer: layer)
          let b = try reference.step(tokens, seed: seed, layer: layer)
          #expect(Life.distance(a, b) <= 1e-5, "\(text): off by \(Life.distance(a, b)) in turn \(turn), layer \(layer)")
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
      let reference = try Life(policy, shape, .cpu(threads: 1, level: "portable"))
      let subject = try Life(policy, shape, emulated())
      for life in [reference, subject] {
        for turn in 0..<4 { try life.append(turn == 0 ? 40 : 200, seed: UInt64(turn)) }
        try life.cache.finishPrefill()
      }
      for turn in 4..<7 { try step(1, turn, subject, reference, text) }
    }

    private func step(_ tokens: Int, _ turn: Int, _ subject: Life, _ reference: Life, _ text: String) throws {
      let (a, b) = (
        try subject.step(tokens, seed: UInt64(turn)), try reference.step(tokens, seed: UInt64(turn))
      )
      let worst = Life.distance(a, b)
      // Sums of 77 products of numbers below 2, in another order: measured below 2e-6.
      #expect(worst <= 1e-5, "\(text): output of turn \(turn) is off by \(worst)")
    }
  }

  /// One cache of one layer fed with the tokens of a sequence.
  final class Life {
    let cache: KVCache
    let shape: LayerShape
    /// What keys and values, and queries, are multiplied by.
    var size: Float = 1
    var querySize: Float = 1

    init(_ policy: Policy, _ model: ModelShape, _ backend: Backend) throws {
      cache = try KVCache(shape: model, policy: policy, backend: backend)
      shape = model.layers[0]
    }

    static func distance(_ a: [Float], _ b: [Float]) -> Float {
      if a.count != b.count { return .infinity }
      var worst: Float = 0
      for (x, y) in zip(a, b) { worst = abs(x - y) <= worst ? worst : abs(x - y) }
      return worst
    }

    /// Appends rows that nobody attends; returns numbers for queries.
    @discardableResult func append(_ tokens: Int, seed: UInt64, layer: Int = 0) throws -> [Float] {
      var numbers = ConformanceTests.Numbers(state: seed)
      let keys = (0..<shape.kvHeads * tokens * shape.keyDim).map { _ in size * numbers.next() }
      let values = (0..<shape.kvHeads * tokens * shape.valueDim).map { _ in size * numbers.next() }
      try cache.append(
        layer: layer, keys: TensorView(keys.span, heads: shape.kvHeads, tokens: tokens, dim: shape.keyDim),
        values: TensorView(values.span, heads: shape.kvHeads, tokens: tokens, dim: shape.valueDim))
      return (0..<shape.queryHeads * tokens * shape.keyDim).map { _ in querySize * numbers.next() }
    }

    func step(_ tokens: Int, seed: UInt64, layer: Int = 0) throws -> [Float] {
      let queries = try append(tokens, seed: seed, layer: layer)
      var output = [Float](repeating: .nan, count: shape.queryHeads * tokens * shape.valueDim)
      var span = output.mutableSpan
      var view = try MutableTensorView(&span, heads: shape.queryHeads, tokens: tokens, dim: shape.valueDim)
      try cache.attend(
        layer: layer, queries: TensorView(queries.span, heads: shape.queryHeads, tokens: tokens, dim: shape.keyDim),
        into: &view)
      return output
    }
  }
}
