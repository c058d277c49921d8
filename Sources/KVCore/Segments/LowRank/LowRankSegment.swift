/// One layer of a low-rank tier: latents of older tokens in storage it shares with its group, newer tokens dense.
package final class LowRankSegment: JointSegment {
  package let lowRank: LowRankStorage
  /// Which layer of the group this is.
  package let member: Int
  /// Per KV head, the slots that are latents.
  package private(set) var columns: [LatentColumns]
  package private(set) var window: RowSegment
  /// Rows lent to another tier while it takes them over.
  private let lent = Workspace()

  package init(storage: LowRankStorage, member: Int, window: RowSegment) {
    lowRank = storage
    self.member = member
    self.window = window
    columns = Array(repeating: LatentColumns(), count: window.kvHeads)
  }

  package init(storage: LowRankStorage, member: Int, columns: [LatentColumns], window: RowSegment) {
    lowRank = storage
    self.member = member
    self.columns = columns
    self.window = window
  }

  package func replace(columns: [LatentColumns], window: RowSegment) {
    self.columns = columns
    self.window = window
  }

  package var storage: any JointStorage { lowRank }
  private var backend: any ComputeBackend { lowRank.backend }
  package var kvHeads: Int { columns.count }

  /// Slots of a head that are latents: they come first.
  private func frozen(_ head: Int) -> Int { columns[head].count }

  package func slotCount(head: Int) -> Int { frozen(head) + window.slotCount(head: head) }
  package func liveCount(head: Int) -> Int { columns[head].live + window.liveCount(head: head) }

  package func position(head: Int, slot: Int) -> Int {
    slot < frozen(head) ? columns[head].positions[slot] : window.position(head: head, slot: slot - frozen(head))
  }

  package func isLive(head: Int, slot: Int) -> Bool {
    slot < frozen(head) ? columns[head].isLive(slot) : window.isLive(head: head, slot: slot - frozen(head))
  }

  package func logBias(head: Int, slot: Int) -> Float {
    slot < frozen(head) ? columns[head].bias?[slot] ?? 0 : window.logBias(head: head, slot: slot - frozen(head))
  }

  // MARK: Adding and removing

  package func append(
    keys: borrowing TensorView, values: borrowing TensorView, firstPosition: Int, tracksScores: Bool
  ) throws(KVError) {
    try window.append(keys: keys, values: values, firstPosition: firstPosition, tracksScores: tracksScores)
  }

  package func settle() throws(KVError) { try window.settle() }

  package func drop(_ slots: [[Int]]) throws(KVError) {
    try window.drop(slots.enumerated().map { head, own in own.filter { $0 >= frozen(head) }.map { $0 - frozen(head) } })
    for head in columns.indices {
      try columns[head].drop(slots[head].filter { $0 < frozen(head) }, backend: backend)
    }
  }

  package func reclaim(eager: Bool) throws(KVError) {
    try window.reclaim(eager: eager)
    // Latents shared with other layers go when those layers let them go too; see `join`.
    if lowRank.layers.count == 1 { try lowRank.compact([self], eager: eager) }
  }

  package func truncate(to position: Int) throws(KVError) { try window.truncate(to: position) }

  package var minimumTruncation: Int {
    columns.reduce(window.minimumTruncation) { max($0, ($1.positions.last ?? -1) + 1) }
  }

  package func absorb(from other: any Segment, slots: [[Int]], tracksScores: Bool) throws(KVError) {
    try window.absorb(from: other, slots: slots, tracksScores: tracksScores)
  }

  package func slices(head: Int, slots: [Int]) -> (keys: [RunSlice], values: [RunSlice]) {
    let older = slots.filter { $0 < frozen(head) }
    let newer = slots.filter { $0 >= frozen(head) }.map { $0 - frozen(head) }
    let rest = window.slices(head: head, slots: newer)
    if older.isEmpty { return rest }
    // Another tier takes rows, not latents.
    let (keyDim, valueDim) = (window.layer.keyDim, window.layer.valueDim)
    let memory = lent.floats(older.count * (keyDim + valueDim))
    let values = memory + older.count * keyDim
    for (row, slot) in older.enumerated() {
      readKeys(head: head, range: slot..<slot + 1, into: memory + row * keyDim)
      readValues(head: head, range: slot..<slot + 1, into: values + row * valueDim)
    }
    func slice(_ base: UnsafeMutablePointer<Float>, _ dim: Int) -> RunSlice {
      RunSlice(
        run: RowRun(encoding: .dense(.f32), dim: dim, capacity: older.count, base: base), first: 0, count: older.count)
    }
    return ([slice(memory, keyDim)] + rest.keys, [slice(values, valueDim)] + rest.values)
  }

  // MARK: Reading

  package func describe(head: Int, range: Range<Int>, shift: Int, in plan: AttentionPlan) {
    let own = range.clamped(to: 0..<frozen(head))
    if !own.isEmpty, let sides = lowRank.sides {
      let place = lowRank.place(member: member, head: head)
      let keyStart = plan.slices.count
      lowRank.store(sides.keys, member: member, head: head).slices(own, into: &plan.slices)
      let valueStart = plan.slices.count
      lowRank.store(sides.values, member: member, head: head).slices(own, into: &plan.slices)
      let column = columns[head]
      var work = RowsWork(
        kvHead: head, count: own.count, keys: keyStart..<valueStart, values: valueStart..<plan.slices.count,
        positions: column.positions.explicit?.base.map { UnsafePointer($0) + own.lowerBound },
        firstPosition: column.positions.first + own.lowerBound,
        bias: column.bias?.base.map { UnsafePointer($0) + own.lowerBound },
        score: column.score?.base.map { $0 + own.lowerBound }, shift: shift)
      work.lowRank = LowRankRows(
        keyBasis: sides.keys.basis?.run(unit: place.unit, head: place.block),
        valueBasis: sides.values.basis?.run(unit: place.unit, head: place.block),
        keyMean: sides.keys.basis?.meanPointer(unit: place.unit, head: place.block),
        valueMean: sides.values.basis?.meanPointer(unit: place.unit, head: place.block),
        rotary: lowRank.rotary)
      plan.rows.append(work)
    }
    let rest = max(range.lowerBound, frozen(head))..<max(range.upperBound, frozen(head))
    window.describe(
      head: head, range: rest.lowerBound - frozen(head)..<rest.upperBound - frozen(head), shift: shift, in: plan)
  }

  package func readKeys(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    read(head, range, lowRank.sides?.keys, isKey: true, into: destination)
    let rest = max(range.lowerBound, frozen(head))..<max(range.upperBound, frozen(head))
    window.readKeys(
      head: head, range: rest.lowerBound - frozen(head)..<rest.upperBound - frozen(head),
      into: destination + (rest.lowerBound - range.lowerBound) * window.layer.keyDim)
  }

  package func readValues(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    read(head, range, lowRank.sides?.values, isKey: false, into: destination)
    let rest = max(range.lowerBound, frozen(head))..<max(range.upperBound, frozen(head))
    window.readValues(
      head: head, range: rest.lowerBound - frozen(head)..<rest.upperBound - frozen(head),
      into: destination + (rest.lowerBound - range.lowerBound) * window.layer.valueDim)
  }

  private func read(
    _ head: Int, _ range: Range<Int>, _ side: LowRankStorage.Side?, isKey: Bool,
    into destination: UnsafeMutablePointer<Float>
  ) {
    let own = range.clamped(to: 0..<frozen(head))
    guard !own.isEmpty, let side else { return }
    let slices = lowRank.store(side, member: member, head: head).slices(own)
    guard let basis = side.basis else {
      var next = destination
      for slice in slices {
        backend.read(slice, into: next, stride: slice.run.dim)
        next += slice.count * slice.run.dim
      }
      return
    }
    let place = lowRank.place(member: member, head: head)
    let positions = columns[head].positions
    backend.restore(
      slices, basis: basis.run(unit: place.unit, head: place.block),
      mean: basis.meanPointer(unit: place.unit, head: place.block),
      positions: isKey ? own.map { Int32(positions[$0]) } : nil, rotary: isKey ? lowRank.rotary : nil,
      into: destination)
  }

  package func denseRun(head: Int, keys: Bool) -> RunSlice? {
    frozen(head) == 0 ? window.denseRun(head: head, keys: keys) : nil
  }

  // MARK: Scores

  package func score(head: Int, slot: Int) -> Float {
    slot < frozen(head) ? columns[head].score?[slot] ?? 0 : window.score(head: head, slot: slot - frozen(head))
  }

  package func copyScores(head: Int, into target: UnsafeMutablePointer<Float>) {
    var next = target
    for slot in 0..<frozen(head) where columns[head].isLive(slot) {
      next.pointee = columns[head].score?[slot] ?? 0
      next += 1
    }
    window.copyScores(head: head, into: next)
  }

  package func appendLiveSlots(head: Int, to slots: inout ContiguousArray<Int32>) {
    for slot in 0..<frozen(head) where columns[head].isLive(slot) { slots.append(Int32(slot)) }
    let first = slots.count
    window.appendLiveSlots(head: head, to: &slots)
    for index in first..<slots.count { slots[index] += Int32(frozen(head)) }
  }

  package func forgetScores() {
    for head in columns.indices { columns[head].forgetScores() }
    window.forgetScores()
  }

  package func addScores(head: Int, _ added: [Float]) throws(KVError) {
    var next = 0
    if columns[head].score != nil {
      try columns[head].makeScoresUnique(backend: backend)
      for slot in 0..<frozen(head) where columns[head].isLive(slot) {
        columns[head].addScore(slot, added[next])
        next += 1
      }
    } else {
      next = columns[head].live
    }
    try window.addScores(head: head, Array(added[next...]))
  }

  package func prepareScores() throws(KVError) {
    for head in columns.indices { try columns[head].makeScoresUnique(backend: backend) }
    try window.prepareScores()
  }

  // MARK: Life cycle

  package func tally(into tally: inout ByteTally) {
    lowRank.tally(into: &tally)
    for column in columns { column.tally(into: &tally) }
    window.tally(into: &tally)
  }

  package func fork() -> any Segment { fork(onto: lowRank.fork()) }

  package func fork(onto storage: any JointStorage) -> any Segment {
    guard let storage = storage as? LowRankStorage, let window = window.fork() as? RowSegment else {
      preconditionFailure("a low-rank segment forks onto low-rank storage")
    }
    return LowRankSegment(storage: storage, member: member, columns: columns, window: window)
  }

  package func checkInvariants() {
    for (head, column) in columns.enumerated() {
      column.checkInvariants()
      let rows = lowRank.sides.map { lowRank.store($0.keys, member: member, head: head).rows } ?? 0
      precondition(column.count == rows, "\(column.count) slots over \(rows) latents")
      if let last = column.positions.last, window.slotCount(head: head) > 0 {
        precondition(last < window.position(head: head, slot: 0), "latents lie before the window")
      }
    }
    window.checkInvariants()
  }
}
