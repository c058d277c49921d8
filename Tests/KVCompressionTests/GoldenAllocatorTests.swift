import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Ada-KV and PyramidKV against their authors' classes and against kvpress.
@Suite struct GoldenAllocatorTests {
  /// A cache of which only one layer is filled, for policies that look at the layer's number.
  private func cache(_ policy: Policy, _ input: GoldenInput, kvHeads: Int, layers: Int) throws -> KVCache {
    try KVCache(
      shape: ModelShape(layerCount: layers, queryHeads: input.queries.heads, kvHeads: kvHeads, headDim: input.keys.dim),
      policy: policy, backend: .cpu(threads: 2))
  }

  @Test(arguments: Goldens.names("adakv."))
  func adaKV(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let repeats = run.entry.parameters?["gqa"]?.flag == true ? 1 : 2
    let window = try run.entry.int("window")
    let capacity = Budget.tokens(try run.entry.int("capacity"))
    let kernel = try run.entry.int("kernel")
    let pooling = try #require(Pooling(rawValue: run.entry.text("pooling")))
    let floor = try #require(run.entry.parameters?["floorAlpha"]?.double)
    let pyramid = run.entry.parameters?["pyramid"]?.flag == true
    let layer = pyramid ? try run.entry.int("layerIndex") : 0
    let selection =
      pyramid
      ? try Selection.adaPyramidKV(budget: capacity, window: window, kernel: kernel, pooling: pooling, floor: floor)
      : try .adaSnapKV(budget: capacity, window: window, kernel: kernel, pooling: pooling, floor: floor)
    let keys = try input.keys.repeatingHeads(repeats)
    let values = try input.values.repeatingHeads(repeats)
    // The model the goldens were made with has 8 layers.
    let cache = try cache(
      Policy(selection, store: .dense(.f32)), input, kvHeads: keys.heads, layers: pyramid ? 8 : 1)
    let (k, v, q) = (keys.elements, values.elements, input.queries.elements)
    try cache.append(
      layer: layer, keys: TensorView(k.span, heads: keys.heads, tokens: keys.tokens, dim: keys.dim),
      values: TensorView(v.span, heads: keys.heads, tokens: keys.tokens, dim: keys.dim))
    try cache.observe(
      layer: layer,
      queries: TensorView(q.span, heads: input.queries.heads, tokens: input.queries.tokens, dim: keys.dim))

    var table = ScoreTable()
    do {
      let view = LayerView(cache.layers[layer], options: cache.attention, backend: cache.backend.operations)
      table.reset(counts: view.rowCounts)
      try #require(selection.scorer).score(view, into: &table)
    }
    let past = input.tokens - window
    // Theirs is the mean over the window, ours the sum: a constant.
    try run.expect(
      "scores",
      (0..<keys.heads).flatMap { head in (0..<past).map { table[head, $0] / Float(window) } })
    try cache.finishPrefill(layer: layer)
    let kept = try (0..<keys.heads).map { try cache.rows(layer: layer, head: $0) }
    try run.expect("lengths", kept.map { Double($0.count) })
    try run.expect("positions", positions: kept)
    let probes = try input.outputProbes()
    try run.expect(
      "output",
      KernelAttention(backend: cache.backend).attend(
        probes, keys: keys, values: values,
        positions: run.isEqual("positions") ? kept : Goldens.positions(run.entry, "positions")))
    run.finish()
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  @Test func pyramidBudgets() throws {
    let run = try GoldenRun("pyramidkv.budgets")
    guard case .array(let rows)? = run.entry.outputs["rows"]?.value else {
      Issue.record("no rows")
      return
    }
    for row in rows {
      let parameters = try #require(row["parameters"])
      func int(_ name: String) throws -> Int { try #require(parameters[name]?.int) }
      let (tokens, layers) = (try int("tokens"), try int("layers"))
      let (window, beta) = (try int("window"), Double(try int("beta")))
      let official = try PyramidAllocator(beta: beta, form: .official)
      let kept = try (0..<layers).map {
        official.rows(budget: try int("capacity"), tokens: tokens, protected: window, index: $0, layers: layers)
      }
      #expect(kept == row["keptPerLayer"]?.numbers.map { Int($0) }, "\(parameters)")
      let budget = try Budget.fraction(1 - #require(parameters["ratio"]?.double)).resolveTokens(
        tokens: tokens, layer: 0, head: 0, layers: layers, kvHeads: 1, bytesPerRow: 1)
      let press = try PyramidAllocator(beta: beta, form: .kvpress)
      let pressed = (0..<layers).map {
        press.rows(budget: budget, tokens: tokens, protected: window, index: $0, layers: layers)
      }
      #expect(pressed == row["kvpressKeptPerLayer"]?.numbers.map { Int($0) }, "\(parameters)")
    }
    #expect(rows.count == 5)
  }

  /// kvpress pools every query head, then takes the mean: with average pooling that is the mean, then pooled. Its masks
  /// keep what our rows keep.
  @Test(arguments: Goldens.names("kvpress.adakv.", "kvpress.snapkv."))
  func press(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let window = try run.entry.int("window_size")
    let ratio = try #require(run.entry.parameters?["compression_ratio"]?.double)
    let snapKV = try Selection.snapKV(
      budget: .fraction(1 - ratio), window: window, kernel: run.entry.int("kernel_size"))
    let floor = run.entry.parameters?["alpha_safeguard"]?.double
    let selection =
      try floor.map { (floor) throws -> Selection in try snapKV.adaKV(floor: floor, form: .kvpress) } ?? snapKV
    let cache = try KVCache(
      Policy(selection, store: .dense(.f32)), queryHeads: input.queries.heads, kvHeads: input.keys.heads,
      dim: input.keys.dim)
    try cache.append(input.keys, input.values)
    try cache.observe(input.queries)
    let reference = try Goldens.reference(run.entry, "scores").numbers
    // Protected positions hold a number above all scores there.
    let scores = try cache.scores().enumerated().flatMap { head, scores in
      scores.enumerated().map { row, score in
        row < input.tokens - window ? Double(score) / Double(window) : reference[head * input.tokens + row]
      }
    }
    try run.expect("scores", scores)
    try cache.finishPrefill()
    let kept = try cache.positions()
    if floor != nil { try run.expect("lengths", kept.map { Double($0.count) }) }
    try run.expect("positions", positions: kept)
    let probes = try input.outputProbes()
    try run.expect(
      "output",
      KernelAttention(backend: cache.backend).attend(
        probes, keys: input.keys, values: input.values,
        positions: run.isEqual("positions") ? kept : Goldens.positions(run.entry, "positions")))
    run.finish()
  }
}
