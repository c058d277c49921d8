import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Methods that fold attention into numbers beside the rows, against their authors' code and kvpress.
@Suite struct GoldenObserverTests {
  // MARK: TOVA

  @Test(arguments: Goldens.names("tova."))
  func tova(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let cache = try cache(input, .tova(budget: .tokens(run.entry.int("cacheSize"))))
    try feedPrompt(cache, input)
    try run.expect("prefill.scores", cache.scores()[0])
    try cache.finishPrefill()
    #expect(try cache.rows(layer: 0, head: 0) == cache.rows(layer: 0, head: 1))
    try run.expect("prefill.positions", positions: [cache.rows(layer: 0, head: 0)])
    var positions: [[Int]] = []
    var outputs: [Float] = []
    var scores: [Float] = []
    for step in 0..<8 {
      // What the step's attention left, before the eviction.
      let whole = cache.fork()
      try whole.append(
        input.probeKeys.slice(tokens: step..<step + 1), input.probeValues.slice(tokens: step..<step + 1))
      scores += try attention(
        whole, input.probeQueries.slice(tokens: step..<step + 1), of: input.tokens + 8 + pad(name))
      try cache.append(
        input.probeKeys.slice(tokens: step..<step + 1), input.probeValues.slice(tokens: step..<step + 1))
      outputs += try cache.attend(input.probeQueries.slice(tokens: step..<step + 1))
      positions.append(try cache.rows(layer: 0, head: 0))
      #expect(try cache.rows(layer: 0, head: 1) == positions[step])
    }
    try run.expect("decode.positions", positions: positions)
    try run.expect("decode.scores", scores)
    try run.expect("decode.output", outputs)
    run.finish()
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
  }

  /// Text a has 12 probes, text b 8; scores are stored for all of them.
  private func pad(_ name: String) -> Int { name.contains(".a") ? 4 : 0 }

  /// Scores by token position after one attention call that evicts nothing.
  private func attention(_ cache: KVCache, _ queries: HeadTensor, of tokens: Int) throws -> [Float] {
    let keep = try KVCache(
      Policy(.tova(budget: .tokens(4096)), store: .dense(.f32)), queryHeads: queries.heads, kvHeads: 2, dim: queries.dim
    )
    let positions = try cache.rows(layer: 0, head: 0)
    let contents = try (0..<2).map { try cache.read(layer: 0, head: $0) }
    let keys = try HeadTensor(
      heads: 2, tokens: positions.count, dim: queries.dim, elements: contents.flatMap(\.keys))
    let values = try HeadTensor(
      heads: 2, tokens: positions.count, dim: queries.dim, elements: contents.flatMap(\.values))
    try keep.append(keys, values)
    _ = try keep.attend(queries)
    let scores = try keep.scores()[0]
    var result = [Float](repeating: 0, count: tokens)
    for (position, score) in zip(positions, scores) { result[position] = score }
    return result
  }

  /// The prompt's attention: from all queries where they were captured, else from the last ones.
  private func feedPrompt(_ cache: KVCache, _ input: GoldenInput) throws {
    let first = input.tokens - input.queries.tokens
    if first > 0 {
      try cache.append(input.keys.slice(tokens: 0..<first), input.values.slice(tokens: 0..<first))
      // Nobody looks at what these attended to.
      try cache.observe(
        layer: 0, attention: Array(repeating: Array(repeating: 0, count: first), count: input.keys.heads))
    }
    try cache.append(
      input.keys.slice(tokens: first..<input.tokens), input.values.slice(tokens: first..<input.tokens))
    _ = try cache.attend(input.queries)
  }

  private func cache(_ input: GoldenInput, _ selection: Selection, repeats: Int = 1) throws -> KVCache {
    try KVCache(
      Policy(selection, store: .dense(.f32)), queryHeads: input.queries.heads, kvHeads: input.keys.heads * repeats,
      dim: input.keys.dim)
  }

  // MARK: kvpress

  @Test(arguments: Goldens.names("kvpress.tova."))
  func pressTOVA(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let cache = try cache(input, .tova(budget: .fraction(0.5), recent: 1, every: nil))
    try feedPrompt(cache, input)
    var scores = try cache.scores()
    // The press writes the largest of the other scores plus one there.
    let newest = scores.map { $0.dropLast().max() ?? 0 }.max().map { $0 + 1 } ?? 1
    for head in scores.indices { scores[head][scores[head].count - 1] = newest }
    try run.expect("scores", scores.flatMap { $0 })
    try finish(run, cache, input)
  }

  @Test(arguments: Goldens.names("kvpress.observed."))
  func observedAttention(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let cache = try cache(input, .h2o(budget: .fraction(0.5), recentShare: 0, every: nil, normalised: true))
    try cache.append(input.keys, input.values)
    if input.hasAllQueries {
      _ = try cache.attend(input.queries)
    } else {
      var sums: [[Float]] = [input.columnSums[0], input.columnSums[2]]
      for head in 0..<2 { for token in 0..<input.tokens { sums[head][token] += input.columnSums[2 * head + 1][token] } }
      try cache.observe(layer: 0, attention: sums)
    }
    try run.expect("scores", cache.scores().flatMap { $0 })
    try finish(run, cache, input)
  }

  private func finish(_ run: GoldenRun, _ cache: KVCache, _ input: GoldenInput) throws {
    try cache.finishPrefill()
    try run.expect("positions", positions: cache.positions())
    let probes = try input.outputProbes()
    let output =
      run.isEqual("positions")
      ? try cache.look(probes)
      : try KernelAttention(backend: cache.backend).attend(
        probes, keys: input.keys, values: input.values, positions: Goldens.positions(run.entry, "positions"))
    try run.expect("output", output)
    run.finish()
  }

  // MARK: LazyEviction

  @Test(arguments: Goldens.names("lazy."))
  func lazy(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let window = try run.entry.int("window")
    let alpha = try #require(run.entry.parameters?["alpha"]?.double)
    let keys = try input.keys.repeatingHeads(2)
    let values = try input.values.repeatingHeads(2)
    let probeKeys = try input.probeKeys.repeatingHeads(2)
    let probeValues = try input.probeValues.repeatingHeads(2)
    func decode(_ budget: Budget) throws -> (KVCache, [Int], pairs: [[(Float, Float)]]) {
      let cache = try cache(input, .lazyEviction(budget: budget, window: window, alpha: alpha), repeats: 2)
      try cache.append(keys, values)
      try cache.finishPrefill()
      var lengths: [Int] = []
      var pairs: [[(Float, Float)]] = []
      for step in 0..<12 {
        try cache.append(probeKeys.slice(tokens: step..<step + 1), probeValues.slice(tokens: step..<step + 1))
        _ = try cache.attend(input.probeQueries.slice(tokens: step..<step + 1))
        lengths.append(cache.rowsHeld(layer: 0, head: 0))
        let view = cache.view
        if pairs.isEmpty, lengths[step] <= 200 {
          for head in 0..<4 {
            var own: [(Float, Float)] = []
            for row in 0..<view.rowCount(head: head) {
              own.append((view.observed(head: head, row: row), view.observed(head: head, row: row, column: 1)))
            }
            pairs.append(own.sorted { $0 < $1 })
          }
        }
      }
      return (cache, lengths, pairs)
    }
    let (whole, _, _) = try decode(.unlimited)
    for (column, output) in ["lastActive", "maxInterval"].enumerated() {
      let view = whole.view
      var numbers: [Float] = []
      for head in 0..<4 { for row in 0..<300 { numbers.append(view.observed(head: head, row: row, column: column)) } }
      try run.expect(output, numbers)
    }
    let (_, lengths, pairs) = try decode(.tokens(run.entry.int("capacity")))
    try run.expect("lengths", lengths.map { Double($0) })
    var flat: [Float] = []
    for own in pairs { for pair in own { flat += [pair.0, pair.1] } }
    try run.expect("firstEvictionPairs", flat)
    run.finish()
  }
}
