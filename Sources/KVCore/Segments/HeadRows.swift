/// One KV head of a row segment: its slots, in the order their rows arrived.
///
/// ```
/// slot        0   1   2   …
/// positions   0   1   5   …    Int32, implicit while consecutive
/// bias        0   0  -∞   …    Float, absent while all are 0
/// observed   .5  .2   0   …    Float, some a slot, absent unless the policy observes attention
/// count       1   3   1   …    UInt32, tokens a slot stands for, absent while all are 1
/// keys      ┌ body ┬ tail ┐    split where the key format says
/// values    ┌ body  ┬ tail┐    split where the value format says
/// ```
package struct HeadRows {
  package var keys: RowStore
  package var values: RowStore
  package var positions = PositionColumn()
  package var bias: Column<Float>?
  package var observed: Column<Float>?
  package var counts: Column<UInt32>?
  package var dead = 0

  package init(keyDim: Int, valueDim: Int, keys: SideFormat, values: SideFormat) {
    self.keys = RowStore(dim: keyDim, format: keys)
    self.values = RowStore(dim: valueDim, format: values)
  }

  package var slots: Int { positions.count }
  package var live: Int { slots - dead }

  package func isLive(_ slot: Int) -> Bool { bias.map { $0[slot] != -.infinity } ?? true }

  /// Tokens a slot stands for.
  package func count(_ slot: Int) -> Int { counts.map { Int($0[slot]) } ?? 1 }

  /// Room for `count` more slots in the bias, observed and count columns, which are made when first needed; `observed`
  /// numbers a slot.
  package mutating func reserveColumns(
    _ count: Int, biased: Bool, observed width: Int, counted: Bool = false, backend: any ComputeBackend
  ) throws(KVError) {
    if bias != nil {
      try bias!.reserve(count, backend: backend)
    } else if biased {
      bias = try HeadRows.column(of: 0, slots, room: count, backend: backend)
    }
    if observed != nil {
      try observed!.reserve(count, backend: backend)
    } else if width > 0 {
      observed = try HeadRows.column(of: 0, width: width, slots, room: count, backend: backend)
    }
    if counts != nil {
      try counts!.reserve(count, backend: backend)
    } else if counted {
      counts = try HeadRows.column(of: 1, slots, room: count, backend: backend)
    }
  }

  private static func column<Element: BitwiseCopyable>(
    of value: Element, width: Int = 1, _ count: Int, room: Int, backend: any ComputeBackend
  ) throws(KVError) -> Column<Element> {
    var column = Column<Element>(width: width)
    try column.reserve(count + room, backend: backend)
    column.append(repeating: value, count: count)
    return column
  }

  /// Cuts off the newest slots, which must be in the dense tails.
  package mutating func removeLast(_ count: Int) {
    for slot in slots - count..<slots where !isLive(slot) { dead -= 1 }
    keys.removeLast(count)
    values.removeLast(count)
    positions.removeLast(count)
    bias?.removeLast(count)
    observed?.removeLast(count)
    counts?.removeLast(count)
  }

  /// Memory in which slots can be marked dead.
  package mutating func prepareDrop(backend: any ComputeBackend) throws(KVError) {
    if bias == nil {
      bias = try HeadRows.column(of: 0, slots, room: 0, backend: backend)
    } else {
      try bias!.makeUnique(backend: backend)
    }
  }

  /// Marks slots dead. Everything that can fail happens before the first slot changes.
  package mutating func drop(_ dropped: [Int], backend: any ComputeBackend) throws(KVError) {
    if dropped.isEmpty { return }
    try prepareDrop(backend: backend)
    for slot in dropped { drop(slot) }
  }

  /// Marks a slot dead. Only after `prepareDrop`.
  package mutating func drop(_ slot: Int) {
    if bias![slot] == -.infinity { return }
    bias!.set(slot, -.infinity)
    dead += 1
  }

  /// Dead slots worth reclaiming: a few for small heads, at most 64.
  package var reclaimThreshold: Int { min(64, max(8, live / 8)) }

  /// The same live rows without the dead slots, except those inside per-channel groups that still hold more live rows
  /// than their memory could hold dense.
  package func reclaimed(backend: any ComputeBackend) throws(KVError) -> HeadRows {
    var physical = (0..<slots).map { isLive($0) }
    let alive = physical
    HeadRows.keepFullUnits(of: keys, alive: alive, in: &physical)
    HeadRows.keepFullUnits(of: values, alive: alive, in: &physical)

    let kept = (0..<slots).filter { physical[$0] }
    var result = self
    result.positions = try positions.gathered(kept, backend: backend)
    result.dead = kept.count - live
    if let bias {
      let stillNeeded = kept.contains { bias[$0] != 0 }
      result.bias = stillNeeded ? try bias.gathered(kept, backend: backend) : nil
    }
    if let observed { result.observed = try observed.gathered(kept, backend: backend) }
    if let counts {
      let stillNeeded = kept.contains { counts[$0] != 1 }
      result.counts = stillNeeded ? try counts.gathered(kept, backend: backend) : nil
    }
    result.keys = try keys.rebuilt(physical: physical, backend: backend)
    result.values = try values.rebuilt(physical: physical, backend: backend)
    return result
  }

  /// Closes the gaps of dead slots inside the memory there is, when all rows are dense and nobody else reads them. The
  /// room that comes free is for the next rows.
  ///
  /// - Returns: false when that is not so; nothing has changed.
  package mutating func compactInPlace(backend: any ComputeBackend) throws(KVError) -> Bool {
    guard dead > 0, bias != nil, positions.isAscending, keys.movesInPlace(backend),
      values.movesInPlace(backend)
    else { return false }
    // Memory much larger than what is left is better given back.
    for capacity in [bias!.capacity, observed?.capacity ?? 0, positions.explicit?.capacity ?? 0]
    where capacity > Column<Float>.roomiest(live) { return false }
    try bias!.makeUnique(backend: backend)
    guard let marks = bias!.base.map({ UnsafePointer($0) }) else { return false }
    try observed?.makeUnique(backend: backend)
    try counts?.makeUnique(backend: backend)
    if positions.explicit == nil {
      // Consecutive positions with gaps are written down for the first time.
      positions = try positions.gathered((0..<slots).filter { marks[$0] != -.infinity }, backend: backend)
    } else {
      try positions.compact(without: marks, backend: backend)
    }
    observed?.compact(without: marks)
    counts?.compact(without: marks)
    keys.compact(without: marks, backend: backend)
    values.compact(without: marks, backend: backend)
    bias!.compact(without: marks)
    self.dead = 0
    return true
  }

  static func keepFullUnits(of store: RowStore, alive: [Bool], in physical: inout [Bool]) {
    let threshold = store.format.thawThreshold(dim: store.dim)
    var start = 0
    for extent in store.extents {
      let unit = extent.encoding.rowsPerUnit
      if unit > 1 {
        for group in stride(from: start, to: start + extent.rows, by: unit) {
          let count = alive[group..<group + unit].reduce(0) { $0 + ($1 ? 1 : 0) }
          if count > threshold { for slot in group..<group + unit { physical[slot] = true } }
        }
      }
      start += extent.rows
    }
  }

  private func checkOrder() {
    var (sortedFrom, highest, maximum) = (0, -1, -1)
    for slot in 0..<slots {
      let position = positions[slot]
      if position <= maximum { (sortedFrom, highest) = (slot + 1, maximum) }
      maximum = max(maximum, position)
    }
    precondition(
      sortedFrom == positions.sortedFrom && highest == positions.highest && maximum == positions.maximum,
      "in order from slot \(sortedFrom) on, behind position \(highest); noted are \(positions.sortedFrom) and "
        + "\(positions.highest)")
    if positions.isAscending { return }
    let alive = (0..<slots).filter { isLive($0) }.map { positions[$0] }
    precondition(Set(alive).count == alive.count, "a live row per position")
  }

  package func tally(into tally: inout ByteTally) {
    keys.tally(into: &tally)
    values.tally(into: &tally)
    if let buffer = positions.explicit?.buffer { tally.add(buffer, kind: \.index) }
    if let buffer = bias?.buffer { tally.add(buffer, kind: \.metadata) }
    if let buffer = observed?.buffer { tally.add(buffer, kind: \.state) }
    if let buffer = counts?.buffer { tally.add(buffer, kind: \.metadata) }
  }

  package func checkInvariants() {
    precondition(keys.rows == slots && values.rows == slots, "keys \(keys.rows), values \(values.rows), slots \(slots)")
    checkOrder()
    let counted = (0..<slots).reduce(0) { $0 + (isLive($1) ? 0 : 1) }
    precondition(counted == dead, "\(counted) dead slots, counter says \(dead)")
    precondition(bias.map { $0.count == slots } ?? true, "one bias per slot")
    precondition(observed.map { $0.count == slots } ?? true, "observed numbers of every slot")
    precondition(counts.map { $0.count == slots } ?? true, "one count per slot")
    precondition(
      keys.extents.allSatisfy { $0.first + $0.rows <= $0.capacity }
        && values.extents.allSatisfy { $0.first + $0.rows <= $0.capacity }, "rows lie inside their extents")
  }
}
