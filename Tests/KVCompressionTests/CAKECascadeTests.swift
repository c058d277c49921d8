import KVCompression
import Testing

@testable import KVCore

/// Layers that finish their prompts one by one and give rows up to those that come.
@Suite struct CAKECascadeTests {
  static let layers = 6
  static let tokens = 400

  private func shape(sliding: Int? = nil) -> ModelShape {
    let geometry = Geometry(4, 2, 40)
    return ModelShape(
      layers: (0..<Self.layers).map { $0 == sliding ? geometry.layer(slidingWindow: 30) : geometry.layer() })
  }

  private func cache(_ text: String, _ shape: ModelShape) throws -> KVCache {
    try KVCache(shape: shape, policy: PolicyRegistry.standard.policy(text), backend: .cpu(threads: 1))
  }

  private func prompt(_ cache: KVCache, _ traffic: Traffic, _ layer: Int) throws {
    try traffic.append(cache, layer, 0..<Self.tokens)
    try traffic.attend(cache, layer, 0..<Self.tokens)
  }

  /// One whole layer and the rows of all budgets, twice while rows are copied: never all layers.
  @Test func peak() throws {
    let traffic = Traffic(shape(), tokens: Self.tokens)
    let text = "cake(budget=40,window=8)+f16"
    var peaks: [Int] = []
    var whole = 0
    for cascades in [true, false] {
      let cache = try cache(text, traffic.shape)
      for layer in 0..<Self.layers {
        try prompt(cache, traffic, layer)
        whole = max(whole, cache.bytes(layer: layer).total)
        if cascades {
          try cache.finishPrefill(layer: layer)
          #expect(cache.bytes.total == cache.backend.memory.liveBytes)
          let held = (0...layer).reduce(0) { $0 + cache.rowsHeld(layer: $1, head: 0) }
          #expect(held <= Self.layers * 40 + layer + 1, "\(held) rows after layer \(layer)")
        }
      }
      if !cascades { try cache.finishPrefill() }
      peaks.append(cache.backend.memory.peakBytes)
      #expect((0..<Self.layers).reduce(0) { $0 + cache.rowsHeld(layer: $1, head: 0) } == Self.layers * 40)
    }
    let budget = whole * 40 * Self.layers / Self.tokens
    #expect(peaks[0] <= whole + 2 * budget, "\(peaks[0]) bytes; one layer has \(whole), the budget \(budget)")
    #expect(peaks[1] >= Self.layers * whole)
  }

  /// Counts only ever fall, and what stays are the best rows of what was there.
  @Test func layersOnlyGiveUp() throws {
    let traffic = Traffic(shape(sliding: 2), tokens: Self.tokens + 8)
    let cache = try cache("cake(budget=40,window=8,tau1=0.5)+f32", traffic.shape)
    var held: [[[Int]]] = []
    for layer in 0..<Self.layers {
      try prompt(cache, traffic, layer)
      try cache.finishPrefill(layer: layer)
      for (earlier, sets) in held.enumerated() {
        for head in 0..<2 {
          let rows = try cache.rows(layer: earlier, head: head)
          #expect(Set(rows).isSubset(of: sets[head]) && rows.suffix(8).first == Self.tokens - 8)
          held[earlier][head] = rows
        }
      }
      held.append(try (0..<2).map { try cache.rows(layer: layer, head: $0) })
    }
    for token in Self.tokens..<Self.tokens + 8 { try traffic.step(cache, token..<token + 1) }
    #expect(cache.layers.allSatisfy { $0.cascade == nil && $0.queryWindow == nil })
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    // Decoding keeps what the cascade gave.
    for layer in [0, 1, 3, 4, 5] { #expect(cache.rowsHeld(layer: layer, head: 0) == held[layer][0].count) }
  }

  /// Some layers one by one, the rest together; and stores that encode when all are finished.
  @Test(arguments: ["f32", "kivi(bits=4,residual=32)", "int8"])
  func theRestTogether(store: String) throws {
    let traffic = Traffic(shape(), tokens: Self.tokens + 4)
    let cache = try cache("cake(budget=60,window=8)+" + store, traffic.shape)
    for layer in 0..<Self.layers {
      try prompt(cache, traffic, layer)
      if layer < 2 { try cache.finishPrefill(layer: layer) }
    }
    let fork = cache.fork()
    try cache.finishPrefill()
    #expect(fork.layers[1].cascade != nil && cache.layers[1].cascade == nil)
    for layer in 2..<Self.layers { try fork.finishPrefill(layer: layer) }
    for cache in [cache, fork] {
      #expect(abs((0..<Self.layers).reduce(0) { $0 + cache.rowsHeld(layer: $1, head: 1) } - Self.layers * 60) <= 6)
      for token in Self.tokens..<Self.tokens + 4 { try traffic.step(cache, token..<token + 1) }
      let restored = try KVCache.load(saved: try cache.saved(), backend: .cpu(threads: 1))
      #expect(restored.bytes == cache.bytes)
    }
    #expect(KVCache.bytes(of: [cache, fork]).total == cache.backend.memory.liveBytes)
  }

  @Test func refused() throws {
    let traffic = Traffic(shape(), tokens: Self.tokens + 1)
    let cache = try cache("cake(budget=40,window=8)+f16", traffic.shape)
    try prompt(cache, traffic, 0)
    try cache.finishPrefill(layer: 0)
    expectError(.wrongPhase, "already finished", layer: 0) { try cache.finishPrefill(layer: 0) }
    expectError(.wrongPhase, "other layers", layer: 0) {
      try traffic.append(cache, 0, Self.tokens..<Self.tokens + 1)
    }
    expectError(.wrongPhase, "saved before any or after all", layer: 0) { _ = try cache.saved() }
    // Queries that nobody showed: nothing has changed.
    try traffic.append(cache, 1, 0..<Self.tokens)
    let before = try cache.rows(layer: 0, head: 0)
    expectError(.missingInput, "not observed", layer: 1) { try cache.finishPrefill(layer: 1) }
    #expect(try cache.rows(layer: 0, head: 0) == before && cache.rowsHeld(layer: 1, head: 0) == Self.tokens)

    for text in ["cake(cascade=false)", "prefixkv", "cake+schedule(over=900)"] {
      let other = try self.cache(text, traffic.shape)
      try prompt(other, traffic, 0)
      expectError(.unsupported, "call finishPrefill()", layer: 0) { try other.finishPrefill(layer: 0) }
    }
  }
}
