/// The keys and values of one sequence, compressed by a policy.
///
/// One owner: a cache is not `Sendable` and is used from one thread at a time; its backend may use several inside a
/// call. Forks are independent caches that share frozen memory.
///
/// The life of a token: `append` puts its keys and values into the dense window of every layer, `attend` (or the
/// engine's own kernels) reads them exactly, then the policy acts: it drops rows, or moves them into their final
/// representation. During the prompt nothing is dropped before ``finishPrefill()``, unless the policy's schedule says
/// so.
///
/// ```swift
/// let cache = try KVCache(shape: shape, policy: policy, backend: .cpu())
/// for layer in 0..<layers {                              // the prompt, at once or in chunks
///   try cache.append(layer: layer, keys: k, values: v)
///   try cache.attend(layer: layer, queries: q, into: &output)
/// }
/// try cache.finishPrefill()                              // the policy compresses
/// // … then one token at a time, the same two calls a layer
/// ```
public final class KVCache {
  public let shape: ModelShape
  public let policy: any CompressionPolicy
  public let backend: Backend
  /// What the engine said it supplies.
  public let engineInputs: EngineInputs
  /// Attention conventions of the model: scale and softcap also shape what scorers see.
  public let attention: AttentionOptions

  package var layers: [LayerState]
  /// Layers that a tier holds together.
  package let groups: [LayerGroup]
  package let plan = AttentionPlan()
  /// What the policy needs, asked once.
  package let observer: (any AttentionObserver)?
  package let windowQueries: Int
  /// Which of all queries the policy looks at.
  package let probes: ProbeQueries?
  package let queriesWhileDecoding: Bool
  /// Whether anything looks at scores after the prompt.
  package let scoresWhileDecoding: Bool
  /// Whether what was observed of attention is kept after the prompt.
  package let observesWhileDecoding: Bool
  /// Whether the policy asks for queries of prompts alone.
  package let queriesOfPromptsOnly: Bool
  /// Whether the attention kernel adds straight into the observer's column.
  package let sumsInPlace: Bool
  package let cachedLayers: Int
  /// How decoding evicts without a plan, where it can.
  package let inPlace: InPlaceEviction?
  package let windowSelection: WindowSelection?
  /// What the columns of new rows start with; reused by every append.
  package var seed: [Float] = []
  /// The weights of the step in work, for observers that fold.
  package let stepWeights = Workspace()
  /// Scores among which many rows are dropped at once.
  let candidates = Workspace()
  /// What each head loses.
  let victims = Workspace()

  /// An empty cache.
  ///
  /// - Parameters:
  ///   - attention: the model's scale and softcap, used by `attend` when a call gives none and by window scorers.
  ///   - inputs: what the engine will report; the default is an engine that attends through the cache.
  /// - Throws: `missingInput` when the policy needs what the engine does not supply, `invalidOption` for shapes and
  ///   options that do not fit. Nothing is allocated yet.
  public convenience init(
    shape: ModelShape, policy: any CompressionPolicy, backend: Backend, attention: AttentionOptions = .init(),
    inputs: EngineInputs = .attendThrough
  ) throws(KVError) {
    try shape.validate()
    try attention.validate()
    try KVCache.check(policy, shape: shape, inputs: inputs)
    try KVCache.check(policy, backend: backend.operations)
    let groups = try LayerGroup.all(policy, shape: shape)
    self.init(
      restoring: shape.layers.enumerated().map { index, layer in
        LayerState(
          layer: index, shape: layer,
          segments: policy.makeSegments(layer: index, shape: shape, groups: groups, backend: backend.operations))
      }, groups: groups, shape: shape, policy: policy, backend: backend,
      attention: attention, inputs: inputs)
  }

  package init(
    restoring layers: [LayerState], groups: [LayerGroup], shape: ModelShape, policy: any CompressionPolicy,
    backend: Backend, attention: AttentionOptions, inputs: EngineInputs
  ) {
    self.layers = layers
    self.groups = groups
    self.shape = shape
    self.policy = policy
    self.backend = backend
    self.attention = attention
    let needed = policy.inputs
    observer = needed.observer
    windowQueries = needed.windowQueries
    queriesOfPromptsOnly = !needed.queriesWhileDecoding
    probes = needed.probes
    scoresWhileDecoding = policy.router.readsScoresWhileDecoding || policy.allocator.readsScoresWhileDecoding
    observesWhileDecoding = scoresWhileDecoding && policy.schedule.decodeInterval != nil
    queriesWhileDecoding = (needed.queriesWhileDecoding || probes != nil) && observesWhileDecoding
    sumsInPlace = needed.observer is AttentionSum
    inPlace = InPlaceEviction(policy)
    windowSelection = WindowSelection(policy)
    cachedLayers = shape.layers.count(where: \.cached)
    engineInputs = inputs
  }

  /// Refuses what the backend cannot do for the policy.
  package static func check(_ policy: any CompressionPolicy, backend: any ComputeBackend) throws(KVError) {
    for tier in policy.tiers {
      for factory in tier.factories { try factory.validate(backend: backend) }
    }
    if let observer = policy.inputs.observer { try backend.require(observer) }
    if policy.positions == .rerotate, !backend.turnsKeys {
      throw KVError(.unsupported, "\(policy.spec) turns keys in the cache, which \(backend.name) does not do")
    }
  }

  package static func check(
    _ policy: any CompressionPolicy, shape: ModelShape, inputs: EngineInputs
  ) throws(KVError) {
    let needed = policy.inputs
    guard (1...64).contains(policy.tiers.count) else {
      throw KVError(.invalidOption, "a policy has 1 to 64 tiers; got \(policy.tiers.count)")
    }
    guard policy.router.tierCount <= policy.tiers.count else {
      throw KVError(
        .invalidOption,
        "\(policy.spec) sends rows to \(policy.router.tierCount) tiers; it has \(policy.tiers.count) stores")
    }
    try policy.router.validate(kvHeads: shape.layers.map(\.kvHeads))
    if let interval = policy.schedule.decodeInterval, interval < 1 {
      throw KVError(.invalidOption, "a policy chooses after every 1 or more decoded tokens, or nil; got \(interval)")
    }
    guard (0...65_536).contains(needed.windowQueries) else {
      throw KVError(.invalidOption, "a policy needs the queries of 0...65536 tokens; got \(needed.windowQueries)")
    }
    if let observer = needed.observer, !(1...AttentionLimits.columns).contains(observer.columns) {
      throw KVError(
        .invalidOption,
        "an observer keeps 1...\(AttentionLimits.columns) numbers with a row; \(observer) keeps \(observer.columns)")
    }
    if needed.windowQueries > 0, !inputs.contains(.queries) {
      throw KVError(
        .missingInput,
        "\(policy.spec) needs the queries of the last \(needed.windowQueries) tokens; the engine supplies none. "
          + "Attend through the cache, or pass inputs: .queries and call observe(layer:queries:) for every append")
    }
    if policy.tiers.contains(where: \.factory.wantsQueries), !inputs.contains(.queries) {
      throw KVError(
        .missingInput,
        "\(policy.spec) needs the queries of the prompt; the engine supplies none. Attend through the cache, or pass "
          + "inputs: .queries and call observe(layer:queries:) for every append")
    }
    if let probes = needed.probes, !inputs.contains(.queries) {
      throw KVError(
        .missingInput,
        "\(policy.spec) needs the queries of \(probes); the engine supplies none. Attend through the cache, or pass "
          + "inputs: .queries and call observe(layer:queries:) for every append")
    }
    if needed.attentionWeights, !inputs.contains(.attentionWeights) {
      throw KVError(
        .missingInput,
        "\(policy.spec) needs attention weights; the engine supplies none. Attend through the cache, or pass "
          + "inputs: .attentionWeights and call observe(layer:attention:) for every append")
    }
    if policy.positions != .keep {
      guard let rotary = shape.rotary else {
        throw KVError(
          .missingInput,
          "\(policy.spec) counts positions in rows, which turns queries or keys; give ModelShape the rotary embedding")
      }
      try rotary.requireStatic()
    }
    if policy.positions == .rerotate { try checkTurning(policy) }
    if needed.rotary {
      guard let rotary = shape.rotary else {
        throw KVError(
          .missingInput, "\(policy.spec) turns keys; give ModelShape the rotary embedding")
      }
      try rotary.requireStatic()
    }
    if policy.router.merges, let store = policy.tiers.first(where: { $0.factories.contains { $0.merging == nil } }) {
      throw KVError(
        .unsupported, "\(policy.spec) merges rows, which the store \(store.spec.name) cannot hold")
    }
    if policy.scorer != nil || policy.budget != .unlimited {
      let protection = policy.router.protection
      try BudgetSplit.validate(sinks: protection.sinks, window: protection.window, budget: policy.budget)
      try policy.budget.validate(kvHeads: shape.layers.map(\.kvHeads))
    }
    try policy.scorer?.validate(shape)
    try policy.allocator.validate(shape)
    try policy.router.validate(shape)
    for (index, layer) in shape.layers.enumerated() where layer.cached {
      do throws(KVError) {
        for tier in policy.tiers { try tier.factory(layer: index, of: shape.layers.count).validate(layer: layer) }
      } catch {
        throw error.at(layer: index)
      }
      if let rotary = shape.rotary, rotary.headDim != layer.keyDim {
        throw KVError(
          .shapeMismatch, "rotary embedding of \(rotary.headDim) channels for keys of \(layer.keyDim)",
          layer: index)
      }
    }
  }

  /// Refuses what would turn keys that are not dense.
  private static func checkTurning(_ policy: any CompressionPolicy) throws(KVError) {
    guard policy.tiers.count == 1, !policy.router.merges else {
      throw KVError(.unsupported, "\(policy.spec) turns keys: rows then stay in one tier and are not merged")
    }
    let again = policy.schedule.decodeInterval != nil || policy.schedule.afterPrefillChunks
    for factory in policy.tiers[0].factories {
      switch factory.keyTurning {
      case .always: continue
      case .whileDense where !again: continue
      default:
        throw KVError(
          .unsupported,
          "\(policy.spec) turns keys \(again ? "again and again" : "after the prompt"), which \(policy.tiers[0].spec.name) "
            + "does not hold dense then; choose after the prompt alone, or store keys dense")
      }
    }
  }

  // MARK: Counting

  /// Tokens a layer has seen: the absolute position of the next one. Not the rows it holds.
  public func tokensSeen(layer: Int) -> Int { layers.indices.contains(layer) ? layers[layer].seen : 0 }

  /// Rows a layer holds for a KV head. At most the tokens seen; heads may differ.
  public func rowsHeld(layer: Int, head: Int) -> Int {
    guard layers.indices.contains(layer), layers[layer].shape.kvHeads > head, head >= 0 else { return 0 }
    return layers[layer].liveRows(head: head)
  }

  /// Bytes this cache holds, by kind. Buffers shared with forks are counted in full.
  public var bytes: ByteCount { KVCache.bytes(of: [self]) }

  /// Bytes of one layer.
  public func bytes(layer: Int) -> ByteCount {
    var tally = ByteTally()
    if layers.indices.contains(layer) { layers[layer].tally(into: &tally) }
    return tally.bytes
  }

  /// Bytes of several caches together: what forks share is counted once.
  public static func bytes(of caches: [KVCache]) -> ByteCount {
    var tally = ByteTally()
    for cache in caches { for layer in cache.layers { layer.tally(into: &tally) } }
    return tally.bytes
  }

  // MARK: Checks every call begins with

  package func state(_ layer: Int) throws(KVError) -> LayerState {
    guard layers.indices.contains(layer) else {
      throw KVError(.shapeMismatch, "layer \(layer) of a cache of \(layers.count) layers", layer: layer)
    }
    guard layers[layer].shape.cached else {
      throw KVError(.unsupported, "this layer has no KV cache", layer: layer)
    }
    return layers[layer]
  }

  package func checkQueries(
    _ queries: borrowing TensorView, _ state: LayerState, causal: Bool = true, finite: Bool = true
  ) throws(KVError) {
    guard queries.heads == state.shape.queryHeads, queries.dim == state.shape.keyDim else {
      throw KVError(
        .shapeMismatch,
        "queries of \(state.shape.queryHeads) heads x \(state.shape.keyDim) channels expected; got "
          + "\(queries.heads) x \(queries.dim)", layer: state.layer)
    }
    guard queries.tokens >= 1, !causal || queries.tokens <= state.seen else {
      throw KVError(
        .shapeMismatch,
        "queries of the last 1...\(state.seen) appended tokens expected; got \(queries.tokens)", layer: state.layer)
    }
    if finite, let place = backend.operations.firstNonfinite(queries) {
      throw nonFiniteQuery(place, tokens: queries.tokens, state)
    }
  }

  func nonFiniteQuery(_ place: ElementPlace, tokens: Int, _ state: LayerState) -> KVError {
    KVError(
      .nonFinite, "channel \(place.channel) of a query is NaN or infinite", layer: state.layer,
      head: place.head, position: state.seen - tokens + place.token)
  }

  package func debugCheck(_ state: LayerState) {
    #if KV_INTERNAL_CHECKS
      for segment in state.segments { segment.checkInvariants() }
    #endif
  }
}
