/// One layer of a low-rank tier: latents of older tokens in storage it shares with its group, newer tokens dense.
package final class LowRankSegment: JointSegment {
  package let lowRank: LowRankStorage
  /// Which layer of the group this is.
  package let member: Int
  /// Per KV head, what every slot carries.
  package private(set) var columns: [SlotColumns]
  /// Per KV head, the slots that are latents: the first ones.
  package private(set) var frozen: [Int]
  /// The other slots' rows. Its own biases and counts are absent: those above count.
  package private(set) var window: RowSegment
  /// Rows lent to another tier while it takes them over.
  private let lent = Workspace()

  /// A segment over the dense rows of `plain`, which stays as it is.
  package init(storage: LowRankStorage, member: Int, plain: RowSegment) throws(KVError) {
    lowRank = storage
    self.member = member
    guard let window = plain.fork() as? RowSegment else { preconditionFailure("a fork of rows is rows") }
    try window.reclaim(eager: true)
    columns = window.heads.map(\.columns)
    frozen = Array(repeating: 0, count: window.kvHeads)
    self.window = window
    LowRankSegment.clear(window)
  }

  package init(
    storage: LowRankStorage, member: Int, columns: [SlotColumns], frozen: [Int], window: RowSegment
  ) {
    lowRank = storage
    self.member = member
    self.columns = columns
    self.frozen = frozen
    self.window = window
  }

  package func replace(columns: [SlotColumns], frozen: [Int], window: RowSegment) {
    self.columns = columns
    self.frozen = frozen
    self.window = window
  }

  /// Takes the columns off the rows of a window that carries none of its own.
  static func clear(_ window: RowSegment) {
    for head in 0..<window.kvHeads {
      let positions = window.heads[head].columns.positions
      window.heads[head].columns = SlotColumns()
      window.heads[head].columns.positions = positions
    }
  }

  package var storage: any JointStorage { lowRank }
  private var backend: any ComputeBackend { lowRank.backend }
  package var kvHeads: Int { columns.count }
  package func slotCount(head: Int) -> Int { columns[head].count }
  package func liveCount(head: Int) -> Int { columns[head].live }
  package func position(head: Int, slot: Int) -> Int { columns[head].positions[slot] }
  package func isLive(head: Int, slot: Int) -> Bool { columns[head].isLive(slot) }
  package func logBias(head: Int, slot: Int) -> Float { columns[head].logBias(slot) }
  package func count(head: Int, slot: Int) -> Int { columns[head].tokens(slot) }
  package func sortedFrom(head: Int) -> Int { columns[head].positions.sortedFrom }

  // MARK: Adding and removing

  package func append(
    keys: borrowing TensorView, values: borrowing TensorView, firstPosition: Int, observed: [Float]
  ) throws(KVError) {
    for head in columns.indices {
      try columns[head].reserve(
        next: firstPosition, adding: keys.tokens, observed: observed.count, backend: backend)
    }
    try window.append(keys: keys, values: values, firstPosition: firstPosition, observed: [])
    for head in columns.indices {
      columns[head].append(next: firstPosition, adding: keys.tokens, observed: observed)
    }
  }

  package func settle() throws(KVError) { try window.settle() }

  package func prepareDrop(_ slots: [[Int]]) throws(KVError) {
    for head in columns.indices where !slots[head].isEmpty { try columns[head].prepareDrop(backend: backend) }
  }

  package func drop(_ slots: [[Int]]) throws(KVError) {
    try prepareDrop(slots)
    for head in columns.indices { for slot in slots[head] { columns[head].drop(slot) } }
  }

  package var dropsInPlace: Bool { true }

  package func prepareDrop() throws(KVError) {
    for head in columns.indices { try columns[head].prepareDrop(backend: backend) }
  }

  package func drop(head: Int, slot: Int) { columns[head].drop(slot) }

  package func reclaim(eager: Bool) throws(KVError) {
    try reclaimWindow(eager: eager)
    // Latents shared with other layers go when those layers let them go too; see `join`.
    if lowRank.layers.count == 1 { try lowRank.compact([self], eager: eager) }
  }

  /// Frees dense rows of dead slots.
  package func reclaimWindow(eager: Bool) throws(KVError) {
    var gone: [[Int]] = []
    for head in columns.indices {
      let own = columns[head]
      let dead = own.dead == 0 ? [] : (frozen[head]..<own.count).filter { !own.isLive($0) }
      gone.append(eager || dead.count >= min(64, max(8, own.live / 8)) ? dead.map { $0 - frozen[head] } : [])
    }
    if gone.allSatisfy(\.isEmpty) { return }
    guard let rest = window.fork() as? RowSegment else { return }
    try rest.drop(gone)
    try rest.reclaim(eager: true)
    var kept = columns
    for head in columns.indices where !gone[head].isEmpty {
      let dead = Set(gone[head].map { $0 + frozen[head] })
      kept[head] = try columns[head].gathered((0..<columns[head].count).filter { !dead.contains($0) }, backend: backend)
    }
    LowRankSegment.clear(rest)
    columns = kept
    window = rest
  }

  package func truncate(to position: Int) throws(KVError) {
    try window.truncate(to: position)
    for head in columns.indices {
      columns[head].removeLast(columns[head].count - frozen[head] - window.slotCount(head: head))
    }
  }

  package var minimumTruncation: Int {
    columns.indices.reduce(window.minimumTruncation) { most, head in
      let positions = columns[head].positions
      if frozen[head] == 0 { return most }
      return max(most, (positions.isAscending ? positions[frozen[head] - 1] : positions.maximum) + 1)
    }
  }

  package func absorb(from other: any Segment, slots: [[Int]], observed: Int) throws(KVError) {
    for head in columns.indices {
      try columns[head].reserve(slots[head], of: other, head: head, observed: observed, backend: backend)
    }
    try window.absorb(from: other, slots: slots, observed: 0)
    LowRankSegment.clear(window)
    for head in columns.indices { columns[head].append(slots[head], of: other, head: head) }
  }

  package var largestTaken: (keys: Float, values: Float) { window.largestTaken }

  package func retract(_ counts: [Int]) {
    window.retract(counts)
    for head in columns.indices where counts[head] > 0 { columns[head].removeLast(counts[head]) }
  }

  package func slices(head: Int, slots: [Int]) -> (keys: [RunSlice], values: [RunSlice]) {
    let older = slots.filter { $0 < frozen[head] }
    let newer = slots.filter { $0 >= frozen[head] }.map { $0 - frozen[head] }
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
    let own = range.clamped(to: 0..<frozen[head])
    let column = columns[head]
    if !own.isEmpty, let sides = lowRank.sides {
      let place = lowRank.place(member: member, head: head)
      let keyStart = plan.slices.count
      lowRank.store(sides.keys, member: member, head: head).slices(own, into: &plan.slices)
      let valueStart = plan.slices.count
      lowRank.store(sides.values, member: member, head: head).slices(own, into: &plan.slices)
      var work = RowsWork(
        kvHead: head, count: own.count, keys: keyStart..<valueStart, values: valueStart..<plan.slices.count,
        shift: shift)
      column.carry(own, to: &work)
      work.lowRank = LowRankRows(
        keyBasis: sides.keys.basis?.run(unit: place.unit, head: place.block),
        valueBasis: sides.values.basis?.run(unit: place.unit, head: place.block),
        keyMean: sides.keys.basis?.meanPointer(unit: place.unit, head: place.block),
        valueMean: sides.values.basis?.meanPointer(unit: place.unit, head: place.block),
        rotary: lowRank.rotary)
      if sides.keys.isJoined { work.lowRank?.keyChannels = lowRank.channels(block: place.block) }
      plan.rows.append(work)
    }
    let rest = max(range.lowerBound, frozen[head])..<max(range.upperBound, frozen[head])
    if rest.isEmpty { return }
    window.describe(
      head: head, range: rest.lowerBound - frozen[head]..<rest.upperBound - frozen[head], shift: shift, in: plan)
    column.carry(rest, to: &plan.rows[plan.rows.count - 1])
  }

  package func readKeys(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    read(head, range, lowRank.sides?.keys, isKey: true, into: destination)
    let rest = max(range.lowerBound, frozen[head])..<max(range.upperBound, frozen[head])
    window.readKeys(
      head: head, range: rest.lowerBound - frozen[head]..<rest.upperBound - frozen[head],
      into: destination + (rest.lowerBound - range.lowerBound) * window.layer.keyDim)
  }

  package func readValues(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    read(head, range, lowRank.sides?.values, isKey: false, into: destination)
    let rest = max(range.lowerBound, frozen[head])..<max(range.upperBound, frozen[head])
    window.readValues(
      head: head, range: rest.lowerBound - frozen[head]..<rest.upperBound - frozen[head],
      into: destination + (rest.lowerBound - range.lowerBound) * window.layer.valueDim)
  }

  private func read(
    _ head: Int, _ range: Range<Int>, _ side: LowRankStorage.Side?, isKey: Bool,
    into destination: UnsafeMutablePointer<Float>
  ) {
    let own = range.clamped(to: 0..<frozen[head])
    guard !own.isEmpty, let side else { return }
    let slices = lowRank.store(side, member: member, head: head).slices(own)
    guard let basis = side.basis else {
      if side.isJoined, let rotary = lowRank.rotary {
        let positions = columns[head].positions
        backend.restore(
          slices, channels: lowRank.channels(block: lowRank.place(member: member, head: head).block),
          positions: own.map { Int32(positions[$0]) }, rotary: rotary, into: destination)
        return
      }
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
    frozen[head] == 0 && columns[head].dead == 0 ? window.denseRun(head: head, keys: keys) : nil
  }

  // MARK: Observed attention

  package func observed(head: Int) -> ObservedColumns { columns[head].observedColumns }

  package func forgetObserved() { for head in columns.indices { columns[head].forgetObserved() } }

  package func prepareObserved() throws(KVError) {
    for head in columns.indices { try columns[head].makeObservedUnique(backend: backend) }
  }

  package func appendLiveSlots(head: Int, to slots: inout ContiguousArray<Int32>) {
    columns[head].appendLive(to: &slots)
  }

  package func enterLiveSlots(
    head: Int, as segment: Int32, in table: UnsafeMutableBufferPointer<LayerView.RowReference>
  ) {
    columns[head].enterLive(as: segment, in: table)
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
    return LowRankSegment(storage: storage, member: member, columns: columns, frozen: frozen, window: window)
  }

  package func checkInvariants() {
    for (head, column) in columns.enumerated() {
      column.checkInvariants()
      let rows = lowRank.sides.map { lowRank.store($0.keys, member: member, head: head).rows } ?? 0
      precondition(frozen[head] == rows, "\(frozen[head]) slots over \(rows) latents")
      precondition(
        column.count == rows + window.slotCount(head: head),
        "\(column.count) slots over \(rows) latents and \(window.slotCount(head: head)) dense rows")
    }
    window.checkInvariants()
  }
}
