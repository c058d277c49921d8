import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Other stores for some layers.
@Suite struct LayersTests {
  private static let shape = Geometry(2, 1, 64).shape(layers: 5)

  private func payload(_ text: String, layer: Int) throws -> Int {
    let cache = try makeCache(text, Self.shape)
    let traffic = Traffic(Self.shape, tokens: 128)
    for layer in 0..<5 { try traffic.append(cache, layer, 0..<128) }
    try cache.finishPrefill()
    return cache.bytes(layer: layer).total
  }

  @Test func everyLayerHasItsStore() throws {
    let text =
      "kivi(bits=2,residual=32)+layers(first=1,last=2)+kivi(bits=8,residual=32)+layers(first=0,last=0,list=[0,1])+f32"
    let wanted = [
      "kivi(bits=8,residual=32)", "f32", "kivi(bits=2,residual=32)", "kivi(bits=8,residual=32)",
      "kivi(bits=8,residual=32)",
    ]
    for (layer, store) in wanted.enumerated() {
      #expect(try payload(text, layer: layer) == payload(store, layer: layer), "layer \(layer)")
    }
    let policy = try PolicyRegistry.standard.policy(text)
    #expect(policy.tiers.count == 1)
    #expect(try PolicyRegistry.standard.policy(policy.spec.description).spec == policy.spec)
    let traffic = Traffic(Self.shape, tokens: 100)
    let cache = try KVCache(shape: Self.shape, policy: policy, backend: .cpu(threads: 1))
    let outputs = try traffic.run(cache, prompt: 80, decoded: 10)
    #expect(!outputs.contains { !$0.isFinite })
    #expect(try policy.estimate(shape: Self.shape, prompt: 80, decoded: 10) == cache.bytes)
    let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu(threads: 1))
    checkSame(try traffic.step(loaded, 90..<91), try traffic.step(cache, 90..<91), "after loading")
    // The same store in layers of both kinds, by hand.
    let made = try Store.kivi(keyBits: 2, residual: 32).except(
      in: LayerChoice(first: 1, last: 2), .kivi(keyBits: 8, residual: 32)
    )
    .except(in: LayerChoice(list: [0, 1]), .dense(.f32))
    #expect(Policy(store: made).spec == policy.spec)
  }

  /// With tiers and selections: an exception belongs to the store it stands behind.
  @Test func withASelection() throws {
    let text = "snapkv(budget=40,window=8)+ggml+layers(first=1,last=1)+f16"
    let cache = try makeCache(text, Self.shape)
    try Traffic(Self.shape, tokens: 90).run(cache, prompt: 80, decoded: 5)
    #expect((0..<5).allSatisfy { cache.rowsHeld(layer: $0, head: 0) == 45 })
    // Scales of blocks are metadata; dense rows have none.
    #expect((0..<5).map { cache.bytes(layer: $0).metadata > 0 } == [false, true, true, true, false])
  }

  @Test(arguments: [
    "layers", "layers+f16", "f16+layers", "f16+layers+layers+f32", "h2o+layers+f16", "f16+layers(first=-1)+f32",
    "f16+layers(list=[-2])+f32",
  ])
  func misplaced(text: String) {
    #expect { _ = try PolicyRegistry.standard.policy(text) } throws: { ($0 as? KVError)?.code == .invalidOption }
  }

  /// What a layer's store refuses is refused with the layer.
  @Test func refusalsNameTheLayer() {
    expectError(.unsupported, "q8_0", layer: 1) {
      _ = try makeCache(
        "f16+layers(first=0,last=1)+ggml", ModelShape(layers: [Geometry(2, 2, 40).layer(), Geometry(2, 2, 40).layer()]))
    }
  }
}
