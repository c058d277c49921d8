/// Storage for the older rows of the layers of a group, whose newer rows are dense: what a `SharedSegment` stands on.
///
/// Row i of a head is slot i of the segments of every layer, alive in some of them or in all.
package protocol SharedRows: JointStorage {
  var layers: [Int] { get }
  var backend: any ComputeBackend { get }
  /// Rows of a head of one layer.
  func rows(member: Int, head: Int) -> Int
  /// How many of them, from the oldest on, can no longer be cut off.
  func fixedRows(head: Int) -> Int
  /// Cuts off the newest rows of a head, for every layer; nothing when no more than `rows` are there.
  func truncate(head: Int, to rows: Int)
  /// Describes the rows `range`, which is not empty, to an attention plan.
  func describe(
    member: Int, head: Int, range: Range<Int>, columns: SlotColumns, shift: Int, in plan: AttentionPlan)
  /// Rows as f32, one behind the other.
  func read(
    member: Int, head: Int, range: Range<Int>, positions: PositionColumn, isKey: Bool,
    into destination: UnsafeMutablePointer<Float>)
  /// Removes rows that are dead in every segment that shares them: all of them when `eager`, else when there are enough.
  func compact(_ segments: [SharedSegment<Self>], eager: Bool) throws(KVError)
  func tally(into tally: inout ByteTally)
}

/// One layer of a group: older rows in storage it shares with the others, newer ones dense.
package final class SharedSegment<Shared: SharedRows>: JointSegment {
  package let shared: Shared
  /// Which layer of the group this is.
  package let member: Int
  /// Per KV head, what every slot carries.
  package private(set) var columns: [SlotColumns]
  /// Per KV head, the slots that are rows of the storage: the first ones.
  package private(set) var frozen: [Int]
  /// The other slots' rows. Its own biases and counts are absent: those above count.
  package private(set) var window: RowSegment
  /// Rows lent to another tier while it takes them over, until the next tokens come.
  private var lent: [Workspace] = []

  /// A segment over the dense rows of `plain`, which stays as it is.
  package init(storage: Shared, member: Int, plain: RowSegment) throws(KVError) {
    shared = storage
    self.member = member
    guard let window = plain.fork() as? RowSegment else { preconditionFailure("a fork of rows is rows") }
    try window.reclaim(eager: true)
    columns = window.heads.map(\.columns)
    frozen = Array(repeating: 0, count: window.kvHeads)
    self.window = window
    SharedSegment.clear(window)
  }

  package init(storage: Shared, member: Int, columns: [SlotColumns], frozen: [Int], window: RowSegment) {
    shared = storage
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

  package func replace(head: Int, columns: SlotColumns, frozen: Int) {
    self.columns[head] = columns
    self.frozen[head] = frozen
  }

  /// The dense rows of a head have become rows of the storage, which `columns` describe.
  package func freeze(head: Int, columns: SlotColumns?) {
    window.heads[head].removeAll()
    if let columns { self.columns[head] = columns }
    frozen[head] = self.columns[head].count
  }

  package var storage: any JointStorage { shared }
  private var backend: any ComputeBackend { shared.backend }
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
    lent.removeAll(keepingCapacity: true)
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
    // Rows shared with other layers go when those layers let them go too; see `join`.
    if shared.layers.count == 1 { try shared.compact([self], eager: eager) }
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
    SharedSegment.clear(rest)
    columns = kept
    window = rest
  }

  package func truncate(to position: Int) throws(KVError) {
    try window.truncate(to: position)
    for head in columns.indices {
      if window.slotCount(head: head) == 0, frozen[head] > 0 {
        let kept = min(frozen[head], max(columns[head].positions.lowerBound(position), shared.fixedRows(head: head)))
        shared.truncate(head: head, to: kept)
        frozen[head] = kept
      }
      columns[head].removeLast(columns[head].count - frozen[head] - window.slotCount(head: head))
    }
  }

  package var minimumTruncation: Int {
    columns.indices.reduce(window.minimumTruncation) { most, head in
      let positions = columns[head].positions
      let fixed = positions.isAscending ? min(shared.fixedRows(head: head), frozen[head]) : frozen[head]
      if fixed == 0 { return most }
      return max(most, (positions.isAscending ? positions[fixed - 1] : positions.maximum) + 1)
    }
  }

  package func absorb(from other: any Segment, slots: [[Int]], observed: Int) throws(KVError) {
    for head in columns.indices {
      try columns[head].reserve(slots[head], of: other, head: head, observed: observed, backend: backend)
    }
    try window.absorb(from: other, slots: slots, observed: 0)
    SharedSegment.clear(window)
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
    // Another tier takes rows, not what they are made of.
    let (keyDim, valueDim) = (window.layer.keyDim, window.layer.valueDim)
    let workspace = Workspace()
    lent.append(workspace)
    let memory = workspace.floats(older.count * (keyDim + valueDim))
    let values = memory + older.count * keyDim
    var row = 0
    while row < older.count {
      var end = row + 1
      while end < older.count, older[end] == older[end - 1] + 1 { end += 1 }
      let range = older[row]..<older[end - 1] + 1
      readKeys(head: head, range: range, into: memory + row * keyDim)
      readValues(head: head, range: range, into: values + row * valueDim)
      row = end
    }
    func slice(_ base: UnsafeMutablePointer<Float>, _ dim: Int) -> RunSlice {
      RunSlice(
        run: RowRun(encoding: .dense(.f32), dim: dim, capacity: older.count, base: base), first: 0, count: older.count)
    }
    return ([slice(memory, keyDim)] + rest.keys, [slice(values, valueDim)] + rest.values)
  }

  // MARK: Reading

  package func describe(head: Int, range: Range<Int>, shift: Int, in plan: AttentionPlan) {
    let older = range.clamped(to: 0..<frozen[head])
    if !older.isEmpty {
      shared.describe(member: member, head: head, range: older, columns: columns[head], shift: shift, in: plan)
    }
    let newer = max(range.lowerBound, frozen[head])..<max(range.upperBound, frozen[head])
    if newer.isEmpty { return }
    window.describe(
      head: head, range: newer.lowerBound - frozen[head]..<newer.upperBound - frozen[head], shift: shift, in: plan)
    columns[head].carry(newer, to: &plan.rows[plan.rows.count - 1])
  }

  package func readKeys(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    read(head, range, isKey: true, into: destination)
    let newer = max(range.lowerBound, frozen[head])..<max(range.upperBound, frozen[head])
    window.readKeys(
      head: head, range: newer.lowerBound - frozen[head]..<newer.upperBound - frozen[head],
      into: destination + (newer.lowerBound - range.lowerBound) * window.layer.keyDim)
  }

  package func readValues(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    read(head, range, isKey: false, into: destination)
    let newer = max(range.lowerBound, frozen[head])..<max(range.upperBound, frozen[head])
    window.readValues(
      head: head, range: newer.lowerBound - frozen[head]..<newer.upperBound - frozen[head],
      into: destination + (newer.lowerBound - range.lowerBound) * window.layer.valueDim)
  }

  private func read(
    _ head: Int, _ range: Range<Int>, isKey: Bool, into destination: UnsafeMutablePointer<Float>
  ) {
    let older = range.clamped(to: 0..<frozen[head])
    if older.isEmpty { return }
    shared.read(
      member: member, head: head, range: older, positions: columns[head].positions, isKey: isKey, into: destination)
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
    shared.tally(into: &tally)
    for column in columns { column.tally(into: &tally) }
    window.tally(into: &tally)
  }

  package func fork() -> any Segment { fork(onto: shared.fork()) }

  package func fork(onto storage: any JointStorage) -> any Segment {
    guard let storage = storage as? Shared, let window = window.fork() as? RowSegment else {
      preconditionFailure("a segment forks onto storage of its kind")
    }
    return SharedSegment(storage: storage, member: member, columns: columns, frozen: frozen, window: window)
  }

  package func checkInvariants() {
    for (head, column) in columns.enumerated() {
      column.checkInvariants()
      let rows = shared.rows(member: member, head: head)
      precondition(frozen[head] == rows, "\(frozen[head]) slots over \(rows) shared rows")
      precondition(
        column.count == rows + window.slotCount(head: head),
        "\(column.count) slots over \(rows) shared and \(window.slotCount(head: head)) dense rows")
    }
    window.checkInvariants()
  }
}

// MARK: - Saved caches

extension SharedSegment {
  /// ```
  /// heads count · per head: shared slots count · slots count · dead count · positions · maybe log biases, observed
  /// attention, counts
  /// the dense window as row segments write it
  /// ```
  package func encode(to writer: inout ByteWriter) {
    writer.count(columns.count)
    for (column, rows) in zip(columns, frozen) {
      writer.count(rows)
      column.encode(to: &writer)
      column.encodeCounts(to: &writer)
    }
    window.encode(to: &writer)
  }

  /// - Parameter format: of the dense window.
  static func decode(
    from reader: inout ByteReader, storage: Shared, layer: Int, shape: LayerShape, format: RowFormat, tokensSeen: Int,
    backend: any ComputeBackend
  ) throws(KVError) -> SharedSegment {
    guard let member = storage.layers.firstIndex(of: layer) else {
      throw reader.corrupt("expected storage of this layer")
    }
    let count = try reader.count("heads of a segment")
    guard count == shape.kvHeads else {
      throw reader.corrupt("expected all \(shape.kvHeads) KV heads; found \(count)")
    }
    var columns: [SlotColumns] = []
    var frozen: [Int] = []
    for head in 0..<count {
      do throws(KVError) {
        let rows = try reader.count("shared rows", in: 0...tokensSeen)
        let there = storage.rows(member: member, head: head)
        guard rows == there else {
          throw reader.corrupt("expected the \(there) rows of the group; found \(rows)")
        }
        frozen.append(rows)
        var own = try SlotColumns(from: &reader, tokensSeen: tokensSeen, backend: backend)
        try own.decodeCounts(from: &reader, tokensSeen: tokensSeen, backend: backend)
        columns.append(own)
      } catch {
        throw error.at(head: head)
      }
    }
    let window = try format.decodeSegment(from: &reader, layer: shape, tokensSeen: tokensSeen, backend: backend)
    guard let window = window as? RowSegment else { throw reader.corrupt("expected a dense window") }
    for head in 0..<count {
      let dense = columns[head].count - frozen[head]
      let own = window.heads[head]
      guard own.slots == dense, own.dead == 0, own.columns.bias == nil else {
        throw reader.corrupt("expected \(dense) dense rows; found \(own.slots)").at(head: head)
      }
    }
    return SharedSegment(storage: storage, member: member, columns: columns, frozen: frozen, window: window)
  }
}
