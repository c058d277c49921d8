extension KVCache {
  /// An independent cache with the same contents. Frozen memory is shared until one side changes it, so a fork costs
  /// little; `KVCache.bytes(of:)` counts what is shared once. O(layers · heads · extents).
  public func fork() -> KVCache {
    var storage = ForkedStorage()
    return KVCache(
      restoring: layers.map { LayerState(forking: $0, storage: &storage) }, groups: groups, shape: shape,
      policy: policy, backend: backend, attention: attention, inputs: engineInputs)
  }

  /// Forgets everything; the memory is freed.
  public func reset() {
    layers = shape.layers.enumerated().map { index, layer in
      LayerState(
        layer: index, shape: layer,
        segments: policy.makeSegments(layer: index, shape: shape, groups: groups, backend: backend.operations))
    }
  }

  /// The shortest length ``trim(to:)`` accepts: what was dropped, encoded or accumulated since cannot be undone.
  public var minimumTrim: Int {
    layers.filter(\.shape.cached).reduce(0) { most, state in
      max(most, min(state.seen, minimumTrim(state)))
    }
  }

  private func minimumTrim(_ state: LayerState) -> Int {
    state.segments.reduce(state.frozenBelow) { max($0, $1.minimumTruncation) }
  }

  /// Rewinds to the first `tokens` tokens (a rejected draft, an edited prompt). Exact: afterwards the cache is as if the
  /// later tokens had never come.
  ///
  /// - Throws: `irreversible` when tokens before that point were dropped, encoded with later ones, or have statistics
  ///   that know later tokens; the cache is unchanged then.
  public func trim(to tokens: Int) throws(KVError) {
    for state in layers where state.shape.cached {
      guard tokens >= 0, tokens <= state.seen else {
        throw KVError(
          .invalidOption, "trimming to \(tokens) tokens of \(state.seen) seen", layer: state.layer)
      }
      if tokens == state.seen { continue }
      let minimum = minimumTrim(state)
      guard tokens >= minimum else {
        throw KVError(
          .irreversible,
          "can rewind to \(minimum) tokens or later, not to \(tokens): what came after was compressed into it",
          layer: state.layer)
      }
      // Captured queries are a ring of the newest tokens: older ones cannot come back.
      if capturesQueries(state) && state.queryWindow != nil || state.queryPeaks != nil
        || capturesProbes(state) && state.probeStore != nil
      {
        throw KVError(
          .irreversible, "queries of the tokens before \(tokens) are no longer held", layer: state.layer)
      }
    }
    for state in layers where state.shape.cached && tokens < state.seen {
      for segment in state.segments { try segment.truncate(to: tokens) }
      // The schedule counts from the tokens that stay.
      if let interval = policy.schedule.decodeInterval, state.phase == .decode, state.settledTokens > tokens {
        let undone = (state.decodedSinceCompression - (state.settledTokens - tokens)) % interval
        state.decodedSinceCompression = undone < 0 ? undone + interval : undone
      }
      if state.phase == .decode { state.decodedTokens = max(0, state.decodedTokens - (state.seen - tokens)) }
      state.settledTokens = min(state.settledTokens, tokens)
      state.promptStart = min(state.promptStart, tokens)
      state.chosenTokens = min(state.chosenTokens, tokens)
      state.observedTokens = min(state.observedTokens, tokens)
      state.observedQueries = min(state.observedQueries, tokens)
      state.seen = tokens
      debugCheck(state)
    }
  }

  /// What the cache did to each layer, and why.
  public var status: [LayerStatus] {
    layers.map { state in
      let rows = (0..<state.shape.kvHeads).map { state.liveRows(head: $0) }
      return LayerStatus(
        layer: state.layer, tokensSeen: state.seen, rowsHeld: rows, bytes: bytes(layer: state.layer),
        state: statusState(state), reason: reason(state) + partners(of: state))
    }
  }

  private func partners(of state: LayerState) -> String {
    groups.filter { $0.layers.contains(state.layer) }.map { group in
      let others = group.layers.filter { $0 != state.layer }.map(String.init).joined(separator: ", ")
      return others.isEmpty
        ? ""
        : state.segments[group.tier] is any JointSegment
          ? "; held together with layers \(others)" : "; waits for layers \(others)"
    }.joined()
  }

  private func statusState(_ state: LayerState) -> LayerStatus.State {
    if !state.shape.cached { return .uncached }
    switch state.outcome {
    case .untouched: return .empty
    case .waiting: return .prefilling
    case .withinBudget, .storedOnly: return .complete
    case .compressed: return .compressed
    case .slidingWindow: return .skipped
    }
  }

  private func reason(_ state: LayerState) -> String {
    if !state.shape.cached { return "this layer keeps no keys and values" }
    switch state.outcome {
    case .untouched: return "no token yet"
    case .waiting: return "the prompt is not finished"
    case .withinBudget(let rows): return "\(rows) rows fit the budget"
    case .storedOnly: return "the policy keeps every token"
    case .compressed(let before, let after, let position):
      return "\(before) rows became \(after) at token \(position)"
    case .slidingWindow(let window):
      return "sliding-window layer: holds the last \(window) tokens, the policy chooses none"
    }
  }
}

/// One line of ``KVCache/status``.
public struct LayerStatus: Hashable, Sendable {
  /// A struct so that states can be added.
  public struct State: Hashable, Sendable, CustomStringConvertible {
    public let description: String
    public static let uncached = State(description: "uncached")
    public static let empty = State(description: "empty")
    /// Tokens are kept until the prompt is complete.
    public static let prefilling = State(description: "prefilling")
    /// Every token seen is held.
    public static let complete = State(description: "complete")
    /// Some tokens were dropped or moved to another tier.
    public static let compressed = State(description: "compressed")
    /// The policy does not apply here.
    public static let skipped = State(description: "skipped")
  }

  public let layer: Int
  public let tokensSeen: Int
  /// Per KV head.
  public let rowsHeld: [Int]
  public let bytes: ByteCount
  public let state: State
  public let reason: String
}
