import KVCompression
import KVCore
import Testing

/// Every selection method x every store x schedules, from the registry itself: a new row is tested the day it is
/// registered.
@Suite struct ProductTests {
  /// Small values for the options methods commonly have.
  static let small: [String: [String]] = [
    "budget": ["24", "0.4"], "window": ["5"], "kernel": ["3"], "sinks": ["2"], "residual": ["32"],
    "bits": ["2", "4", "8"], "type": ["f32", "f16", "bf16"], "positions": ["keep"], "policy": ["keep"],
    "lag": ["7"], "rotary": ["false"], "queries": ["6"], "length": ["4"],
    "rank_k": ["0.3"], "rank_v": ["0.6"], "rope": ["post"], "scope": ["layer", "head"],
  ]

  /// Texts of a method with every combination of the small values.
  static func texts(_ method: MethodDescription) -> [String] {
    // Tables and calibrations fit one model: these methods have tests of their own.
    if method.options.contains(where: { $0.name == "table" || $0.name == "calibration" }) { return [] }
    var result: [[String]] = [[]]
    for option in method.options {
      guard let values = small[option.name], option.name != "window" || method.role != .store,
        option.name != "scope" || method.role == .store
      else { continue }
      result = result.flatMap { base in values.map { base + ["\(option.name)=\($0)"] } }
    }
    return result.map { $0.isEmpty ? method.name : "\(method.name)(\($0.joined(separator: ",")))" }
  }

  static let selections =
    PolicyRegistry.standard.methods.filter { $0.role == .selection }.flatMap(texts) + modified + [
      "kvcrush(budget=24,sinks=2,window=5,block=3,representatives=2,anchor=mean,every=3)",
      "kvcrush(budget=0.4,sinks=2,window=5,form=paper,share=0.5)",
    ]
  /// Every modifier behind what needs attention of the last queries or behind what needs the weights of all, in turn.
  static let modified = PolicyRegistry.standard.methods.filter { $0.role == .modifier }.flatMap(texts).enumerated()
    .map { ($0.offset % 2 == 0 ? "snapkv(budget=0.4,window=5,kernel=3)+" : "h2o(budget=24)+") + $0.element }
  static let stores =
    PolicyRegistry.standard.methods.filter { $0.role == .store }.flatMap(texts) + [
      "kivi(key_bits=3,value_bits=2,residual=64)", "int8(scale=head,group=32)",
      "int8(format=int4,group=16,metadata=f16)",
      "int8(scale=tensor,factor=0.016)", "fp8(scale=token)", "fp8(key_format=e5m2,value_scale=head,value_group=32)",
      "ggml(keys=q5_1,values=iq4_nl)", "ggml(keys=dense,values=q4_1)", "ggml(keys=q4_0,values=q5_0,residual=7)",
      "quant(keys=q8_0,values=int4)", "quant(keys=token,key_bits=3,values=f16)",
      "kivi(bits=2,residual=32)+layers(first=1,last=0)+ggml(keys=q4_0)",
      "rotatekv(bits=4,group=32,gap=4)", "rotatekv(bits=8,heads=2,levels=squared)",
      "svd(rank_k=0.2,rank_v=full,new=project,keep=3,latents=int4)",
      "svd(rank_k=full,rank_v=0.5,scope=head,new=refresh,keep=2,every=5)",
      "f16+minicache(from=0)", "kivi(bits=4,residual=32)+minicache(from=0,retain=share,scope=layer)",
    ]

  /// Schedules a selection may be asked for.
  static func schedules(_ selection: Selection) -> [(String, Schedule)] {
    [
      ("as published", selection.schedule), ("once", Schedule()), ("every 1", Schedule(decodeInterval: 1)),
      ("every 5", Schedule(decodeInterval: 5)),
      ("chunks", Schedule(afterPrefillChunks: true, decodeInterval: 3)),
      ("over", Schedule(decodeInterval: 1, trigger: .tokens(31))),
    ]
  }

  /// A selection with a store. One of several tiers has f16 before it, as often as needed.
  static func policy(_ selection: String, _ store: String) throws -> Policy {
    // A text of a selection alone says nothing about its stores where it has none of its own.
    let tiers = (1...64).first { count in
      (try? PolicyRegistry.standard.policy(([selection] + Array(repeating: store, count: count)).joined(separator: "+")))
        != nil
    }
    let others = Array(repeating: "f16", count: (tiers ?? 1) - 1)
    return try PolicyRegistry.standard.policy(([selection] + others + [store]).joined(separator: "+"))
  }

  @Test func registryHasWhatTheProductNeeds() {
    #expect(Self.selections.count >= 5 && Self.stores.count >= 6)
  }

  @Test(arguments: stores)
  func product(store: String) throws {
    var turn = 0
    withEvery("selection", in: Self.selections) { text in
      let made = try Self.policy(text, store)
      // Latents are no rows that others could be merged into; the cache says so.
      if made.selection.router.merges, made.tiers.contains(where: { $0.factory.merging == nil }) {
        let shape = try Geometry.all[0].shape(layers: 2, rotary: true)
        expectError(.unsupported, "merges rows") {
          _ = try KVCache(shape: shape, policy: made, backend: .cpu(threads: 1))
        }
        return
      }
      withEvery("schedule", in: Self.schedules(made.selection)) { name, schedule in
        let geometry = try Geometry.all[turn % Geometry.all.count].fitting(made)
        turn += 1
        labelled("\(store), \(geometry)") {
          try Self.life(
            Policy(made.selection.scheduled(schedule), tiers: made.tiers), geometry,
            prompt: [41, 75, 1, 33][turn % 4], decoded: 9, chunk: [7, 16, 64][turn % 3], oracle: turn % 3 == 0)
        }
      }
    }
  }

  /// Every shape with every store, the whole cache and one method that drops.
  @Test(arguments: stores)
  func shapes(store: String) throws {
    withEvery("geometry", in: Geometry.all) { geometry in
      withEvery("selection", in: ["", "h2o(budget=20)+"]) { selection in
        let policy = try PolicyRegistry.standard.policy(selection + store)
        try Self.life(
          policy, geometry.fitting(policy), prompt: 61, decoded: 12, chunk: 23,
          oracle: true)
      }
    }
  }

  static func life(
    _ policy: Policy, _ geometry: Geometry, prompt: Int, decoded: Int, chunk: Int, oracle: Bool
  ) throws {
    let shape = try geometry.shape(layers: 2, rotary: true)
    // Keys of one channel have nothing to turn.
    let turns = policy.tiers.contains { ($0.factory as? LowRankFormat)?.beforeRotation == true }
    if turns, shape.rotary == nil { return }
    let backend = try Backend.cpu(threads: 1)
    let traffic = Traffic(shape, tokens: prompt + decoded, seed: UInt64(prompt))
    do {
      let cache = try KVCache(shape: shape, policy: policy, backend: backend)
      var model = RowModel(policy, shape)
      for start in stride(from: 0, to: prompt, by: chunk) {
        let range = start..<min(start + chunk, prompt)
        for layer in 0..<2 { try traffic.append(cache, layer, range); try traffic.attend(cache, layer, range) }
        model.append(range.count)
        try checkCache(cache, model, traffic, contents: false)
      }
      try cache.finishPrefill()
      model.finishPrefill()
      try checkCache(cache, model, traffic, contents: true)
      for token in prompt..<prompt + decoded {
        for layer in 0..<2 {
          if oracle {
            try traffic.checkedStep(cache, layer, token..<token + 1)
          } else {
            try traffic.append(cache, layer, token..<token + 1)
            let output = try traffic.attend(cache, layer, token..<token + 1)
            check(output.allSatisfy(\.isFinite), "output at \(token) is not finite")
          }
        }
        model.append(1)
        try checkCache(cache, model, traffic, contents: token == prompt + decoded - 1)
      }
      if estimable(policy) {
        let estimate = try policy.estimate(shape: shape, prompt: prompt, decoded: decoded, chunk: chunk)
        if policy.scorer != nil, policy.inputs == .none {
          // Which rows stay, and so which positions must be written down, depends on the keys.
          check(estimate.payload == cache.bytes.payload, "estimated \(estimate), measured \(cache.bytes)")
        } else {
          check(estimate == cache.bytes, "estimated \(estimate), measured \(cache.bytes)")
        }
      }
    }
    check(backend.memory.liveBytes == 0, "\(backend.memory.liveBytes) bytes left after the cache is gone")
  }

  /// Whether row counts and memory cannot depend on the data.
  static func estimable(_ policy: Policy) -> Bool {
    guard policy.allocator is UniformAllocator, !policy.router.merges else { return false }
    // How many rows stay exact is a matter of angles.
    if policy.tiers.contains(where: { $0.factory is DirectionFormat }) { return false }
    // Which rows wait to be reclaimed in one of several tiers is a matter of scores.
    return policy.scorer == nil || policy.tiers.count == 1 && policy.tiers[0].spec.name == "dense"
  }

  static func checkCache(_ cache: KVCache, _ model: RowModel, _ traffic: Traffic, contents: Bool) throws {
    check(
      cache.bytes.total == cache.backend.memory.liveBytes,
      "reports \(cache.bytes.total) bytes, \(cache.backend.memory.liveBytes) are allocated")
    let dense = cache.policy.tiers.allSatisfy { $0.spec.name == "dense" && $0.modifiers.isEmpty }
    let protection = cache.policy.router.protection
    for layer in cache.shape.layers.indices {
      check(cache.tokensSeen(layer: layer) == model.seen, "\(cache.tokensSeen(layer: layer)) tokens seen")
      for head in 0..<cache.shape.layers[layer].kvHeads {
        let rows = try cache.rows(layer: layer, head: head)
        if model.isExact {
          check(rows.count == model.rows, "\(rows.count) rows, \(model.rows) expected at \(model.seen) tokens")
        }
        check(
          (model.seen == 0 ? 0 : 1)...max(1, model.seen) ~= rows.count, "\(rows.count) rows of \(model.seen) tokens")
        check(cache.rowsHeld(layer: layer, head: head) == rows.count, "rowsHeld")
        check(zip(rows, rows.dropFirst()).allSatisfy(<), "positions do not increase: \(rows)")
        check(rows.allSatisfy { (0..<model.seen).contains($0) }, "positions beyond the tokens: \(rows)")
        let kept = model.atLastCompression
        let split = protection.split(kept: kept.rows, of: kept.before)
        if kept.seen > 0, model.isExact {
          // A sink that a tiny budget took in an early compression is gone for good.
          let sinks = min(split.sinks, model.sinksLeft)
          check(rows.starts(with: 0..<sinks), "\(sinks) sinks, found \(rows)")
          let window = model.newestAtLastCompression.suffix(split.window)
          check(window.allSatisfy(rows.contains), "window \(window) is not all in \(rows)")
        }
        if !contents { continue }
        let held = try cache.read(layer: layer, head: head)
        check(held.positions == rows, "read and rows differ")
        if cache.policy.router.merges {
          // Sums of others by now; what must hold for them is tested with the methods.
          check(held.counts.allSatisfy { (1...model.seen).contains($0) }, "counts \(held.counts)")
          check((held.keys + held.values + held.logBias).allSatisfy(\.isFinite), "not finite")
          continue
        }
        check(held.logBias.allSatisfy { $0 == 0 } && held.counts.allSatisfy { $0 == 1 }, "merged rows")
        if dense {
          checkSame(held.keys, rows.flatMap { traffic.key(layer, head, $0) }, "keys of head \(head)")
          checkSame(held.values, rows.flatMap { traffic.value(layer, head, $0) }, "values of head \(head)")
        } else if cache.policy.tiers.contains(where: { $0.factory is DirectionFormat }) {
          checkLengths(held.keys, rows.map { traffic.key(layer, head, $0) })
        } else if held.keys.count > 0, cache.policy.tiers.contains(where: { $0.factory is LowRankFormat }) {
          // What a basis leaves of all heads of a token is no longer than they were.
          let longest = Double(254 / 64) * Double(cache.shape.layers[layer].kvHeads * 2 * 67).squareRoot()
          check(held.keys.allSatisfy { abs(Double($0)) < longest }, "a restored key is longer than any there was")
        } else {
          // Affine codes of numbers within ±2 are off by at most half a step of the full range.
          // A row may have gone through every tier.
          let half = cache.policy.tiers.filter { $0.spec.name != "dense" }.reduce(Float(0.01)) { sum, tier in
            let bits =
              tier.spec.options.compactMap { option -> Int? in
                guard option.name.hasSuffix("bits"), case .integer(let n) = option.value.kind else { return nil }
                return n
              }.min() ?? 2
            return sum + 254 / Float(64) / Float(1 << bits - 1) / 2 * 1.01
          }
          let worst = zip(held.keys, rows.flatMap { traffic.key(layer, head, $0) }).map { abs($0 - $1) }.max() ?? 0
          check(worst <= half, "a key is off by \(worst), half a step is \(half)")
        }
      }
    }
  }
}

extension ProductTests {
  /// Rows that share a direction with another layer's keep their length, but for what f16, and a step of 4 bits in every
  /// channel of a unit row, may add or take.
  static func checkLengths(_ held: [Float], _ rows: [ArraySlice<Float>]) {
    guard let dim = rows.first?.count else { return }
    func length(_ row: ArraySlice<Float>) -> Double { row.reduce(0) { $0 + Double($1) * Double($1) }.squareRoot() }
    for (index, row) in rows.enumerated() {
      let own = length(held[index * dim..<(index + 1) * dim])
      let bound = (0.01 + Double(dim).squareRoot() * 2 / 15) * length(row) + 1e-3
      check(abs(own - length(row)) <= bound, "a row of length \(length(row)) has become \(own) long")
    }
  }
}

/// How many rows each head must hold, from the schedule and the budget alone.
struct RowModel {
  let policy: Policy
  let shape: ModelShape
  var seen = 0
  var rows = 0
  var decoding = false
  var sinceCompression = 0
  var sinksLeft = Int.max
  var atLastCompression = (rows: 0, before: 0, seen: 0)
  /// Other allocators may give layers and heads different counts.
  var isExact: Bool { policy.allocator is UniformAllocator }
  /// Newest positions when last compressed (the window is a suffix of what was appended).
  var newestAtLastCompression: [Int] { Array(max(0, atLastCompression.seen - 4096)..<atLastCompression.seen) }

  init(_ policy: Policy, _ shape: ModelShape) {
    self.policy = policy
    self.shape = shape
  }

  mutating func append(_ count: Int) {
    seen += count
    rows += count
    if !decoding {
      if policy.schedule.afterPrefillChunks { compress() }
      return
    }
    guard let interval = policy.schedule.decodeInterval else { return }
    sinceCompression += count
    if sinceCompression >= interval {
      compress()
      sinceCompression = 0
    }
  }

  mutating func finishPrefill() {
    if policy.schedule.afterPrefill { compress() }
    decoding = true
    sinceCompression = 0
  }

  mutating func compress() {
    let budget = policy.budget.resolveTokens(
      tokens: seen, layer: 0, head: 0, layers: shape.layers.count, kvHeads: shape.layers[0].kvHeads, bytesPerRow: 1)
    let trigger = policy.schedule.trigger?.resolveTokens(
      tokens: seen, layer: 0, head: 0, layers: shape.layers.count, kvHeads: shape.layers[0].kvHeads, bytesPerRow: 1)
    if rows > budget, rows > trigger ?? 0 {
      sinksLeft = min(sinksLeft, policy.router.protection.split(kept: budget, of: rows).sinks)
      atLastCompression = (budget, rows, seen)
      rows = budget
    }
  }
}
