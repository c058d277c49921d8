import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// `tiers`: which rows go where, and every selection with tiers behind it.
@Suite struct TierShareTests {
  static let lists: [(shares: String, stores: [String])] = [
    ("[0.2,0.3,0.5]", ["f32", "f16", "bf16"]), ("[0.3,0.7]", ["f16", "kivi(bits=4,residual=32)"]),
    ("[0,0.4,0.6]", ["kivi(bits=8,residual=32)", "f16", "kivi(bits=2,residual=32)"]),
  ]

  // MARK: The product

  @Test(arguments: lists.indices)
  func product(list: Int) throws {
    let (shares, stores) = Self.lists[list]
    var turn = list
    withEvery("selection", in: ProductTests.selections.filter { !$0.contains("0.4") } + [""]) { text in
      let settle = turn % 2 == 1
      let tiers = "tiers(shares=\(shares),settle=\(settle),sinks=1)"
      guard
        let made = try? PolicyRegistry.standard.policy(
          ((text.isEmpty ? [tiers] : [text, tiers]) + stores).joined(separator: "+"))
      else {
        // Methods with tiers of their own say so.
        expectError(.invalidOption, "already") { _ = try PolicyRegistry.standard.policy("\(text)+\(tiers)") }
        return
      }
      withEvery("schedule", in: ProductTests.schedules(made.selection)) { name, schedule in
        let geometry = Geometry.all[turn % Geometry.all.count]
        turn += 1
        labelled("\(geometry)") {
          try ProductTests.life(
            Policy(made.selection.scheduled(schedule), tiers: made.tiers), geometry, prompt: [41, 75, 1, 33][turn % 4],
            decoded: 9, chunk: [7, 16, 64][turn % 3], oracle: turn % 3 == 0)
        }
      }
    }
  }

  // MARK: Who goes where

  /// Scores that a test can write down: a permutation of the positions, another one for every head.
  private struct Known: Scorer {
    var inputs: RequiredInputs { .none }
    static func score(_ head: Int, _ position: Int) -> Float { Float((position * 37 + head * 11) % 101) }
    func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
      for head in 0..<layer.kvHeads {
        for row in 0..<layer.rowCount(head: head) {
          scores[head, row] = Known.score(head, layer.position(head: head, row: row))
        }
      }
    }
  }

  private static func selection(
    _ budget: Budget = .unlimited, _ protection: Protection = Protection(), every: Int? = nil
  ) -> Selection {
    Selection(
      spec: StageSpec(name: "known"), scorer: Known(), budget: budget, router: TopKRouter(protection),
      schedule: Schedule(decodeInterval: every))
  }

  /// Positions per head and tier.
  static func tiers(_ cache: KVCache) -> [[[Int]]] {
    let view = cache.view
    return (0..<view.kvHeads).map { head in
      var result = [[Int]](repeating: [], count: cache.policy.tiers.count)
      for row in 0..<view.rowCount(head: head) {
        result[view.tier(head: head, row: row)].append(view.position(head: head, row: row))
      }
      return result
    }
  }

  /// All rows sorted by score, cut at the shares: the oracle of a prompt.
  private static func expected(
    head: Int, tokens: Int, kept: Int, shares: [Double], sinks: Int, window: Int
  ) -> [[Int]] {
    let order = (0..<tokens).sorted {
      let (a, b) = (Known.score(head, $0), Known.score(head, $1))
      return a != b ? a > b : $0 < $1
    }
    let split = BudgetSplit.resolve(budgetTokens: kept, tokens: tokens, sinks: sinks, window: window)
    let protected = Set(split.sinkRange).union(split.windowRange)
    let alive = protected.union(order.filter { !protected.contains($0) }.prefix(split.chosen))
    // Sinks and window that survived first, then the best.
    let first = alive.filter { $0 < sinks || $0 >= tokens - window }
    var left = order.filter { alive.contains($0) && !first.contains($0) }[...]
    var result: [[Int]] = []
    for tier in shares.indices {
      let behind = shares[(tier + 1)...].reduce(0, +)
      let limit = alive.count - Int((behind * Double(alive.count) + 1e-6).rounded(.down))
      var own = tier == 0 ? Array(first) : []
      let taken = max(0, limit - result.joined().count - own.count)
      own += left.prefix(taken)
      left = left.dropFirst(taken)
      result.append(own.sorted())
    }
    return result
  }

  @Test func everyRowOfAPromptGoesToItsTier() throws {
    withEvery("tokens", in: [1, 2, 9, 40]) { tokens in
      withEvery("budget", in: [Budget.unlimited, .tokens(8), .fraction(0.5), .tokens(100)]) { budget in
        withEvery("shares", in: [[0.1, 0.3, 0.6], [0, 0, 1], [1, 0, 0], [0.34, 0.33, 0.33], [0, 1, 0]]) { shares in
          withEvery("sinks", in: [0, 2]) { sinks in
            withEvery("window", in: [0, 5]) { window in
              let policy = Policy(
                try Self.selection(budget).tiers(shares: TierShares(shares), sinks: sinks, window: window),
                tiers: Array(repeating: .dense(.f32), count: 3))
              let traffic = Traffic(Geometry(4, 2, 5).shape(), tokens: tokens)
              let cache = try KVCache(shape: traffic.shape, policy: policy, backend: .cpu(threads: 1))
              try traffic.run(cache, prompt: tokens)
              let kept =
                budget == .unlimited
                ? tokens
                : budget == .fraction(0.5)
                  ? max(1, tokens / 2)
                  : min(
                    tokens, budget == .tokens(8) ? 8 : 100)
              for head in 0..<2 {
                // The modifier's own sinks and window do not survive a budget that the selection set.
                let alive = Self.expected(head: head, tokens: tokens, kept: kept, shares: [1], sinks: 0, window: 0)[0]
                let wanted = Self.sharing(alive, head, tokens, shares, sinks, window)
                let found = Self.tiers(cache)[head]
                check(found == wanted, "\(found), not \(wanted)")
              }
            }
          }
        }
      }
    }
  }

  private static func sharing(
    _ alive: [Int], _ head: Int, _ tokens: Int, _ shares: [Double], _ sinks: Int, _ window: Int
  ) -> [[Int]] {
    // First and newest of the rows there were.
    let first = alive.filter { $0 < sinks || $0 >= max(sinks, tokens - window) }
    var left = alive.filter { !first.contains($0) }.sorted {
      let (a, b) = (Known.score(head, $0), Known.score(head, $1))
      return a != b ? a > b : $0 < $1
    }[...]
    var result: [[Int]] = []
    for tier in shares.indices {
      let behind = shares[(tier + 1)...].reduce(0, +)
      let limit = alive.count - Int((behind * Double(alive.count) + 1e-6).rounded(.down))
      var own = tier == 0 ? first : []
      let taken =
        tier == shares.count - 1 ? left.count : min(left.count, max(0, limit - result.joined().count - own.count))
      own += left.prefix(taken)
      left = left.dropFirst(taken)
      result.append(own.sorted())
    }
    return result
  }

  /// While decoding the worst of each tier moves on; nobody comes back, every row is somewhere.
  @Test func rowsOnlyMoveDown() throws {
    withEvery("every", in: [1, 4]) { every in
      let policy = Policy(
        try Self.selection(.unlimited, Protection(sinks: 1, window: 3), every: every).tiers(
          shares: TierShares([0.2, 0.3, 0.5])), tiers: [.dense(.f32), .dense(.f16), .dense(.bf16)])
      let traffic = Traffic(Geometry(4, 2, 40, 24).shape(), tokens: 120)
      let backend = try Backend.cpu(threads: 1)
      let cache = try KVCache(shape: traffic.shape, policy: policy, backend: backend)
      try traffic.run(cache, prompt: 40)
      var before = Self.tiers(cache)
      for token in 40..<120 {
        try traffic.checkedStep(cache, 0, token..<token + 1)
        check(cache.bytes.total == backend.memory.liveBytes, "bytes")
        let now = Self.tiers(cache)
        for head in 0..<2 {
          check(now[head].joined().sorted() == Array(0...token), "rows at \(token)")
          for tier in 1..<3 {
            let came = Set(now[head][tier]).subtracting(before[head][tier])
            check(came.allSatisfy { before[head][..<tier].joined().contains($0) || $0 >= token - 3 }, "\(came) came up")
          }
          check(now[head][0].starts(with: [0]) && now[head][0].suffix(3) == [token - 2, token - 1, token], "protected")
          if (token - 39) % every == 0 {
            let rows = token + 1
            let limits = [rows - Int(0.8 * Double(rows) + 1e-6), rows - rows / 2]
            check(now[head][0].count == limits[0], "\(now[head][0].count) of \(limits[0]) in the first")
            check(now[head][0].count + now[head][1].count == limits[1], "\(limits[1]) in two tiers")
          }
        }
        before = now
      }
    }
  }

  /// With `settle` only newcomers are sent anywhere.
  @Test func settledRowsStay() throws {
    let policy = Policy(
      try Self.selection(every: 10).tiers(shares: TierShares([0.6, 0.4]), settle: true),
      tiers: [.dense(.f32), .dense(.f16)])
    let traffic = Traffic(Geometry(4, 2, 40, 24).shape(), tokens: 100)
    let cache = try KVCache(shape: traffic.shape, policy: policy, backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 50, decoded: 25)
    let resumed = try KVCache.load(
      saved: cache.saved(), policy: policy, shape: traffic.shape, backend: .cpu(threads: 1))
    for token in 75..<100 {
      try traffic.step(cache, token..<token + 1)
      try traffic.step(resumed, token..<token + 1)
    }
    #expect(Self.tiers(resumed) == Self.tiers(cache))
    for head in 0..<2 {
      var low: [Int] = []
      for batch in [0..<50, 50..<60, 60..<70, 70..<80, 80..<90, 90..<100] {
        low += batch.sorted { Known.score(head, $0) < Known.score(head, $1) }.prefix(batch.count * 2 / 5)
      }
      #expect(Self.tiers(cache)[head][1] == low.sorted())
    }
  }

  @Test func sharesOfLayersAndHeads() throws {
    let shape = Geometry(4, 2, 5).shape(layers: 2)
    let traffic = Traffic(shape, tokens: 20)
    let tables: [(TierShares, [[Int]])] = [
      (try TierShares(perLayer: [[0.5, 0.5], [0.1, 0.9]]), [[10, 10], [2, 2]]),
      (try TierShares(perHead: [[[0, 1], [1, 0]], [[0.25, 0.75], [0.3, 0.7]]]), [[0, 20], [5, 6]]),
    ]
    for (shares, expected) in tables {
      let recency = Policy(
        try Selection.everything.tiers(shares: shares), tiers: [.dense(.f32), .dense(.f16)])
      let second = try KVCache(shape: shape, policy: recency, backend: .cpu(threads: 1))
      try traffic.run(second, prompt: 20)
      #expect((0..<2).map { l in (0..<2).map { second.layers[l].segments[0].liveCount(head: $0) } } == expected)
      // The text makes the same policy.
      #expect(try PolicyRegistry.standard.policy(recency.spec).spec == recency.spec)
      #expect(
        try PolicyRegistry.standard.policy(PolicySpec(configuration: recency.spec.json())).spec == recency.spec)
    }
    let wrong = Policy(
      try Selection.everything.tiers(shares: TierShares(perLayer: [[1, 0]])), tiers: [.dense(.f32), .dense(.f16)])
    expectError(.invalidOption, "2 layers") {
      _ = try KVCache(shape: shape, policy: wrong, backend: .cpu(threads: 1))
    }
  }

  /// Tiers of one format are that format, whatever the ranks.
  @Test func tiersOfOneFormatAreThatFormat() throws {
    let traffic = Traffic(Geometry(6, 3, 40, 24).shape(), tokens: 120)
    let plain = try makeCache("f16", traffic.shape)
    let outputs = try traffic.run(plain, prompt: 70, decoded: 50, chunk: 33)
    withEvery("shares", in: ["[0.1,0.2,0.7]", "[0,0.5,0.5]"]) { shares in
      let tiered = try makeCache("h2o(budget=100%)+tiers(shares=\(shares))+f16+f16+f16", traffic.shape)
      checkClose(try traffic.run(tiered, prompt: 70, decoded: 50, chunk: 33), outputs, "attention")
    }
  }

  @Test func badTexts() throws {
    for (text, part) in [
      ("tiers(shares=[0.5,0.6])+f16+f16", "add up to 1"), ("tiers(shares=[1.5,-0.5])+f16+f16", "0...1"),
      ("tiers(shares=[])+f16", "such as"), ("tiers(shares=0.5)+f16+f16", "such as"),
      ("tiers(shares=[0.5,0.5])+f16", "2 stores, 1 are named"),
      ("tiers(shares=[[0.5,0.5],[1]])+f16+f16", "shares of 0...1"),
      ("tiers(shares=[0.5,0.5])", "2 stores"), ("tiers(shares=[[0.5,a]])+f16+f16", "such as"),
      ("tiers(shares=[0.5,0.5])+tiers(shares=[0.5,0.5])+f16+f16", "already"), ("tiers+f16+f16+f16", "3 are named"),
    ] {
      expectError(.invalidOption, part) { _ = try PolicyRegistry.standard.policy(text) }
    }
  }

  /// A score that is NaN changes nothing.
  @Test func nanIsRefused() throws {
    struct Broken: Scorer {
      var inputs: RequiredInputs { .none }
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        if layer.tokensSeen > 30 { scores[1, 3] = .nan }
      }
    }
    let base = Selection(
      spec: StageSpec(name: "broken"), scorer: Broken(), budget: .unlimited, router: TopKRouter(),
      schedule: Schedule(decodeInterval: 1))
    let policy = Policy(
      try base.tiers(shares: TierShares([0.5, 0.5])), tiers: [.dense(.f32), try .kivi(keyBits: 4, residual: 32)])
    let traffic = Traffic(Geometry(4, 2, 5).shape(), tokens: 40)
    let cache = try KVCache(shape: traffic.shape, policy: policy, backend: .cpu(threads: 1))
    try traffic.run(cache, prompt: 30)
    try traffic.append(cache, 0, 30..<31)
    let before = Self.tiers(cache)
    expectError(.nonFinite, "row 3", layer: 0, head: 1) { try traffic.attend(cache, 0, 30..<31) }
    #expect(Self.tiers(cache) == before)
  }

  /// A budget in bytes counts every tier.
  @Test func byteBudgetsCountAllTiers() throws {
    withEvery("stores", in: ["f32+f16", "f16+kivi(bits=2,residual=32)"]) { stores in
      let traffic = Traffic(Geometry(4, 2, 40, 24).shape(), tokens: 1500)
      let cache = try makeCache("snapkv(budget=200000B,window=8)+tiers(shares=[0.3,0.7])+\(stores)", traffic.shape)
      try traffic.run(cache, prompt: 1500, chunk: 500)
      check((120_000...200_000).contains(cache.bytes.total), "\(cache.bytes.total) bytes")
      check(cache.rowsHeld(layer: 0, head: 0) < 1500, "nothing was dropped")
    }
  }

  /// The estimate is what a cache takes where the moves are known, and near it where scores decide: rows that wait to be
  /// reclaimed, and positions that happen to be consecutive, are a matter of data.
  @Test func estimates() throws {
    let cases = [
      ("tiers+f32+f16", 0), ("h2o(budget=100%)+tiers(shares=[0.2,0.3,0.5])+f32+f16+bf16", 0.2),
      ("h2o(budget=60%)+tiers(shares=[0.3,0.7])+f32+f16", 0.1),
    ]
    withEvery("case", in: cases) { text, slack in
      let shape = Geometry(4, 2, 40, 24).shape(layers: 2)
      let traffic = Traffic(shape, tokens: 600)
      let cache = try makeCache(text, shape)
      try traffic.run(cache, prompt: 530, decoded: 70, chunk: 200)
      let estimate = try cache.policy.estimate(shape: shape, prompt: 530, decoded: 70, chunk: 200)
      let off = abs(Double(estimate.total - cache.bytes.total)) / Double(cache.bytes.total)
      check(slack == 0 ? estimate == cache.bytes : off <= slack, "\(estimate), measured \(cache.bytes)")
    }
  }
}
