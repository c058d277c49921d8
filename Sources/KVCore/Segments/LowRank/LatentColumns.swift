/// What the slots of one KV head carry beside their rows: positions, log biases, observed attention, counts. Latents
/// first, the dense window behind them.
package struct LatentColumns {
  package private(set) var positions = PositionColumn()
  package private(set) var bias: Column<Float>?
  package private(set) var observed: Column<Float>?
  package private(set) var counts: Column<UInt32>?
  package private(set) var dead = 0

  package init() {}

  /// Those of dense rows.
  package init(of rows: HeadRows) {
    positions = rows.positions
    bias = rows.bias
    observed = rows.observed
    counts = rows.counts
    dead = rows.dead
  }

  package init(
    restoring positions: PositionColumn, bias: Column<Float>?, observed: Column<Float>?, counts: Column<UInt32>?,
    dead: Int
  ) {
    self.positions = positions
    self.bias = bias
    self.observed = observed
    self.counts = counts
    self.dead = dead
  }

  package var count: Int { positions.count }
  package var live: Int { count - dead }
  package func isLive(_ slot: Int) -> Bool { bias.map { $0[slot] != -.infinity } ?? true }

  // MARK: Appending

  /// Room for `added` more slots in every column, which are made when first needed; `observed` numbers a slot.
  package mutating func reserve(
    _ added: Int, biased: Bool = false, observed width: Int, counted: Bool = false, backend: any ComputeBackend
  ) throws(KVError) {
    try LatentColumns.reserve(&bias, added, slots: count, wanted: biased, of: 0, width: 1, backend: backend)
    try LatentColumns.reserve(&observed, added, slots: count, wanted: width > 0, of: 0, width: width, backend: backend)
    try LatentColumns.reserve(&counts, added, slots: count, wanted: counted, of: 1, width: 1, backend: backend)
  }

  private static func reserve<Element: BitwiseCopyable>(
    _ column: inout Column<Element>?, _ added: Int, slots: Int, wanted: Bool, of value: Element, width: Int,
    backend: any ComputeBackend
  ) throws(KVError) {
    if column != nil {
      try column!.reserve(added, backend: backend)
    } else if wanted {
      var fresh = Column<Element>(width: width)
      try fresh.reserve(slots + added, backend: backend)
      fresh.append(repeating: value, count: slots)
      column = fresh
    }
  }

  package mutating func reserve(next: Int, adding: Int, backend: any ComputeBackend) throws(KVError) {
    try positions.reserve(next: next, adding: adding, backend: backend)
  }

  package mutating func reserve(_ added: [Int], backend: any ComputeBackend) throws(KVError) {
    try positions.reserve(added, backend: backend)
  }

  /// Appends tokens that follow those there are, into reserved room.
  package mutating func append(next: Int, adding: Int, observed values: [Float]) {
    positions.append(next: next, adding: adding)
    bias?.append(repeating: 0, count: adding)
    if values.isEmpty {
      observed?.append(repeating: 0, count: adding)
    } else {
      observed?.append(planes: values, count: adding)
    }
    counts?.append(repeating: 1, count: adding)
  }

  /// Appends one slot of another segment, into reserved room.
  package mutating func append(slot: Int, of other: any Segment, head: Int, observed source: ObservedColumns) {
    positions.append([other.position(head: head, slot: slot)])
    bias?.append(other.logBias(head: head, slot: slot))
    counts?.append(UInt32(other.count(head: head, slot: slot)))
    observed?.append(0)
    let (width, last) = (observed?.width ?? 0, count - 1)
    for plane in 0..<width { observed?.set(last, plane: plane, source.value(column: plane, slot: slot)) }
  }

  // MARK: Removing

  package mutating func prepareDrop(backend: any ComputeBackend) throws(KVError) {
    if bias == nil {
      try LatentColumns.reserve(&bias, 0, slots: count, wanted: true, of: 0, width: 1, backend: backend)
    } else {
      try bias!.makeUnique(backend: backend)
    }
  }

  /// Marks a slot dead. Only after `prepareDrop`.
  package mutating func drop(_ slot: Int) {
    if bias![slot] == -.infinity { return }
    bias!.set(slot, -.infinity)
    dead += 1
  }

  package mutating func removeLast(_ removed: Int) {
    for slot in count - removed..<count where !isLive(slot) { dead -= 1 }
    positions.removeLast(removed)
    bias?.removeLast(removed)
    observed?.removeLast(removed)
    counts?.removeLast(removed)
  }

  /// The columns of the slots `kept` alone.
  package func gathered(_ kept: [Int], backend: any ComputeBackend) throws(KVError) -> LatentColumns {
    var result = LatentColumns()
    result.positions = try positions.gathered(kept, backend: backend)
    result.dead = kept.count { !isLive($0) }
    if let bias, kept.contains(where: { bias[$0] != 0 }) { result.bias = try bias.gathered(kept, backend: backend) }
    if let observed { result.observed = try observed.gathered(kept, backend: backend) }
    if let counts, kept.contains(where: { counts[$0] != 1 }) {
      result.counts = try counts.gathered(kept, backend: backend)
    }
    return result
  }

  package mutating func forgetObserved() { observed = nil }
  package mutating func makeObservedUnique(backend: any ComputeBackend) throws(KVError) {
    if observed != nil { try observed!.makeUnique(backend: backend) }
  }

  package func tally(into tally: inout ByteTally) {
    if let buffer = positions.explicit?.buffer { tally.add(buffer, kind: \.index) }
    if let buffer = bias?.buffer { tally.add(buffer, kind: \.metadata) }
    if let buffer = observed?.buffer { tally.add(buffer, kind: \.state) }
    if let buffer = counts?.buffer { tally.add(buffer, kind: \.metadata) }
  }

  package func checkInvariants() {
    precondition((0..<count).count { !isLive($0) } == dead, "\(dead) dead slots counted")
    precondition(bias.map { $0.count == count } ?? true, "one bias per slot")
    precondition(observed.map { $0.count == count } ?? true, "observed numbers of every slot")
    precondition(counts.map { $0.count == count } ?? true, "one count per slot")
  }
}
