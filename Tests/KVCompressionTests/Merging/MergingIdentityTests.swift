import KVCompression
import KVExperiments
import Testing

@testable import KVCore
@testable import KVMerging

/// What must hold for every merging rule.
@Suite struct MergingIdentityTests {
  static let bases = [
    "h2o(budget=20)", "snapkv(budget=20,window=4,every=1)", "streaming(sinks=3,recent=17,positions=keep)",
    "h2o(budget=20,every=7)",
  ]

  /// A gate that refuses everything leaves eviction, to the bit: rows, bytes, outputs and saved files.
  @Test(arguments: bases)
  func refusedMergesAreEviction(base: String) throws {
    withEvery("store", in: ["f16", "f32", "kivi(bits=4,residual=32)"]) { store in
      withEvery("geometry", in: [Geometry(4, 2, 40), Geometry(16, 1, 16, 9), Geometry(2, 2, 67)]) { geometry in
        withEvery("to", in: ["nearest_key", "nearest_position", "next"]) { to in
          let traffic = Traffic(geometry.shape(), tokens: 80)
          let plain = try makeCache("\(base)+\(store)", traffic.shape)
          let merging = try makeCache("\(base)+merge(to=\(to),threshold=1.5)+\(store)", traffic.shape)
          let expected = try traffic.run(plain, prompt: 61, decoded: 19, chunk: 23)
          let outputs = try traffic.run(merging, prompt: 61, decoded: 19, chunk: 23)
          checkSame(outputs, expected, "outputs")
          check(try Snapshot(merging) == Snapshot(plain), "contents")
        }
      }
    }
  }

  /// Every token twice: dropping the copies changes nothing when the others count twice, and changes much when not.
  @Test func duplicatesMergeExactly() throws {
    withEvery("geometry", in: Geometry.all) { geometry in
      if geometry.keyDim < 3 { return }  // Too few directions for 20 tokens to differ.
      let layer = geometry.layer()
      var traffic = Traffic(geometry.shape(), tokens: 41, seed: 5)
      for head in 0..<layer.kvHeads {
        for token in 0..<20 {
          traffic.keys[0].replaceSubrange(
            (head * 41 + 20 + token) * layer.keyDim..<(head * 41 + 21 + token) * layer.keyDim,
            with: Array(traffic.key(0, head, token)))
          traffic.values[0].replaceSubrange(
            (head * 41 + 20 + token) * layer.valueDim..<(head * 41 + 21 + token) * layer.valueDim,
            with: Array(traffic.value(0, head, token)))
        }
      }
      func outputs(_ rule: MergeRule?) throws -> [Float] {
        let base = ToldRouter(dropped: Set(20..<40))
        let selection = Selection(
          spec: nil, scorer: nil, budget: rule == nil ? .unlimited : .tokens(20),
          router: rule.map { MergingRouter(base, rule: $0) } ?? TopKRouter(), schedule: Schedule())
        let cache = try KVCache(
          shape: traffic.shape, policy: Policy(selection, store: .dense(.f32)), backend: .cpu(threads: 2))
        try traffic.run(cache, prompt: 40)
        if rule != nil { check(cache.rowsHeld(layer: 0, head: 0) == 20, "rows") }
        return try traffic.step(cache, 40..<41)
      }
      let full = try outputs(nil)
      checkClose(try outputs(MergeRule(gate: .cosine(0.999))), full, "counted")
      checkClose(try outputs(MergeRule(gate: .cosine(0.999), key: .average)), full, "counted, keys averaged")
      checkClose(try outputs(MergeRule(gate: .cosine(0.999), update: .mean)), full, "means")
      let blind = try outputs(MergeRule(gate: .cosine(0.999), logCount: false))
      let off = zip(blind, full).map { abs($0 - $1) }.max() ?? 0
      check(off > 1e-4, "without a bias the new token weighs twice as much: off by \(off)")
    }
  }

  /// Counts of what stays and what was dropped without merging add up to the tokens; rows stay in order.
  @Test func countsAddUp() throws {
    withEvery(
      "policy",
      in: [
        "h2o(budget=20)+merge(threshold=-1)", "h2o(budget=20)+merge(to=nearest_position,threshold=-1)",
        "kvmerger(budget=20,heavy=0)", "kvmerger(threshold=0.1,every=5)",
        "snapkv(budget=20,window=4,every=3)+merge(threshold=-1)",
      ]
    ) { text in
      withEvery("store", in: ["f32", "bf16", "kivi(bits=8,residual=32)"]) { store in
        withEvery("geometry", in: Geometry.all) { geometry in
          let traffic = Traffic(geometry.shape(), tokens: 91)
          let cache = try makeCache("\(text)+\(store)", traffic.shape)
          try traffic.run(cache, prompt: 70, decoded: 20)
          for head in 0..<geometry.kvHeads {
            let held = try cache.read(layer: 0, head: head)
            check(held.counts.reduce(0, +) == 90, "\(held.counts.reduce(0, +)) tokens counted")
            check(zip(held.positions, held.positions.dropFirst()).allSatisfy(<), "order")
            for (count, bias) in zip(held.counts, held.logBias) {
              check(
                count == 1 ? bias == 0 : abs(exponential(bias) - Double(count)) < 1e-5 * Double(count), "bias \(bias)")
            }
          }
          check(cache.bytes.total == cache.backend.memory.liveBytes, "bytes")
          try traffic.checkedStep(cache, 0, 90..<91)
        }
      }
    }
  }

  private func exponential(_ x: Float) -> Double {
    var sum = 1.0
    for k in stride(from: 40, to: 0, by: -1) { sum = 1 + sum * Double(x) / Double(k) }
    return sum
  }

  /// 4 bytes of log bias and 4 of count per slot, on top of what the rows and positions take.
  @Test func bytesAreWhatTheFormulaSays() throws {
    let shape = Geometry(4, 2, 40, 24).shape()
    let traffic = Traffic(shape, tokens: 100)
    let cache = try makeCache("h2o(budget=20,every=0)+merge(threshold=-1)+f16", shape)
    try traffic.run(cache, prompt: 100)
    let plain = try makeCache("h2o(budget=20,every=0)+f16", shape)
    try traffic.run(plain, prompt: 100)
    #expect(cache.bytes.metadata == 2 * 20 * 8)
    #expect(plain.bytes.metadata == 0)
    #expect(cache.bytes.payload == plain.bytes.payload && cache.bytes.index == plain.bytes.index)
  }

  /// Rows encoded one by one are encoded anew; groups of keys are decoded once when keys are averaged, else left alone.
  @Test func quantizedRowsTakeOthersIn() throws {
    let shape = Geometry(2, 1, 32).shape()
    let traffic = Traffic(shape, tokens: 140, seed: 9)
    for (keys, frozen) in [("keep", true), ("average", false)] {
      let cache = try cacheThatMerges(shape, keys: keys)
      try traffic.append(cache, 0, 0..<128)
      try cache.finishPrefill()
      let before = try cache.read(layer: 0, head: 0)
      let groups = EncodedBody(try cache.segment.heads[0].keys).rows
      #expect(groups == 128)
      try cache.compress()
      let held = try cache.read(layer: 0, head: 0)
      #expect(held.positions == Array(0..<127))
      // Row 5 took row 127 in: its value is the mean to the precision of the store, its key as it was or the mean.
      for c in 0..<32 {
        let mean = (before.values[5 * 32 + c] + before.values[127 * 32 + c]) / 2
        #expect(abs(held.values[5 * 32 + c] - mean) < 0.02)
        let key = (before.keys[5 * 32 + c] + before.keys[127 * 32 + c]) / 2
        #expect(abs(held.keys[5 * 32 + c] - (frozen ? before.keys[5 * 32 + c] : key)) < (frozen ? 1e-9 : 0.002))
      }
      // No other row changed by more than the rounding of a decoded group.
      for row in 0..<127 where row != 5 {
        for c in 0..<32 {
          #expect(held.values[row * 32 + c] == before.values[row * 32 + c])
          #expect(abs(held.keys[row * 32 + c] - before.keys[row * 32 + c]) <= (row < 32 && !frozen ? 0.002 : 0))
        }
      }
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
      try traffic.checkedStep(cache, 0, 128..<129)
    }
  }

  private func cacheThatMerges(_ shape: ModelShape, keys: String) throws -> KVCache {
    var merge = Routing.Merge(head: 0, target: 5)
    merge.key = keys == "keep" ? .keep : .average
    (merge.keyDivisor, merge.valueDivisor) = (2, 2)
    let selection = Selection(
      spec: nil, scorer: nil, budget: .tokens(127),
      router: ToldRouter(dropped: [127], told: [(merge, [Routing.Term(row: 127, weight: 1)])]),
      schedule: Schedule(afterPrefill: false, decodeInterval: 1000))
    return try KVCache(
      shape: shape, policy: Policy(selection, store: .kivi(keyBits: 8, valueBits: 8, residual: 32)),
      backend: .cpu(threads: 1))
  }

  /// A fork that merges leaves the other as it was.
  @Test func forksMergeAlone() throws {
    withEvery("store", in: ["f16", "kivi(bits=4,residual=32)"]) { store in
      let traffic = Traffic(Geometry(4, 2, 40).shape(), tokens: 120)
      let cache = try makeCache("h2o(budget=0.5,every=40)+merge(threshold=-1,keys=average)+\(store)", traffic.shape)
      try traffic.run(cache, prompt: 80, decoded: 10)
      let before = try Snapshot(cache)
      let fork = cache.fork()
      try fork.compress()
      check(try Snapshot(cache) == before, "the original changed")
      let alone = try makeCache("h2o(budget=0.5,every=40)+merge(threshold=-1,keys=average)+\(store)", traffic.shape)
      try traffic.run(alone, prompt: 80, decoded: 10)
      try alone.compress()
      check(try Snapshot(fork).heads == Snapshot(alone).heads, "the fork merged otherwise")
    }
  }

  /// What was merged cannot be taken apart: only later tokens can be cut off.
  @Test func rollbackEndsAtTheMerge() throws {
    let traffic = Traffic(Geometry(4, 2, 40).shape(), tokens: 100)
    let cache = try makeCache("snapkv(budget=20,window=4)+merge(threshold=-1)", traffic.shape)
    try traffic.run(cache, prompt: 80, decoded: 10)
    #expect(cache.minimumTrim == 80)
    let before = try Snapshot(cache)
    expectError(.irreversible, layer: 0) { try cache.trim(to: 79) }
    #expect(try Snapshot(cache) == before)
    try cache.trim(to: 84)
    #expect(try cache.read(layer: 0, head: 0).counts.reduce(0, +) == 84)
    try traffic.step(cache, 84..<90)
    #expect(try Snapshot(cache).heads == before.heads)
  }

  /// Sums that f16 cannot hold are refused before anything changes; zero rows are like nothing.
  @Test func sumsBeyondTheStore() throws {
    let rule = MergeRule(targets: .next(1), gate: .open, update: .add, logCount: false)
    let selection = Selection(
      spec: nil, scorer: nil, budget: .tokens(2), router: MergingRouter(ToldRouter(dropped: [0]), rule: rule),
      schedule: Schedule())
    let cache = try KVCache(Policy(selection, store: .dense(.f16)), queryHeads: 1, kvHeads: 1, dim: 1)
    try cache.append(
      HeadTensor(heads: 1, tokens: 3, dim: 1, elements: [1, 2, 3]),
      HeadTensor(heads: 1, tokens: 3, dim: 1, elements: [60000, 50000, 1]))
    let before = try cache.read(layer: 0, head: 0)
    expectError(.unrepresentable, "beyond ±65504", layer: 0, head: 0, position: 1) { try cache.finishPrefill() }
    #expect(try cache.read(layer: 0, head: 0) == before)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)

    let zeros = try toldCache(
      [[0, 0], [1, 0], [0, 0]], [[1], [2], [3]],
      router: MergingRouter(ToldRouter(dropped: [0]), rule: MergeRule(gate: .cosine(0.01))))
    #expect(try zeros.read(layer: 0, head: 0).values == [2, 3])
  }

  /// Routers that contradict themselves are refused; nothing has changed then.
  @Test func routersThatContradictThemselves() throws {
    let term = Routing.Term(row: 1, weight: 1)
    func refused(_ code: KVError.Code, _ told: [(Routing.Merge, [Routing.Term])], dropped: Set<Int> = [1]) throws {
      let selection = Selection(
        spec: nil, scorer: nil, budget: .tokens(2), router: ToldRouter(dropped: dropped, told: told),
        schedule: Schedule())
      let cache = try KVCache(Policy(selection, store: .dense(.f32)), queryHeads: 1, kvHeads: 1, dim: 2)
      try cache.append(normalTensor(1, 3, 2, seed: 1), normalTensor(1, 3, 2, seed: 2))
      let before = try cache.read(layer: 0, head: 0)
      let error = #expect(throws: KVError.self) { try cache.finishPrefill() }
      #expect(error?.code == code && error?.layer == 0)
      #expect(try cache.read(layer: 0, head: 0) == before)
    }
    let merge = Routing.Merge(head: 0, target: 0)
    try refused(.invalidOption, [(merge, [Routing.Term(row: 2, weight: 1)])])  // Stays.
    try refused(.invalidOption, [(merge, [term]), (merge, [term])])
    try refused(.invalidOption, [(Routing.Merge(head: 0, target: 1), [term])])
    try refused(.invalidOption, [(Routing.Merge(head: 1, target: 0), [term])])
    try refused(.invalidOption, [(Routing.Merge(head: 0, target: 7), [term])])
    try refused(.invalidOption, [(merge, [Routing.Term(row: 2, weight: 1), term])], dropped: [1, 2])
    try refused(.nonFinite, [(merge, [Routing.Term(row: 1, weight: .nan)])])
    var divided = merge
    divided.valueDivisor = 0
    try refused(.nonFinite, [(divided, [term])])
    var biased = merge
    biased.logBias = -.infinity
    try refused(.nonFinite, [(biased, [term])])
  }

  /// The same rows at any number of threads, and copies that agree at every CPU level.
  @Test func threadsAndLevels() throws {
    let traffic = Traffic(Geometry(4, 2, 67).shape(), tokens: 700, seed: 3)
    let text = "h2o(budget=0.3,every=0)+merge(threshold=-1,update=mean,keys=average)+f32"
    var first: Snapshot?
    for threads in [1, 2, 5] {
      let cache = try makeCache(text, traffic.shape, backend: .cpu(threads: threads))
      try traffic.run(cache, prompt: 700)
      let snapshot = try Snapshot(cache)
      if let first { #expect(snapshot.heads == first.heads) }
      first = first ?? snapshot
    }
    // Which rows are nearest may differ by rounding, the sums of the same rows may not.
    var merge = Routing.Merge(head: 0, target: 1)
    (merge.key, merge.keyDivisor, merge.valueDivisor) = (.average, 1.7, 1.7)
    let terms = [Routing.Term(row: 2, weight: 0.3), Routing.Term(row: 4, weight: 0.4)]
    var rows: [Float]?
    for level in Backend.cpuLevels {
      let selection = Selection(
        spec: nil, scorer: nil, budget: .tokens(30), router: ToldRouter(dropped: [2, 4], told: [(merge, terms)]),
        schedule: Schedule())
      let cache = try KVCache(
        shape: traffic.shape, policy: Policy(selection, store: .dense(.f32)), backend: .cpu(threads: 1, level: level))
      try traffic.run(cache, prompt: 40)
      let held = try cache.read(layer: 0, head: 0)
      if let rows { checkSame(held.keys + held.values, rows, level) }
      rows = held.keys + held.values
    }
  }

  @Test func whatNeedsWhat() throws {
    let shape = Geometry(4, 2, 40).shape()
    expectError(.missingInput, "rotary") { _ = try makeCache("h2o(budget=20)+merge(keys=rotate)", shape) }
    expectError(.invalidOption, "another way") {
      _ = try makeCache("tova+merge(to=next,weights=prominence)", shape)
    }
    expectError(.invalidOption, "keeps everything") { _ = try makeCache("merge", shape) }
    expectError(.missingInput, "attention weights") { _ = try makeCache("cam", shape, inputs: .queries) }
    let cache = try makeCache("cam(attention=3)", shape, inputs: .queries)
    #expect(cache.policy.inputs == RequiredInputs(windowQueries: 3))
    withEvery(
      "text",
      in: [
        "merge", "merge(to=next,width=4,weights=prominence,attention=2,mode=random,seed=7)",
        "merge(threshold=-1,keys=average)",
      ]
    ) { text in
      let policy = try PolicyRegistry.standard.policy("h2o+\(text)")
      let again = try PolicyRegistry.standard.policy("\(policy.spec)")
      check(again.spec == policy.spec, "\(policy.spec) became \(again.spec)")
      check(
        (again.router as? MergingRouter)?.rule == (policy.router as? MergingRouter)?.rule, "rule of \(policy.spec)")
    }
  }
}
