import KVCompression
import Testing

@testable import KVCore

/// What moves between tiers either moves whole, or not at all.
@Suite struct TierFailureTests {
  /// Rows, where they lie, and what they hold.
  private struct State: Equatable {
    var positions: [[[Int]]] = []
    var contents: [[Float]] = []
    var bytes: ByteCount

    init(_ cache: KVCache) throws {
      bytes = cache.bytes
      for state in cache.layers {
        for segment in state.segments {
          positions.append(
            (0..<segment.kvHeads).map { head in
              (0..<segment.slotCount(head: head)).filter { segment.isLive(head: head, slot: $0) }
                .map { segment.position(head: head, slot: $0) }
            })
        }
        for head in 0..<state.shape.kvHeads {
          let held = try cache.read(layer: state.layer, head: head)
          contents += [held.keys, held.values]
        }
      }
    }
  }

  /// Memory runs out at every allocation of a move in turn: each time everything is where it was, and once there is
  /// enough the rows move.
  @Test func movesRollBack() throws {
    let texts = [
      "tiers(shares=[0.2,0.3,0.5],every=0)+f32+bf16+kivi(bits=4,residual=32)",
      "tiers(shares=[0.2,0.8],every=0)+f16+rotatekv(bits=2,group=32)",
      "mikv(every=0)+f32+pertoken(bits=2,group=32)",
    ]
    withEvery("policy", in: texts) { text in
      let geometry = Geometry(4, 2, 32)
      let shape = try geometry.shape(layers: 1, rotary: true)
      let backend = try ShortBackend()
      let traffic = Traffic(shape, tokens: 70)
      let policy = try PolicyRegistry.standard.policy(text)
      let cache = try KVCache(shape: shape, policy: policy, backend: Backend(backend))
      try traffic.append(cache, 0, 0..<70)
      try traffic.attend(cache, 0, 0..<70)
      let before = try State(cache)
      let fork = cache.fork()
      // How many allocations it takes in all.
      backend.asked = 0
      try fork.finishPrefill()
      let needed = backend.asked
      check(needed > 4, "\(needed) allocations")
      var untouched = 0
      for count in 0..<needed {
        let copy = cache.fork()
        backend.left = count
        let threw: Bool
        do throws(KVError) {
          try copy.finishPrefill()
          threw = false
        } catch {
          check(error.code == .outOfMemory && error.layer == 0, "\(error)")
          threw = true
        }
        backend.left = nil
        let after = try State(copy)
        if threw, after.positions == before.positions {
          check(after.contents == before.contents, "contents changed after \(count) allocations")
          untouched += 1
        } else {
          // The rows have moved; what failed after that is encoding, which is tried again.
          check(after.positions == (try State(fork)).positions, "half moved after \(count) allocations")
        }
        check(try State(cache) == before, "the cache that was forked changed")
        if threw {
          try copy.finishPrefill()
          check(try State(copy).positions == State(fork).positions, "rows after a second try")
        }
      }
      check(untouched > 1, "no move failed")
    }
  }

  /// A row is held against the store it goes to, not the one it came to.
  @Test func rangesOfLaterTiers() throws {
    let geometry = Geometry(2, 2, 32)
    let shape = geometry.shape(layers: 2)
    let policy = try PolicyRegistry.standard.policy("tiers(shares=[0,1],sinks=2,every=1)+f32+pertoken(bits=4,group=32)")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))
    func append(_ layer: Int, _ tokens: Int, _ large: [(head: Int, token: Int, value: Float)]) throws {
      var rows = [Float](repeating: 1, count: 2 * tokens * 32)
      for place in large { rows[(place.head * tokens + place.token) * 32 + 5] = place.value }
      try cache.append(
        layer: layer, keys: TensorView(rows.span, heads: 2, tokens: tokens, dim: 32),
        values: TensorView(rows.span, heads: 2, tokens: tokens, dim: 32))
    }
    // Beyond f16, but sinks stay in f32.
    try append(0, 10, [(0, 1, 70000)])
    try append(1, 10, [(1, 6, -70000), (1, 8, 1e9)])
    let before = try State(cache)
    expectError(.unrepresentable, "store 2 of 2", "65504", "pertoken", layer: 1, head: 1, position: 6) {
      try cache.finishPrefill()
    }
    // No layer has changed, the first one neither.
    #expect(try State(cache) == before)
    try cache.trim(to: 6)
    try cache.finishPrefill()
    #expect(cache.layers[0].segments.map { $0.liveCount(head: 0) } == [2, 4])
    let sink = try cache.read(layer: 0, head: 0).keys[32 + 5]
    #expect(sink == 70000)
    // A wider store holds them.
    let wide = try PolicyRegistry.standard.policy(
      "tiers(shares=[0,1],every=1)+f32+pertoken(bits=4,metadata=f32,type=f32)")
    let other = try KVCache(shape: geometry.shape(), policy: wide, backend: .cpu(threads: 1))
    var rows = [Float](repeating: 1, count: 2 * 3 * 32)
    rows[0] = 1e9
    try other.append(
      layer: 0, keys: TensorView(rows.span, heads: 2, tokens: 3, dim: 32),
      values: TensorView(rows.span, heads: 2, tokens: 3, dim: 32))
    try other.finishPrefill()
    #expect(try other.read(layer: 0, head: 0).keys[0] == 1e9)
  }
}
