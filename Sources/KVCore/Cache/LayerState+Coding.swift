/// The section LAYR of a saved cache, drawn in ``SavedCache``.
extension LayerState {
  func encode(to writer: inout ByteWriter) {
    for counter in [
      seen, observedTokens, observedQueries, settledTokens, decodedSinceCompression, frozenBelow, promptStart,
      decodedTokens,
    ] {
      writer.count(counter)
    }
    writer.u8(phase.rawValue)
    outcome.encode(to: &writer)
    writer.bool(queryWindow != nil)
    queryWindow?.encode(to: &writer)
    writer.count(routerMemory.count)
    writer.array(routerMemory)
    writer.bool(allocation != nil)
    if let allocation {
      writer.count(allocation.tokensSeen)
      for head in 0..<shape.kvHeads {
        writer.count(allocation.kept[head])
        writer.count(allocation.budget[head])
      }
    }
    writer.count(chosenTokens)
    writer.bool(queryPeaks != nil)
    queryPeaks?.encode(to: &writer)
    writer.bool(probeStore != nil)
    probeStore?.encode(to: &writer)
    writer.count(markedProbes.count)
    writer.array(markedProbes.sorted().map { Int32($0) })
  }

  /// Fills an empty state from its sections. `joint` tells what a tier holds together with other layers, `waiting` what it
  /// holds until then.
  func decode(
    _ container: ContainerReader, policy: any CompressionPolicy, layerCount: Int, backend: any ComputeBackend,
    waiting: (Int) -> RowFormat?,
    joint: (Int) -> (factory: any JointFactory, storage: any JointStorage, shape: ModelShape)?
  ) throws(KVError) {
    var reader = try container.section(SavedCache.layer, index: layer)
    seen = try reader.count("the tokens seen", in: 0...SavedCache.maximumTokens)
    observedTokens = try reader.count("the observed tokens", in: 0...seen)
    observedQueries = try reader.count("the observed queries", in: 0...seen)
    settledTokens = try reader.count("the settled tokens", in: 0...seen)
    decodedSinceCompression = try reader.count(
      "the tokens since a compression", in: 0...SavedCache.maximumCounter)
    frozenBelow = try reader.count("the tokens that cannot be cut off", in: 0...seen)
    promptStart = try reader.count("the tokens before the prompt", in: 0...seen)
    decodedTokens = try reader.count("the decoded tokens", in: 0...seen)
    let number = try reader.u8("the phase")
    guard let phase = Phase(rawValue: number) else {
      throw reader.corrupt("expected the phase 0 (prompt) or 1 (decoding); found \(number)")
    }
    self.phase = phase
    outcome = try LayerOutcome(from: &reader)
    if try reader.bool("whether there is a query window") {
      queryWindow = try QueryWindow(
        from: &reader, capacity: policy.inputs.windowQueries, shape: shape, backend: backend)
    }
    let remembered = try reader.count("numbers of the router", in: 0...SavedCache.maximumRemembered)
    routerMemory = try reader.array(of: Float.self, count: remembered, "numbers of the router")
    if try reader.bool("whether there is an allocation") {
      let tokens = try reader.count("the tokens of an allocation", in: 0...seen)
      var kept: [Int] = []
      var budget: [Int] = []
      for _ in 0..<shape.kvHeads {
        kept.append(try reader.count("the rows of an allocation", in: 0...tokens))
        budget.append(try reader.count("the budget of an allocation", in: 0...SavedCache.maximumTokens))
      }
      allocation = EarlierAllocation(kept: kept, budget: budget, tokensSeen: tokens)
    }
    chosenTokens = try reader.count("the tokens of the last choice", in: 0...seen)
    if try reader.bool("whether there are magnitudes of queries") {
      queryPeaks = try QueryPeaks(from: &reader, seen: seen, shape: shape, backend: backend)
    }
    probes = policy.inputs.probes
    if try reader.bool("whether there are probe queries") {
      probeStore = try ProbeStore(from: &reader, seen: seen, shape: shape, backend: backend)
    }
    let marked = try reader.count("named probes", in: 0...SavedCache.maximumTokens)
    markedProbes = Set(try reader.array(of: Int32.self, count: marked, "named probes").map { Int($0) })
    try reader.finish()

    for (tier, store) in policy.tiers.enumerated() {
      var reader = try container.section(
        SavedCache.segment, index: SavedCache.segmentIndex(layer: layer, tier: tier))
      if let joint = joint(tier) {
        segments.append(
          try joint.factory.decodeSegment(
            from: &reader, on: joint.storage, layer: layer, shape: joint.shape, tokensSeen: seen, backend: backend))
      } else {
        let factory: any SegmentFactory = waiting(tier) ?? store.factory(layer: layer, of: layerCount)
        segments.append(
          try factory.decodeSegment(from: &reader, layer: shape, tokensSeen: seen, backend: backend))
      }
      try reader.finish()
    }
    try checkDisjoint()
  }

  /// A row that moved between tiers is dead in one of them; alive in two it would count twice.
  private func checkDisjoint() throws(KVError) {
    for head in 0..<shape.kvHeads {
      if segments.count == 1, segments[0].sortedFrom(head: head) == 0 { continue }
      var positions: [Int] = []
      for segment in segments {
        for slot in 0..<segment.slotCount(head: head) where segment.isLive(head: head, slot: slot) {
          positions.append(segment.position(head: head, slot: slot))
        }
      }
      positions.sort()
      for (earlier, later) in zip(positions, positions.dropFirst()) where earlier == later {
        throw KVError(
          .corruptFile, "expected a token once; found it alive twice", head: head, position: later)
      }
    }
  }
}

extension LayerOutcome {
  fileprivate func encode(to writer: inout ByteWriter) {
    let number: UInt8
    let details: [Int]
    switch self {
    case .untouched: (number, details) = (0, [])
    case .waiting: (number, details) = (1, [])
    case .withinBudget(let rows): (number, details) = (2, [rows])
    case .compressed(let before, let after, let position): (number, details) = (3, [before, after, position])
    case .slidingWindow(let window): (number, details) = (4, [window])
    case .storedOnly: (number, details) = (5, [])
    }
    writer.u8(number)
    for detail in details { writer.count(detail) }
  }

  fileprivate init(from reader: inout ByteReader) throws(KVError) {
    let number = try reader.u8("the outcome")
    switch number {
    case 0: self = .untouched
    case 1: self = .waiting
    case 2: self = .withinBudget(rows: try reader.count("rows within the budget", in: 0...SavedCache.maximumTokens))
    case 3:
      self = .compressed(
        before: try reader.count("rows before a compression", in: 0...SavedCache.maximumTokens),
        after: try reader.count("rows after a compression", in: 0...SavedCache.maximumTokens),
        at: try reader.count("the token of a compression", in: 0...SavedCache.maximumTokens))
    case 4: self = .slidingWindow(try reader.count("a sliding window", in: 1...Int.max))
    case 5: self = .storedOnly
    default: throw reader.corrupt("expected an outcome in 0...5; found \(number)")
    }
  }
}

extension QueryWindow {
  fileprivate func encode(to writer: inout ByteWriter) {
    writer.count(capacity)
    writer.count(captured)
    writer.array(newest(count))
  }

  /// - Parameter capacity: queries the policy wants.
  fileprivate init(
    from reader: inout ByteReader, capacity: Int, shape: LayerShape, backend: any ComputeBackend
  ) throws(KVError) {
    let saved = try reader.count("the capacity of the query window")
    guard saved == capacity, capacity > 0 else {
      throw reader.corrupt("expected a window of the \(capacity) queries the policy needs; found \(saved)")
    }
    let captured = try reader.count("the captured queries", in: 0...SavedCache.maximumCounter)
    // Heads and channels are bounded by the shape, the count by the policy: no overflow.
    let rows = try reader.array(
      of: Float.self, count: shape.queryHeads * min(captured, capacity) * shape.keyDim, "channels of queries")
    guard rows.allSatisfy(\.isFinite) else { throw reader.corrupt("expected finite queries") }
    try self.init(restoring: rows, captured: captured, capacity: capacity, shape: shape, backend: backend)
  }
}
