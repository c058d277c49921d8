extension KVCache {
  /// Writes everything this cache is to a file: rows as they are encoded, positions, statistics, counters, the model
  /// shape and the text of the policy. `path` holds the old content or the new, never a part.
  ///
  /// A cache loaded from it continues with the same bits, on a backend of the same kind.
  ///
  /// - Throws: `inputOutput` with the system's text, `unsupported` for shapes beyond any model.
  /// - Complexity: O(bytes of the cache), in time and in memory: the file is put together before it is written.
  public func save(to path: String) throws(KVError) { try container().write(to: path) }

  /// What ``save(to:)`` would write.
  public func saved() throws(KVError) -> [UInt8] { try container().bytes() }

  private func container() throws(KVError) -> ContainerWriter {
    try checkSavable()
    var writer = ContainerWriter()
    var section = ByteWriter()
    SavedCache.Header(
      policy: policy.spec.description, tokensSeen: layers.reduce(0) { max($0, $1.seen) },
      tiers: policy.tiers.count, attention: attention, inputs: engineInputs
    ).encode(to: &section)
    writer.add(SavedCache.header, section)

    section = ByteWriter()
    shape.encode(to: &section)
    writer.add(SavedCache.shape, section)

    for state in layers where state.shape.cached {
      section = ByteWriter()
      state.encode(to: &section)
      writer.add(SavedCache.layer, index: state.layer, section)
      for (tier, segment) in state.segments.enumerated() {
        if let joint = segment as? any JointSegment,
          let group = groups.first(where: { $0.tier == tier && $0.layers.first == state.layer })
        {
          section = ByteWriter()
          joint.storage.encode(to: &section)
          writer.add(
            SavedCache.joint, index: SavedCache.segmentIndex(layer: group.layers[0], tier: tier), section)
        }
        section = ByteWriter()
        segment.encode(to: &section)
        writer.add(SavedCache.segment, index: SavedCache.segmentIndex(layer: state.layer, tier: tier), section)
      }
    }
    return writer
  }

  /// What a reader would refuse must not be written.
  private func checkSavable() throws(KVError) {
    let cached = layers.filter(\.shape.cached).count
    guard layers.count <= SavedCache.maximumLayers,
      2 + cached * (1 + policy.tiers.count) + groups.count <= Container.maximumSections
    else {
      throw KVError(
        .unsupported,
        "a file holds up to \(SavedCache.maximumLayers) layers of few tiers; this cache has "
          + "\(layers.count) layers of \(policy.tiers.count)")
    }
    for state in layers {
      guard state.cascade == nil else {
        throw KVError(
          .wrongPhase, "a cache is saved before any or after all layers' prompts are finished", layer: state.layer)
      }
      guard state.shape.isSavable else {
        throw KVError(
          .unsupported,
          "a file holds layers of 0...\(SavedCache.maximumHeads) heads of 0...4096 channels; this one has "
            + "\(state.shape)", layer: state.layer)
      }
    }
  }
}
