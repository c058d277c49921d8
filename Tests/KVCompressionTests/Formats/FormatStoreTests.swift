import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Stores of these formats as caches: any way tokens come, any order of heads, numbers that do not fit.
@Suite struct FormatStoreTests {
  static let stores = [
    "int8", "int8(scale=head,group=32)", "int8(format=int4,group=16,metadata=f16)", "int8(scale=tensor,factor=0.05)",
    "fp8", "fp8(format=e5m2,scale=token)", "fp8(scale=head,group=64,metadata=bf16)", "ggml",
    "ggml(keys=q5_0,values=q5_1)", "ggml(keys=q4_0,values=q4_1)", "ggml(keys=iq4_nl,values=iq4_nl,residual=5)",
    "quant(keys=channel,key_bits=3,key_residual=64,values=e4m3)",
    "quant(keys=q8_0,values=token,value_bits=2,value_group=16)",
    "kivi(bits=2,residual=32)", "pertoken(bits=3,group=16,window=9)", "pertoken(bits=4,group=32)+rotated",
    "kivi(bits=4,residual=64)+rotated(keys=false,signs=false)",
  ]

  /// Appending by 1, 3, 7 or all at once: the same rows, the same bytes, the same attention.
  @Test(arguments: stores)
  func anyStep(store: String) throws {
    let traffic = Traffic(Geometry(4, 2, 64).shape(), tokens: 140, seed: 5)
    var expected: [HeadContents]?
    for step in [140, 1, 3, 7] {
      let cache = try makeCache(store, traffic.shape)
      for start in stride(from: 0, to: 140, by: step) {
        try traffic.append(cache, 0, start..<min(start + step, 140))
        if start == 0 { try cache.finishPrefill() } else { try cache.commit(layer: 0) }
      }
      let held = try (0..<2).map { try cache.read(layer: 0, head: $0) }
      #expect(held == expected ?? held, "by \(step)")
      expected = held
    }
  }

  /// Heads know nothing of each other.
  @Test(arguments: stores)
  func headsPermute(store: String) throws {
    let traffic = Traffic(Geometry(3, 3, 32).shape(), tokens: 80, seed: 6)
    var turned = traffic
    let size = 80 * 32
    turned.keys[0] = Array(traffic.keys[0][size...] + traffic.keys[0][..<size])
    turned.values[0] = Array(traffic.values[0][size...] + traffic.values[0][..<size])
    turned.queries[0] = Array(traffic.queries[0][size...] + traffic.queries[0][..<size])
    let (a, b) = (try makeCache(store, traffic.shape), try makeCache(store, traffic.shape))
    let (x, y) = (try traffic.run(a, prompt: 70, decoded: 10), try turned.run(b, prompt: 70, decoded: 10))
    for head in 0..<3 {
      #expect(try a.read(layer: 0, head: (head + 1) % 3) == b.read(layer: 0, head: head))
    }
    // The last token's output of heads 1 and 2, and of the heads that are 1 and 2 turned.
    let (old, new) = (Array(x.suffix(96)), Array(y.suffix(96)))
    checkSame(Array(old[32...]), Array(new[..<64]), "outputs")
  }

  /// NaN, infinity and what f16 cannot hold are refused with layer, head and token; nothing changes.
  @Test(arguments: stores)
  func badNumbers(store: String) throws {
    let shape = Geometry(2, 2, 32).shape(layers: 2)
    let cache = try makeCache(store, shape)
    let traffic = Traffic(shape, tokens: 8)
    try traffic.append(cache, 1, 0..<4)
    for bad: Float in [.nan, .infinity, -.infinity] {
      var keys = traffic.keys(1, 4..<8)
      keys[4 * 32 + 2 * 32 + 7] = bad
      let values = traffic.values(1, 4..<8)
      expectError(.nonFinite, "channel 7 of a key", layer: 1, head: 1, position: 6) {
        try cache.append(
          layer: 1, keys: TensorView(keys.span, heads: 2, tokens: 4, dim: 32),
          values: TensorView(values.span, heads: 2, tokens: 4, dim: 32))
      }
    }
    var keys = traffic.keys(1, 4..<8)
    keys[3] = 70000
    let values = traffic.values(1, 4..<8)
    expectError(.unrepresentable, "channel 3 of a key", layer: 1, head: 0, position: 4) {
      try cache.append(
        layer: 1, keys: TensorView(keys.span, heads: 2, tokens: 4, dim: 32),
        values: TensorView(values.span, heads: 2, tokens: 4, dim: 32))
    }
    #expect(cache.tokensSeen(layer: 1) == 4)
  }

  /// The byte formulas of the pages, per token and head.
  @Test(arguments: [
    ("int8", 132, 132), ("int8(metadata=f16)", 130, 130), ("int8(scale=tensor,factor=1)", 128, 128),
    ("int8(format=int4,group=32,metadata=f16)", 72, 72), ("fp8", 128, 128), ("fp8(scale=token)", 132, 132),
    ("ggml", 136, 136), ("ggml(keys=q5_1,values=q5_0)", 96, 88), ("ggml(keys=q4_1,values=q4_0)", 80, 72),
    ("ggml(keys=iq4_nl,values=dense)", 72, 256), ("int8(scale=head,group=128)", 128, 128),
  ])
  func byteFormulas(store: String, keys: Int, values: Int) throws {
    let shape = Geometry(1, 1, 128).shape()
    let policy = try PolicyRegistry.standard.policy(store)
    let a = try policy.estimate(shape: shape, prompt: 1024)
    let b = try policy.estimate(shape: shape, prompt: 2048)
    let scales = store.contains("scale=head") ? 2 * 1024 / 128 * 4 : 0
    #expect(b.total - a.total == 1024 * (keys + values) + scales)
  }

  @Test func headsThatAreNoBlocks() {
    expectError(.unsupported, "q8_0", "40 channels", "keys", layer: 0) {
      _ = try makeCache("ggml", Geometry(2, 2, 40, 32).shape())
    }
    expectError(.unsupported, "q4_1", "33 channels", "values", layer: 1) {
      _ = try makeCache(
        "ggml(keys=q8_0,values=q4_1)",
        ModelShape(layers: [Geometry(2, 2, 32).layer(), Geometry(2, 2, 32, 33).layer()]))
    }
  }

  @Test(arguments: [
    "int8(scale=tensor)", "int8(factor=2)", "int8(format=e4m3)", "int8(scale=tensor,factor=1,group=32)",
    "fp8(group=32)",
    "int8(group=12)", "int8(scale=head,group=48)", "fp8(scale=tensor,factor=0)", "ggml(keys=q2_k)",
    "quant(keys=q8_0,key_bits=4)", "quant(keys=f16,key_window=f32)", "quant(keys=channel,key_scale=head)",
    "quant(keys=int8,key_factor=1)", "quant(values=token,value_bits=5)", "quant(keys=q8_0,key_metadata=f32)",
  ])
  func textsThatContradictThemselves(text: String) {
    #expect { _ = try PolicyRegistry.standard.policy(text) } throws: { ($0 as? KVError)?.code == .invalidOption }
  }

  @Test(
    arguments: stores + [
      "int8(key_scale=tensor,key_factor=0.1,value_scale=head,value_group=64)",
      "quant(keys=e5m2,key_scale=head,values=int4,value_group=16)", "quant(keys=bf16,values=iq4_nl,value_residual=9)",
    ])
  func specsMakeTheSamePolicy(text: String) throws {
    let policy = try PolicyRegistry.standard.policy(text)
    let again = try PolicyRegistry.standard.policy(policy.spec.description)
    #expect(again.spec == policy.spec)
    #expect((again.tiers[0].factory as? RowFormat) == (policy.tiers[0].factory as? RowFormat))
  }
}
