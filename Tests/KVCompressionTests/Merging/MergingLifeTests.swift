import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Merging behind other stages, and when memory runs out in the middle of it.
@Suite struct MergingLifeTests {
  /// What is dropped goes into rows of whatever tier they lie in, behind whatever map: every token is counted once, and
  /// attention is that of the rows.
  @Test(arguments: [
    "h2o(budget=30)+merge(threshold=-1)+kivi(bits=4,residual=32)+rotated",
    "h2o(budget=30)+merge(threshold=-1,keys=average)+kivi(bits=8,residual=32)+rotated(signs=false)",
    "h2o(budget=30)+merge(threshold=-1)+int8+rotated(keys=false)",
    "h2o(budget=30)+tiers(shares=[0.4,0.6])+merge(threshold=-1)+f16+f16",
    "h2o(budget=30)+tiers(shares=[0.4,0.6])+merge(threshold=-1,keys=average)+f16+kivi(bits=8,residual=32)",
    "h2o(budget=30)+tiers(shares=[0.3,0.3,0.4])+merge(threshold=-1)+f32+int8+kivi(bits=4,residual=32)+rotated",
    "snapkv(budget=30,window=4,every=3)+tiers(shares=[0.4,0.6])+merge(threshold=-1)+f16+int8",
    "kvmerger(budget=30,heavy=0)+kivi(bits=8,residual=32)+rotated",
    "h2o(budget=30)+merge(threshold=-1)+cst(bits=4,gap=16)",
  ])
  func behindTiersAndMaps(text: String) throws {
    withEvery("geometry", in: [Geometry(4, 2, 32), Geometry(4, 1, 24, 40), Geometry(2, 2, 40)]) { geometry in
      let traffic = Traffic(geometry.shape(), tokens: 110)
      let cache = try makeCache(text, traffic.shape)
      try traffic.run(cache, prompt: 70, decoded: 20)
      for head in 0..<geometry.kvHeads {
        let held = try cache.read(layer: 0, head: head)
        check(held.counts.reduce(0, +) == 90, "\(held.counts.reduce(0, +)) of 90 tokens counted")
        check(zip(held.positions, held.positions.dropFirst()).allSatisfy(<), "order")
      }
      check(cache.bytes.total == cache.backend.memory.liveBytes, "bytes")
      for token in 90..<100 { try traffic.checkedStep(cache, 0, token..<token + 1) }
      let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu(threads: 1))
      check(try Snapshot(loaded).heads == Snapshot(cache).heads, "a loaded cache")
    }
  }

  /// A gate that refuses everything leaves eviction, to the bit, in front of any stores.
  @Test(arguments: [
    ("h2o(budget=30)+tiers(shares=[0.4,0.6])", "f16+kivi(bits=4,residual=32)"),
    ("h2o(budget=30)", "kivi(bits=4,residual=32)+rotated"), ("streaming(sinks=3,recent=17,positions=keep)", "f16"),
    ("tova(budget=30)", "int8+rotated"),
  ])
  func refusedMergesAreEviction(base: String, stores: String) throws {
    let traffic = Traffic(Geometry(4, 2, 32).shape(), tokens: 100)
    let plain = try makeCache("\(base)+\(stores)", traffic.shape)
    let merging = try makeCache("\(base)+merge(threshold=1.5)+\(stores)", traffic.shape)
    let expected = try traffic.run(plain, prompt: 70, decoded: 30, chunk: 33)
    checkSame(try traffic.run(merging, prompt: 70, decoded: 30, chunk: 33), expected, "outputs")
    #expect(try Snapshot(merging) == Snapshot(plain))
  }

  /// Memory that runs out anywhere in a merge leaves the layer as it was, and what it says it holds; with memory again it
  /// ends as if nothing had been.
  @Test(arguments: [
    "h2o(budget=20)+merge(threshold=-1,keys=average)+f16",
    "h2o(budget=20)+merge(threshold=-1,keys=average)+kivi(bits=4,residual=32)",
    "h2o(budget=40)+tiers(shares=[0.4,0.6])+merge(threshold=-1,keys=average)+f16+kivi(bits=8,residual=32)",
    "kvmerger(budget=20,keys=average)+f32", "cam(start=2,recent=20)+f16", "h2o(budget=20)+merge+int8+rotated",
  ])
  func memoryThatRunsOut(text: String) throws {
    let traffic = Traffic(Geometry(2, 2, 16).shape(), tokens: 80)
    let short = try ShortBackend()
    func filled() throws -> KVCache {
      let cache = try makeCache(text, traffic.shape, backend: Backend(short))
      // Groups of keys are complete before the merge: a second turn thaws them.
      try traffic.run(cache, prompt: 40)
      cache.beginPrefill()
      try traffic.step(cache, 40..<75)
      return cache
    }
    let whole = try filled()
    try whole.finishPrefill()
    let wanted = try Snapshot(whole).heads
    let counts = wanted.map { $0.map(\.counts) }
    var failures = 0
    for left in 0..<2000 {
      let cache = try filled()
      let before = try Snapshot(cache).heads
      short.left = left
      let outcome = Result { () throws(KVError) in try cache.finishPrefill() }
      short.left = nil
      guard case .failure(let error) = outcome else { break }
      check(error.code == .outOfMemory, "\(error)")
      failures += 1
      // What was merged before memory ran out for the rest of the work (codes, giving memory back) is merged for good.
      let after = try Snapshot(cache).heads
      let isMerged = after.map { $0.map(\.counts) } == counts
      check(after == before || isMerged, "after \(left) allocations the cache is neither as it was nor merged")
      check(KVCache.bytes(of: [cache, whole]).total == short.meter.liveBytes, "bytes")
      // Now and then to the end.
      if left % 7 > 0 { continue }
      try cache.finishPrefill()
      if !isMerged { check(try Snapshot(cache).heads == wanted, "with memory again") }
      try traffic.checkedStep(cache, 0, 75..<76)
    }
    #expect(failures > 0)
  }

  /// KVMerger leaves the first and the last layers alone, of those it chooses in.
  @Test func skippedLayers() throws {
    var layers = Array(repeating: Geometry(2, 2, 16).layer(), count: 6)
    layers[5] = Geometry(2, 2, 16).layer(slidingWindow: 16)
    let shape = ModelShape(layers: layers)
    let traffic = Traffic(shape, tokens: 80)
    for text in ["kvmerger(threshold=-1,heavy=0,recent=4", "kvmerger(budget=30,heavy=0,recent=4"] {
      let cache = try makeCache("\(text),skip_first=2,skip_last=1,every=5)+f32", shape)
      try traffic.run(cache, prompt: 60, decoded: 20)
      for layer in 0..<5 {
        let counts = try cache.read(layer: layer, head: 0).counts
        #expect(counts.reduce(0, +) <= 80)
        #expect((counts.max() == 1) == [0, 1, 4].contains(layer), "\(text): layer \(layer) \(counts)")
      }
    }
    let made = try PolicyRegistry.standard.policy("kvmerger(skip_last=1)")
    #expect(try PolicyRegistry.standard.policy(made.spec).spec == made.spec)
  }

  /// Tokens of a second prompt stay dense behind latents, until they are projected where that is asked for.
  @Test func secondPromptBehindLatents() throws {
    let shape = try Geometry(4, 2, 16).shape(layers: 2, rotary: true)
    let traffic = Traffic(shape, tokens: 220)
    for (text, dense) in [
      ("svd(rank_k=0.4,rank_v=0.5)", 100..<101), ("xkv(layers=2,rank_k=0.3,rank_v=0.3)", 100..<101),
      ("svd(rank_k=0.4,rank_v=0.5,new=project,keep=5)", 5..<37),
    ] {
      let cache = try makeCache(text, shape)
      try traffic.run(cache, prompt: 100, decoded: 20)
      let old = try cache.read(layer: 1, head: 1)
      cache.beginPrefill()
      for start in [120, 160] { try traffic.step(cache, start..<start + 40) }
      try cache.finishPrefill()
      let held = try cache.read(layer: 1, head: 1)
      #expect(held.positions == Array(0..<200))
      #expect(Array(held.keys[..<(95 * 16)]) == Array(old.keys[..<(95 * 16)]), "what was factored stays")
      let segment = try #require(cache.layers[1].segments[0] as? LowRankSegment)
      #expect(dense.contains(segment.window.slotCount(head: 1)), "\(segment.window.slotCount(head: 1)) dense rows")
      if text.contains("project") == false {
        // Dense f16 of exact numbers.
        #expect(Array(held.values[(100 * 16)...]) == (100..<200).flatMap { Array(traffic.value(1, 1, $0)) })
      }
      for token in 200..<220 { for layer in 0..<2 { try traffic.checkedStep(cache, layer, token..<token + 1) } }
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    }
  }
}
