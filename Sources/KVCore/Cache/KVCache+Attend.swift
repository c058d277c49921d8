extension KVCache {
  /// Attention of the newest tokens' queries over everything the layer holds, straight from the compressed rows.
  ///
  /// Query i of n has position `tokensSeen - n + i` and sees rows at or before it (and inside the sliding window).
  /// Unless `options.commits` is false the policy then acts on these tokens: attend each appended token once.
  ///
  /// - Parameters:
  ///   - queries: [queryHeads, n, keyDim], post-RoPE, the last n appended tokens.
  ///   - output: [queryHeads, n, valueDim] f32, overwritten; any strides. A query that sees no row gives zeros.
  /// - Throws: `shapeMismatch`, `nonFinite` (also for logits beyond f32); the cache is unchanged then.
  /// - Complexity: O(n · queryHeads · rows · dim). Decoding allocates nothing that grows with the tokens seen.
  public func attend(
    layer: Int, queries: borrowing TensorView, into output: inout MutableTensorView,
    options: AttentionOptions? = nil
  ) throws(KVError) {
    try attendOne(layer: layer, queries: queries, into: &output, logSumExp: nil, options: options ?? attention)
  }

  /// The same, and the log-sum-exp of each query's logits: with it the output is a ``Partial`` that merges with attention
  /// the engine computes over rows of its own (a shared prefix, another device).
  ///
  /// - Parameter logSumExp: [queryHeads, n], overwritten; minus infinity for a query that sees no row.
  public func attend(
    layer: Int, queries: borrowing TensorView, into output: inout MutableTensorView,
    logSumExp: inout MutableSpan<Float>, options: AttentionOptions? = nil
  ) throws(KVError) {
    guard logSumExp.count == queries.heads * queries.tokens else {
      throw KVError(
        .shapeMismatch,
        "\(queries.heads) heads x \(queries.tokens) log-sum-exps expected; the span holds \(logSumExp.count)",
        layer: layer)
    }
    let base = logSumExp.withUnsafeMutableBufferPointer { $0.baseAddress }
    try attendOne(layer: layer, queries: queries, into: &output, logSumExp: base, options: options ?? attention)
  }

  /// The same for several caches of one model in one call: their queries lie behind one another on the token axis,
  /// `tokens[i]` of them for cache i. Lengths may differ.
  ///
  /// - Throws: `shapeMismatch` when the token counts do not add up, a cache is listed twice or the models differ.
  public static func attend(
    _ caches: [KVCache], layer: Int, queries: borrowing TensorView, tokens: [Int],
    into output: inout MutableTensorView, options: AttentionOptions? = nil
  ) throws(KVError) {
    guard let first = caches.first else {
      throw KVError(.shapeMismatch, "a batch of at least 1 cache expected; got 0 for \(queries.tokens) queries")
    }
    try checkBatch(caches, tokens: tokens, queries: queries)
    // Every cache is checked before any of them changes.
    var token = 0
    for (cache, count) in zip(caches, tokens) {
      try cache.check(output, queries: queries.tokens, layer: layer, options ?? cache.attention)
      try cache.checkQueries(
        queries.slice(tokens: token..<token + count), cache.state(layer), causal: (options ?? cache.attention).causal,
        finite: !first.backend.operations.checksAttention)
      token += count
    }
    for cache in caches { try cache.prepare(layer: layer, options: options ?? cache.attention) }
    let plan = first.plan(ofLayer: layer)
    plan.isRepeated = plan.sequences.count == caches.count
    token = 0
    for (index, (cache, count)) in zip(caches, tokens).enumerated() where plan.isRepeated {
      plan.isRepeated = cache.describeAgain(
        layer: layer, queries: queries.slice(tokens: token..<token + count), output: &output, firstToken: token,
        options: options ?? cache.attention, sequence: index, in: plan)
      token += count
    }
    if !plan.isRepeated {
      plan.reset()
      token = 0
      for (cache, count) in zip(caches, tokens) {
        cache.describe(
          layer: layer, queries: queries.slice(tokens: token..<token + count), output: &output, firstToken: token,
          options: options ?? cache.attention, in: plan)
        token += count
      }
    }
    if let fault = try first.backend.operations.attendFinite(plan) {
      let before = tokens[..<fault.sequence].reduce(0, +)
      throw caches[fault.sequence].error(fault, layer: layer, tokens: tokens[fault.sequence], firstToken: before)
    }
    try first.checkFinite(output, layer: layer)
    token = 0
    for (cache, count) in zip(caches, tokens) {
      try cache.conclude(
        layer: layer, queries: queries.slice(tokens: token..<token + count), options: options ?? cache.attention)
      token += count
    }
  }

  /// The single-cache form, without the arrays a batch is described by: decoding allocates nothing.
  private func attendOne(
    layer: Int, queries: borrowing TensorView, into output: inout MutableTensorView,
    logSumExp: UnsafeMutablePointer<Float>?, options: AttentionOptions
  ) throws(KVError) {
    try check(output, queries: queries.tokens, layer: layer, options)
    try checkQueries(
      queries, state(layer), causal: options.causal, finite: !backend.operations.checksAttention)
    try prepare(layer: layer, options: options)
    let plan = plan(ofLayer: layer)
    plan.isRepeated =
      plan.sequences.count == 1
      && describeAgain(
        layer: layer, queries: queries, output: &output, firstToken: 0, options: options, sequence: 0, in: plan)
    if !plan.isRepeated {
      plan.reset()
      describe(layer: layer, queries: queries, output: &output, firstToken: 0, options: options, in: plan)
    }
    plan.sequences[0].logSumExp = logSumExp
    if let fault = try backend.operations.attendFinite(plan) {
      throw error(fault, layer: layer, tokens: queries.tokens, firstToken: 0)
    }
    try checkFinite(output, layer: layer)
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

  /// Finite keys and queries can have a product beyond f32, and its softmax is NaN: that is said, not passed on. The policy
  /// has not acted on the step then.
  private func checkFinite(_ output: borrowing MutableTensorView, layer: Int) throws(KVError) {
    if backend.operations.checksAttention { return }
    let view = TensorView(
      unsafeBase: output.base, type: .f32, heads: output.heads, tokens: output.tokens, dim: output.dim,
      headStride: output.headStride, tokenStride: output.tokenStride)
    if let place = backend.operations.firstNonfinite(view) { throw beyondLogits(place, layer: layer) }
  }

  private func beyondLogits(_ place: ElementPlace, layer: Int) -> KVError {
    KVError(
      .nonFinite,
      "the logits of query \(place.token) of query head \(place.head) are beyond what f32 holds; scale keys or queries",
      layer: layer)
  }

  /// - Parameter firstToken: queries of a batch before those of this cache.
  private func error(_ fault: AttentionFault, layer: Int, tokens: Int, firstToken: Int) -> KVError {
    if fault.isQuery { return nonFiniteQuery(fault.place, tokens: tokens, layers[layer]) }
    var place = fault.place
    place.token += firstToken
    return beyondLogits(place, layer: layer)
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

  /// Everything that can fail for lack of memory, before attention starts.
  private func prepare(layer: Int, options: AttentionOptions) throws(KVError) {
    let state = try state(layer)
    guard options.commits else { return }
    guard options.causal || !(observesAttention(state) || capturesQueries(state) || capturesProbes(state)) else {
      throw KVError(
        .unsupported,
        "queries that see every row have no position and cannot count for \(policy.spec): pass commits: false",
        layer: layer)
    }
    if observesAttention(state) { for segment in state.segments { try segment.prepareObserved() } }
    if capturesQueries(state), state.queryWindow == nil {
      state.queryWindow = try QueryWindow(
        capacity: windowQueries, shape: state.shape, backend: backend.operations)
    }
  }

  /// What follows attention: the policy is told, then acts.
  private func conclude(
    layer: Int, queries: borrowing TensorView, options: AttentionOptions
  ) throws(KVError) {
    if !options.commits { return }
    let state = layers[layer]
    if observesAttention(state) {
      if !sumsInPlace { fold(state, queries: observedQueries(of: queries.tokens, state)) }
      // Tokens before these that nobody attended stay missing.
      if state.observedTokens >= state.seen - queries.tokens { state.observedTokens = state.seen }
      state.frozenBelow = state.seen
    }
    if capturesQueries(state) || capturesProbes(state) { try capture(queries, state) }
    try notePeaks(of: queries, state)
    try maintain(state)
  }

  /// Remembers how large the prompt's queries were, where a store wants to know.
  package func notePeaks(of queries: borrowing TensorView, _ state: LayerState) throws(KVError) {
    guard state.phase == .prefill, state.segments.contains(where: \.wantsQueries) else { return }
    if state.queryPeaks == nil {
      state.queryPeaks = try QueryPeaks(state.shape, backend: backend.operations)
    }
    try state.queryPeaks!.add(queries, backend: backend.operations)
  }

  package func capture(_ queries: borrowing TensorView, _ state: LayerState) throws(KVError) {
    if capturesProbes(state) { try captureProbes(queries, state) }
    guard capturesQueries(state) else {
      state.observedQueries = state.seen
      return
    }
    if state.queryWindow == nil {
      state.queryWindow = try QueryWindow(
        capacity: windowQueries, shape: state.shape, backend: backend.operations)
    }
    // Only neighbours make a window: after tokens whose queries nobody showed, it begins anew.
    if state.observedQueries != state.seen - queries.tokens { state.queryWindow!.clear() }
    try state.queryWindow!.capture(queries, backend: backend.operations)
    state.observedQueries = state.seen
  }

  private func captureProbes(_ queries: borrowing TensorView, _ state: LayerState) throws(KVError) {
    guard let probes else { return }
    let tokens = state.seen - queries.tokens..<state.seen
    let start = max(state.chosenTokens, state.promptStart)
    // Probes stand for all tokens since the last choice: after some that nobody showed, they begin anew.
    if state.probeStore == nil || state.observedQueries < tokens.lowerBound {
      state.probeStore = ProbeStore(first: tokens.lowerBound, shape: state.shape)
    }
    state.probes = probes
    if state.observedQueries > tokens.lowerBound { return }
    try state.probeStore!.capture(
      queries, tokens: tokens, range: start..<state.seen, probes, marked: state.markedProbes,
      backend: backend.operations)
  }

  private func describe(
    layer: Int, queries: borrowing TensorView, output: inout MutableTensorView, firstToken: Int,
    options: AttentionOptions, in plan: AttentionPlan
  ) {
    let state = layers[layer]
    let shape = state.shape
    let start = plan.rows.count
    let counted = options.commits && observesAttention(state) ? observedQueries(of: queries.tokens, state) : 0
    var step = counted > 0 && !sumsInPlace ? clearedStepWeights(state) : nil
    // Which positions are missing behind a row is a matter of all tiers together.
    let missing = policy.positions == .slot && state.segments.count > 1 ? missingBehind(state) : nil
    for head in 0..<shape.kvHeads {
      for (index, segment) in state.segments.enumerated() {
        let first = plan.rows.count
        if let missing {
          describe(segment, head: head, missing: missing[head][index], in: plan)
        } else {
          describe(segment, head: head, seen: state.seen, in: plan)
        }
        for work in first..<plan.rows.count {
          if counted == 0 {
            plan.rows[work].score = nil
          } else if let weights = step, let own = plan.rows[work].score, let base = segment.observed(head: head).base {
            plan.rows[work].score = weights + (own - base)
          }
        }
        step = step.map { $0 + KVCache.padded(segment.slotCount(head: head)) }
      }
    }
    plan.sequences.append(
      sequence(
        state, queries: queries, output: &output, firstToken: firstToken, options: options, counted: counted,
        work: start..<plan.rows.count))
  }

  private func sequence(
    _ state: LayerState, queries: borrowing TensorView, output: inout MutableTensorView, firstToken: Int,
    options: AttentionOptions, counted: Int, work: Range<Int>
  ) -> SequenceWork {
    let shape = state.shape
    return SequenceWork(
      queries: queries.base, queryType: queries.type, queryHeadStride: queries.headStride,
      queryTokenStride: queries.tokenStride, output: output.base + firstToken * output.tokenStride,
      outputHeadStride: output.headStride, outputTokenStride: output.tokenStride, logSumExp: nil,
      tokens: queries.tokens, kvHeads: shape.kvHeads, group: shape.group, keyDim: shape.keyDim,
      valueDim: shape.valueDim, scale: options.scale ?? 1 / Float(shape.keyDim).squareRoot(),
      softcap: options.softcap ?? 0, firstPosition: options.causal ? state.seen - queries.tokens : Int.max,
      slidingWindow: shape.slidingWindow ?? 0, rotary: self.shape.rotary, work: work,
      observedFrom: queries.tokens - counted, reduction: observer?.reduction ?? .sum)
  }

  /// The plan of calls for a layer: its own, with what the backend keeps of it, or one of all layers.
  private func plan(ofLayer layer: Int) -> AttentionPlan {
    if !backend.operations.keepsPlans { return plan }
    if let own = layers[layer].plan { return own }
    let own = AttentionPlan()
    layers[layer].plan = own
    return own
  }

  /// Brings sequence `index` of the plan of an earlier step up to date. False where this call has another structure; the
  /// plan is of no account then.
  private func describeAgain(
    layer: Int, queries: borrowing TensorView, output: inout MutableTensorView, firstToken: Int,
    options: AttentionOptions, sequence index: Int, in plan: AttentionPlan
  ) -> Bool {
    guard backend.operations.keepsPlans, queries.tokens == 1, policy.positions != .slot else { return false }
    let state = layers[layer]
    let counted = options.commits && observesAttention(state) ? observedQueries(of: 1, state) : 0
    let work = plan.sequences[index].work
    guard plan.sequences[index].tokens == 1, plan.sequences[index].observedFrom == 1 - counted,
      counted == 0 || sumsInPlace, work.count == state.shape.kvHeads * state.segments.count
    else { return false }
    for (tier, segment) in state.segments.enumerated() {
      let first = work.lowerBound + tier
      if !segment.describeAgain(first: first, stride: state.segments.count, in: plan) { return false }
    }
    if counted == 0 { for row in work { plan.rows[row].score = nil } }
    plan.sequences[index] = sequence(
      state, queries: queries, output: &output, firstToken: firstToken, options: options, counted: counted, work: work)
    #if KV_INTERNAL_CHECKS
      checkRepetition(
        layer: layer, queries: queries, output: &output, firstToken: firstToken, options: options, sequence: index,
        plan)
    #endif
    return true
  }

  #if KV_INTERNAL_CHECKS
    /// What was brought up to date is what a new description would be.
    private func checkRepetition(
      layer: Int, queries: borrowing TensorView, output: inout MutableTensorView, firstToken: Int,
      options: AttentionOptions, sequence index: Int, _ plan: AttentionPlan
    ) {
      let other = AttentionPlan()
      describe(
        layer: layer, queries: queries, output: &output, firstToken: firstToken, options: options, in: other)
      let work = plan.sequences[index].work
      precondition(other.rows.count == work.count, "\(other.rows.count) lists of rows, \(work.count) were kept")
      for (fresh, kept) in zip(other.rows, plan.rows[work]) {
        precondition(
          fresh.kvHead == kept.kvHead && fresh.count == kept.count && fresh.shift == kept.shift
            && fresh.positions == kept.positions && fresh.firstPosition == kept.firstPosition
            && fresh.bias == kept.bias && fresh.score == kept.score && fresh.sortedFrom == kept.sortedFrom
            && fresh.highest == kept.highest && fresh.frozen == kept.frozen, "rows of head \(kept.kvHead)")
        for (own, known) in [(fresh.keys, kept.keys), (fresh.values, kept.values)] {
          precondition(
            own.count == known.count
              && zip(other.slices[own], plan.slices[known]).allSatisfy {
                $0.run.base == $1.run.base && $0.run.capacity == $1.run.capacity && $0.run.map == $1.run.map
                  && $0.run.encoding == $1.run.encoding && $0.first == $1.first && $0.count == $1.count
              }, "slices of head \(kept.kvHead)")
        }
      }
    }
  #endif

  /// Positions that no tier holds behind each slot, [head][tier][slot]; -1 for dead slots.
  private func missingBehind(_ state: LayerState) -> [[[Int]]] {
    let view = LayerView(state, options: attention, backend: backend.operations)
    return (0..<view.kvHeads).map { head in
      var missing = state.segments.map { [Int](repeating: -1, count: $0.slotCount(head: head)) }
      let rows = view.rowCount(head: head)
      for row in 0..<rows {
        let place = view.reference(head: head, row: row)
        let later = state.seen - 1 - view.position(head: head, row: row)
        missing[Int(place.segment)][Int(place.slot)] = later - (rows - 1 - row)
      }
      return missing
    }
  }

  /// Slots of a head of one of several tiers, in pieces that count as equally much later.
  private func describe(_ segment: any Segment, head: Int, missing: [Int], in plan: AttentionPlan) {
    var begin = 0
    while begin < missing.count {
      if missing[begin] < 0 {
        begin += 1
        continue
      }
      var end = begin + 1
      while end < missing.count, missing[end] == missing[begin] { end += 1 }
      segment.describe(head: head, range: begin..<end, shift: missing[begin], in: plan)
      begin = end
    }
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
    // From the newest run backwards: a run counts as later by all the positions missing behind it. A dead slot whose
    // memory was not reclaimed yet is missing too.
    var end = count
    var missing = 0
    var next = seen
    while end > 0 {
      guard segment.isLive(head: head, slot: end - 1) else {
        end -= 1
        continue
      }
      missing += next - 1 - segment.position(head: head, slot: end - 1)
      var begin = end - 1
      while begin > 0, segment.isLive(head: head, slot: begin - 1),
        segment.position(head: head, slot: begin - 1) == segment.position(head: head, slot: begin) - 1
      {
        begin -= 1
      }
      segment.describe(head: head, range: begin..<end, shift: missing, in: plan)
      next = segment.position(head: head, slot: begin)
      end = begin
    }
  }
}
