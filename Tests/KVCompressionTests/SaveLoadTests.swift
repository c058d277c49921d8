import KVCompression
import KVCore
import Testing

@Suite struct SaveLoadTests {
  /// Both caches live the same life from here on: every bit of every output, every decision, every byte.
  private func expectSameFuture(
    _ original: KVCache, _ loaded: KVCache, steps: ArraySlice<SavedStep>, sameBytes: Bool = true,
    _ context: Comment
  ) throws {
    for (index, step) in zip(steps.indices, steps) {
      let expected = try step.run(original, seed: UInt64(index))
      let found = try step.run(loaded, seed: UInt64(index))
      guard expected.map(\.bitPattern) == found.map(\.bitPattern) else {
        Issue.record("outputs differ in step \(index)")
        return
      }
    }
    if sameBytes {
      #expect(loaded.bytes == original.bytes, context)
      #expect(loaded.status == original.status, context)
      #expect(try loaded.saved() == original.saved(), context)
    }
    for (index, layer) in original.shape.layers.enumerated() {
      for head in 0..<layer.kvHeads where layer.cached {
        #expect(try original.read(layer: index, head: head) == loaded.read(layer: index, head: head), context)
      }
    }
    #expect(loaded.minimumTrim == original.minimumTrim, context)
  }

  @Test(arguments: SavedCases.texts)
  func continuesBitForBit(text: String) throws {
    let policy = try SavedCases.policy(text)
    let shape = try SavedCases.shape()
    let life = SavedStep.life
    // Empty, within the prompt, after it, while decoding, within the second prompt, at the end.
    for saving in [0, 1, 2, 3, 20, 48, 50, 53, life.count - 1] {
      let backend = try Backend.cpu(threads: 1)
      let cache = try KVCache(
        shape: shape, policy: policy, backend: backend, attention: AttentionOptions(scale: 0.2, softcap: 30))
      for index in 0..<saving { try life[index].run(cache, seed: UInt64(index)) }
      let bytes = try cache.saved()
      let other = try Backend.cpu(threads: 1)
      let loaded = try KVCache.load(saved: bytes, policy: policy, shape: shape, backend: other)
      #expect(loaded.bytes == cache.bytes, "\(text) after \(saving)")
      #expect(loaded.bytes.total == other.memory.liveBytes)
      #expect(loaded.status == cache.status)
      #expect(try loaded.saved() == bytes)
      #expect(loaded.attention == cache.attention)
      #expect(loaded.engineInputs == cache.engineInputs)
      try expectSameFuture(cache, loaded, steps: life[saving...], "\(text) after \(saving)")
    }
  }

  @Test(arguments: SavedCases.texts)
  func forksAreSavedWhole(text: String) throws {
    let policy = try SavedCases.policy(text)
    let shape = try SavedCases.shape()
    for saving in [1, 3, 30, 50] {
      let life = SavedStep.life
      let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))
      for index in 0..<saving { try life[index].run(cache, seed: UInt64(index)) }
      let fork = cache.fork()
      let before = try fork.saved()
      let loaded = try KVCache.load(saved: before, policy: policy, shape: shape, backend: .cpu(threads: 1))
      // The fork opens new memory where the loaded cache has room of its own: bytes may differ, nothing else.
      try expectSameFuture(fork, loaded, steps: life[saving...], sameBytes: false, "fork of \(text) after \(saving)")
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
      for step in SavedStep.life[..<20] { try step.run(cache, seed: 1) }
      try cache.trim(to: 131)
      let loaded = try KVCache.load(saved: cache.saved(), policy: policy, shape: open, backend: .cpu(threads: 1))
      #expect(loaded.bytes == cache.bytes)
      try expectSameFuture(cache, loaded, steps: SavedStep.life[20...], "\(text)")
    }
  }

  @Test func filesTellPolicyAndShape() throws {
    try withTemporaryPath { path in
      let shape = try SavedCases.shape()
      let policy = try SavedCases.policy("snapkv(budget=25%,window=8,every=16)+kivi(bits=2,residual=32)")
      let cache = try KVCache(
        shape: shape, policy: policy, backend: .cpu(), attention: AttentionOptions(softcap: 50, causal: true),
        inputs: .queries)
      for (index, step) in SavedStep.life[..<10].enumerated() { try step.run(cache, seed: UInt64(index)) }
      try cache.save(to: path)
      let description = try KVCache.savedDescription(path: path)
      #expect(description.policy == policy.spec.description)
      #expect(description.shape == shape)
      #expect(description.tokensSeen == 138)
      #expect(description.attention == cache.attention)
      #expect(description.inputs == .queries)
      #expect(try description == KVCache.savedDescription(of: cache.saved()))

      let loaded = try KVCache.load(from: path, backend: .cpu())
      #expect(loaded.policy.spec == policy.spec)
      try cache.save(to: path)
      let again = try KVCache.load(from: path, policy: policy, shape: shape, backend: .cpu())
      try expectSameFuture(cache, loaded, steps: SavedStep.life[10...], "by text")
      #expect(try again.saved() != loaded.saved())
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
  }
}
