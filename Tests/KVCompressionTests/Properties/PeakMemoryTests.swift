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
    ("cst(bits=4)+minicache(from=0)", 1.10), ("h2o(budget=0.5)+f16+minicache(from=0)", 1.15),
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

  /// Prompts much longer than a group is wide: latents take the place of rows piece by piece, and what is factored in,
  /// which is counted, is small beside them.
  @Test(arguments: [
    ("xkv(layers=8,rank_k=0.5,rank_v=0.5)", 1.2), ("xkv(layers=8,rank_k=0.25,rank_v=0.25)", 1.2),
    ("xkv(layers=8,rank_k=0.12,rank_v=0.12,equalise=true)", 1.2), ("xkv(layers=8,rank_k=full,rank_v=0.5)", 1.2),
    ("xkv(layers=8,rank_k=0.25,rank_v=0.25,latents=int4)", 1.2),
    ("xkv(layers=8,rank_k=0.5,rank_v=0.5,new=project,keep=40)", 1.2), ("xkv(layers=4,rank_k=0.5,rank_v=0.5)", 1.1),
    ("svd(rank_k=0.5,rank_v=0.5)", 1.05), ("svd(rank_k=0.5,rank_v=0.5,scope=head,rope=post)", 1.05),
  ])
  func whileFactoring(text: String, limit: Double) throws {
    let tokens = 8192
    let shape = ModelShape(
      layerCount: 8, queryHeads: 1, kvHeads: 1, headDim: 16, rotary: try RotaryEmbedding(headDim: 16))
    let traffic = Traffic(shape, tokens: tokens)
    let cache = try makeCache(text, shape)
    for layer in 0..<8 {
      for start in stride(from: 0, to: tokens, by: 1024) { try traffic.append(cache, layer, start..<start + 1024) }
    }
    let memory = cache.backend.memory
    let before = memory.liveBytes
    memory.resetPeak()
    try cache.finishPrefill()
    let peak = Double(memory.peakBytes) / Double(before)
    #expect(peak <= limit, "\(text): \(peak) times what was there before")
    #expect(cache.bytes.total == memory.liveBytes && memory.liveBytes < before)
    #expect(try cache.policy.estimate(shape: shape, prompt: tokens) == cache.bytes)
  }

  /// Layer by layer no more than one group is ever held in full.
  @Test(arguments: [("f16+minicache(from=0)", 2, 1.0), ("xkv(layers=4,rank_k=0.125,rank_v=0.1875)", 4, 1.25)])
  func layerByLayer(text: String, layers: Int, limit: Double) throws {
    let tokens = 4096
    let shape = ModelShape(
      layerCount: 8, queryHeads: 1, kvHeads: 1, headDim: 16, rotary: try RotaryEmbedding(headDim: 16))
    let traffic = MiniCacheTests.alike(shape, tokens: tokens)
    let cache = try makeCache(text, shape)
    for layer in 0..<8 {
      try traffic.append(cache, layer, 0..<tokens)
      try cache.finishPrefill(layer: layer)
    }
    let memory = cache.backend.memory
    let group = Double(layers * 2 * tokens * 16 * 2)
    let peak = Double(memory.peakBytes - memory.liveBytes) / group
    #expect(peak <= limit, "\(peak) times a group, and what is there in the end")
  }
}
