import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// ZipCache's codec against the authors' packing code. Theirs flattens all KV heads into one row, so the caches here hold
/// one head of all channels.
@Suite struct GoldenZipCacheCodecTests {
  /// Channel factors, steps, minima, codes, and attention over the restored values.
  @Test(arguments: Goldens.names("zipcache.cst"))
  func separable(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let bits = try run.entry.int("bits")
    let (heads, dim) = (input.values.heads, input.values.dim)
    let channels = heads * dim
    let policy = Policy(store: try .cst(keyBits: bits, window: .f32, metadata: .f32))
    let cache = try KVCache(policy, queryHeads: 1, kvHeads: 1, dim: channels)
    let flat = try input.values.flattened()
    try cache.append(flat, flat)
    try cache.finishPrefill()

    let store = try cache.segment.heads[0].values
    #expect(store.bodyRows == input.tokens && store.tailRows == 0)
    let body = EncodedBody(store)
    let factors = try numbers(of: try #require(store.sharedMap), cache)
    try run.expect("channelFactors", factors)
    try run.expect("tokenSteps", body.scales)
    try run.expect("tokenMins", body.minima)
    try run.expect("packed", packed(body.words, bits: bits, channels: channels))
    let restored = try HeadTensor(
      heads: 1, tokens: input.tokens, dim: channels, elements: cache.read(layer: 0, head: 0).values
    ).split(heads: heads)
    let all = Array(repeating: Array(0..<input.tokens), count: heads)
    try run.expect(
      "output",
      KernelAttention(backend: .cpu(threads: 1)).attend(
        input.outputProbes(), keys: input.keys, values: restored, positions: all))
    run.finish()

    // C numbers a sequence, two a token, b bits an element.
    #expect(body.metadataBytes == 2 * 4 * input.tokens && body.payloadBytes == input.tokens * channels * bits / 8)
    let keyNumbers = 2 * channels * 4
    #expect(cache.bytes.metadata == body.metadataBytes + channels * 4 + keyNumbers)
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    #expect(try policy.estimate(shape: cache.shape, prompt: input.tokens) == cache.bytes)
  }

  /// Two classes of tokens: their own scales per channel for keys, one factor per channel for values. Which tokens are in
  /// which class is given here.
  @Test(arguments: Goldens.names("zipcache.mixed"))
  func mixed(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let (heads, dim, tokens) = (input.keys.heads, input.keys.dim, input.tokens)
    let low = try Goldens.positions(run.entry, "lowOrder")
    let high = low.map { own in (0..<tokens).filter { !own.contains($0) } }
    var keys = [Float](repeating: 0, count: heads * tokens * dim)
    var values = keys

    // The factors of all tokens, shared by both classes.
    let backend = try Backend.cpu(threads: 1).operations
    let flatShape = ModelShape(layerCount: 1, queryHeads: 1, kvHeads: 1, headDim: heads * dim)
    let whole = try KVCache(
      shape: flatShape, policy: Policy(store: try .cst(window: .f32, metadata: .f32)), backend: Backend(backend))
    let flat = try input.values.flattened()
    try whole.append(flat, flat)
    try whole.finishPrefill()
    let factors = try numbers(of: try #require(whole.segment.heads[0].values.sharedMap), whole)
    try run.expect("channelFactors", factors)

    for (bits, rows, word) in [(4, high, "High"), (2, low, "Low")] {
      // Keys: every head a cache of its own, as heads hold different tokens.
      var steps: [Float] = []
      var mins: [Float] = []
      for head in 0..<heads {
        let own = try input.keys.gather(head: head, tokens: rows[head])
        let cache = try KVCache(
          Policy(store: try .cst(keyBits: bits, window: .f32, metadata: .f32)), queryHeads: 1, kvHeads: 1, dim: dim)
        try cache.append(own, own)
        try cache.finishPrefill()
        let map = try #require(cache.segment.heads[0].keys.extents.first?.map)
        let found = try numbers(of: map, cache)
        steps += found[..<dim]
        mins += found[dim...]
        let restored = try cache.read(layer: 0, head: 0).keys
        for (index, token) in rows[head].enumerated() {
          for c in 0..<dim { keys[(head * tokens + token) * dim + c] = restored[index * dim + c] }
        }
      }
      try run.expect("key\(word)Steps", steps)
      try run.expect("key\(word)Mins", mins)

      // Values: row i holds the i-th token of every head.
      let mixedRows = try HeadTensor(
        heads: heads, tokens: rows[0].count, dim: dim,
        elements: (0..<heads).flatMap { head in
          try! input.values.gather(head: head, tokens: rows[head]).elements
        }
      ).flattened()
      let format = try SideFormat.batches(
        of: 1, window: .f32, body: .affinePerToken(bits: bits, group: 4096, metadata: .f32)
      ).scaled(.separable)
      let segment = RowSegment(
        layer: flatShape.layers[0], format: RowFormat(keys: format, values: format), backend: backend)
      try segment.append(
        keys: TensorView(mixedRows.elements.span, heads: 1, tokens: mixedRows.tokens, dim: mixedRows.dim),
        values: TensorView(mixedRows.elements.span, heads: 1, tokens: mixedRows.tokens, dim: mixedRows.dim),
        firstPosition: 0, observed: [])
      let changed = try segment.calibrate(over: [whole.segment], queries: nil)
      #expect(changed)
      var head = segment.heads[0]
      let fixed = try #require(head.values.fixedMap)
      head.values.sharedMap = try RowMap(fixed, numbers: factors, type: .f32, backend: backend)
      let scaled = RowSegment(
        restoring: [head], layer: flatShape.layers[0], format: RowFormat(keys: format, values: format),
        backend: backend)
      try scaled.settleBatch(interval: nil)
      #expect(scaled.heads[0].values.tailRows == 0)
      var restored = [Float](repeating: 0, count: mixedRows.elements.count)
      restored.withUnsafeMutableBufferPointer { buffer in
        scaled.readValues(head: 0, range: 0..<mixedRows.tokens, into: buffer.baseAddress!)
      }
      for head in 0..<heads {
        for (index, token) in rows[head].enumerated() {
          for c in 0..<dim {
            values[(head * tokens + token) * dim + c] = restored[index * heads * dim + head * dim + c]
          }
        }
      }
    }
    try run.expect("keys", keys)
    try run.expect("values", values)
    let all = Array(repeating: Array(0..<tokens), count: heads)
    try run.expect(
      "output",
      KernelAttention(backend: Backend(backend)).attend(
        input.outputProbes(), keys: HeadTensor(heads: heads, tokens: tokens, dim: dim, elements: keys),
        values: HeadTensor(heads: heads, tokens: tokens, dim: dim, elements: values), positions: all))
    run.finish(except: ["probes", "saliency", "lowPositions"])
  }

  private func numbers(of map: RowMap, _ cache: KVCache) throws -> [Float] {
    let run = try #require(map.numberRun)
    var result = [Float](repeating: 0, count: run.capacity * run.dim)
    result.withUnsafeMutableBufferPointer { buffer in
      cache.backend.operations.read(
        RunSlice(run: run, first: 0, count: run.capacity), into: buffer.baseAddress!, stride: run.dim)
    }
    return result
  }

  /// Bytes as theirs: column j with columns C/2 or C/4, C/2, 3C/4 further, low bits first.
  private func packed(_ words: [UInt32], bits: Int, channels: Int) -> [Double] {
    let per = 32 / bits
    let wordsPerRow = channels / per
    var bytes: [Double] = []
    for row in stride(from: 0, to: words.count, by: wordsPerRow) {
      func code(_ c: Int) -> UInt32 { words[row + c / per] >> UInt32(c % per * bits) & (1 << UInt32(bits) - 1) }
      let width = channels * bits / 8
      for j in 0..<width {
        bytes.append(
          Double((0..<8 / bits).reduce(0) { $0 | code(j + $1 * width) << UInt32($1 * bits) }))
      }
    }
    return bytes
  }
}

extension HeadTensor {
  /// One head of all channels: [1, tokens, heads * dim], head-major.
  func flattened() throws -> HeadTensor {
    try HeadTensor(
      heads: 1, tokens: tokens, dim: heads * dim,
      elements: (0..<tokens).flatMap { token in (0..<heads).flatMap { Array(row(head: $0, token: token)) } })
  }

  /// The opposite.
  func split(heads count: Int) throws -> HeadTensor {
    let own = dim / count
    return try HeadTensor(
      heads: count, tokens: tokens, dim: own,
      elements: (0..<count).flatMap { head in
        (0..<tokens).flatMap { Array(row(head: 0, token: $0))[head * own..<(head + 1) * own] }
      })
  }
}
