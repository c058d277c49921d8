/// One attention call, described for a backend: which queries read which rows. Made once per call by the cache, in
/// arrays that keep their capacity, so that a decode step allocates nothing.
package final class AttentionPlan {
  package var sequences: ContiguousArray<SequenceWork> = []
  package var rows: ContiguousArray<RowsWork> = []
  package var slices: ContiguousArray<RunSlice> = []
  /// Working memory of the backend for this plan's owner. Grows to the largest call and stays; not part of a cache's
  /// bytes.
  package let workspace = Workspace()
  /// For how the backend cut the work.
  package let bookkeeping = Workspace()
  /// Whether this call is the one before, but for tensors, counts and columns, and for the slices of every list from its
  /// `frozen` ones on: `first` and `count` of these differ, not their number and their memory.
  package var isRepeated = false
  /// Changes with every new description.
  package private(set) var generation = 0
  /// What the backend keeps of this plan for the next call.
  package var kept: AnyObject?

  package init() {}

  package func reset() {
    isRepeated = false
    generation += 1
    sequences.removeAll(keepingCapacity: true)
    rows.removeAll(keepingCapacity: true)
    slices.removeAll(keepingCapacity: true)
  }
}

/// Memory for intermediate results that is reused from call to call.
package final class Workspace {
  private var base: UnsafeMutableRawPointer?
  private var capacity = 0

  package init() {}

  deinit { base?.deallocate() }

  /// At least `count` floats, 64-byte aligned. Earlier contents are gone.
  package func floats(_ count: Int) -> UnsafeMutablePointer<Float> {
    let bytes = max(count, 1) * MemoryLayout<Float>.stride
    if bytes > capacity || base == nil {
      base?.deallocate()
      capacity = bytes + bytes / 4
      base = UnsafeMutableRawPointer.allocate(byteCount: capacity, alignment: 64)
    }
    return base.unsafelyUnwrapped.assumingMemoryBound(to: Float.self)
  }

  /// Room for `count` values of a trivial type, uninitialised.
  package func values<Value: BitwiseCopyable>(of type: Value.Type, count: Int) -> UnsafeMutablePointer<Value> {
    let floats = (count * MemoryLayout<Value>.stride + 3) / 4
    return UnsafeMutableRawPointer(self.floats(floats)).bindMemory(to: type, capacity: max(count, 1))
  }
}

/// The queries of one cache in one call.
package struct SequenceWork {
  package var queries: UnsafeRawPointer
  package var queryType: ElementType
  package var queryHeadStride: Int
  package var queryTokenStride: Int
  package var output: UnsafeMutablePointer<Float>
  package var outputHeadStride: Int
  package var outputTokenStride: Int
  /// Optional: log-sum-exp of the logits, [queryHeads][tokens], so that a partial can be merged by the caller.
  package var logSumExp: UnsafeMutablePointer<Float>?
  package var tokens: Int
  package var kvHeads: Int
  package var group: Int
  package var keyDim: Int
  package var valueDim: Int
  package var scale: Float
  package var softcap: Float
  /// Position of the first query; the others follow. `Int.max`: every row is visible.
  package var firstPosition: Int
  package var slidingWindow: Int
  package var rotary: RotaryEmbedding?
  /// Items of `plan.rows` that belong to this sequence, in KV head order.
  package var work: Range<Int>
  /// Tokens before this one leave no weights in `RowsWork.score`.
  package var observedFrom = 0
  /// How the weights of several query rows become one.
  package var reduction = AttentionReduction.sum

  package init(
    queries: UnsafeRawPointer, queryType: ElementType, queryHeadStride: Int, queryTokenStride: Int,
    output: UnsafeMutablePointer<Float>, outputHeadStride: Int, outputTokenStride: Int,
    logSumExp: UnsafeMutablePointer<Float>?, tokens: Int, kvHeads: Int, group: Int, keyDim: Int, valueDim: Int,
    scale: Float, softcap: Float, firstPosition: Int, slidingWindow: Int, rotary: RotaryEmbedding?,
    work: Range<Int>, observedFrom: Int = 0, reduction: AttentionReduction = .sum
  ) {
    self.queries = queries
    self.queryType = queryType
    self.queryHeadStride = queryHeadStride
    self.queryTokenStride = queryTokenStride
    self.output = output
    self.outputHeadStride = outputHeadStride
    self.outputTokenStride = outputTokenStride
    self.logSumExp = logSumExp
    self.tokens = tokens
    self.kvHeads = kvHeads
    self.group = group
    self.keyDim = keyDim
    self.valueDim = valueDim
    self.scale = scale
    self.softcap = softcap
    self.firstPosition = firstPosition
    self.slidingWindow = slidingWindow
    self.rotary = rotary
    self.work = work
    self.observedFrom = observedFrom
    self.reduction = reduction
  }
}

/// Consecutive slots of one KV head in one segment, read with one query phase.
package struct RowsWork {
  package var kvHead: Int
  package var count: Int
  /// Ranges of `plan.slices`.
  package var keys: Range<Int>
  package var values: Range<Int>
  /// Positions of the rows; nil means `firstPosition + i`.
  package var positions: UnsafePointer<Int32>?
  package var firstPosition = 0
  /// Log bias per row; minus infinity hides a row.
  package var bias: UnsafePointer<Float>?
  /// Where the attention each row receives is added (or its maximum kept), over the observed query rows.
  package var score: UnsafeMutablePointer<Float>?
  /// Positions by which these rows count as later than they are stored. The backend turns the query back by as much.
  package var shift: Int
  /// From this row on, positions are larger than all before; 0: positions ascend.
  package var sortedFrom = 0
  /// No row before `sortedFrom` is later.
  package var highest = -1
  /// The slices hold latents, and this is what restores them. Their `dim` is the rank.
  package var lowRank: LowRankRows?
  /// The slices hold directions, and this is what they are multiplied by.
  package var factored: FactoredRows?
  /// Structures of the stores of keys and values, of which these are all rows, and how many slices of each stay as they are
  /// while these are the same. Structure 0: not known.
  package var structure: (keys: UInt64, values: UInt64) = (0, 0)
  package var frozen: (keys: Int, values: Int) = (0, 0)

  package init(kvHead: Int, count: Int, keys: Range<Int>, values: Range<Int>, shift: Int) {
    self.kvHead = kvHead
    self.count = count
    self.keys = keys
    self.values = values
    self.shift = shift
  }

  /// The same rows in a list of slices that begins with `count` others.
  package mutating func moveSlices(by count: Int) {
    func moved(_ range: Range<Int>) -> Range<Int> { range.lowerBound + count..<range.upperBound + count }
    keys = moved(keys)
    values = moved(values)
    guard var own = factored else { return }
    own.keys.lengths = moved(own.keys.lengths)
    own.keys.exact = moved(own.keys.exact)
    own.values.lengths = moved(own.values.lengths)
    own.values.exact = moved(own.values.exact)
    factored = own
  }
}

/// Rows that lie as directions with a length each. A logit is multiplied by its row's length, a weight by that of its value,
/// so that no row is ever restored.
package struct FactoredRows {
  package struct Side {
    /// Slices of the lengths: dense rows of one channel, one for each row.
    package var lengths: Range<Int>
    /// Slices of rows that take the place of some of these, and which: `slots`, ascending, the first row being `offset`.
    package var exact: Range<Int>
    package var slots: UnsafePointer<Int32>?
    package var count: Int
    package var offset: Int
  }

  package var keys: Side
  package var values: Side
}

/// Column sums over the last queries of a prompt (SnapKV and its kin).
package struct WindowScoreRequest {
  /// f32 queries [queryHeads][window][keyDim], the last `window` positions.
  package var queries: UnsafePointer<Float>
  package var window: Int
  /// Queries are the positions `firstPosition ..< firstPosition + window`.
  package var firstPosition: Int
  package var group: Int
  package var keyDim: Int
  package var scale: Float
  package var softcap: Float
  package var reduction: GroupReduction
  package var statistic = WindowStatistic.sum
  /// Of each KV head, when they are wanted.
  package var totals: UnsafeMutablePointer<WindowTotals>?
  /// Per KV head: key slices, positions and count, in slot order.
  package var heads: [RowsWork]
  package var slices: [RunSlice]

  package init(
    queries: UnsafePointer<Float>, window: Int, firstPosition: Int, group: Int, keyDim: Int, scale: Float,
    softcap: Float, reduction: GroupReduction, heads: [RowsWork], slices: [RunSlice]
  ) {
    self.queries = queries
    self.window = window
    self.firstPosition = firstPosition
    self.group = group
    self.keyDim = keyDim
    self.scale = scale
    self.softcap = softcap
    self.reduction = reduction
    self.heads = heads
    self.slices = slices
  }
}

/// How the scores of the query heads of one KV head become one.
public enum GroupReduction: String, Sendable, Hashable, CaseIterable {
  case mean, max, sum
}
