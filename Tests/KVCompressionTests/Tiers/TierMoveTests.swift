import KVCompression
import KVCore
import Testing

/// Sends rows to tiers by a hash of position and time: back and forth, older behind newer.
private struct Shuffling: Router {
  var tiers: Int
  /// Tokens after which rows are sent elsewhere.
  var every = 1
  var protection: Protection { Protection() }
  var tierCount: Int { tiers }

  static func hash(_ a: Int, _ b: Int) -> UInt64 {
    var x = UInt64(a) &* 0x9E37_79B9_7F4A_7C15 &+ UInt64(b) &* 0xBF58_476D_1CE4_E5B9
    x ^= x >> 31
    x &*= 0x94D0_49BB_1331_11EB
    return x ^ x >> 29
  }

  /// Where a token is after `seen` tokens.
  func tier(_ position: Int, _ seen: Int) -> Int { Int(Self.hash(position, seen / every) % UInt64(tiers)) }

  func route(_ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing) {
    for head in 0..<layer.kvHeads {
      let rows = 0..<layer.rowCount(head: head)
      // The newest stays, of the others any.
      let survivors = rows.sorted {
        let (a, b) = (layer.position(head: head, row: $0), layer.position(head: head, row: $1))
        if a == layer.tokensSeen - 1 || b == layer.tokensSeen - 1 { return a > b }
        return Self.hash(a, head) > Self.hash(b, head)
      }.prefix(kept[head])
      for row in survivors {
        routing[head, row] = .tier(tier(layer.position(head: head, row: row), layer.tokensSeen))
      }
    }
  }
}

@Suite struct TierMoveTests {
  private static let geometries = [Geometry(4, 2, 40, 24), Geometry(16, 1, 16, 9), Geometry(1, 1, 1, 3)]
  private static let dense: [Store] = [.dense(.f32), .dense(.f16), .dense(.bf16)]

  private static func policy(
    _ tiers: [Store], budget: Budget = .unlimited, every: Int = 1, interval: Int? = 1, chunks: Bool = false,
    scorer: (any Scorer)? = nil, positions: PositionPolicy = .keep
  ) -> Policy {
    Policy(
      Selection(
        spec: StageSpec(name: "shuffling"), scorer: scorer, budget: budget,
        router: Shuffling(tiers: tiers.count, every: every),
        schedule: Schedule(afterPrefillChunks: chunks, decodeInterval: interval), positions: positions), tiers: tiers)
  }

  /// Every live row is in exactly one tier, holds what was appended, and attention is that over all of them.
  @Test func rowsWanderWithoutLoss() throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      withEvery("budget", in: [Budget.unlimited, .tokens(25), .fraction(0.5)]) { budget in
        withEvery("every", in: [1, 7]) { every in
          withEvery("chunks", in: [false, true]) { chunks in
            let backend = try Backend.cpu(threads: 1)
            let traffic = Traffic(geometry.shape(), tokens: 90, seed: 5)
            let policy = Self.policy(Self.dense, budget: budget, every: every, chunks: chunks)
            let cache = try KVCache(shape: traffic.shape, policy: policy, backend: backend)
            try traffic.run(cache, prompt: 50, chunk: 17)
            for token in 50..<90 {
              try traffic.checkedStep(cache, 0, token..<token + 1)
              check(cache.bytes.total == backend.memory.liveBytes, "bytes")
              for head in 0..<geometry.kvHeads {
                let held = try cache.read(layer: 0, head: head)
                let rows = held.positions
                let expected = budget == .unlimited ? token + 1 : budget == .tokens(25) ? 25 : (token + 1) / 2
                guard
                  check(rows.count == expected && zip(rows, rows.dropFirst()).allSatisfy(<), "\(rows) at \(token)")
                else { return }
                checkSame(held.keys, rows.flatMap { traffic.key(0, head, $0) }, "keys")
                checkSame(held.values, rows.flatMap { traffic.value(0, head, $0) }, "values")
              }
            }
          }
        }
      }
    }
  }

  /// Rows that are older than those of their new tier go through its codec like any other.
  @Test func olderRowsAreEncoded() throws {
    let kivi = try Store.kivi(keyBits: 8, residual: 32)
    let traffic = Traffic(Geometry(4, 2, 40, 24).shape(), tokens: 260, seed: 2)
    let cache = try KVCache(
      shape: traffic.shape, policy: Self.policy([.dense(.f32), kivi, kivi], every: 40), backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 150, chunk: 64)
    for token in 150..<260 { try traffic.checkedStep(cache, 0, token..<token + 1) }
    #expect(cache.bytes.metadata > 0)
    for head in 0..<2 {
      let held = try cache.read(layer: 0, head: head)
      #expect(held.positions == Array(0..<260))
      let worst = zip(held.keys, (0..<260).flatMap { traffic.key(0, head, $0) }).map { abs($0 - $1) }.max() ?? 0
      // A few trips through 8 bits over a range of at most 4, half a step each.
      #expect(worst < 8 * 4 / 255 / 2 + 0.01 && worst > 0)
    }
  }

  /// Queries from before the moves see what they saw then, also behind a softcap and over several rows of a group.
  @Test func causalQueriesOverUnsortedRows() throws {
    withEvery("geometry", in: Self.geometries) { geometry in
      withEvery("options", in: [AttentionOptions(), AttentionOptions(softcap: 3)]) { options in
        let traffic = Traffic(geometry.shape(), tokens: 80, seed: 9)
        let cache = try KVCache(
          shape: traffic.shape, policy: Self.policy(Self.dense), backend: .cpu(threads: 1), attention: options)
        try traffic.run(cache, prompt: 40, decoded: 40)
        var looking = options
        looking.commits = false
        let layer = traffic.shape.layers[0]
        let held = try (0..<geometry.kvHeads).map { try cache.read(layer: 0, head: $0) }
        for count in [1, 2, 20, 33, 80] {
          let output = try traffic.attend(cache, 0, 80 - count..<80, looking)
          try Oracle(
            held, layer, queries: traffic.queries(0, 80 - count..<80), tokens: count, firstPosition: 80 - count,
            options: options
          ).check(output)
        }
        looking.causal = false
        let output = try traffic.attend(cache, 0, 70..<80, looking)
        try Oracle(held, layer, queries: traffic.queries(0, 70..<80), tokens: 10, firstPosition: 70, options: looking)
          .check(output)
      }
    }
  }

  /// Distances in cached rows: three tiers of f32 count as one.
  @Test func slotsCountOverAllTiers() throws {
    var shape = Geometry(4, 2, 40, 24).shape()
    shape.rotary = try RotaryEmbedding(headDim: 40)
    withEvery("budget", in: [Budget.unlimited, .tokens(30)]) { budget in
      let traffic = Traffic(shape, tokens: 90, seed: 3)
      let tiers = [Store](repeating: .dense(.f32), count: 3)
      let many = try KVCache(
        shape: shape, policy: Self.policy(tiers, budget: budget, positions: .slot), backend: .cpu(threads: 1))
      let one = try KVCache(
        shape: shape, policy: Self.policy([.dense(.f32)], budget: budget, positions: .slot), backend: .cpu(threads: 1))
      let a = try traffic.run(many, prompt: 50, decoded: 40)
      let b = try traffic.run(one, prompt: 50, decoded: 40)
      checkClose(a, b, "attention over tiers")
    }
  }

  /// Forks part, saved caches continue with the same bits, and what moved is not trimmed away.
  @Test func forkSaveTrim() throws {
    withEvery("tiers", in: [Self.dense, [.dense(.f16), try! .kivi(keyBits: 4, residual: 32)]]) { tiers in
      withEvery("interval", in: [1, 5]) { interval in
        let policy = Self.policy(tiers, every: 3, interval: interval)
        let traffic = Traffic(Geometry(4, 2, 40, 24).shape(layers: 2), tokens: 140, seed: 4)
        let backend = try Backend.cpu(threads: 1)
        let cache = try KVCache(shape: traffic.shape, policy: policy, backend: backend)
        try traffic.run(cache, prompt: 80, decoded: 22)
        let saved = try cache.saved()
        let loaded = try KVCache.load(saved: saved, policy: policy, shape: traffic.shape, backend: backend)
        check(try loaded.saved() == saved, "saved again")
        check(try Snapshot(loaded) == Snapshot(cache), "loaded")
        check(loaded.minimumTrim == cache.minimumTrim, "minimum trim \(loaded.minimumTrim)")
        let fork = cache.fork()
        let before = try Snapshot(fork)
        for token in 102..<140 {
          let expected = try traffic.step(cache, token..<token + 1)
          // A loaded cache has room where the saved one opened new memory: last bits of codes' sums may differ.
          checkClose(try traffic.step(loaded, token..<token + 1), expected, "loaded, at \(token)")
        }
        check(try Snapshot(fork) == before, "the fork changed")
        for token in 102..<140 { try traffic.checkedStep(fork, 1, token..<token + 1) }

        // Only tokens after the last choice can be taken back.
        let minimum = cache.minimumTrim
        check((135...140).contains(minimum), "minimum trim \(minimum)")
        expectError(.irreversible, layer: 0) { try cache.trim(to: minimum - 1) }
        if minimum < 140 {
          try cache.trim(to: minimum)
          check(try cache.rows(layer: 0, head: 1) == Array(0..<minimum), "rows after trim")
          for token in minimum..<140 { try traffic.checkedStep(cache, 0, token..<token + 1) }
        }
      }
    }
  }

  /// An engine with kernels of its own reports weights in position order, whatever tier a row is in.
  @Test func observedWeightsFindTheirRows() throws {
    struct Observed: Scorer {
      var inputs: RequiredInputs { RequiredInputs(attentionWeights: true) }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        layer.accumulatedAttention(into: &scores)
        for head in 0..<layer.kvHeads {
          for row in 0..<layer.rowCount(head: head) {
            // Every step gave each row its position and head.
            let position = layer.position(head: head, row: row)
            let steps = layer.tokensSeen - max(position, 29)
            let expected = Float(steps * (position + 1000 * head))
            if scores[head, row] != expected || layer.accumulatedAttention(head: head, row: row) != expected {
              throw KVError(.nonFinite, "\(position): \(scores[head, row]), not \(expected)", head: head)
            }
          }
        }
      }
    }
    let traffic = Traffic(Geometry(4, 2, 40, 24).shape(), tokens: 60)
    let cache = try KVCache(
      shape: traffic.shape, policy: Self.policy(Self.dense, scorer: Observed()), backend: .cpu(threads: 1),
      inputs: .attentionWeights)
    func observe() throws {
      try cache.observe(
        layer: 0, attention: (0..<2).map { h in try cache.rows(layer: 0, head: h).map { Float($0 + 1000 * h) } })
    }
    try traffic.append(cache, 0, 0..<30)
    try observe()
    try cache.finishPrefill()
    for token in 30..<60 {
      try traffic.append(cache, 0, token..<token + 1)
      try observe()
      try cache.commit(layer: 0)
    }
  }

  /// A policy whose router knows more tiers than it has stores is refused before the first token.
  @Test func tooFewStoresAreRefused() throws {
    let policy = Policy(
      Selection(
        spec: StageSpec(name: "shuffling"), scorer: nil, budget: .unlimited, router: Shuffling(tiers: 3),
        schedule: Schedule()), tiers: [.dense(.f32), .dense(.f16)])
    expectError(.invalidOption, "3 tiers", "2 stores") {
      _ = try KVCache(shape: Geometry(1, 1, 3).shape(), policy: policy, backend: .cpu(threads: 1))
    }
  }
}
