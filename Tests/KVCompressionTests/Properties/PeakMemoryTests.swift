import KVCompression
import Testing

@testable import KVCore

/// What a cache allocates at its peak while a prompt is compressed.
@Suite struct PeakMemoryTests {
  static let tokens = 600
  static let shape = ModelShape(
    layerCount: 8, queryHeads: 4, kvHeads: 4, headDim: 32, rotary: try? RotaryEmbedding(headDim: 32))
  static let traffic = MiniCacheTests.alike(shape, tokens: tokens)

  /// Layers that are brought together release their rows a group, and where they can a head, at a time.
  @Test(arguments: [
    ("f16+minicache(from=0)", 1.10), ("f16+minicache", 1.10), ("kivi(bits=4)+minicache(from=0)", 1.10),
    ("kivi(bits=4)+minicache(from=0,scope=layer,retain=share)", 1.10), ("kivi(bits=2)+minicache", 1.10),
    ("cst(bits=4)+minicache(from=0)", 1.10), ("xkv(layers=4,rank_k=0.125,rank_v=0.1875)", 1.15),
    ("xkv(layers=8,rank_k=0.06,rank_v=0.08)", 1.25), ("xkv(layers=2,rank_k=0.25,rank_v=0.25,latents=int8)", 1.15),
    ("svd(rank_k=0.3,rank_v=0.3)", 1.10), ("h2o(budget=0.5)+f16+minicache(from=0)", 1.15),
  ])
  func whileCompressing(text: String, limit: Double) throws {
    let (shape, traffic, tokens) = (Self.shape, Self.traffic, Self.tokens)
    let cache = try makeCache(text, shape)
    for layer in 0..<8 {
      for start in stride(from: 0, to: tokens, by: 200) {
        try traffic.append(cache, layer, start..<start + 200)
        if cache.policy.inputs != .none { try traffic.attend(cache, layer, start..<start + 200) }
      }
    }
    let memory = cache.backend.memory
    let before = memory.liveBytes
    #expect(before >= 8 * 2 * 4 * tokens * 32 * 2)
    memory.resetPeak()
    try cache.finishPrefill()
    let peak = Double(memory.peakBytes) / Double(before)
    #expect(peak <= limit, "\(text): \(peak) times what was there before")
    #expect(cache.bytes.total == memory.liveBytes && memory.liveBytes < before)
  }

  /// Layer by layer no more than one group is ever held in full.
  @Test(arguments: [("f16+minicache(from=0)", 2), ("xkv(layers=4,rank_k=0.125,rank_v=0.1875)", 4)])
  func layerByLayer(text: String, layers: Int) throws {
    let (shape, traffic, tokens) = (Self.shape, Self.traffic, Self.tokens)
    let cache = try makeCache(text, shape)
    for layer in 0..<8 {
      try traffic.append(cache, layer, 0..<tokens)
      try cache.finishPrefill(layer: layer)
    }
    let memory = cache.backend.memory
    let group = layers * 2 * 4 * tokens * 32 * 2
    #expect(memory.peakBytes <= memory.liveBytes + group, "\(memory.peakBytes), \(memory.liveBytes) in the end")
  }
}
