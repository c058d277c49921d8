extension KVCache {
  /// A cache from a file that ``save(to:)`` wrote, on any backend.
  ///
  /// Everything in the file is checked before the cache exists. It continues as the saved one would have: same rows,
  /// same statistics, same decisions.
  ///
  /// - Parameters:
  ///   - policy: the policy of the saved cache; its text must be the one in the file
  ///     (``savedDescription(path:)`` tells it).
  ///   - shape: the model; must be the one in the file.
  ///   - attention: nil: as saved. Otherwise must be what the file says.
  ///   - inputs: what the engine supplies from now on; nil: as saved.
  /// - Throws: `invalidOption` when the file holds a cache of another policy, model or attention, `missingInput` when
  ///   `inputs` lacks what the policy needs, `corruptFile` for a file that is damaged or contradicts itself,
  ///   `inputOutput`, `outOfMemory`.
  /// - Complexity: O(bytes of the file); the largest section is held twice for a moment.
  public static func load(
    from path: String, policy: any CompressionPolicy, shape: ModelShape, backend: Backend,
    attention: AttentionOptions? = nil, inputs: EngineInputs? = nil
  ) throws(KVError) -> KVCache {
    try load(
      ContainerReader(path: path), policy: policy, shape: shape, backend: backend, attention: attention,
      inputs: inputs)
  }

  /// The same from the bytes that ``saved()`` returned.
  public static func load(
    saved bytes: [UInt8], policy: any CompressionPolicy, shape: ModelShape, backend: Backend,
    attention: AttentionOptions? = nil, inputs: EngineInputs? = nil
  ) throws(KVError) -> KVCache {
    try load(
      ContainerReader(bytes: bytes), policy: policy, shape: shape, backend: backend, attention: attention,
      inputs: inputs)
  }

  /// What a file holds, without loading it: the text of its policy, its model, its tokens. O(layers).
  public static func savedDescription(path: String) throws(KVError) -> SavedCacheDescription {
    try SavedCacheDescription(ContainerReader(path: path))
  }

  /// What the bytes that ``saved()`` returned hold.
  public static func savedDescription(of bytes: [UInt8]) throws(KVError) -> SavedCacheDescription {
    try SavedCacheDescription(ContainerReader(bytes: bytes))
  }

  private static func load(
    _ container: ContainerReader, policy: any CompressionPolicy, shape: ModelShape, backend: Backend,
    attention: AttentionOptions?, inputs: EngineInputs?
  ) throws(KVError) -> KVCache {
    let header = try SavedCache.Header(container)
    guard header.policy == policy.spec.description else {
      throw KVError(
        .invalidOption, "the file holds a cache of the policy \(header.policy); \(policy.spec) was given")
    }
    guard header.tiers == policy.tiers.count else {
      throw KVError(
        .invalidOption,
        "the file holds \(header.tiers) tiers of \(header.policy); a policy of \(policy.tiers.count) "
          + "was given")
    }
    let description = try SavedCacheDescription(container)
    if let difference = description.shape.difference(from: shape) {
      throw KVError(.invalidOption, "the file holds a cache of another model: \(difference)")
    }
    if let attention, attention != header.attention {
      throw KVError(
        .invalidOption, "the file holds a cache for \(header.attention); \(attention) was given")
    }
    let inputs = inputs ?? header.inputs
    try check(policy, shape: shape, inputs: inputs)
    try KVCache.check(policy, backend: backend.operations)

    let cached = shape.layers.filter(\.cached).count
    let groups = try LayerGroup.all(policy, shape: shape)
    let storages = try storages(of: groups, in: container, shape: shape, header: header, backend: backend)
    let joined = storages.filter { $0 != nil }.count
    guard container.entries.count == 2 + cached * (1 + policy.tiers.count) + joined else {
      throw KVError(
        .corruptFile,
        "expected \(2 + cached * (1 + policy.tiers.count) + joined) sections for \(cached) cached layers of "
          + "\(policy.tiers.count) tiers and \(joined) joined groups; found \(container.entries.count)", offset: 24)
    }
    var layers: [LayerState] = []
    for (index, layer) in shape.layers.enumerated() {
      let state = LayerState(layer: index, shape: layer, segments: [])
      do throws(KVError) {
        if layer.cached {
          try state.decode(
            container, policy: policy, layerCount: shape.layers.count, backend: backend.operations,
            waiting: { groups.waiting(layer: index, tier: $0, shape: layer) }
          ) { tier in
            zip(groups, storages).first { $0.0.tier == tier && $0.0.layers.contains(index) }
              .flatMap { group, storage in storage.map { (group.factory, $0, shape) } }
          }
        }
      } catch {
        throw error.at(layer: index)
      }
      layers.append(state)
    }
    let seen = layers.reduce(0) { max($0, $1.seen) }
    guard seen == header.tokensSeen else {
      throw KVError(.corruptFile, "expected \(header.tokensSeen) tokens seen; the layers saw \(seen)")
    }
    let cache = KVCache(
      restoring: layers, groups: groups, shape: shape, policy: policy, backend: backend, attention: header.attention,
      inputs: inputs)
    for state in layers { cache.debugCheck(state) }
    return cache
  }

  /// What groups of layers held together when the cache was saved; nil for a group that was not joined yet.
  private static func storages(
    of groups: [LayerGroup], in container: ContainerReader, shape: ModelShape, header: SavedCache.Header,
    backend: Backend
  ) throws(KVError) -> [(any JointStorage)?] {
    var result: [(any JointStorage)?] = []
    for group in groups {
      let index = SavedCache.segmentIndex(layer: group.layers[0], tier: group.tier)
      guard container.entry(SavedCache.joint, index: index) != nil else {
        result.append(nil)
        continue
      }
      var reader = try container.section(SavedCache.joint, index: index)
      do throws(KVError) {
        result.append(
          try group.factory.decodeStorage(
            from: &reader, layers: group.layers, shape: shape, tokensSeen: header.tokensSeen,
            backend: backend.operations))
        try reader.finish()
      } catch {
        throw error.at(layer: group.layers[0])
      }
    }
    return result
  }
}
