extension KVCache {
  /// Attention of the newest tokens' queries over everything the layer holds, straight from the compressed rows.
  ///
  /// Query i of n has position `tokensSeen - n + i` and sees rows at or before it (and inside the sliding window).
  /// Unless `options.commits` is false the policy then acts on these tokens: attend each appended token once.
  ///
  /// - Parameters:
  ///   - queries: [queryHeads, n, keyDim], post-RoPE, the last n appended tokens.
  ///   - output: [queryHeads, n, valueDim] f32, overwritten; any strides. A query that sees no row gives zeros.
  /// - Throws: `shapeMismatch`, `nonFinite`; the cache is unchanged then.
  /// - Complexity: O(n · queryHeads · rows · dim). Decoding allocates nothing that grows with the tokens seen.
  public func attend(
    layer: Int, queries: borrowing TensorView, into output: inout MutableTensorView,
    options: AttentionOptions? = nil
  ) throws(KVError) {
    try attendOne(layer: layer, queries: queries, into: &output, options: options ?? attention)
  }

  /// The same for several caches of one model in one call: their queries lie behind one another on the token axis,
  /// `tokens[i]` of them for cache i. Lengths may differ.
  ///
  /// - Throws: `shapeMismatch` when the token counts do not add up, a cache is listed twice or the models differ.
  public static func attend(
    _ caches: [KVCache], layer: Int, queries: borrowing TensorView, tokens: [Int],
    into output: inout MutableTensorView, options: AttentionOptions? = nil
  ) throws(KVError) {
    guard let first = caches.first else { return }
    try checkBatch(caches, tokens: tokens, queries: queries)
    let options = options ?? first.attention
    try first.check(output, queries: queries.tokens, layer: layer, options)
    var token = 0
    for (cache, count) in zip(caches, tokens) {
      try cache.prepare(layer: layer, queries: queries.slice(tokens: token..<token + count), options: options)
      token += count
    }
    first.plan.reset()
    token = 0
    for (cache, count) in zip(caches, tokens) {
      cache.describe(
        layer: layer, queries: queries.slice(tokens: token..<token + count), output: &output, firstToken: token,
        options: options, in: first.plan)
      token += count
    }
    first.backend.operations.attend(first.plan)
    token = 0
    for (cache, count) in zip(caches, tokens) {
      try cache.conclude(layer: layer, queries: queries.slice(tokens: token..<token + count), options: options)
      token += count
    }
  }

  /// The single-cache form, without the arrays a batch is described by: decoding allocates nothing.
  private func attendOne(
    layer: Int, queries: borrowing TensorView, into output: inout MutableTensorView, options: AttentionOptions
  ) throws(KVError) {
    try check(output, queries: queries.tokens, layer: layer, options)
    try prepare(layer: layer, queries: queries, options: options)
    plan.reset()
    describe(layer: layer, queries: queries, output: &output, firstToken: 0, options: options, in: plan)
    backend.operations.attend(plan)
    try conclude(layer: layer, queries: queries, options: options)
  }

  private func check(
    _ output: borrowing MutableTensorView, queries: Int, layer: Int, _ options: AttentionOptions
  ) throws(KVError) {
    let shape = try state(layer).shape
    guard output.heads == shape.queryHeads, output.tokens == queries, output.dim == shape.valueDim else {
      throw KVError(
        .shapeMismatch,
        "an output of \(shape.queryHeads) heads x \(queries) tokens x \(shape.valueDim) channels expected; got "
          + "\(output.heads) x \(output.tokens) x \(output.dim)", layer: layer)
    }
    try options.validate(layer: layer)
  }

  private static func checkBatch(
    _ caches: [KVCache], tokens: [Int], queries: borrowing TensorView
  ) throws(KVError) {
    guard tokens.count == caches.count, tokens.allSatisfy({ $0 >= 1 }), tokens.reduce(0, +) == queries.tokens else {
      throw KVError(
        .shapeMismatch,
        "\(caches.count) caches need as many token counts, adding up to \(queries.tokens) queries; got \(tokens)")
    }
    guard Set(caches.map(ObjectIdentifier.init)).count == caches.count else {
      throw KVError(.shapeMismatch, "a cache appears twice in one batch")
    }
    for cache in caches.dropFirst()
    where cache.shape != caches[0].shape || cache.backend.operations !== caches[0].backend.operations {
      throw KVError(.shapeMismatch, "the caches of a batch share one model shape and one backend")
    }
  }

  /// Everything that can fail, before attention starts.
  private func prepare(
    layer: Int, queries: borrowing TensorView, options: AttentionOptions
  ) throws(KVError) {
    let state = try state(layer)
    try checkQueries(queries, state)
    guard options.commits else { return }
    if tracksScores(state) { for segment in state.segments { try segment.prepareScores() } }
    if capturesQueries(state), state.queryWindow == nil {
      state.queryWindow = try QueryWindow(
        capacity: policy.inputs.windowQueries, shape: state.shape, backend: backend.operations)
    }
  }

  /// What follows attention: the policy is told, then acts.
  private func conclude(
    layer: Int, queries: borrowing TensorView, options: AttentionOptions
  ) throws(KVError) {
    if !options.commits { return }
    let state = layers[layer]
    if tracksScores(state) {
      state.observedTokens = state.seen
      state.frozenBelow = state.seen
    }
    if capturesQueries(state) { try capture(queries, state) }
    try maintain(state)
  }

  package func capture(_ queries: borrowing TensorView, _ state: LayerState) throws(KVError) {
    if state.queryWindow == nil {
      state.queryWindow = try QueryWindow(
        capacity: policy.inputs.windowQueries, shape: state.shape, backend: backend.operations)
    }
    try state.queryWindow!.capture(queries, backend: backend.operations)
    state.observedQueries = state.seen
  }

  private func describe(
    layer: Int, queries: borrowing TensorView, output: inout MutableTensorView, firstToken: Int,
    options: AttentionOptions, in plan: AttentionPlan
  ) {
    let state = layers[layer]
    let shape = state.shape
    let start = plan.rows.count
    let scored = options.commits && tracksScores(state)
    for head in 0..<shape.kvHeads {
      for segment in state.segments {
        let first = plan.rows.count
        describe(segment, head: head, seen: state.seen, in: plan)
        if !scored { for index in first..<plan.rows.count { plan.rows[index].score = nil } }
      }
    }
    plan.sequences.append(
      SequenceWork(
        queries: queries.base, queryType: queries.type, queryHeadStride: queries.headStride,
        queryTokenStride: queries.tokenStride, output: output.base + firstToken * output.tokenStride,
        outputHeadStride: output.headStride, outputTokenStride: output.tokenStride, logSumExp: nil,
        tokens: queries.tokens, kvHeads: shape.kvHeads, group: shape.group, keyDim: shape.keyDim,
        valueDim: shape.valueDim, scale: options.scale ?? 1 / Float(shape.keyDim).squareRoot(),
        softcap: options.softcap ?? 0, firstPosition: options.causal ? state.seen - queries.tokens : Int.max,
        slidingWindow: shape.slidingWindow ?? 0, rotary: self.shape.rotary, work: start..<plan.rows.count))
  }

  /// All slots of a head of a segment: at once, or one piece per run of consecutive positions when distances are
  /// counted in slots.
  private func describe(_ segment: any Segment, head: Int, seen: Int, in plan: AttentionPlan) {
    let count = segment.slotCount(head: head)
    if count == 0 { return }
    guard policy.positions == .slot else {
      segment.describe(head: head, range: 0..<count, shift: 0, in: plan)
      return
    }
    // From the newest run backwards: a run counts as later by all the positions missing behind it.
    var end = count
    var missing = seen - 1 - segment.position(head: head, slot: count - 1)
    while end > 0 {
      var begin = end - 1
      while begin > 0,
        segment.position(head: head, slot: begin - 1) == segment.position(head: head, slot: begin) - 1
      {
        begin -= 1
      }
      segment.describe(head: head, range: begin..<end, shift: missing, in: plan)
      if begin > 0 {
        missing +=
          segment.position(head: head, slot: begin) - segment.position(head: head, slot: begin - 1) - 1
      }
      end = begin
    }
  }
}
