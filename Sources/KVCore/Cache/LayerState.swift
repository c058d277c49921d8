/// Everything a cache holds for one layer: segments, observed inputs, counters. Owned by one cache.
package final class LayerState {
  let layer: Int
  let shape: LayerShape
  /// Tokens ever appended: the position of the next one. Not the rows held.
  var seen = 0
  var phase = Phase.prefill
  package internal(set) var segments: [any Segment]
  /// The plan of the last attention, where the backend keeps what it makes of it.
  package internal(set) var plan: AttentionPlan?
  /// Queries of the newest tokens, while the policy needs them.
  var queryWindow: QueryWindow?
  /// The largest magnitudes of the prompt's queries, while a segment waits for them.
  var queryPeaks: QueryPeaks?
  /// Queries that may yet be probes, while the policy needs them, the rule, and the tokens the engine named.
  var probeStore: ProbeStore?
  var probes: ProbeQueries?
  var markedProbes: Set<Int> = []
  /// Tokens up to which attention weights were observed.
  var observedTokens = 0
  var observedQueries = 0
  /// Tokens up to which the policy's maintenance has run.
  var settledTokens = 0
  var decodedSinceCompression = 0
  /// Tokens that the policy's last choice saw.
  var chosenTokens = 0
  /// Tokens appended while decoding, in all turns: the clock of observers.
  var decodedTokens = 0
  /// Tokens whose queries and weights nobody kept: those before this turn's prompt, when nothing is chosen while decoding.
  var promptStart = 0
  /// Positions below this can no longer be cut off: something was dropped, or the statistics know later tokens.
  var frozenBelow = 0
  var outcome = LayerOutcome.untouched
  /// Whether all heads were seen to hold the same slots, and nothing but appending and evicting alike came since.
  var headsAreAlike = false
  /// What the router remembers between its calls: a few numbers.
  var routerMemory: [Float] = []
  /// What the last choice of the prompt gave the heads.
  var allocation: EarlierAllocation?
  /// Its scores, while the prompts of other layers are not finished.
  var cascade: CascadedScores?

  enum Phase: UInt8 { case prefill = 0, decode = 1 }

  init(layer: Int, shape: LayerShape, segments: [any Segment]) {
    self.layer = layer
    self.shape = shape
    self.segments = segments
  }

  init(forking other: LayerState, storage: inout ForkedStorage) {
    layer = other.layer
    shape = other.shape
    seen = other.seen
    phase = other.phase
    segments = other.segments.map { storage.fork($0) }
    queryWindow = other.queryWindow
    queryPeaks = other.queryPeaks
    probeStore = other.probeStore
    probes = other.probes
    markedProbes = other.markedProbes
    observedTokens = other.observedTokens
    observedQueries = other.observedQueries
    settledTokens = other.settledTokens
    decodedSinceCompression = other.decodedSinceCompression
    chosenTokens = other.chosenTokens
    decodedTokens = other.decodedTokens
    promptStart = other.promptStart
    frozenBelow = other.frozenBelow
    outcome = other.outcome
    routerMemory = other.routerMemory
    allocation = other.allocation
    cascade = other.cascade
  }

  func liveRows(head: Int) -> Int { segments.reduce(0) { $0 + $1.liveCount(head: head) } }

  func tally(into tally: inout ByteTally) {
    for segment in segments { segment.tally(into: &tally) }
    if let buffer = queryWindow?.buffer { tally.add(buffer, kind: \.state) }
    if let buffer = queryPeaks?.values.buffer { tally.add(buffer, kind: \.state) }
    probeStore?.tally(into: &tally)
    if let buffer = cascade?.buffer { tally.add(buffer, kind: \.state) }
  }
}

/// The scores of a layer whose prompt is finished before those of others: by them it gives more rows up. Never written,
/// so forks share them.
struct CascadedScores {
  let buffer: Buffer
  let counts: [Int]
  let measures: [Double]

  /// - Parameter routing: rows that leave are left out; nil: all stay.
  init(_ scores: ScoreTable, routing: Routing?, backend: any ComputeBackend) throws(KVError) {
    var values: [Float] = []
    var counts: [Int] = []
    for head in 0..<scores.headCount {
      let before = values.count
      for row in 0..<scores.rowCount(head: head) where routing?[head, row] != .dropped {
        values.append(scores[head, row])
      }
      counts.append(values.count - before)
    }
    buffer = try backend.allocate(byteCount: values.count * MemoryLayout<Float>.stride, hostVisible: true)
    buffer.base.assumingMemoryBound(to: Float.self).update(from: values, count: values.count)
    self.counts = counts
    measures = scores.measures
  }

  var table: ScoreTable {
    var table = ScoreTable(counts: counts)
    let base = buffer.base.assumingMemoryBound(to: Float.self)
    for index in table.values.indices { table.values[index] = base[index] }
    table.measures = measures
    return table
  }
}

/// What happened to a layer, for `KVCache.status`.
enum LayerOutcome: Hashable {
  case untouched
  case waiting
  case withinBudget(rows: Int)
  case compressed(before: Int, after: Int, at: Int)
  case slidingWindow(Int)
  case storedOnly
}

/// The last queries of a layer as f32, in a ring [queryHeads][capacity][keyDim].
struct QueryWindow {
  private(set) var buffer: Buffer
  let capacity: Int
  let queryHeads: Int
  let keyDim: Int
  /// Tokens captured so far; the newest min(captured, capacity) are in the ring.
  private(set) var captured = 0
  /// Reused by every capture.
  private var targets: [WriteTarget] = []

  init(capacity: Int, shape: LayerShape, backend: any ComputeBackend) throws(KVError) {
    self.capacity = capacity
    queryHeads = shape.queryHeads
    keyDim = shape.keyDim
    buffer = try backend.allocate(
      byteCount: shape.queryHeads * capacity * shape.keyDim * 4, hostVisible: true)
  }

  /// A window from a saved cache: `rows` as `newest(count)` gave them.
  init(
    restoring rows: [Float], captured: Int, capacity: Int, shape: LayerShape, backend: any ComputeBackend
  ) throws(KVError) {
    try self.init(capacity: capacity, shape: shape, backend: backend)
    self.captured = captured
    precondition(rows.count == queryHeads * count * keyDim, "\(rows.count) channels of \(count) captured queries")
    let base = buffer.base.assumingMemoryBound(to: Float.self)
    for head in 0..<queryHeads {
      for i in 0..<count {
        let slot = (captured - count + i) % capacity
        let target = base + (head * capacity + slot) * keyDim
        for c in 0..<keyDim { target[c] = rows[(head * count + i) * keyDim + c] }
      }
    }
  }

  var count: Int { min(captured, capacity) }

  /// Forgets what was captured: the queries that follow are not neighbours of it.
  mutating func clear() { captured = 0 }

  /// Takes in the newest queries of a view. Forks share the ring until one of them writes.
  mutating func capture(_ queries: borrowing TensorView, backend: any ComputeBackend) throws(KVError) {
    if !isKnownUniquelyReferenced(&buffer) {
      let fresh = try backend.allocate(byteCount: buffer.byteCount, hostVisible: true)
      fresh.base.copyMemory(from: buffer.base, byteCount: buffer.byteCount)
      buffer = fresh
    }
    let taken = min(queries.tokens, capacity)
    let first = queries.tokens - taken
    targets.removeAll(keepingCapacity: true)
    for head in 0..<queryHeads {
      var token = 0
      while token < taken {
        let slot = (captured + first + token) % capacity
        let run = min(taken - token, capacity - slot)
        targets.append(
          WriteTarget(
            head: head, token: first + token,
            slice: RunSlice(run: row(head: head, slot: slot), first: 0, count: run), range: .window))
        token += run
      }
    }
    _ = backend.write(queries, to: targets)
    captured += queries.tokens
  }

  private func row(head: Int, slot: Int) -> RowRun {
    RowRun(
      encoding: .dense(.f32), dim: keyDim, capacity: capacity - slot,
      base: buffer.base + (head * capacity + slot) * keyDim * 4)
  }

  /// The newest `wanted` queries, oldest first: [queryHeads][wanted][keyDim].
  func newest(_ wanted: Int) -> [Float] {
    precondition(wanted <= count, "\(wanted) of \(count) captured queries")
    let base = buffer.base.assumingMemoryBound(to: Float.self)
    var result = [Float](repeating: 0, count: queryHeads * wanted * keyDim)
    for head in 0..<queryHeads {
      for i in 0..<wanted {
        let slot = (captured - wanted + i) % capacity
        let source = base + (head * capacity + slot) * keyDim
        let target = (head * wanted + i) * keyDim
        for c in 0..<keyDim { result[target + c] = source[c] }
      }
    }
    return result
  }
}
