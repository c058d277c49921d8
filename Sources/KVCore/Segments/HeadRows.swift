/// One KV head of a row segment: its slots, in the order their rows arrived.
///
/// ```
/// slot        0   1   2   …
/// columns     positions, log biases, observed attention, counts: `SlotColumns`
/// keys      ┌ body ┬ tail ┐    split where the key format says
/// values    ┌ body  ┬ tail┐    split where the value format says
/// ```
package struct HeadRows {
  package var keys: RowStore
  package var values: RowStore
  package var columns = SlotColumns()

  package init(keyDim: Int, valueDim: Int, keys: SideFormat, values: SideFormat) {
    self.keys = RowStore(dim: keyDim, format: keys)
    self.values = RowStore(dim: valueDim, format: values)
  }

  package var slots: Int { columns.count }
  package var live: Int { columns.live }
  package var dead: Int { columns.dead }

  package func isLive(_ slot: Int) -> Bool { columns.isLive(slot) }

  /// Whether a row of the tails is dead: in a group it would stretch the range of the rows that live.
  var tailHasDead: Bool {
    if dead == 0 { return false }
    return (min(keys.bodyRows, values.bodyRows)..<slots).contains { !isLive($0) }
  }

  /// Cuts off the newest slots, which must be in the dense tails.
  package mutating func removeLast(_ count: Int) {
    keys.removeLast(count)
    values.removeLast(count)
    columns.removeLast(count)
  }

  /// Forgets the oldest `count` slots of a head without a body or dead slots. Memory goes extent by extent.
  package mutating func removeFirst(_ count: Int, backend: any ComputeBackend) throws(KVError) {
    columns = try columns.gathered(Array(count..<columns.count), backend: backend)
    keys.removeTailFront(count)
    values.removeTailFront(count)
  }

  /// Forgets every row of a head without a body: those to come leave as soon. Memory for a few stays.
  package mutating func removeAll() {
    keys.isSparse = true
    values.isSparse = true
    keys.removeTailFront(keys.tailRows)
    values.removeTailFront(values.tailRows)
    columns = SlotColumns()
  }

  /// Marks slots dead. Everything that can fail happens before the first slot changes.
  package mutating func drop(_ dropped: [Int], backend: any ComputeBackend) throws(KVError) {
    if dropped.isEmpty { return }
    try columns.prepareDrop(backend: backend)
    for slot in dropped { columns.drop(slot) }
  }

  /// Dead slots worth reclaiming: a few for small heads, 64 for larger ones, and the root of the rows for those that are
  /// so long that moving all of them every 64 tokens would cost more than reading dead rows.
  package var reclaimThreshold: Int {
    min(max(64, Int(Double(live).squareRoot())), max(8, live / 8))
  }

  /// The same live rows without the dead slots, except those inside per-channel groups that still hold more live rows
  /// than their memory could hold dense.
  package func reclaimed(backend: any ComputeBackend) throws(KVError) -> HeadRows {
    var physical = [Bool](repeating: true, count: slots)
    var live = slots
    if let bias = columns.bias?.base {
      for slot in 0..<slots where bias[slot] == -.infinity {
        physical[slot] = false
        live -= 1
      }
    }
    let alive = physical
    HeadRows.keepFullUnits(of: keys, alive: alive, in: &physical)
    HeadRows.keepFullUnits(of: values, alive: alive, in: &physical)

    var kept: [Int] = []
    kept.reserveCapacity(live)
    for slot in 0..<slots where physical[slot] { kept.append(slot) }
    var result = self
    result.columns = try columns.gathered(kept, backend: backend)
    result.keys = try keys.rebuilt(physical: physical, backend: backend)
    result.values = try values.rebuilt(physical: physical, backend: backend)
    return result
  }

  /// Closes the gaps of dead slots inside the memory there is, when all rows are dense and nobody else reads them. The
  /// room that comes free is for the next rows.
  ///
  /// - Returns: false when that is not so; nothing has changed.
  package mutating func compactInPlace(backend: any ComputeBackend) throws(KVError) -> Bool {
    guard dead > 0, columns.positions.isAscending, keys.movesInPlace(backend), values.movesInPlace(backend),
      !columns.isRoomy
    else { return false }
    guard let marks = try columns.beginCompaction(backend: backend) else { return false }
    keys.compact(without: marks, backend: backend)
    values.compact(without: marks, backend: backend)
    columns.endCompaction()
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

  package func tally(into tally: inout ByteTally) {
    keys.tally(into: &tally)
    values.tally(into: &tally)
    columns.tally(into: &tally)
  }

  package func checkInvariants() {
    precondition(keys.rows == slots && values.rows == slots, "keys \(keys.rows), values \(values.rows), slots \(slots)")
    columns.checkInvariants()
    precondition(
      keys.extents.allSatisfy { $0.first + $0.rows <= $0.capacity }
        && values.extents.allSatisfy { $0.first + $0.rows <= $0.capacity }, "rows lie inside their extents")
  }
}
