import KVCompression
import KVExperiments
import Testing

/// StreamingLLM against the authors' `StartRecentKVCache`.
@Suite struct GoldenStreamingTests {
  @Test(arguments: Goldens.names("streaming."), [PositionPolicy.keep, .slot])
  func sinksAndWindow(name: String, positions: PositionPolicy) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let theta = try #require(Goldens.index.get().model["ropeTheta"]?.double)
    let rotary = try RotaryEmbedding(headDim: input.keys.dim, theta: theta)
    let policy = Policy(
      try .streamingLLM(
        sinks: run.entry.int("start"), recent: run.entry.int("recent"), positions: positions), store: .dense(.f32))
    let cache = try KVCache(
      policy, queryHeads: input.queries.heads, kvHeads: input.keys.heads, dim: input.keys.dim, rotary: rotary)
    try cache.append(input.keys, input.values)
    try cache.finishPrefill()
    for kept in try cache.positions() { try run.expect("positions", positions: [kept]) }

    if positions == .keep {
      try run.expect("keepPositions.output", cache.look(input.outputProbes()))
    } else {
      // Every probe stands right behind the cache, at the slot after the last: position `tokens`. Seen from there the
      // rows are as far away as their slots.
      let before = try #require(input.probeQueriesBeforeRotation)
      var rotated = before.elements
      var span = rotated.mutableSpan
      let places = [Int32](repeating: Int32(input.tokens), count: before.heads * before.tokens)
      try rotary.rotate(&span, stride: before.dim, positions: places.span)
      let queries = try HeadTensor(
        heads: before.heads, tokens: before.tokens, dim: before.dim, elements: rotated)
      var outputs: [[Float]] = []
      for probe in 0..<queries.tokens {
        outputs.append(
          try cache.attend(queries.slice(tokens: probe..<probe + 1), AttentionOptions(commits: false)))
      }
      try run.expect("slotPositions.output", headMajor(outputs, heads: queries.heads))
    }

    try cache.makeRoom(for: run.entry.int("coming"))
    for kept in try cache.positions() { try run.expect("positionsForComing", positions: [kept]) }
    run.finish(except: [positions == .keep ? "slotPositions.output" : "keepPositions.output"])
  }
}
