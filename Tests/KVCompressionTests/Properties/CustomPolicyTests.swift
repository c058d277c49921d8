import KVCompression
import KVCore
import Testing

// Stages of a user, written against the public API only.

/// Large keys matter.
private struct LargeKeys: Scorer {
  var inputs: RequiredInputs { .none }
  func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    for head in 0..<layer.kvHeads {
      let keys = layer.keys(head: head)
      for row in 0..<layer.rowCount(head: head) {
        scores[head, row] = keys[row * layer.shape.keyDim..<(row + 1) * layer.shape.keyDim].reduce(0) { $0 + $1 * $1 }
      }
    }
  }
}

/// Even positions matter: a score whose choice a test can write down.
private struct EvenFirst: Scorer {
  var inputs: RequiredInputs { .none }
  func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    for head in 0..<layer.kvHeads {
      for row in 0..<layer.rowCount(head: head) {
        scores[head, row] = layer.position(head: head, row: row) % 2 == 0 ? 1 : 0
      }
    }
  }
}

/// Head h keeps `table[h]` rows.
private struct PerHead: Allocator {
  let table: [Int]
  func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    requests.map { request in zip(request.rows, table).map { min($0, $1) } }
  }
}

/// Layers share their rows: the first half gets a third.
private struct Pyramid: Allocator {
  var spansLayers: Bool { true }
  func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    requests.enumerated().map { index, request in
      zip(request.rows, request.budget).map { min($0, $1 * (requests.count - index) / requests.count) }
    }
  }
}

@Suite struct CustomPolicyTests {
  private static let geometry = Geometry(4, 2, 40, 24)

  private static func policy(
    _ scorer: any Scorer = LargeKeys(), budget: Budget = .tokens(24), allocator: any Allocator = UniformAllocator(),
    protection: Protection = Protection(sinks: 1, window: 4), others: Routing.Outcome = .dropped,
    schedule: Schedule = Schedule(), tiers: [Store] = [.dense(.f32)]
  ) -> Policy {
    Policy(
      Selection(
        spec: StageSpec(name: "custom"), scorer: scorer, budget: budget, allocator: allocator,
        router: TopKRouter(protection, others: others), schedule: schedule), tiers: tiers)
  }

  @Test func aScorerOfOnesOwn() throws {
    let traffic = Traffic(Self.geometry.shape(), tokens: 90)
    let cache = try KVCache(shape: traffic.shape, policy: Self.policy(), backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 80)
    for head in 0..<2 {
      let norms = (0..<80).map { traffic.key(0, head, $0).reduce(0) { $0 + $1 * $1 } }
      let middle = (1..<76).sorted { norms[$0] != norms[$1] ? norms[$0] > norms[$1] : $0 < $1 }.prefix(19)
      #expect(try cache.rows(layer: 0, head: head) == [0] + middle.sorted() + [76, 77, 78, 79])
    }
  }

  /// Heads of different lengths hold, and pay for, different rows.
  @Test func raggedHeadsFreeBytes() throws {
    withEvery("store", in: [Store.dense(.f32), .dense(.f16), try! .kivi(keyBits: 4, residual: 32)]) { store in
      withEvery("table", in: [[8, 60], [60, 8], [5, 5], [100, 100]]) { table in
        let backend = try Backend.cpu(threads: 1)
        let traffic = Traffic(Self.geometry.shape(), tokens: 104)
        let cache = try KVCache(
          shape: traffic.shape,
          policy: Self.policy(budget: .tokens(64), allocator: PerHead(table: table), tiers: [store]),
          backend: backend)
        try traffic.run(cache, prompt: 100)
        check(
          (0..<2).map { cache.rowsHeld(layer: 0, head: $0) } == table,
          "rows \((0..<2).map { cache.rowsHeld(layer: 0, head: $0) })")
        check(cache.bytes.total == backend.memory.liveBytes, "bytes")
        if store.spec.name == "dense" {
          let row = (40 + 24) * (store.spec.description.contains("f32") ? 4 : 2)
          // Every head has room for 64 rows at least; explicit positions only where some are missing.
          let payload = table.reduce(0) { $0 + max($1, 64) } * row
          check(cache.bytes.payload == payload, "payload \(cache.bytes.payload), expected \(payload)")
        }
        for token in 100..<104 { try traffic.checkedStep(cache, 0, token..<token + 1) }
      }
    }
  }

  @Test func raggedHeadsCostLess() throws {
    let traffic = Traffic(Self.geometry.shape(), tokens: 512)
    func bytes(_ table: [Int]) throws -> Int {
      let cache = try KVCache(
        shape: traffic.shape, policy: Self.policy(budget: .tokens(500), allocator: PerHead(table: table)),
        backend: .cpu(threads: 1))
      try traffic.run(cache, prompt: 512, chunk: 256)
      return cache.bytes.total
    }
    let (even, ragged, small) = (try bytes([256, 256]), try bytes([64, 448]), try bytes([64, 64]))
    #expect(abs(even - ragged) <= 64)
    #expect(small < even / 3)
  }

  @Test func budgetsOfLayersAndHeads() throws {
    let shape = Self.geometry.shape(layers: 3)
    let traffic = Traffic(shape, tokens: 70)
    let tables: [(Budget, [[Int]])] = [
      (.perLayer([.tokens(40), .tokens(20), .unlimited]), [[40, 40], [20, 20], [60, 60]]),
      (.perLayer([.fraction(0.5), .tokens(6), .fraction(0.1)]), [[30, 30], [6, 6], [6, 6]]),
      (
        .perHead([[.tokens(10), .tokens(30)], [.fraction(0.5), .unlimited], [.tokens(60), .tokens(7)]]),
        [[10, 30], [30, 60], [60, 7]]
      ),
    ]
    withEvery("budget", in: tables) { budget, expected in
      let policy = Self.policy(budget: budget)
      let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))
      try traffic.run(cache, prompt: 60)
      let rows = (0..<3).map { layer in (0..<2).map { cache.rowsHeld(layer: layer, head: $0) } }
      check(rows == expected, "rows \(rows)")
      check(try policy.estimate(shape: shape, prompt: 60) == cache.bytes, "estimate")
      for layer in 0..<3 { try traffic.checkedStep(cache, layer, 60..<61) }
    }
  }

  /// An estimate reads no memory that nobody wrote: a scorer of keys sees zeros, each time.
  @Test func estimatesAreTheSameEachTime() throws {
    struct Recording: Scorer {
      var inputs: RequiredInputs { .none }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        for head in 0..<layer.kvHeads {
          guard layer.keys(head: head).allSatisfy({ $0 == 0 }), layer.values(head: head).allSatisfy({ $0 == 0 }) else {
            throw KVError(.nonFinite, "a dry run showed memory nobody wrote", layer: layer.layer, head: head)
          }
        }
      }
    }
    let policy = Self.policy(Recording(), budget: .tokens(20))
    let shape = Self.geometry.shape()
    // Memory that was used before is not zero by luck.
    let dirt = (0..<64).map { _ in [Float](repeating: .nan, count: 60 * 40) }
    #expect(dirt.count == 64)
    let first = try policy.estimate(shape: shape, prompt: 60)
    for _ in 0..<20 { #expect(try policy.estimate(shape: shape, prompt: 60) == first) }
  }

  /// A model with a layer that has no cache still takes a table of budgets per head.
  @Test func tablesPassOverUncachedLayers() throws {
    let shape = ModelShape(layers: [Self.geometry.layer(), .uncached, Self.geometry.layer()])
    let budget = Budget.perHead([[.tokens(10), .tokens(20)], [.unlimited], [.tokens(30), .tokens(9)]])
    let traffic = Traffic(shape, tokens: 50)
    let cache = try KVCache(shape: shape, policy: Self.policy(budget: budget), backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 50)
    #expect(try positions(cache).map { $0.map(\.count) } == [[10, 20], [30, 9]])
  }

  @Test func layersThatShareABudget() throws {
    let shape = Self.geometry.shape(layers: 4)
    let traffic = Traffic(shape, tokens: 64)
    let policy = Self.policy(budget: .tokens(32), allocator: Pyramid())
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))
    try traffic.step(cache, 0..<64)
    let before = try Snapshot(cache)
    expectError(.unsupported, "finishPrefill()", layer: 2) { try cache.finishPrefill(layer: 2) }
    #expect(try Snapshot(cache) == before)
    try cache.finishPrefill()
    #expect((0..<4).map { cache.rowsHeld(layer: $0, head: 1) } == [32, 24, 16, 8])
  }

  // MARK: Byte budgets

  /// Right after the prompt and, for dense stores, at every decoded token. Quantized stores keep groups that have holes,
  /// which a budget in rows cannot foresee: while decoding they may be a group or so above it.
  @Test func byteBudgetsAreNeverExceeded() throws {
    withEvery("geometry", in: [Geometry(4, 2, 40, 24), Geometry(2, 1, 67)]) { geometry in
      withEvery("store", in: ["f32", "f16", "kivi(bits=2,residual=32)", "kivi(bits=8,residual=64)"]) { store in
        withEvery("bytes", in: [90_000, 131_171]) { bytes in
          withEvery(
            "selection", in: ["streaming(sinks=2,positions=keep", "snapkv(window=5", "snapkv(window=5,every=2", "h2o("]
          ) {
            let comma = $0.hasSuffix("(") ? "" : ","
            let traffic = Traffic(geometry.shape(), tokens: 530)
            let cache = try makeCache("\($0)\(comma)budget=\(bytes)B)+\(store)", traffic.shape)
            for start in stride(from: 0, to: 480, by: 120) {
              try traffic.append(cache, 0, start..<start + 120)
              // The few queries that H2O needs all of, the others the last of.
              if $0.hasPrefix("h2o") {
                try traffic.attend(cache, 0, start..<start + 120)
              } else if start == 360 {
                try traffic.attend(cache, 0, start + 110..<start + 120)
              }
            }
            try cache.finishPrefill()
            let rows = cache.rowsHeld(layer: 0, head: 0)
            if rows == 1 { return }
            check(cache.bytes.total <= bytes, "\(cache.bytes) = \(cache.bytes.total) after the prompt, \(rows) rows")
            if cache.policy.schedule.decodeInterval == nil { return }
            let limit = store.hasPrefix("kivi") ? bytes + bytes / 8 : bytes
            for token in 480..<530 {
              try traffic.step(cache, token..<token + 1)
              guard check(cache.bytes.total <= limit, "\(cache.bytes) = \(cache.bytes.total) at \(token)") else {
                return
              }
            }
          }
        }
      }
    }
  }

  // MARK: Tiers

  @Test func tiersHoldWhatTheyShould() throws {
    let kivi = try Store.kivi(keyBits: 4, residual: 32)
    withEvery("second tier", in: [Store.dense(.f16), .dense(.bf16), kivi]) { second in
      let policy = Self.policy(EvenFirst(), budget: .tokens(24), others: .tier(1), tiers: [.dense(.f32), second])
      let backend = try Backend.cpu(threads: 1)
      let traffic = Traffic(Self.geometry.shape(), tokens: 110)
      let cache = try KVCache(shape: traffic.shape, policy: policy, backend: backend)
      try traffic.run(cache, prompt: 100)
      check(cache.bytes.total == backend.memory.liveBytes, "bytes")
      for head in 0..<2 {
        check(try cache.rows(layer: 0, head: head) == Array(0..<100), "every token stays")
        let held = try cache.read(layer: 0, head: head)
        // The first tier: sink 0, window 96..., and of the others the 19 first even ones: exact, in f32.
        for position in [0] + (1...19).map({ 2 * $0 }) + [96, 97, 98, 99] {
          checkSame(
            Array(held.keys[position * 40..<(position + 1) * 40]), Array(traffic.key(0, head, position)),
            "key \(position)")
        }
        if second.spec.name == "dense" {
          checkSame(held.keys, (0..<100).flatMap { traffic.key(0, head, $0) }, "keys")
        }
      }
      // 24 rows of f32 in room for 64, the rest in the second tier with room for 64 more.
      let most = 2 * (40 + 24) * (64 * 4 + (76 + 64) * 2)
      check(cache.bytes.payload <= most, "\(cache.bytes), at most \(most)")
      if second.spec.name == "kivi" { check(cache.bytes.metadata > 0, "no metadata in \(cache.bytes)") }
      for token in 100..<110 { try traffic.checkedStep(cache, 0, token..<token + 1) }
      let estimate = try policy.estimate(shape: traffic.shape, prompt: 100, decoded: 10)
      if second.spec.name == "dense" { check(estimate.payload == cache.bytes.payload, "estimate \(estimate)") }
    }
  }

  /// Demoting rows step by step while decoding: the oldest of the window leave in order.
  @Test func tiersFillWhileDecoding() throws {
    let policy = Self.policy(
      EvenFirst(), budget: .tokens(12), protection: Protection(window: 12), others: .tier(1),
      schedule: Schedule(decodeInterval: 1), tiers: [.dense(.f32), .dense(.f16)])
    let backend = try Backend.cpu(threads: 1)
    let traffic = Traffic(Self.geometry.shape(), tokens: 130)
    let cache = try KVCache(shape: traffic.shape, policy: policy, backend: backend)
    try traffic.run(cache, prompt: 30)
    for token in 30..<130 {
      try traffic.checkedStep(cache, 0, token..<token + 1)
      check(cache.bytes.total == backend.memory.liveBytes, "bytes")
      check(cache.rowsHeld(layer: 0, head: 0) == token + 1, "rows")
    }
    // 118 rows of f16 and at most 12 + slack of f32, with the room a growing window is given.
    let limit = 2 * (40 + 24) * ((118 + 128) * 2 + (12 + 128) * 4)
    #expect(cache.bytes.payload <= limit, "payload \(cache.bytes.payload), at most \(limit)")
  }

  /// Scores that change their mind send rows back and forth.
  @Test func tiersWithScoresThatChange() throws {
    let policy = Self.policy(
      LargeKeys(), budget: .tokens(12), others: .tier(1), schedule: Schedule(decodeInterval: 1),
      tiers: [.dense(.f32), .dense(.f16)])
    let traffic = Traffic(Self.geometry.shape(), tokens: 60)
    let cache = try KVCache(shape: traffic.shape, policy: policy, backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 30)
    for token in 30..<60 { try traffic.checkedStep(cache, 0, token..<token + 1) }
    for head in 0..<2 {
      let held = try cache.read(layer: 0, head: head)
      #expect(held.positions == Array(0..<60))
      checkSame(held.keys, (0..<60).flatMap { traffic.key(0, head, $0) }, "keys")
    }
  }

  /// Accumulated attention goes with a row into its tier: per head it sums to queries times the heads of the group.
  @Test func scoresFollowRowsBetweenTiers() throws {
    final class Sums: Scorer, @unchecked Sendable {
      nonisolated(unsafe) var last: [Float] = []
      var inputs: RequiredInputs { RequiredInputs(attentionWeights: true) }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        last = (0..<layer.kvHeads).map { head in
          (0..<layer.rowCount(head: head)).reduce(0) { $0 + layer.accumulatedAttention(head: head, row: $1) }
        }
      }
    }
    withEvery("second tier", in: ["f16", "kivi"]) { name in
      let second = name == "f16" ? Store.dense(.f16) : try Store.kivi(keyBits: 8, residual: 32)
      let sums = Sums()
      let policy = Self.policy(
        sums, budget: .tokens(12), protection: Protection(window: 12), others: .tier(1),
        schedule: Schedule(decodeInterval: 1), tiers: [.dense(.f32), second])
      let traffic = Traffic(Self.geometry.shape(), tokens: 120)
      let cache = try KVCache(shape: traffic.shape, policy: policy, backend: .cpu(threads: 1))
      try traffic.run(cache, prompt: 40, chunk: 17)
      for token in 40..<120 {
        try traffic.step(cache, token..<token + 1)
        let expected = Float(2 * (token + 1))
        guard check(sums.last.allSatisfy { abs($0 - expected) < 1e-4 * expected }, "\(sums.last), not \(expected)")
        else {
          return
        }
      }
    }
  }

  // MARK: Ties

  /// Equal scores: the lower position wins, whatever the budget.
  @Test func tiesGoToTheLowerPosition() throws {
    struct Flat: Scorer {
      var inputs: RequiredInputs { .none }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {}
    }
    withEvery("tokens", in: [1, 2, 9, 30]) { tokens in
      withEvery("budget", in: [1, 2, 5, 29, 30, 31]) { budget in
        withEvery("sinks", in: 0...1) { sinks in
          let window = min(budget - sinks, 2)
          if window < 0 { return }
          let traffic = Traffic(Geometry(1, 1, 3).shape(), tokens: tokens)
          let cache = try KVCache(
            shape: traffic.shape,
            policy: Self.policy(Flat(), budget: .tokens(budget), protection: Protection(sinks: sinks, window: window)),
            backend: .cpu(threads: 1))
          try traffic.run(cache, prompt: tokens)
          let split = BudgetSplit.resolve(budgetTokens: budget, tokens: tokens, sinks: sinks, window: window)
          let expected = Array(0..<split.sinks + split.chosen) + Array(tokens - split.window..<tokens)
          let rows = try cache.rows(layer: 0, head: 0)
          check(rows == expected, "\(rows), expected \(expected)")
        }
      }
    }
  }
}
