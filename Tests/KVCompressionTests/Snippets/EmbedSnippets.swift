import KVCompression
import Testing

/// The code of "Embed it in an engine".
@Suite struct EmbedSnippets {
  let shape = ModelShape(layerCount: 2, queryHeads: 4, kvHeads: 2, headDim: 64)

  func numbers(_ count: Int) -> [Float] {
    (0..<count).map { (index: Int) -> Float in Float(index * 37 % 101) / 101 - 0.5 }
  }

  @Test func attendThrough() throws {
    let policy = try PolicyRegistry.standard.policy("h2o(budget=24)+kivi(bits=4,residual=32)")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    let prompt = 96

    func layerAttention(_ layer: Int, q: [Float], k: [Float], v: [Float], output: inout [Float]) throws {
      let tokens = k.count / (2 * 64)
      // As a projection leaves them: [token, head, dim]. Nothing is copied or transposed.
      try cache.append(
        layer: layer,
        keys: TensorView(k.span, heads: 2, tokens: tokens, dim: 64, layout: .tokenMajor),
        values: TensorView(v.span, heads: 2, tokens: tokens, dim: 64, layout: .tokenMajor))
      var span = output.mutableSpan
      var target = try MutableTensorView(&span, heads: 4, tokens: tokens, dim: 64, layout: .tokenMajor)
      try cache.attend(
        layer: layer, queries: TensorView(q.span, heads: 4, tokens: tokens, dim: 64, layout: .tokenMajor),
        into: &target)
    }
    func forward(tokens: Int) throws {
      for layer in 0..<2 {
        var output = [Float](repeating: 0, count: tokens * 4 * 64)
        try layerAttention(
          layer, q: numbers(tokens * 4 * 64), k: numbers(tokens * 2 * 64), v: numbers(tokens * 2 * 64),
          output: &output)
        #expect(output.allSatisfy { $0.isFinite })
      }
    }

    for _ in 0..<3 { try forward(tokens: prompt / 3) }  // the prompt in chunks
    try cache.finishPrefill()
    let position = cache.tokensSeen(layer: 0)  // for the rotary embedding of the next token
    try forward(tokens: 1)

    #expect(position == 96)
    #expect(cache.rowsHeld(layer: 0, head: 0) == 24)
    for line in cache.status { print(line.layer, line.state, line.reason, line.bytes.total) }

    let beam = cache.fork()
    let together = KVCache.bytes(of: [cache, beam])  // shared memory counted once

    #expect(together.total == cache.bytes.total)

    cache.beginPrefill()  // the next turn of a conversation: kept whole until …
    try forward(tokens: 20)
    try cache.finishPrefill()

    #expect(cache.tokensSeen(layer: 0) == 117)
  }

  @Test func speculate() throws {
    let policy = try PolicyRegistry.standard.policy("f16")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    for layer in 0..<2 {
      let rows = numbers(2 * 8 * 64)
      try cache.append(
        layer: layer, keys: TensorView(rows.span, heads: 2, tokens: 8, dim: 64),
        values: TensorView(rows.span, heads: 2, tokens: 8, dim: 64))
    }
    let accepted = 5
    if cache.minimumTrim <= accepted {
      try cache.trim(to: accepted)  // the rejected draft never happened
    }

    #expect(cache.tokensSeen(layer: 1) == 5)
  }

  @Test func batch() throws {
    let policy = try PolicyRegistry.standard.policy("kivi")
    let backend = try Backend.cpu()
    let layer = 0
    let caches = try (0..<2).map { _ in try KVCache(shape: shape, policy: policy, backend: backend) }
    for (cache, length) in zip(caches, [5, 9]) {
      let rows = numbers(2 * length * 64)
      try cache.append(
        layer: layer, keys: TensorView(rows.span, heads: 2, tokens: length, dim: 64),
        values: TensorView(rows.span, heads: 2, tokens: length, dim: 64))
    }
    let q = numbers(4 * 2 * 64)
    var output = [Float](repeating: 0, count: 4 * 2 * 64)

    var span = output.mutableSpan
    var target = try MutableTensorView(&span, heads: 4, tokens: 2, dim: 64)
    try KVCache.attend(
      caches, layer: layer, queries: TensorView(q.span, heads: 4, tokens: 2, dim: 64), tokens: [1, 1], into: &target)

    #expect(output.allSatisfy { $0.isFinite })
  }

  @Test func attendYourself() throws {
    let policy = try PolicyRegistry.standard.policy("snapkv(budget=16,window=8)+kivi(bits=4,residual=32)")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(), inputs: .queries)
    let layers = try (0..<2).map { try FetchCache(cache, layer: $0) }

    func layerAttention(_ layer: Int, tokens: Int, q: [Float], k: [Float], v: [Float]) throws -> [Float] {
      let rows = try layers[layer].update(
        keys: TensorView(k.span, heads: 2, tokens: tokens, dim: 64),
        values: TensorView(v.span, heads: 2, tokens: tokens, dim: 64))
      let output = softmaxAttention(
        q, rows.keys, rows.values, mask: rows.mask(queries: tokens), rows: rows.rows, tokens: tokens)
      try cache.observe(layer: layer, queries: TensorView(q.span, heads: 4, tokens: tokens, dim: 64))
      return output
    }

    for tokens in [32, 32, 1] {
      for layer in 0..<2 {
        let output = try layerAttention(
          layer, tokens: tokens, q: numbers(4 * tokens * 64), k: numbers(2 * tokens * 64),
          v: numbers(2 * tokens * 64))
        #expect(output.allSatisfy { $0.isFinite })
      }
    }
    #expect(layers[0].offset == 65)
    #expect(layers[0].count == 17)
  }

  @Test func reportWeights() throws {
    let policy = try PolicyRegistry.standard.policy("h2o(budget=8)")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(), inputs: .attentionWeights)
    let layer = 0
    let rows = numbers(2 * 16 * 64)
    try cache.append(
      layer: layer, keys: TensorView(rows.span, heads: 2, tokens: 16, dim: 64),
      values: TensorView(rows.span, heads: 2, tokens: 16, dim: 64))

    // What each live row received in this step, summed over the new queries and the query heads of its group.
    var received: [[Float]] = []
    for head in 0..<2 {
      let positions = try cache.rows(layer: layer, head: head)
      received.append(positions.map { Float(1 + $0 % 3) })  // the column sums of the engine's own softmax
    }
    try cache.observe(layer: layer, attention: received)

    try cache.finishPrefill(layer: layer)
    #expect(cache.rowsHeld(layer: layer, head: 0) == 8)
  }

  @Test func viewWithoutCopy() throws {
    let policy = try PolicyRegistry.standard.policy("f32")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
    let layer = 0
    let head = 1
    let keys = numbers(2 * 4 * 64)
    try cache.append(
      layer: layer, keys: TensorView(keys.span, heads: 2, tokens: 4, dim: 64),
      values: TensorView(keys.span, heads: 2, tokens: 4, dim: 64))

    let rows = try cache.withDenseRows(layer: layer, head: head) { keys, values in
      keys.tokens  // views of [1, rows, dim] in the cache's own memory; hand them to a kernel here
    }
    let decoded = try cache.read(layer: layer, head: head)  // when that was nil: f32 copies

    #expect(rows == 4)
    #expect(decoded.positions == [0, 1, 2, 3])
  }

  private func softmaxAttention(
    _ q: [Float], _ keys: [Float], _ values: [Float], mask: [Float], rows: Int, tokens: Int
  ) -> [Float] {
    var output = [Float](repeating: 0, count: 4 * tokens * 64)
    for head in 0..<4 {
      for token in 0..<tokens {
        let query = (head * tokens + token) * 64
        var weights = (0..<rows).map { (row: Int) -> Float in
          var logit: Float = 0
          for channel in 0..<64 { logit += q[query + channel] * keys[(head / 2 * rows + row) * 64 + channel] }
          return logit / 8 + mask[(head / 2 * tokens + token) * rows + row]
        }
        // Logits of these inputs are small: no maximum to subtract.
        weights = weights.map { $0 == -.infinity ? 0 : 1 + $0 + $0 * $0 / 2 }
        let sum = weights.reduce(0, +)
        for row in 0..<rows where weights[row] > 0 {
          for channel in 0..<64 {
            output[query + channel] += weights[row] / sum * values[(head / 2 * rows + row) * 64 + channel]
          }
        }
      }
    }
    return output
  }
}
