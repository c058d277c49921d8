import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Forks, rewinding, reset, several turns.
@Suite struct LifeCycleTests {
  static let geometry = Geometry(4, 2, 40, 24)
  static let policies =
    InvarianceTests.policies + ["streaming(sinks=2,recent=30)", "snapkv(budget=31,window=6,every=4)"]

  static func shape(layers: Int = 1) throws -> ModelShape {
    var shape = geometry.shape(layers: layers)
    shape.rotary = try RotaryEmbedding(headDim: 40)
    return shape
  }

  // MARK: Forks

  @Test func forksShareAndPart() throws {
    withEvery("policy", in: Self.policies) { text in
      let shape = try Self.shape()
      let backend = try Backend.cpu(threads: 1)
      // Tokens after the fork differ between the two sides.
      let common = Traffic(shape, tokens: 120, seed: 1)
      var other = Traffic(shape, tokens: 120, seed: 2)
      for head in 0..<2 {
        for token in 0..<77 {
          for c in 0..<40 {
            other.keys[0][(head * 120 + token) * 40 + c] = common.keys[0][(head * 120 + token) * 40 + c]
          }
          for c in 0..<24 {
            other.values[0][(head * 120 + token) * 24 + c] = common.values[0][(head * 120 + token) * 24 + c]
          }
        }
      }
      func start() throws -> KVCache {
        let cache = try makeCache(text, shape, backend: backend)
        try common.run(cache, prompt: 70, decoded: 7)
        return cache
      }
      func decode(_ cache: KVCache, _ traffic: Traffic) throws -> [Float] {
        var outputs: [Float] = []
        for token in 77..<120 { outputs += try traffic.step(cache, token..<token + 1) }
        return outputs
      }
      // Twins that never were forks.
      let (twinA, twinB) = (try start(), try start())
      let expectedA = try decode(twinA, common)
      let expectedB = try decode(twinB, other)

      let a = try start()
      let alone = a.bytes
      let before = try Snapshot(a)
      do {
        let b = a.fork()
        check(KVCache.bytes(of: [a, b]) == alone, "a fork costs \(KVCache.bytes(of: [a, b])), alone \(alone)")
        check(b.bytes == alone, "bytes of the fork")
        check(try Snapshot(b) == before, "the fork holds something else")
        // In turns, so that each has every chance to write into the other.
        var (outputsA, outputsB): ([Float], [Float]) = ([], [])
        for token in 77..<120 {
          outputsA += try common.step(a, token..<token + 1)
          outputsB += try other.step(b, token..<token + 1)
        }
        // A fork opens extents of its own, so sums are cut elsewhere: close to rounding, not to the bit. Weights of codes
        // are rounded to 16 bits of the largest in a cut.
        let bound: Float = text.contains("kivi") ? 2e-4 : 1e-5
        checkClose(outputsA, expectedA, within: bound, "the original")
        checkClose(outputsB, expectedB, within: bound, "the fork")
        check(try Snapshot(a).heads == Snapshot(twinA).heads, "contents of the original")
        check(try Snapshot(b).heads == Snapshot(twinB).heads, "contents of the fork")
        // A fork of a fork outlives both.
        let c = b.fork()
        _ = try common.step(a.fork(), 119..<120)
        check(KVCache.bytes(of: [b, c]) == b.bytes, "the fork's fork")
        check(KVCache.bytes(of: [a, b, c]).total <= a.bytes.total + b.bytes.total, "the three")
      }
      check(backend.memory.liveBytes == KVCache.bytes(of: [a, twinA, twinB]).total, "bytes left of the fork")
    }
  }

  // MARK: Rewinding

  @Test func trimIsExact() throws {
    withEvery(
      "store", in: ["f32", "f16", "kivi(bits=2,residual=64)", "streaming(sinks=2,recent=200,positions=keep)+f16"]
    ) {
      store in
      withEvery("cut", in: [0, 1, 3, 17]) { cut in
        let traffic = Traffic(Self.geometry.shape(layers: 2), tokens: 128)
        let twin = try makeCache(store, traffic.shape)
        try traffic.run(twin, prompt: 66, decoded: 20)
        let cache = try makeCache(store, traffic.shape)
        let length = 86
        try traffic.run(cache, prompt: 66, decoded: 20)
        // A draft of `cut` tokens, looked at and rejected.
        if cut > 0 {
          for layer in 0..<2 {
            try traffic.append(cache, layer, length..<length + cut)
            try traffic.attend(cache, layer, length..<length + cut, AttentionOptions(commits: false))
          }
        }
        try cache.trim(to: length)
        check(try Snapshot(cache).heads == Snapshot(twin).heads, "contents")
        check(cache.tokensSeen(layer: 1) == length, "seen")
        for token in length..<length + 10 {
          checkSame(
            try traffic.step(cache, token..<token + 1), try traffic.step(twin, token..<token + 1), "token \(token)")
        }
        check(try Snapshot(cache).heads == Snapshot(twin).heads, "contents later")
      }
    }
  }

  /// Dense caches rewind anywhere, also into the prompt.
  @Test func denseTrimsToAnyLength() throws {
    let traffic = Traffic(Self.geometry.shape(), tokens: 80)
    withEvery("length", in: [0, 1, 39, 40, 41, 64, 70]) { length in
      let backend = try Backend.cpu(threads: 1)
      let cache = try makeCache("f16", traffic.shape, backend: backend)
      try traffic.run(cache, prompt: 50, decoded: 20, chunk: 20)
      check(cache.minimumTrim == 0, "minimum \(cache.minimumTrim)")
      try cache.trim(to: length)
      check(try cache.rows(layer: 0, head: 1) == Array(0..<length), "rows")
      check(cache.bytes.total == backend.memory.liveBytes, "bytes")
      for token in length..<70 { try traffic.checkedStep(cache, 0, token..<token + 1) }
      let twin = try makeCache("f16", traffic.shape)
      try traffic.run(twin, prompt: 50, decoded: 20)
      check(try Snapshot(cache).heads == Snapshot(twin).heads, "contents")
    }
  }

  @Test func trimRefusesWhatIsGone() throws {
    let cases: [(String, Int)] = [
      ("kivi(residual=32)", 60), ("h2o(budget=20)", 69), ("streaming(sinks=2,recent=20,positions=keep)", 69),
      ("snapkv(budget=20,window=4)", 59), ("snapkv(budget=64,window=4,every=100)", 69),
    ]
    withEvery("policy", in: cases) { text, length in
      let traffic = Traffic(Self.geometry.shape(layers: 2), tokens: 80)
      let cache = try makeCache(text, traffic.shape)
      let twin = try makeCache(text, traffic.shape)
      for cache in [cache, twin] { try traffic.run(cache, prompt: 60, decoded: 10) }
      let before = try Snapshot(cache)
      expectError(.irreversible, layer: 0) { try cache.trim(to: length) }
      expectError(.invalidOption, "71", "70", layer: 0) { try cache.trim(to: 71) }
      expectError(.invalidOption, "-1", layer: 0) { try cache.trim(to: -1) }
      check(try Snapshot(cache) == before, "changed by an error")
      checkSame(try traffic.step(cache, 70..<71), try traffic.step(twin, 70..<71), "next token")
    }
    // KIVI: what is encoded stays, the rest can be cut.
    let traffic = Traffic(Self.geometry.shape(), tokens: 80)
    let cache = try makeCache("kivi(residual=32)", traffic.shape)
    try traffic.run(cache, prompt: 60, decoded: 10)
    #expect(cache.minimumTrim == 64)
    try cache.trim(to: 64)
    #expect(cache.tokensSeen(layer: 0) == 64)
  }

  /// A schedule of every n tokens counts from the tokens that stayed.
  @Test func trimTurnsTheScheduleBack() throws {
    let selection = Selection(
      spec: StageSpec(name: "s"), scorer: nil, budget: .tokens(40), router: TopKRouter(Protection(window: 40)),
      schedule: Schedule(decodeInterval: 8))
    let traffic = Traffic(Self.geometry.shape(), tokens: 80)
    func cache() throws -> KVCache {
      let cache = try KVCache(
        shape: traffic.shape, policy: Policy(selection, store: .dense(.f32)), backend: .cpu(threads: 1))
      try traffic.run(cache, prompt: 40, decoded: 3)
      return cache
    }
    let (trimmed, twin) = (try cache(), try cache())
    for token in 43..<47 { try traffic.step(trimmed, token..<token + 1) }
    try trimmed.trim(to: 43)
    for token in 43..<60 {
      try traffic.step(trimmed, token..<token + 1)
      try traffic.step(twin, token..<token + 1)
      check(try positions(trimmed) == positions(twin), "at \(token)")
    }
  }

  // MARK: Reset and turns

  @Test func resetForgetsEverything() throws {
    withEvery("policy", in: Self.policies) { text in
      let shape = try Self.shape(layers: 2)
      let backend = try Backend.cpu(threads: 1)
      let traffic = Traffic(shape, tokens: 80)
      let cache = try makeCache(text, shape, backend: backend)
      let first = try traffic.run(cache, prompt: 60, decoded: 20)
      let held = try Snapshot(cache)
      cache.reset()
      check(backend.memory.liveBytes == 0 && cache.bytes == ByteCount(), "bytes after reset: \(cache.bytes)")
      check(cache.tokensSeen(layer: 1) == 0 && cache.rowsHeld(layer: 0, head: 0) == 0, "counters")
      check(cache.status.allSatisfy { $0.state == .empty }, "status \(cache.status.map(\.state))")
      checkSame(try traffic.run(cache, prompt: 60, decoded: 20), first, "second life")
      check(try Snapshot(cache) == held, "contents of the second life")
    }
  }

  /// Prompt, answer, prompt, answer: nothing is dropped in a turn before its end, then the budget holds again.
  @Test func turns() throws {
    withEvery("policy", in: Self.policies) { text in
      withEvery("second prompt", in: [40, 3]) { second in
        let shape = try Self.shape(layers: 2)
        let backend = try Backend.cpu(threads: 1)
        let traffic = Traffic(shape, tokens: 200)
        let cache = try makeCache(text, shape, backend: backend)
        try traffic.run(cache, prompt: 60, decoded: 10)
        let rows = cache.rowsHeld(layer: 0, head: 0)
        cache.beginPrefill()
        try traffic.step(cache, 70..<70 + second)
        check(cache.rowsHeld(layer: 0, head: 0) == rows + second, "rows during the second prompt")
        try cache.finishPrefill()
        var model = RowModel(cache.policy as! Policy, shape)
        model.append(60)
        model.finishPrefill()
        for _ in 0..<10 { model.append(1) }
        model.decoding = false
        model.append(second)
        model.finishPrefill()
        check(
          cache.rowsHeld(layer: 0, head: 0) == model.rows,
          "\(cache.rowsHeld(layer: 0, head: 0)) rows, not \(model.rows)")
        for token in 70 + second..<90 + second {
          try traffic.step(cache, token..<token + 1)
          model.append(1)
          check(cache.rowsHeld(layer: 1, head: 1) == model.rows, "rows at \(token)")
          check(cache.bytes.total == backend.memory.liveBytes, "bytes at \(token)")
        }
      }
    }
  }

  @Test func layersFinishOneByOne() throws {
    let traffic = Traffic(Self.geometry.shape(layers: 3), tokens: 80)
    let together = try makeCache("snapkv(budget=20,window=4)", traffic.shape)
    try traffic.run(together, prompt: 60, decoded: 5)
    let cache = try makeCache("snapkv(budget=20,window=4)", traffic.shape)
    for layer in 0..<3 {
      try traffic.append(cache, layer, 0..<60)
      try traffic.attend(cache, layer, 0..<60)
      try cache.finishPrefill(layer: layer)
      #expect(cache.rowsHeld(layer: layer, head: 0) == 20)
    }
    for token in 60..<65 { try traffic.step(cache, token..<token + 1) }
    #expect(try Snapshot(cache) == Snapshot(together))
  }

  @Test func roomForATurn() throws {
    // StreamingLLM's oracle: N = 10, S = 2, R = 3, two tokens coming: 0, 1 and 9 stay.
    let traffic = Traffic(Self.geometry.shape(), tokens: 40)
    let cache = try makeCache("streaming(sinks=2,recent=3,positions=keep)", traffic.shape)
    try traffic.run(cache, prompt: 10)
    #expect(try cache.rows(layer: 0, head: 0) == [0, 1, 7, 8, 9])
    try cache.makeRoom(for: 2)
    #expect(try cache.rows(layer: 0, head: 0) == [0, 1, 9])
    cache.beginPrefill()
    try traffic.step(cache, 10..<12)
    #expect(try cache.rows(layer: 0, head: 0) == [0, 1, 9, 10, 11])
    try cache.makeRoom(for: 30)
    #expect(try cache.rows(layer: 0, head: 0) == [0, 1])
    try traffic.checkedStep(cache, 0, 12..<20)
    expectError(.invalidOption, "-1") { try cache.makeRoom(for: -1) }
  }
}
