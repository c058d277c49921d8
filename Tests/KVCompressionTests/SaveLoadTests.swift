import KVCompression
import KVCore
import Testing

@Suite struct SaveLoadTests {
  /// Bits of everything attention gives in these steps.
  private func outputs(_ cache: KVCache, _ steps: ArraySlice<SavedStep>) throws -> [[UInt32]] {
    try zip(steps.indices, steps).map { index, step in
      try step.run(cache, seed: UInt64(index)).map(\.bitPattern)
    }
  }

  private func expectSame(_ found: KVCache, _ expected: KVCache, _ context: Comment) throws {
    #expect(found.bytes == expected.bytes, context)
    #expect(found.status == expected.status, context)
    #expect(found.minimumTrim == expected.minimumTrim, context)
    #expect(try found.saved() == expected.saved(), context)
  }

  @Test(arguments: SavedCases.texts)
  func continuesBitForBit(text: String) throws {
    let policy = try SavedCases.policy(text)
    let shape = try SavedCases.shape()
    let life = SavedStep.life(of: text)
    let cache = try KVCache(
      shape: shape, policy: policy, backend: .cpu(threads: 1), attention: AttentionOptions(scale: 0.2, softcap: 30))
    // Empty, within the prompt, after it, while decoding, within the second prompt, at the end.
    let points = [0, 1, 2, 3, 24, 41, life.count].filter { $0 <= life.count }
    var files: [[UInt8]] = []
    var expected: [[UInt32]] = []
    for index in 0...life.count {
      if points.contains(index) {
        let bytes = try cache.saved()
        files.append(bytes)
        let other = try Backend.cpu(threads: 1)
        let loaded = try KVCache.load(saved: bytes, policy: policy, shape: shape, backend: other)
        try expectSame(loaded, cache, "\(text) after \(index)")
        #expect(loaded.bytes.total == other.memory.liveBytes)
        #expect(loaded.attention == cache.attention)
        #expect(loaded.engineInputs == cache.engineInputs)
      }
      if index < life.count { expected += try outputs(cache, life[index...index]) }
    }
    for (point, bytes) in zip(points, files) {
      let loaded = try KVCache.load(saved: bytes, policy: policy, shape: shape, backend: .cpu(threads: 1))
      let found = try outputs(loaded, life[point...])
      let difference = zip(found, expected[point...]).enumerated().first { $1.0 != $1.1 }?.offset
      #expect(difference == nil, "\(text) after \(point): steps later")
      try expectSame(loaded, cache, "\(text) after \(point), at the end")
    }
  }

  @Test(arguments: SavedCases.texts)
  func forksAreSavedWhole(text: String) throws {
    let policy = try SavedCases.policy(text)
    let shape = try SavedCases.shape()
    let life = SavedStep.life(of: text)
    for saving in [1, 26] {
      // Where the fork must open new memory, the loaded cache has room of its own. Bytes differ then, and so do sums of
      // kernels that round a run of rows as a whole: those of the portable level do not.
      let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1, level: "portable"))
      _ = try outputs(cache, life[..<saving])
      let fork = cache.fork()
      let before = try fork.saved()
      let loaded = try KVCache.load(saved: before, policy: policy, shape: shape, backend: cache.backend)
      let steps = life[saving..<saving + 13]
      #expect(try outputs(fork, steps) == outputs(loaded, steps), "\(text) after \(saving)")
      for (index, layer) in shape.layers.enumerated() where layer.cached {
        for head in 0..<layer.kvHeads {
          #expect(try fork.read(layer: index, head: head) == loaded.read(layer: index, head: head))
        }
      }
      #expect(try cache.saved() == before)
    }
  }

  @Test func trimmedCachesAreSaved() throws {
    let shape = try SavedCases.shape()
    for text in ["f32", "kivi(bits=4,residual=128)"] {
      let policy = try SavedCases.policy(text)
      var open = shape
      open.layers.removeLast()
      let cache = try KVCache(shape: open, policy: policy, backend: .cpu(threads: 1))
      _ = try outputs(cache, SavedStep.life[..<12])
      try cache.trim(to: 90)
      let loaded = try KVCache.load(saved: cache.saved(), policy: policy, shape: open, backend: .cpu(threads: 1))
      try expectSame(loaded, cache, "\(text)")
      #expect(try outputs(cache, SavedStep.life[12..<20]) == outputs(loaded, SavedStep.life[12..<20]))
      try expectSame(loaded, cache, "\(text), later")
    }
  }

  @Test func filesTellPolicyAndShape() throws {
    try withTemporaryPath { path in
      let shape = try SavedCases.shape()
      let policy = try SavedCases.policy("snapkv(budget=25%,window=8,every=16)+kivi(bits=2,residual=32)")
      let cache = try KVCache(
        shape: shape, policy: policy, backend: .cpu(), attention: AttentionOptions(softcap: 50, causal: true),
        inputs: .queries)
      _ = try outputs(cache, SavedStep.life[..<10])
      try cache.save(to: path)
      let description = try KVCache.savedDescription(path: path)
      #expect(description.policy == policy.spec.description)
      #expect(description.shape == shape)
      #expect(description.tokensSeen == 96)
      #expect(description.attention == cache.attention)
      #expect(description.inputs == .queries)
      #expect(try description == KVCache.savedDescription(of: cache.saved()))

      let loaded = try KVCache.load(from: path, backend: .cpu())
      #expect(loaded.policy.spec == policy.spec)
      try cache.save(to: path)
      let again = try KVCache.load(from: path, policy: policy, shape: shape, backend: .cpu())
      try expectSame(again, loaded, "by text")
      let steps = SavedStep.life[10..<30]
      #expect(try outputs(cache, steps) == outputs(loaded, steps))
      try expectSame(loaded, cache, "by text, later")
    }
    #expect(throws: KVError.self) { try KVCache.load(from: "/tmp/no-such-file.kvc", backend: .cpu()) }
  }

  @Test(arguments: SavedCases.texts.filter { !["two tiers", "ragged heads"].contains($0) })
  func registryMakesThePolicyAgain(text: String) throws {
    let cache = try KVCache(shape: SavedCases.shape(), policy: SavedCases.policy(text), backend: .cpu())
    let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu())
    #expect(loaded.policy.spec == cache.policy.spec)
    #expect(loaded.shape == cache.shape)
  }

  @Test func everyRotaryEmbeddingSurvives() throws {
    let scalings: [RotaryEmbedding.Scaling] = [
      .none, .linear(factor: 4), .ntk(factor: 2.5), .dynamicNTK(factor: 2, originalContext: 4096),
      .yarn(factor: 8, originalContext: 8192), .explicit(inverseFrequencies: [1, 0.5, 0.25, 0], attentionFactor: 1.5),
      .yarn(factor: 8, originalContext: 8192, betaFast: 16, betaSlow: 2, attentionFactor: 1.25, truncate: false),
      .llama3(factor: 8, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalContext: 8192),
    ]
    for scaling in scalings {
      for (layout, product) in [
        (RotaryEmbedding.Layout.halfSplit, RotaryEmbedding.AngleProduct.f32), (.interleaved, .f64),
      ] {
        let plain = try RotaryEmbedding(
          headDim: 32, rotaryDim: 8, theta: 500_000, layout: layout, scaling: scaling, angleProduct: product)
        for rotary in [plain, try plain.resolved(contextLength: 20_000)] {
          let shape = try SavedCases.shape(rotary: rotary)
          let cache = try KVCache(shape: shape, policy: SavedCases.policy("f16"), backend: .cpu())
          #expect(try KVCache.savedDescription(of: cache.saved()).shape == shape)
        }
      }
    }
    let bare = try KVCache(
      shape: ModelShape(layerCount: 2, queryHeads: 2, kvHeads: 1, headDim: 8), policy: SavedCases.policy("f16"),
      backend: .cpu())
    #expect(try KVCache.savedDescription(of: bare.saved()).shape == bare.shape)
  }

  @Test func whatDoesNotFitIsNamed() throws {
    let shape = try SavedCases.shape()
    let policy = try SavedCases.policy("h2o(heavy=20,recent=20)")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    let bytes = try cache.saved()
    func refusal(
      _ policy: Policy, _ shape: ModelShape, attention: AttentionOptions? = nil, inputs: EngineInputs? = nil
    ) -> KVError? {
      do {
        _ = try KVCache.load(
          saved: bytes, policy: policy, shape: shape, backend: .cpu(), attention: attention, inputs: inputs)
        return nil
      } catch {
        return error
      }
    }
    #expect(refusal(policy, shape) == nil)
    #expect(refusal(policy, shape, attention: AttentionOptions()) == nil)
    let wrong = refusal(try SavedCases.policy("h2o(heavy=21,recent=20)"), shape)
    #expect(wrong?.code == .invalidOption)
    #expect(wrong?.message.contains("heavy=20") == true)
    #expect(wrong?.message.contains("heavy=21") == true)

    var fewer = shape
    fewer.layers.removeLast()
    #expect(refusal(policy, fewer)?.message.contains("4 layers in the file, 3 were given") == true)
    var wider = shape
    wider.layers[1].valueDim = 64
    let layer = refusal(policy, wider)
    #expect(layer?.code == .invalidOption)
    #expect(layer?.message.contains("layer 1 has 3 KV and 3 query heads, 32 key and 32 value channels") == true)
    let turned = try SavedCases.shape(rotary: RotaryEmbedding(headDim: 32, theta: 500))
    #expect(refusal(policy, turned)?.message.contains("base 10000.0") == true)
    #expect(refusal(policy, shape, attention: AttentionOptions(scale: 0.5))?.code == .invalidOption)
    #expect(refusal(policy, shape, inputs: .queries)?.code == .missingInput)
    let twoTiers = Policy(policy.selection, tiers: [policy.tiers[0], policy.tiers[0]])
    #expect(refusal(twoTiers, shape)?.code == .invalidOption)
    #expect(throws: KVError.self) { try KVCache.load(saved: bytes, backend: .cpu(), inputs: []) }

    // Nothing is written that could not be read: such a cache is not even made.
    var absurd = shape
    absurd.layers[2].kvHeads = -1
    let error = #expect(throws: KVError.self) {
      try KVCache(shape: absurd, policy: policy, backend: .cpu()).saved()
    }
    #expect(error?.code == .invalidOption)
    #expect(error?.layer == 2)
  }
}
