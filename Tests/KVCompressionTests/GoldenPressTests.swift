import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Scorers and wrappers against kvpress, and PrefixKV against its authors' code.
@Suite struct GoldenPressTests {
  private func rotary(_ dim: Int) throws -> RotaryEmbedding {
    try RotaryEmbedding(headDim: dim, theta: #require(Goldens.index.get().model["ropeTheta"]?.double))
  }

  private func ratio(_ run: GoldenRun) throws -> Double {
    try #require(run.entry.parameters?["compression_ratio"]?.double)
  }

  private func filled(_ selection: Selection, _ input: GoldenInput, chunks: [Int]? = nil) throws -> KVCache {
    let cache = try KVCache(
      Policy(selection, store: .dense(.f32)), queryHeads: input.queries.heads, kvHeads: input.keys.heads,
      dim: input.keys.dim, rotary: rotary(input.keys.dim))
    var start = 0
    for count in chunks ?? [input.tokens] {
      let range = start..<min(start + count, input.tokens)
      try cache.append(input.keys.slice(tokens: range), input.values.slice(tokens: range))
      if cache.policy.inputs.windowQueries > 0 { try cache.observe(input.queries) }
      try cache.commit(layer: 0)
      start = range.upperBound
    }
    return cache
  }

  /// Scores, kept positions and attention over them. Rows below `padded` hold a number above all others there.
  private func compare(_ run: GoldenRun, _ selection: Selection, _ input: GoldenInput, padded: Int = 0) throws {
    let cache = try filled(selection, input)
    let reference = try Goldens.reference(run.entry, "scores").numbers
    let scores = try cache.scores().enumerated().flatMap { head, own in
      own.enumerated().map { $0.offset < padded ? reference[head * input.tokens + $0.offset] : Double($0.element) }
    }
    try run.expect("scores", scores)
    try cache.finishPrefill()
    let kept = try cache.positions()
    try run.expect("positions", positions: kept)
    try run.expect(
      "output",
      KernelAttention(backend: cache.backend).attend(
        input.outputProbes(), keys: input.keys, values: input.values,
        positions: run.isEqual("positions") ? kept : Goldens.positions(run.entry, "positions")))
    run.finish()
  }

  @Test(arguments: Goldens.names("kvpress.knorm.", "kvpress.keydiff."))
  func keys(name: String) throws {
    let run = try GoldenRun(name)
    let budget = Budget.fraction(1 - (try ratio(run)))
    try compare(
      run, name.hasPrefix("kvpress.knorm") ? .knorm(budget: budget) : .keyDiff(budget: budget), GoldenInput(run.entry))
  }

  /// Its scores are 1 for what stays and 0 for the rest.
  @Test(arguments: Goldens.names("kvpress.streaming."))
  func streaming(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let sinks = try #require(run.entry.parameters?["n_sink"]?.int)
    let cache = try filled(
      .streamingLLM(sinks: sinks, budget: .fraction(1 - ratio(run)), positions: .keep), input)
    try cache.finishPrefill()
    let kept = try cache.positions()
    try run.expect("scores", kept.flatMap { own in (0..<input.tokens).map { own.contains($0) ? 1.0 : 0 } })
    try run.expect("positions", positions: kept)
    try run.expect(
      "output",
      KernelAttention(backend: cache.backend).attend(
        input.outputProbes(), keys: input.keys, values: input.values, positions: kept))
    run.finish()
  }

  @Test(arguments: Goldens.names("kvpress.lagkv."))
  func lagKV(name: String) throws {
    let run = try GoldenRun(name)
    try compare(
      run,
      .lagKV(
        budget: .fraction(1 - ratio(run)), sinks: run.entry.int("n_sink"), lag: run.entry.int("lag_size"),
        cross: run.entry.parameters?["cross_scoring"]?.flag ?? false), GoldenInput(run.entry))
  }

  /// From given statistics, and in text a, where all queries are known, from captured ones.
  @Test(arguments: Goldens.names("kvpress.expected."), [false, true])
  func expectedAttention(name: String, captured: Bool) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    if captured, !input.hasAllQueries { return }
    var statistics: QueryStatistics?
    if !captured {
      let file = try Goldens.file(try #require(run.entry.input?["file"]?.string))
      let layer = "layers.\(try #require(run.entry.input?["layer"]?.int))."
      statistics = QueryStatistics(layers: [
        0: .init(
          mean: try file.floats(named: layer + "query_mean"),
          covariance: try file.floats(named: layer + "query_covariance"))
      ])
    }
    let sinks = try run.entry.int("n_sink")
    try compare(
      run,
      .expectedAttention(
        budget: .fraction(1 - ratio(run)), sinks: sinks, queries: 65_536,
        future: run.entry.int("n_future_positions"),
        covariance: run.entry.parameters?["use_covariance"]?.flag ?? true,
        valueLength: run.entry.parameters?["use_vnorm"]?.flag ?? true, statistics: statistics), input, padded: sinks)
  }

  @Test(arguments: Goldens.names("kvpress.critical."))
  func critical(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let rule = try rule(run)
    let cache = try filled(
      .snapKV(budget: .fraction(1 - ratio(run)), window: 32, kernel: 5), input)
    let view = cache.view
    let norms = (0..<view.kvHeads).map { rule.norms(view, head: $0) }
    try run.expect("projectedNorm", norms.flatMap(\.self))
    try run.expect("scores", products(run, cache, norms, input))
    run.finish()
  }

  /// Both stages inside the budgets that the heads won.
  @Test(arguments: Goldens.names("kvpress.criticaladakv."))
  func criticalAdaKV(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let rule = try rule(run)
    let floor = try #require(run.entry.parameters?["alpha_safeguard"]?.double)
    let selection = try Selection.snapKV(budget: .fraction(1 - ratio(run)), window: 32, kernel: 5)
      .adaKV(floor: floor, form: .kvpress)
      // There what the floor keeps goes by score alone.
      .critical(first: rule.first, epsilon: rule.epsilon, safe: floor, projections: rule.projections)
    let cache = try filled(selection, input)
    do {
      let view = cache.view
      try run.expect(
        "scores", products(run, cache, (0..<view.kvHeads).map { rule.norms(view, head: $0) }, input))
    }
    try cache.finishPrefill()
    let kept = try cache.positions()
    try run.expect("lengths", kept.map { Double($0.count) })
    if run.entry.outputs["positions"] != nil { try run.expect("positions", positions: kept) }
    run.finish()
  }

  private func rule(_ run: GoldenRun) throws -> TwoStageRule {
    let file = try Goldens.file(try #require(run.entry.input?["file"]?.string))
    let layer = try #require(run.entry.input?["layer"]?.int)
    return try TwoStageRule(
      first: #require(run.entry.parameters?["first_stage_ratio"]?.double),
      epsilon: #require(run.entry.parameters?["epsilon"]?.double),
      projections: OutputProjections(layers: [0: try file.floats(named: "layers.\(layer).output_projection")]))
  }

  /// Second-stage scores. Rows of the window, and whatever else is above all scores there, are as the reference has them.
  private func products(
    _ run: GoldenRun, _ cache: KVCache, _ norms: [[Float]], _ input: GoldenInput
  ) throws -> [Double] {
    let reference = try Goldens.reference(run.entry, "scores").numbers
    return try cache.scores().enumerated().flatMap { head, scores in
      scores.enumerated().map { row, score in
        let wanted = reference[head * input.tokens + row]
        if row >= input.tokens - 32 || wanted > 1e30 { return wanted }
        return (Double(score) / 32 + 1e-4) * Double(norms[head][row])
      }
    }
  }

  @Test(arguments: Goldens.names("kvpress.chunkkv"))
  func chunkKV(name: String) throws {
    let run = try GoldenRun(name)
    let cache = try filled(
      .chunkKV(
        budget: .fraction(1 - ratio(run)), window: run.entry.int("window_size"), kernel: run.entry.int("kernel_size"),
        length: run.entry.int("chunk_length"), whole: true), GoldenInput(run.entry))
    try cache.finishPrefill()
    try run.expect("positions", positions: cache.positions())
    run.finish()
  }

  @Test(arguments: Goldens.names("kvpress.chunk2", "kvpress.chunk6"))
  func chunk(name: String) throws {
    let run = try GoldenRun(name)
    let cache = try filled(
      .knorm(budget: .fraction(1 - ratio(run))).even(length: run.entry.int("chunk_length")), GoldenInput(run.entry))
    try cache.finishPrefill()
    try run.expect("positions", positions: cache.positions())
    run.finish()
  }

  /// Block by block while the prompt comes in; near ties may change 2 %.
  @Test(arguments: Goldens.names("kvpress.block."))
  func block(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let kept = Int(Double(input.tokens) * (1 - (try ratio(run))))
    var selection = try Selection.keyDiff(budget: .tokens(kept))
    selection.schedule.afterPrefillChunks = true
    let size = try run.entry.int("block_size")
    let cache = try filled(
      selection, input, chunks: [kept] + Array(repeating: size, count: (input.tokens - kept + size - 1) / size))
    try cache.finishPrefill()
    for (ours, theirs) in zip(try cache.positions(), try Goldens.positions(run.entry, "positions")) {
      #expect(ours.count == theirs.count)
      #expect(Set(ours).subtracting(theirs).count <= theirs.count / 50)
    }
  }

  // MARK: PrefixKV

  @Test(arguments: Goldens.names("prefixkv."))
  func prefixKV(name: String) throws {
    let run = try GoldenRun(name)
    let file = try Goldens.file(try #require(run.entry.input?["file"]?.string))
    let tokens = try #require(run.entry.input?["tokens"]?.int)
    let importance = try file.floats(named: "importance")
    let layers = importance.count / tokens
    let drop = try #require(run.entry.parameters?["dropRatio"]?.double)
    let start = try run.entry.int("start")
    let selection = try Selection.prefixKV(budget: .fraction(1 - drop), sinks: start)
    let allocator = try #require(selection.allocator as? PrefixAllocator)

    let scores = (0..<layers).map { Array(importance[$0 * tokens..<($0 + 1) * tokens]) }
    let protection = Protection(sinks: start, window: 1)
    let requests = scores.enumerated().map { layer, own in
      WorkedExampleAllocationTests.request(
        [own],
        budget: Budget.fraction(1 - drop).resolveTokens(
          tokens: tokens, layer: 0, head: 0, layers: 1, kvHeads: 1, bytesPerRow: 1), index: layer, layers: layers,
        protection: protection)
    }
    let kept = try allocator.allocate(requests).map { $0[0] }
    let drops = kept.map { Double(tokens - $0) }
    try run.expect("bisectionDrops", drops)
    try run.expect("dropsPerLayer", drops)

    // The selection of every layer, with the official drops as calibrated shares.
    let official = try Goldens.reference(run.entry, "dropsPerLayer").numbers
    let calibrated = try Selection.prefixKV(
      budget: .fraction(1 - drop), sinks: start, keep: official.map { 1 - $0 / Double(tokens) })
    let shape = ModelShape(layerCount: layers, queryHeads: 2, kvHeads: 2, headDim: 4)
    let cache = try KVCache(
      shape: shape, policy: Policy(calibrated, store: .dense(.f32)), backend: .cpu(threads: 1))
    let traffic = Traffic(shape, tokens: tokens + 6)
    for layer in 0..<layers {
      try traffic.append(cache, layer, 0..<tokens)
      // Two heads share what was received.
      try cache.observe(layer: layer, attention: [scores[layer], scores[layer]])
    }
    try cache.finishPrefill()
    #expect(try (0..<layers).allSatisfy { try cache.rows(layer: $0, head: 0) == cache.rows(layer: $0, head: 1) })
    try run.expect("positions", positions: (0..<layers).map { try cache.rows(layer: $0, head: 0) })
    let rule = FrozenPrefixRule()
    let cuts = (0..<layers).map { rule.cut(kept: cache.rowsHeld(layer: $0, head: 0)) }
    try run.expect("cutSlots", cuts.map { Double($0) })

    var lengths: [Double] = []
    for step in 0..<6 {
      for layer in 0..<layers {
        let before = try cache.rows(layer: layer, head: 0) + [tokens + step]
        try traffic.append(cache, layer, tokens + step..<tokens + step + 1)
        try traffic.attend(cache, layer, tokens + step..<tokens + step + 1)
        let after = try cache.rows(layer: layer, head: 0)
        lengths.append(Double(after.count))
        var wanted = before
        if after.count < before.count { wanted.remove(at: cuts[layer]) }
        #expect(after == wanted, "the row in slot \(cuts[layer]) goes")
      }
    }
    try run.expect("decodeLengths", lengths)
    run.finish(except: ["scores"])
  }
}
