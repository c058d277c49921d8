/// What a scorer or router sees of a layer: its live rows per KV head, in position order across all segments.
///
/// Valid during the call it is passed to.
public final class LayerView {
  public let layer: Int
  /// Its place among the ``layerCount`` layers that the policy chooses in: layers without a cache or with a sliding window
  /// do not count.
  public let index: Int
  public let layerCount: Int
  public let shape: LayerShape
  /// Tokens the layer has ever seen; at least the rows it holds.
  public let tokensSeen: Int
  /// Tokens that the policy's last choice saw; those that came since are at this position and later.
  public let tokensChosen: Int
  /// Tokens decoded since the cache was made.
  public let decodedTokens: Int
  /// Whether the layer's prompt is not finished.
  public let isPrompt: Bool
  /// Tokens of the prompt whose queries can have been kept.
  let observableTokens: Int
  package let segments: [any Segment]
  /// What the router left in ``Routing/memory`` the last time; empty at first.
  public let routerMemory: [Float]
  let queryWindow: QueryWindow?
  let options: AttentionOptions
  /// Queries that may be probes, the rule that chooses among them, and the tokens the engine named.
  let probeStore: ProbeStore?
  let probes: ProbeQueries?
  let markedProbes: Set<Int>
  /// Tokens whose queries can be probes.
  var probeRange: Range<Int> { max(tokensChosen, tokensSeen - observableTokens)..<tokensSeen }
  let backend: any ComputeBackend
  /// How the model rotates keys and queries, where the engine said so.
  public let rotary: RotaryEmbedding?
  /// The prompt is finished: tokens come one by one.
  public let isDecoding: Bool
  /// What the layer was allocated when its prompt was finished.
  public let earlier: EarlierAllocation?

  /// Which slot of which segment a live row is.
  package struct RowReference: BitwiseCopyable {
    package var segment: Int32
    package var slot: Int32

    package init(segment: Int32, slot: Int32) {
      self.segment = segment
      self.slot = slot
    }
  }

  /// Live slots of all heads, and the segment of each where there are several.
  private var slots: ContiguousArray<Int32> = []
  private var owners: ContiguousArray<Int32> = []
  private var starts: [Int] = [0]

  init(
    _ state: LayerState, options: AttentionOptions, backend: any ComputeBackend, rotary: RotaryEmbedding? = nil,
    place: (index: Int, count: Int)? = nil
  ) {
    self.rotary = rotary
    (index, layerCount) = place ?? (state.layer, state.layer + 1)
    isDecoding = state.phase == .decode
    earlier = state.allocation
    layer = state.layer
    shape = state.shape
    tokensSeen = state.seen
    tokensChosen = state.chosenTokens
    decodedTokens = state.decodedTokens
    isPrompt = state.phase == .prefill
    observableTokens = state.seen - state.promptStart
    segments = state.segments
    routerMemory = state.routerMemory
    queryWindow = state.queryWindow
    probeStore = state.probeStore
    probes = state.probes
    markedProbes = state.markedProbes
    self.options = options
    self.backend = backend
    if segments.count == 1, (0..<shape.kvHeads).allSatisfy({ segments[0].sortedFrom(head: $0) == 0 }) {
      for head in 0..<shape.kvHeads {
        segments[0].appendLiveSlots(head: head, to: &slots)
        starts.append(slots.count)
      }
    } else {
      collectByPosition()
    }
  }

  /// Several tiers, each in the order its rows arrived: every row is entered at its position, and the entries are read in
  /// order. O(tokens seen) a head, without a sort.
  private func collectByPosition() {
    let rows = (0..<shape.kvHeads).reduce(0) { total, head in
      segments.reduce(total) { $0 + $1.liveCount(head: head) }
    }
    slots.reserveCapacity(rows)
    owners.reserveCapacity(rows)
    withUnsafeTemporaryAllocation(of: RowReference.self, capacity: max(tokensSeen, 1)) { table in
      for head in 0..<shape.kvHeads {
        table.update(repeating: RowReference(segment: -1, slot: 0))
        for (index, segment) in segments.enumerated() {
          segment.enterLiveSlots(head: head, as: Int32(index), in: table)
        }
        for place in table where place.segment >= 0 {
          slots.append(place.slot)
          owners.append(place.segment)
        }
        starts.append(slots.count)
      }
    }
  }

  package func reference(head: Int, row: Int) -> RowReference {
    let index = starts[head] + row
    return RowReference(segment: owners.isEmpty ? 0 : owners[index], slot: slots[index])
  }

  public var kvHeads: Int { shape.kvHeads }
  /// Live rows of a head.
  public func rowCount(head: Int) -> Int { starts[head + 1] - starts[head] }
  /// Live rows of every head.
  public var rowCounts: [Int] { (0..<kvHeads).map { rowCount(head: $0) } }

  /// Absolute position of the token in a row. O(1).
  public func position(head: Int, row: Int) -> Int {
    let place = reference(head: head, row: row)
    return segments[Int(place.segment)].position(head: head, slot: Int(place.slot))
  }

  /// The tier that holds a row. Tokens arrive in tier 0. O(1).
  public func tier(head: Int, row: Int) -> Int { Int(reference(head: head, row: row).segment) }

  /// A number that the policy's observer keeps with a row. 0 when it keeps none. O(1).
  public func observed(head: Int, row: Int, column: Int = 0) -> Float {
    let place = reference(head: head, row: row)
    return segments[Int(place.segment)].observed(head: head).value(column: column, slot: Int(place.slot))
  }

  /// One column of the policy's observer for all rows of all heads. O(rows).
  public func observed(column: Int = 0, into scores: inout ScoreTable) {
    for head in 0..<kvHeads {
      let range = scores.range(head: head)
      let own = segments.map { $0.observed(head: head) }
      scores.values.withUnsafeMutableBufferPointer { buffer in
        guard let base = buffer.baseAddress else { return }
        if owners.isEmpty {
          own[0].copyLive(column: column, into: base + range.lowerBound)
          return
        }
        let first = starts[head]
        for row in 0..<range.count {
          base[range.lowerBound + row] = own[Int(owners[first + row])].value(
            column: column, slot: Int(slots[first + row]))
        }
      }
    }
  }

  /// Attention the row has received so far, summed over the queries seen and the query heads of the group.
  /// Needs ``AttentionSum``.
  public func accumulatedAttention(head: Int, row: Int) -> Float { observed(head: head, row: row) }

  /// The same for all rows of all heads at once. O(rows).
  public func accumulatedAttention(into scores: inout ScoreTable) { observed(into: &scores) }

  /// The keys of a head as stored, [rows, keyDim] f32. O(rows · keyDim), allocates.
  public func keys(head: Int) -> [Float] { read(head: head, dim: shape.keyDim) { $0.readKeys } }
  /// The values of a head as stored, [rows, valueDim] f32. O(rows · valueDim), allocates.
  public func values(head: Int) -> [Float] { read(head: head, dim: shape.valueDim) { $0.readValues } }

  private typealias Reader = (Int, Range<Int>, UnsafeMutablePointer<Float>) -> Void

  private func read(head: Int, dim: Int, _ reader: (any Segment) -> Reader) -> [Float] {
    let count = rowCount(head: head)
    return [Float](unsafeUninitializedCapacity: count * dim) { buffer, initialized in
      initialized = count * dim
      guard let base = buffer.baseAddress else { return }
      var row = 0
      while row < count {
        let place = reference(head: head, row: row)
        let slot = Int(place.slot)
        // Neighbours at once: some representations restore many rows as quickly as one.
        var end = row + 1
        while end < count, case let next = reference(head: head, row: end), next.segment == place.segment,
          Int(next.slot) == slot + end - row
        { end += 1 }
        reader(segments[Int(place.segment)])(head, slot..<slot + end - row, base + row * dim)
        row = end
      }
    }
  }

  /// Attention of the last `window` queries over all rows, summed over the queries, reduced over the query heads of
  /// each KV head. The softmax runs over all rows, the window's own included; the rows of the window are masked
  /// causally among themselves. Rows are scored in position order.
  ///
  /// O(window · queryHeads · rows · keyDim), no more than the window's rows are ever formed.
  ///
  /// - Throws: `missingInput` when fewer queries were observed than the window needs.
  public func windowAttention(
    window: Int, reduction: GroupReduction, into scores: inout ScoreTable
  ) throws(KVError) {
    _ = try windowStatistics(.sum, window: window, reduction: reduction, into: &scores)
  }

  /// Any statistic of the same softmax rows, reduced over the query heads of each KV head, and what they say of the layer
  /// as a whole. Entropy is only made when `totals` asks for it, the variance when the statistic needs it or `totals`
  /// asks.
  ///
  /// - Throws: `missingInput` when fewer queries were observed than the window needs, `unsupported` on backends that
  ///   only sum.
  public func windowStatistics(
    _ statistic: WindowStatistic, window: Int, reduction: GroupReduction, totals: Bool = false,
    into scores: inout ScoreTable
  ) throws(KVError) -> WindowTotals {
    guard backend.hasWindowStatistics || statistic == .sum && !totals else {
      throw KVError(.unsupported, "\(backend.name) sums window attention and has no other statistics", layer: layer)
    }
    let queries = try windowQueries(window)
    let wanted = min(window, observableTokens)
    for head in 0..<kvHeads { for row in 0..<rowCount(head: head) { scores[head, row] = 0 } }
    var headTotals = totals ? Array(repeating: WindowTotals(), count: kvHeads) : []
    headTotals.withUnsafeMutableBufferPointer {
      addWindow(
        queries, count: wanted, firstPosition: tokensSeen - wanted, reduction: reduction,
        keyWork(), statistic: statistic, totals: totals ? $0.baseAddress : nil, into: &scores)
    }
    return headTotals.reduce(into: WindowTotals()) {
      $0.entropy += $1.entropy
      $0.variance += $1.variance
    }
  }

  /// The newest queries, [queryHeads][min(window, tokens that can have been observed)][keyDim].
  func windowQueries(_ window: Int) throws(KVError) -> [Float] {
    let wanted = min(window, observableTokens)
    guard let queryWindow, wanted > 0, queryWindow.count >= wanted else {
      throw KVError(
        .missingInput,
        "needs the queries of the last \(wanted) tokens; \(queryWindow?.count ?? 0) were observed. "
          + "Attend through the cache, or call observe(layer:queries:) for every append",
        layer: layer)
    }
    return queryWindow.newest(wanted)
  }

  /// The keys of every head and segment, described for a backend.
  package struct KeyWork {
    var heads: [RowsWork] = []
    var slices: [RunSlice] = []
    /// First item of `heads` for a segment of a head; -1 where it has no slots.
    var item: [[Int]] = []
  }

  package func keyWork() -> KeyWork {
    var result = KeyWork()
    for head in 0..<kvHeads {
      var items: [Int] = []
      for segment in segments {
        let plan = AttentionPlan()
        segment.describe(head: head, range: 0..<segment.slotCount(head: head), shift: 0, in: plan)
        items.append(plan.rows.isEmpty ? -1 : result.heads.count)
        // A segment in several pieces describes them in slot order.
        for var work in plan.rows {
          work.moveSlices(by: result.slices.count)
          work.values = 0..<0
          result.heads.append(work)
        }
        result.slices += plan.slices
      }
      result.item.append(items)
    }
    return result
  }

  /// Adds a statistic of the attention of `count` neighbouring queries, [queryHeads][count][keyDim], to the scores of
  /// the rows. `totals` has room for one per KV head.
  package func addWindow(
    _ queries: [Float], count: Int, firstPosition: Int, reduction: GroupReduction, _ work: KeyWork,
    statistic: WindowStatistic = .sum, totals: UnsafeMutablePointer<WindowTotals>? = nil,
    into scores: inout ScoreTable
  ) {
    var slots = ScoreTable()
    slots.reset(counts: work.heads.map(\.count))
    queries.withUnsafeBufferPointer { buffer in
      guard let base = buffer.baseAddress else { return }
      var request = WindowScoreRequest(
        queries: base, window: count, firstPosition: firstPosition, group: shape.group, keyDim: shape.keyDim,
        scale: options.scale ?? 1 / Float(shape.keyDim).squareRoot(), softcap: options.softcap ?? 0,
        reduction: reduction, heads: work.heads, slices: work.slices)
      request.statistic = statistic
      request.totals = totals
      backend.windowScores(request, into: &slots)
    }
    // From slots of segments to live rows.
    for head in 0..<kvHeads {
      let range = scores.range(head: head)
      for row in 0..<range.count {
        let place = reference(head: head, row: row)
        let first = slots.range(head: work.item[head][Int(place.segment)]).lowerBound
        scores.values[range.lowerBound + row] += slots.values[first + Int(place.slot)]
      }
    }
  }
}
