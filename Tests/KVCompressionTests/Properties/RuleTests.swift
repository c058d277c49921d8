import KVCompression
import KVCore
import Testing

/// Every allocator and rule on every small case: what is protected stays, counts are the allocator's, ties go to the lower
/// position, budgets hold for every length.
@Suite struct RuleTests {
  /// Scores with many ties: a few values, the same for two runs.
  struct Few: Scorer {
    var levels: Int
    var inputs: RequiredInputs { .none }
    func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
      for head in 0..<layer.kvHeads {
        for row in 0..<layer.rowCount(head: head) {
          scores[head, row] = score(layer.layer, head, layer.position(head: head, row: row))
        }
      }
    }

    func score(_ layer: Int, _ head: Int, _ position: Int) -> Float {
      Float((position * 7 + head * 5 + layer * 3) % 11 % levels)
    }
  }

  static let changes: [(String, @Sendable (Selection) throws -> Selection)] = [
    ("none", { $0 }),
    ("adakv", { try $0.adaKV(floor: 0.2) }), ("adakv kvpress", { try $0.adaKV(floor: 0.5, form: .kvpress) }),
    ("pyramid", { try $0.pyramid(beta: 2) }), ("pyramid official", { try $0.pyramid(beta: 3, form: .official) }),
    ("pyramid kvpress", { try $0.pyramid(beta: 4, form: .kvpress) }),
    ("pyramid clip adakv", { try $0.pyramid(beta: 2, short: .clip).adaKV(floor: 0) }),
    ("prefix", { try $0.prefix() }), ("prefix adakv", { try $0.adaKV().prefix(tolerance: 1) }),
    ("chunks 1", { try $0.chunks(length: 1) }), ("chunks 3", { try $0.chunks(length: 3, shared: false) }),
    ("chunks 4 shared", { try $0.chunks(length: 4) }), ("whole chunks", { try $0.chunks(length: 3, whole: true) }),
    ("even", { try $0.even(length: 3) }), ("shared", { try $0.shared(.max) }),
    ("critical", { try $0.critical(first: 0.5) }), ("critical adakv", { try $0.adaKV(form: .kvpress).critical() }),
    ("crush", { try $0.crush(RepresentativeRule(form: .paper, share: 0.5, anchor: .mean)) }),
    ("crush blocks", { try $0.crush(RepresentativeRule(form: .code, block: 2, share: 0.4, anchor: .alternating)) }),
    ("threshold", { try $0.threshold(score: 2) }), ("mass", { try $0.threshold(mass: 0.5) }),
  ]

  @Test(arguments: changes.map(\.0))
  func everySmallCase(name: String) throws {
    let change = try #require(Self.changes.first { $0.0 == name }).1
    withEvery("heads", in: 1...3) { heads in
      let shape = Geometry(heads, heads, 4).shape(layers: 2)
      let backend = try Backend.cpu(threads: 1)
      let traffic = Traffic(shape, tokens: 10)
      withEvery("sinks", in: 0...2) { sinks in
        withEvery("window", in: 0...3) { window in
          withEvery("budget", in: max(1, sinks + window)...10) { budget in
            let selection = try change(
              Selection(
                spec: nil, scorer: Few(levels: 1 + (budget + sinks) % 4), budget: .tokens(budget),
                router: TopKRouter(Protection(sinks: sinks, window: window)), schedule: Schedule()))
            let policy = Policy(selection, store: .dense(.f32))
            withEvery("tokens", in: 0...9) { tokens in
              let cache = try KVCache(shape: shape, policy: policy, backend: backend)
              for layer in 0..<2 where tokens > 0 { try traffic.append(cache, layer, 0..<tokens) }
              try cache.finishPrefill()
              try Self.check(cache, name, heads: heads, tokens: tokens, budget: budget, sinks: sinks, window: window)
            }
          }
        }
      }
    }
  }

  // MARK: Decoding

  /// When a sweep's policy chooses, and what that leaves of a head that all its rows fit.
  struct Clock {
    let budget: Int
    let every: Int
    let over: Int?
    var rows = 0
    private var since = 0

    init(budget: Int, every: Int, over: Int?) {
      self.budget = budget
      self.every = every
      self.over = over
    }

    var schedule: Schedule {
      Schedule(afterPrefill: true, decodeInterval: every, trigger: over.map { .tokens($0) })
    }

    /// - Returns: whether the policy chooses.
    private mutating func choose() -> Bool {
      if let over, rows <= over { return false }
      rows = min(rows, budget)
      return true
    }

    mutating func prompt(_ tokens: Int) {
      rows = tokens
      _ = choose()
    }

    mutating func step() -> Bool {
      rows += 1
      since += 1
      if since < every { return false }
      since = 0
      return choose()
    }
  }

  /// What the rule "none" keeps, by sorting.
  static func expected(
    _ rows: [Int], keeping budget: Int, sinks: Int, window: Int, score: (Int) -> Float
  ) -> [Int] {
    if rows.count <= budget { return rows }
    let middle = rows.dropFirst(sinks).dropLast(window)
    let best = middle.sorted { (score($0), $1) > (score($1), $0) }.prefix(budget - sinks - window)
    return Array(rows.prefix(sinks)) + best.sorted() + Array(rows.suffix(window))
  }

  /// The same cases token by token, under every kind of schedule, and in turns with another sequence of the same policy.
  @Test(arguments: changes.map(\.0))
  func everySmallCaseWhileDecoding(name: String) throws {
    let change = try #require(Self.changes.first { $0.0 == name }).1
    var cases = 0
    withEvery("heads", in: 1...3) { heads in
      let shape = Geometry(heads, heads, 4).shape(layers: 2)
      let backend = try Backend.cpu(threads: 1)
      let traffic = Traffic(shape, tokens: 10)
      withEvery("sinks", in: 0...2) { sinks in
        withEvery("window", in: 0...3) { window in
          withEvery("budget", in: max(1, sinks + window)...10) { budget in
            cases += 1
            let prompt = [0, 1, 4, 7][cases % 4]
            let clock = [
              Clock(budget: budget, every: 1, over: nil), Clock(budget: budget, every: 2, over: nil),
              Clock(budget: budget, every: 3, over: nil), Clock(budget: budget, every: 1, over: budget + 2),
              Clock(budget: budget, every: 2, over: budget + 1),
            ][cases % 5]
            let scorer = Few(levels: 1 + (budget + sinks) % 4)
            let policy = Policy(
              try change(
                Selection(
                  spec: nil, scorer: scorer, budget: .tokens(budget),
                  router: TopKRouter(Protection(sinks: sinks, window: window)), schedule: clock.schedule)),
              store: .dense(.f32))
            let run = DecodeRun(
              name: name, heads: heads, sinks: sinks, window: window, clock: clock, scorer: scorer, prompt: prompt)
            let cache = try KVCache(shape: shape, policy: policy, backend: backend)
            let other = cases % 3 == 0 ? try KVCache(shape: shape, policy: policy, backend: backend) : nil
            try run.decode(cache, traffic, between: other)
            if other == nil { return }
            let alone = try KVCache(shape: shape, policy: policy, backend: backend)
            try run.decode(alone, traffic, between: nil)
            KVCompressionTests.check(try positions(cache) == positions(alone), "in turns as alone")
          }
        }
      }
    }
  }

  /// One case of the sweep.
  struct DecodeRun {
    let name: String
    let heads: Int
    let sinks: Int
    let window: Int
    var clock: Clock
    let scorer: Few
    let prompt: Int

    /// Decodes to ten tokens, a token of `other` between any two.
    func decode(_ cache: KVCache, _ traffic: Traffic, between other: KVCache?) throws {
      var clock = clock
      for layer in 0..<2 where prompt > 0 { try traffic.append(cache, layer, 0..<prompt) }
      try cache.finishPrefill()
      try other?.finishPrefill()
      clock.prompt(prompt)
      var rows = (0..<2).map { layer in (0..<heads).map { choice(Array(0..<prompt), clock, layer, $0) } }
      try check(cache, clock, rows, seen: prompt, chosen: true)
      for token in prompt..<10 {
        for layer in 0..<2 { try step(cache, traffic, layer, token) }
        let chosen = clock.step()
        for layer in 0..<2 {
          for head in 0..<heads {
            rows[layer][head].append(token)
            rows[layer][head] = choice(rows[layer][head], clock, layer, head)
          }
          if let other { try step(other, traffic, layer, token - prompt) }
        }
        try check(cache, clock, rows, seen: token + 1, chosen: chosen)
      }
    }

    private func step(_ cache: KVCache, _ traffic: Traffic, _ layer: Int, _ token: Int) throws {
      try traffic.append(cache, layer, token..<token + 1)
      try cache.commit(layer: layer)
    }

    private func choice(_ rows: [Int], _ clock: Clock, _ layer: Int, _ head: Int) -> [Int] {
      if rows.count <= clock.rows { return rows }
      return RuleTests.expected(rows, keeping: clock.budget, sinks: sinks, window: window) {
        scorer.score(layer, head, $0)
      }
    }

    private func check(_ cache: KVCache, _ clock: Clock, _ rows: [[[Int]]], seen: Int, chosen: Bool) throws {
      let held = try positions(cache)
      for layer in 0..<2 {
        for head in 0..<heads {
          let own = held[layer][head]
          KVCompressionTests.check(zip(own, own.dropFirst()).allSatisfy(<), "positions \(own)")
          KVCompressionTests.check(own.starts(with: 0..<min(sinks, seen)), "sinks of \(own)")
          KVCompressionTests.check(
            own.suffix(window).elementsEqual(max(0, seen - window)..<seen), "window of \(own) at \(seen)")
          KVCompressionTests.check(seen == 0 || !own.isEmpty, "nothing is left")
        }
        let counts = held[layer].map(\.count)
        switch name {
        case "none":
          KVCompressionTests.check(held[layer] == rows[layer], "\(held[layer]), not \(rows[layer])")
        case "chunks 1", "chunks 3", "chunks 4 shared", "even", "shared", "critical", "crush", "crush blocks":
          KVCompressionTests.check(counts.allSatisfy { $0 == clock.rows }, "\(counts) rows, not \(clock.rows)")
        case "adakv kvpress", "critical adakv":
          if clock.over == nil, chosen {
            KVCompressionTests.check(
              counts.reduce(0, +) == heads * clock.rows, "\(counts) rows, not \(clock.rows) a head")
          }
        case "threshold", "mass":
          // Heads below the size that triggers grow on.
          let most = max(clock.rows, clock.over.map { $0 + clock.every - 1 } ?? 0)
          KVCompressionTests.check(counts.allSatisfy { $0 <= most }, "\(counts) rows of \(most)")
        default: break
        }
        if seen <= clock.budget, name != "threshold", name != "mass" {
          KVCompressionTests.check(counts.allSatisfy { $0 == seen }, "all \(seen) fit: \(counts)")
        }
        if name == "shared" || name == "chunks 4 shared" {
          KVCompressionTests.check(held[layer].allSatisfy { $0 == held[layer][0] }, "heads differ: \(held[layer])")
        }
      }
      if name == "pyramid", clock.over == nil, chosen {
        let counts = (0..<heads).map { held[0][$0].count + held[1][$0].count }
        KVCompressionTests.check(counts.allSatisfy { $0 <= 2 * clock.rows }, "\(counts) rows of \(clock.rows)")
      }
    }
  }

  static func check(
    _ cache: KVCache, _ name: String, heads: Int, tokens: Int, budget: Int, sinks: Int, window: Int
  ) throws {
    let counts = (0..<2).map { layer in (0..<heads).map { cache.rowsHeld(layer: layer, head: $0) } }
    for layer in 0..<2 {
      for head in 0..<heads {
        let rows = try cache.rows(layer: layer, head: head)
        KVCompressionTests.check(zip(rows, rows.dropFirst()).allSatisfy(<), "positions \(rows)")
        KVCompressionTests.check(rows.starts(with: 0..<min(sinks, tokens)), "sinks of \(rows)")
        KVCompressionTests.check(
          rows.suffix(min(window, tokens)) == (tokens - min(window, tokens)..<tokens)[...].map { $0 }[...],
          "window of \(rows)")
        KVCompressionTests.check(tokens == 0 || !rows.isEmpty, "nothing is left")
        let contents = try cache.read(layer: layer, head: head)
        KVCompressionTests.check(contents.positions == rows, "read")
      }
    }
    let whole = min(tokens, budget)
    if tokens <= budget, !["threshold", "mass"].contains(name) {
      KVCompressionTests.check(
        counts == Array(repeating: Array(repeating: tokens, count: heads), count: 2), "all fit: \(counts)")
    }
    switch name {
    case "none", "chunks 1", "chunks 3", "chunks 4 shared", "even", "shared", "critical", "crush", "crush blocks":
      KVCompressionTests.check(counts.allSatisfy { $0.allSatisfy { $0 == whole } }, "\(counts)")
    case "adakv kvpress", "critical adakv":
      KVCompressionTests.check(counts.allSatisfy { $0.reduce(0, +) == heads * whole }, "\(counts)")
    case "adakv":
      // Half a row a head of rounding, and one more where the floor is cut.
      KVCompressionTests.check(
        counts.allSatisfy { abs($0.reduce(0, +) - heads * whole) <= heads + (heads + 1) / 2 }, "\(counts)")
    case "pyramid":
      KVCompressionTests.check((0..<heads).allSatisfy { counts[0][$0] + counts[1][$0] == 2 * whole }, "\(counts)")
    case "threshold", "mass":
      KVCompressionTests.check(counts.allSatisfy { $0.allSatisfy { $0 <= whole } }, "\(counts)")
    case "prefix":
      // Scaling rounds what is dropped down: at most a row a layer stays beyond the budget, protected ones aside.
      let total = counts.reduce(0) { $0 + $1.reduce(0, +) }
      KVCompressionTests.check(
        total <= heads * max(2 * whole + 2, 2 * min(tokens, sinks + window)) || tokens <= budget, "\(counts)")
    default: break
    }
    if name == "shared" || name == "chunks 4 shared" {
      for layer in 0..<2 {
        let sets = try (0..<heads).map { try cache.rows(layer: layer, head: $0) }
        KVCompressionTests.check(sets.allSatisfy { $0 == sets[0] }, "heads differ: \(sets)")
      }
    }
  }

  /// Equal scores: the lowest positions between sinks and window, under every rule that chooses rows one by one.
  @Test func equalScoresKeepTheLowerPosition() throws {
    withEvery("change", in: ["none", "shared", "critical", "adakv kvpress", "pyramid", "chunks 1"]) { name in
      let change = try #require(Self.changes.first { $0.0 == name }).1
      withEvery("budget", in: 3...9) { budget in
        var traffic = Traffic(Geometry(2, 2, 4).shape(), tokens: 9)
        traffic.values[0] = traffic.values[0].map { _ in 1 }
        let selection = try change(
          Selection(
            spec: nil, scorer: Few(levels: 1), budget: .tokens(budget),
            router: TopKRouter(Protection(sinks: 1, window: 2)), schedule: Schedule()))
        let cache = try KVCache(
          shape: traffic.shape, policy: Policy(selection, store: .dense(.f32)), backend: .cpu(threads: 1))
        try traffic.append(cache, 0, 0..<9)
        try cache.finishPrefill()
        for head in 0..<2 {
          let rows = try cache.rows(layer: 0, head: head)
          KVCompressionTests.check(rows == Array(0..<budget - 2) + [7, 8], "\(rows)")
        }
      }
    }
  }

  /// Scorer x allocator x rule x store: counts, bytes, and the attention of what is left.
  @Test(arguments: [
    "snapkv(budget=0.4,window=5)", "knorm(budget=0.4)", "keydiff(budget=20,sinks=1)", "lagkv(budget=0.6,sinks=2,lag=5)",
    "expected(budget=0.4,sinks=2,queries=6,rotary=false)", "random(budget=0.4)", "h2o(budget=0.4,every=0)",
  ])
  func product(scorer: String) throws {
    let allocators = [
      "", "+pyramid(beta=4)", "+adakv", "+pyramid+adakv(form=kvpress)", "+prefix", "+threshold(mass=0.6)",
    ]
    let rules = ["", "+chunks(length=4)", "+even(length=16)", "+critical", "+shared"]
    let stores = ["f16", "kivi(bits=4,residual=32)"]
    let geometry = Geometry(4, 2, 24, 17)
    let traffic = Traffic(geometry.shape(layers: 2), tokens: 76)
    withEvery("allocator", in: allocators) { allocator in
      withEvery("rule", in: rules) { rule in
        withEvery("store", in: stores) { store in
          let backend = try Backend.cpu(threads: 1)
          let cache = try makeCache("\(scorer)\(allocator)\(rule)+\(store)", traffic.shape, backend: backend)
          try traffic.run(cache, prompt: 70, chunk: 33)
          KVCompressionTests.check(cache.bytes.total == backend.memory.liveBytes, "bytes")
          let text = cache.policy.spec.description
          KVCompressionTests.check(try PolicyRegistry.standard.policy(text).spec.description == text, "\(text)")
          let restored = try KVCache.load(saved: try cache.saved(), backend: .cpu(threads: 1))
          for token in 70..<73 {
            for layer in 0..<2 { try traffic.checkedStep(cache, layer, token..<token + 1) }
            try traffic.step(restored, token..<token + 1)
          }
          KVCompressionTests.check(try positions(cache) == positions(restored), "a loaded cache goes on alike")
        }
      }
    }
  }

  /// Two caches of one policy, token by token in turn, are as each alone: nothing is kept in the policy.
  @Test(arguments: [
    "prefixkv(budget=0.4)", "adapyramidkv(budget=0.4,window=5,every=2)",
    "chunkkv(budget=0.4,window=5,length=4,every=3)",
    "criticalkv(budget=0.4,window=5,every=2)", "expected(budget=0.4,queries=8,rotary=false,every=2)",
    "kvcrush(budget=0.4,sinks=1,window=2,block=3,every=3)", "lagkv(budget=0.6,lag=6,every=1)",
    "keydiff(budget=0.4,every=1)", "random(budget=0.4,every=1)",
  ])
  func interleavedSequences(text: String) throws {
    let shape = Geometry(4, 2, 16).shape(layers: 2)
    let policy = try PolicyRegistry.standard.policy(text + "+f32")
    let traffics = [Traffic(shape, tokens: 60, seed: 1), Traffic(shape, tokens: 60, seed: 2)]
    func fresh(_ policy: Policy) throws -> KVCache {
      try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))
    }
    let shared = [try fresh(policy), try fresh(policy)]
    for start in [0, 20] {
      for (cache, traffic) in zip(shared, traffics) { try traffic.step(cache, start..<start + 20) }
    }
    for cache in shared { try cache.finishPrefill() }
    for token in 40..<60 {
      for (cache, traffic) in zip(shared, traffics) { try traffic.step(cache, token..<token + 1) }
    }
    for (cache, traffic) in zip(shared, traffics) {
      let alone = try fresh(PolicyRegistry.standard.policy(text + "+f32"))
      try traffic.run(alone, prompt: 40, decoded: 20, chunk: 20)
      #expect(try Snapshot(alone) == Snapshot(cache))
    }
  }

  @Test func modifiersWantScores() {
    for name in ["adakv", "chunks", "even", "critical", "shared", "threshold", "prefix"] {
      expectError(.unsupported, "\(name) needs scores") { _ = try PolicyRegistry.standard.policy("streaming+\(name)") }
      expectError(.unsupported, "snapkv+\(name)") { _ = try PolicyRegistry.standard.policy(name) }
    }
  }
}
