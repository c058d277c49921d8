import Foundation
import KVCompression
import KVCore
import Testing

/// Policies, shapes and moments that do not exist.
@Suite struct BadPolicyTests {
  static let shape = Geometry(4, 2, 40, 24).shape(layers: 2)

  // MARK: Texts

  /// Text, code, and words the message must have.
  static let texts: [(String, KVError.Code, [String])] = [
    ("snapkw", .unknownName, ["\"snapkw\"", "did you mean \"snapkv\"?", "kivi"]),
    ("h20(budget=3)", .unknownName, ["did you mean \"h2o\"?"]),
    ("zzzzzz", .unknownName, ["zzzzzz", "streaming"]),
    ("snapkv(windw=3)", .unknownName, ["windw", "did you mean \"window\"?"]),
    ("kivi(bit=3)", .unknownName, ["did you mean \"bits\"?", "residual"]),
    ("h2o(positions=keep)", .unknownName, ["positions"]),
    ("f16(type=f32)", .unknownName, ["f16"]),
    ("h2o+snapkv", .invalidOption, ["snapkv", "second"]),
    ("kivi+h2o", .invalidOption, ["h2o", "left"]),
    ("kivi+f16", .invalidOption, ["1 stores, 2 are named"]),
    ("kivi(bits=5)", .invalidOption, ["2, 3, 4 or 8", "5"]),
    ("kivi(bits=1)", .invalidOption, ["2...8", "1"]),
    ("kivi(bits=\"4\")", .invalidOption, ["bits", "integer"]),
    ("kivi(key_bits=9)", .invalidOption, ["key_bits", "9"]),
    ("kivi(value_bits=7)", .invalidOption, ["7"]),
    ("kivi(group=33)", .invalidOption, ["32", "33"]),
    ("kivi(group=2048,residual=2048)", .invalidOption, ["2048"]),
    ("kivi(group=0)", .invalidOption, ["group", "0"]),
    ("kivi(group=64,residual=96)", .invalidOption, ["multiple", "96"]),
    ("kivi(residual=0)", .invalidOption, ["residual", "0"]),
    ("kivi(residual=-32)", .invalidOption, ["residual", "-32"]),
    ("kivi(window=f8)", .invalidOption, ["window", "f32, f16, bf16"]),
    ("kivi(metadata=3)", .invalidOption, ["metadata", "f32, f16, bf16"]),
    ("dense(type=int8)", .invalidOption, ["type", "int8"]),
    ("h2o(budget=0)", .invalidOption, ["budget", "0"]),
    ("h2o(budget=1.5)", .invalidOption, ["budget", "1.5"]),
    ("h2o(budget=-0.1)", .invalidOption, ["budget"]),
    ("h2o(budget=0B)", .invalidOption, ["budget"]),
    ("h2o(budget=none)", .invalidOption, ["budget", "none"]),
    ("h2o(budget=[])", .invalidOption, ["budget"]),
    ("h2o(recent_share=1.01)", .invalidOption, ["recent_share", "1.01"]),
    ("h2o(recent_share=-1)", .invalidOption, ["recent_share"]),
    ("h2o(heavy=3,budget=10)", .invalidOption, ["not both"]),
    ("h2o(heavy=0,recent=0)", .invalidOption, ["at least 1"]),
    ("h2o(heavy=3)", .invalidOption, ["recent", "required"]),
    ("h2o(every=-1)", .invalidOption, ["every", "-1"]),
    ("h2o(every=1.5)", .invalidOption, ["every", "integer"]),
    ("snapkv(window=0)", .invalidOption, ["window", "0"]),
    ("snapkv(window=65537)", .invalidOption, ["window"]),
    ("snapkv(kernel=4)", .invalidOption, ["odd", "4"]),
    ("snapkv(kernel=0)", .invalidOption, ["kernel"]),
    ("snapkv(pooling=mean)", .invalidOption, ["pooling", "avg, max"]),
    ("snapkv(reduction=median)", .invalidOption, ["reduction", "mean, max, sum"]),
    ("snapkv(budget=32)", .invalidOption, ["32"]),
    ("snapkv(budget=31)", .invalidOption, ["31", "window of 32"]),
    ("streaming(sinks=-1)", .invalidOption, ["sinks"]),
    ("streaming(recent=0)", .invalidOption, ["recent"]),
    ("streaming(recent=3,budget=5)", .invalidOption, ["not both"]),
    ("streaming(positions=true)", .invalidOption, ["positions"]),
    ("streaming(positions=rotate)", .invalidOption, ["slot", "keep"]),
    ("", .syntax, []), ("kivi(", .syntax, []), ("kivi(bits=2,)", .syntax, []), ("kivi(bits=2,bits=3)", .syntax, []),
    ("kivi+", .syntax, []), ("+kivi", .syntax, []), ("kivi)", .syntax, []), ("kivi(bits)", .syntax, []),
    ("{\"stages\":[{\"name\":\"kivi\",\"options\":{\"bits\":5}}]}", .invalidOption, ["5"]),
    ("[{\"name\":\"kiwi\"}]", .unknownName, ["did you mean \"kivi\"?"]), ("[", .syntax, []),
  ]

  @Test func policiesThatDoNotExist() {
    withEvery("text", in: Self.texts) { text, code, words in
      do {
        _ = try PolicyRegistry.standard.policy(text)
        check(false, "accepted")
      } catch let error as KVError {
        check(error.code == code, "\(error)")
        for word in words { check(error.message.contains(word), "\"\(word)\" is missing in: \(error)") }
        check(error.message.count >= 10 && !error.message.hasSuffix(" "), "\(error)")
        if code == .syntax || code == .unknownName {
          check(error.offset != nil || text.hasPrefix("["), "no offset: \(error)")
        }
      }
    }
  }

  /// Every option of every method, out of its type: always an error, never a crash.
  @Test func everyOptionRefusesNonsense() {
    for method in PolicyRegistry.standard.methods {
      for option in method.options {
        withEvery("value", in: ["-1", "1e300", "nan_", "[[1],[2]]", "99999999999999999999", "\"\"", "true", "3GiB"]) {
          value in
          let text = "\(method.name)(\(option.name)=\(value))"
          do {
            let policy = try PolicyRegistry.standard.policy(text)
            // Some are meant: they must then make a cache or say why not.
            do { _ = try KVCache(shape: Self.shape, policy: policy, backend: .cpu(threads: 1)) } catch let e as KVError
            {
              check(!e.message.isEmpty, text)
            }
          } catch let error as KVError {
            check(
              [.invalidOption, .syntax, .unknownName, .unsupported, .inputOutput].contains(error.code)
                && !error.message.isEmpty,
              "\(text): \(error)")
          }
        }
      }
    }
  }

  // MARK: Construction

  @Test func cachesThatCannotBe() throws {
    let backend = try Backend.cpu(threads: 1)
    func make(_ text: String, _ shape: ModelShape = Self.shape, _ inputs: EngineInputs = .attendThrough) throws {
      _ = try makeCache(text, shape, backend: backend, inputs: inputs)
    }
    expectError(.missingInput, "queries", "32", "observe(layer:queries:)") { try make("snapkv", Self.shape, []) }
    expectError(.missingInput, "queries") { try make("snapkv", Self.shape, .attentionWeights) }
    expectError(.missingInput, "attention weights", "observe(layer:attention:)") {
      try make("h2o", Self.shape, .queries)
    }
    expectError(.missingInput, "rotary") { try make("streaming") }
    expectError(.invalidOption, "10 tokens", "12 sinks") { try make("streaming(sinks=12,budget=10,positions=keep)") }
    expectError(.shapeMismatch, "2 layers", "got 3") { try make("h2o(budget=[10,20,30])") }
    expectError(.shapeMismatch, "2 KV heads", "got 1", layer: 0) { try make("h2o(budget=[[10],[20]])") }
    var dynamic = Self.shape
    dynamic.rotary = try RotaryEmbedding(headDim: 40, scaling: .dynamicNTK(factor: 2, originalContext: 100))
    expectError(.unsupported, "resolved") { try make("streaming", dynamic) }
    var wrong = Self.shape
    wrong.rotary = try RotaryEmbedding(headDim: 64)
    expectError(.shapeMismatch, "64", "40", layer: 0) { try make("f16", wrong) }
    for (q, kv) in [(3, 2), (0, 0), (1, 2), (-2, -1), (2, 0)] {
      expectError(.invalidOption, "\(q)", "\(kv)", layer: 0) { try make("f16", Geometry(q, kv, 8).shape()) }
    }
    for dim in [0, -1, 4097] {
      expectError(.invalidOption, "\(dim)", layer: 0) { try make("f16", Geometry(1, 1, dim).shape()) }
    }
    expectError(.invalidOption, "4097", layer: 0) { try make("f16", Geometry(1, 1, 8, 4097).shape()) }
    expectError(.invalidOption, "0", layer: 1) {
      try make("f16", ModelShape(layers: [Geometry(1, 1, 8).layer(), Geometry(1, 1, 8).layer(slidingWindow: 0)]))
    }
    #expect(backend.memory.allocations == 0)
  }

  @Test func stagesOfOnesOwnThatAreWrong() throws {
    struct Score: Scorer {
      var inputs: RequiredInputs { .none }
      let value: @Sendable (Int, Int) throws(KVError) -> Float
      func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
        for h in 0..<layer.kvHeads { for r in 0..<layer.rowCount(head: h) { scores[h, r] = try value(layer.layer, r) } }
      }
    }
    struct Wrong: Allocator {
      let counts: [[Int]]
      func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] { counts }
    }
    let traffic = Traffic(Self.shape, tokens: 50)
    func policy(_ scorer: any Scorer, _ allocator: any Allocator = UniformAllocator(), every: Int? = nil) -> Policy {
      Policy(
        Selection(
          spec: StageSpec(name: "own"), scorer: scorer, budget: .tokens(10), allocator: allocator, router: TopKRouter(),
          schedule: Schedule(decodeInterval: every)), store: .dense(.f32))
    }
    func run(_ policy: Policy) throws -> (KVCache, Snapshot) {
      let cache = try KVCache(shape: Self.shape, policy: policy, backend: .cpu(threads: 1))
      try traffic.step(cache, 0..<40)
      return (cache, try Snapshot(cache))
    }
    // NaN in the second layer: the first has not been compressed either.
    let (nan, before) = try run(policy(Score { layer, row throws(KVError) in layer == 1 && row == 7 ? .nan : 1 }))
    expectError(.nonFinite, "row 7", layer: 1, head: 0) { try nan.finishPrefill() }
    #expect(try Snapshot(nan) == before)
    let (throwing, was) = try run(
      policy(Score { layer, _ throws(KVError) in if layer == 1 { throw KVError(.unsupported, "mine") } else { 0 } }))
    expectError(.unsupported, "mine", layer: 1) { try throwing.finishPrefill() }
    #expect(try Snapshot(throwing) == was)
    let flat = Score { _, _ throws(KVError) in 0 }
    withEvery(
      "counts",
      in: [[[Int]]](arrayLiteral: [[10]], [[10, 10, 10]], [[10, -1]], [[10, 41]], [], [[10, 10], [10, 10]])
    ) { counts in
      let (cache, before) = try run(policy(flat, Wrong(counts: counts)))
      do {
        try cache.finishPrefill()
        check(false, "accepted")
      } catch let error as KVError {
        check(error.code == .invalidOption && error.message.contains("allocator"), "\(error)")
      }
      check(try Snapshot(cache) == before, "changed")
    }
    for every in [0, -3] {
      expectError(.invalidOption, "\(every)") {
        _ = try KVCache(shape: Self.shape, policy: policy(flat, every: every), backend: .cpu(threads: 1))
      }
    }
    // Infinite scores are an order like any other.
    let (infinite, _) = try run(
      policy(Score { _, row throws(KVError) in row == 20 ? .infinity : (row == 0 ? -.infinity : 0) }))
    try infinite.finishPrefill()
    #expect(try infinite.rows(layer: 0, head: 0) == Array(1...9) + [20])
  }

  // MARK: Moments

  @Test func inputsThatDidNotCome() throws {
    let traffic = Traffic(Self.shape, tokens: 60)
    withEvery("policy", in: ["h2o(budget=20)", "snapkv(budget=20,window=4)"]) { text in
      // Nothing attended, or the first layer only: neither layer may change.
      withEvery("layers observed", in: 0...1) { observed in
        let cache = try makeCache(text, Self.shape)
        for layer in 0..<2 { try traffic.append(cache, layer, 0..<40) }
        if observed == 1 { try traffic.attend(cache, 0, 0..<40) }
        let before = try Snapshot(cache)
        expectError(.missingInput, "40", "observe(layer:", layer: observed) { try cache.finishPrefill() }
        check(try Snapshot(cache) == before, "changed")
        expectError(.missingInput, layer: 1) { try cache.finishPrefill(layer: 1) }
        check(try Snapshot(cache) == before, "changed")
        // Not too late.
        for layer in observed..<2 { try traffic.attend(cache, layer, 0..<40) }
        try cache.finishPrefill()
        check(cache.rowsHeld(layer: 1, head: 0) == 20, "rows")
      }
    }
    // The engine said it would observe, and did not.
    let cache = try makeCache("h2o(budget=20)", Self.shape, inputs: .attentionWeights)
    try traffic.append(cache, 0, 0..<40)
    try cache.commit(layer: 0)
    expectError(.missingInput, layer: 0) { try cache.finishPrefill(layer: 0) }
    // Scores that the schedule gave up cannot choose later.
    let once = try makeCache("h2o(budget=20,every=0)", Self.shape)
    try traffic.run(once, prompt: 40)
    let before = try Snapshot(once)
    expectError(.missingInput, "every", layer: 0) { try once.makeRoom(for: 5) }
    #expect(try Snapshot(once) == before)
  }

  @Test func momentsThatDoNotFit() throws {
    let traffic = Traffic(Self.shape, tokens: 60)
    let cache = try makeCache("h2o(budget=20)", Self.shape)
    expectError(.shapeMismatch, "got 1", layer: 0) { try traffic.attend(cache, 0, 0..<1) }
    try traffic.step(cache, 0..<40)
    try cache.finishPrefill(layer: 0)
    expectError(.wrongPhase, "already finished", layer: 0) { try cache.finishPrefill(layer: 0) }
    try cache.finishPrefill()
    expectError(.wrongPhase, layer: 1) { try cache.finishPrefill(layer: 1) }
    expectError(.shapeMismatch, layer: 9) { try cache.commit(layer: 9) }
    let before = try Snapshot(cache)
    expectError(.unsupported, "commits: false", layer: 0) {
      try traffic.attend(cache, 0, 39..<40, AttentionOptions(causal: false))
    }
    #expect(try Snapshot(cache) == before)
    expectError(.invalidOption, "-1") { _ = try cache.policy.estimate(shape: Self.shape, prompt: -1) }
    expectError(.invalidOption, "-5") { _ = try cache.policy.estimate(shape: Self.shape, prompt: 3, decoded: -5) }
    expectError(.invalidOption, "0") { _ = try cache.policy.estimate(shape: Self.shape, prompt: 3, chunk: 0) }
  }

  // MARK: Backends

  @Test func levelsAndThreads() {
    for level in ["sse9", "", "AVX2 ", "portable\0x"] {
      if level.isEmpty { continue }
      expectError(.unavailable, "portable") { _ = try Backend.cpu(level: level) }
    }
    for threads in [0, -1, 1025, Int.max, Int.min] {
      expectError(.invalidOption, "1...1024", "\(threads)") { _ = try Backend.cpu(threads: threads) }
    }
  }

  /// In a process of its own: the environment belongs to all tests.
  @Test func environment() async {
    await #expect(processExitsWith: .success) {
      func fails(_ code: KVError.Code, _ part: String) -> Bool {
        do { _ = try Backend.cpu() } catch { return error.code == code && error.message.contains(part) }
        return false
      }
      for nonsense in ["x", "1.5", "0", "-2", "99999999999999999999", " 2", "2000"] {
        setenv("KV_THREADS", nonsense, 1)
        guard fails(.invalidOption, nonsense == "0" || nonsense == "-2" || nonsense == "2000" ? nonsense : "KV_THREADS")
        else { exit(1) }
        guard (try? Backend.cpu(threads: 2)) != nil else { exit(2) }
      }
      setenv("KV_THREADS", "3", 1)
      guard try! Backend.cpu().name.contains("3 threads") else { exit(3) }
      setenv("KV_THREADS", "", 1)
      guard (try? Backend.cpu()) != nil else { exit(4) }
      setenv("KV_CPU_LEVEL", "pentium", 1)
      guard fails(.unavailable, "pentium") else { exit(5) }
      setenv("KV_CPU_LEVEL", "portable", 1)
      guard try! Backend.cpu().name.contains("portable") else { exit(6) }
      exit(0)
    }
  }
}
