extension KVCache {
  /// Appends the keys and values of the next tokens to one layer.
  ///
  /// The rows are readable exactly as the dense window holds them until the policy acts, which it does after the
  /// attention of these tokens (decoding) or after the prompt.
  ///
  /// - Parameters:
  ///   - keys: [kvHeads, tokens, keyDim], post-RoPE, any element type and strides; at least one token.
  ///   - values: [kvHeads, tokens, valueDim].
  /// - Throws: `shapeMismatch`, `nonFinite`, `unrepresentable` (a value beyond the window's element type),
  ///   `outOfMemory`. The cache is unchanged then.
  /// - Complexity: O(tokens · kvHeads · (keyDim + valueDim)).
  public func append(
    layer: Int, keys: borrowing TensorView, values: borrowing TensorView
  ) throws(KVError) {
    let state = try state(layer)
    let shape = state.shape
    guard keys.heads == shape.kvHeads, keys.dim == shape.keyDim else {
      throw KVError(
        .shapeMismatch,
        "keys of \(shape.kvHeads) heads x \(shape.keyDim) channels expected; got \(keys.heads) x \(keys.dim)",
        layer: layer)
    }
    guard values.heads == shape.kvHeads, values.dim == shape.valueDim else {
      throw KVError(
        .shapeMismatch,
        "values of \(shape.kvHeads) heads x \(shape.valueDim) channels expected; got \(values.heads) x \(values.dim)",
        layer: layer)
    }
    try checkTokens(keys: keys.tokens, values: values.tokens, state)
    fillSeed(state)
    do throws(KVError) {
      try state.segments[0].append(keys: keys, values: values, firstPosition: state.seen, observed: seed)
    } catch {
      throw error.at(layer: layer)
    }
    count(keys.tokens, state)
  }

  /// Refuses token counts that differ, are empty or lead beyond the last position.
  func checkTokens(keys: Int, values: Int, _ state: LayerState) throws(KVError) {
    guard keys == values, keys >= 1 else {
      throw KVError(
        .shapeMismatch,
        "as many keys as values and at least one token expected; got \(keys) keys and \(values) values",
        layer: state.layer)
    }
    guard state.cascade == nil else {
      throw KVError(
        .wrongPhase, "the prompt of this layer is finished; finish those of the other layers first", layer: state.layer)
    }
    guard keys <= Int(Int32.max) - state.seen else {
      throw KVError(.unsupported, "positions beyond \(Int32.max) are not supported", layer: state.layer)
    }
  }

  /// Counts tokens whose rows are in.
  func count(_ tokens: Int, _ state: LayerState) {
    state.seen += tokens
    if state.phase == .decode { state.decodedTokens += tokens }
    if state.phase == .prefill { state.outcome = .waiting }
    debugCheck(state)
  }

  /// What the columns of the next rows start with; empty when no attention is observed.
  func fillSeed(_ state: LayerState) {
    let width = observedColumns(state)
    if seed.count != width { seed = Array(repeating: 0, count: width) }
    guard let observer else { return }
    for column in 0..<width {
      seed[column] = observer.initial(column: column, decodedTokens: state.decodedTokens)
    }
  }

  /// Numbers every row of a layer carries.
  package func observedColumns(_ state: LayerState) -> Int { observesAttention(state) ? observer?.columns ?? 0 : 0 }

  /// Whether rows carry what was observed of their attention: only while the policy will ask for it.
  package func observesAttention(_ state: LayerState) -> Bool {
    guard observer != nil, selects(state) else { return false }
    return state.phase == .prefill || observesWhileDecoding
  }

  /// Whether queries must be captured for a window scorer.
  package func capturesQueries(_ state: LayerState) -> Bool {
    guard windowQueries > 0, selects(state) else { return false }
    return state.phase == .prefill || queriesWhileDecoding
  }

  /// Whether queries are kept of which some will be probes.
  package func capturesProbes(_ state: LayerState) -> Bool {
    guard probes != nil, selects(state) else { return false }
    return state.phase == .prefill || observesWhileDecoding
  }

  /// Whether the policy chooses tokens in this layer. A sliding-window layer forgets by itself.
  package func selects(_ state: LayerState) -> Bool {
    state.shape.slidingWindow == nil && policy.schedule != .never
  }
}
