/// One layer of a low-rank tier.
package typealias LowRankSegment = SharedSegment<LowRankStorage>

extension LowRankSegment {
  package var lowRank: LowRankStorage { shared }
}

/// The latents and bases of a group of layers.
///
/// Row i of a unit's latents is slot i of every head that shares them. Heads that hold different tokens are rows of the
/// same matrix all the same, each turned by positions of its own; what a longer head has beyond the shortest stays dense.
package final class LowRankStorage: SharedRows {
  /// One side of the older rows.
  package struct Side {
    /// Nil: rows themselves, one store per layer and head.
    package var basis: LatentBasis?
    /// Rows themselves, but those of the heads of a unit side by side.
    package var isJoined = false
    /// One per unit.
    package var stores: [RowStore]

    /// Whether heads share rows.
    package var isShared: Bool { basis != nil || isJoined }
    /// Whether rows end as they come.
    var isPlain: Bool { !isShared && stores.allSatisfy { $0.format.body == nil } }
  }

  package let format: LowRankFormat
  package let layers: [Int]
  package let shape: LayerShape
  package let rotary: RotaryEmbedding?
  package let backend: any ComputeBackend
  /// Nil while nothing was worth factoring.
  package private(set) var sides: (keys: Side, values: Side)?
  /// Whether rows of the prompt are still to become latents.
  private var isWaiting = false

  package init(
    format: LowRankFormat, layers: [Int], shape: LayerShape, rotary: RotaryEmbedding?, backend: any ComputeBackend
  ) {
    self.format = format
    self.layers = layers
    self.shape = shape
    self.rotary = rotary
    self.backend = backend
  }

  package func restore(sides: (keys: Side, values: Side)?) { self.sides = sides }

  package func fork() -> any JointStorage {
    let copy = LowRankStorage(format: format, layers: layers, shape: shape, rotary: rotary, backend: backend)
    copy.sides = sides
    copy.isWaiting = isWaiting
    return copy
  }

  // MARK: Heads and units

  package var units: Int { format.perHead ? shape.kvHeads : 1 }
  package var headsPerUnit: Int { format.perHead ? layers.count : layers.count * shape.kvHeads }

  /// The unit of a head, and which of its blocks the head is.
  package func place(member: Int, head: Int) -> (unit: Int, block: Int) {
    format.perHead ? (head, member) : (0, member * shape.kvHeads + head)
  }

  /// The channels of one head in keys side by side.
  package func channels(block: Int) -> Range<Int> { block * shape.keyDim..<(block + 1) * shape.keyDim }

  /// Member and head of each block of a unit, in order.
  func heads(of unit: Int) -> [(member: Int, head: Int)] {
    format.perHead
      ? layers.indices.map { ($0, unit) }
      : layers.indices.flatMap { member in (0..<shape.kvHeads).map { (member, $0) } }
  }

  package func store(_ side: Side, member: Int, head: Int) -> RowStore {
    side.isShared
      ? side.stores[place(member: member, head: head).unit] : side.stores[member * shape.kvHeads + head]
  }

  package func latentFormat(keys: Bool) -> SideFormat { keys ? format.keyLatents : format.valueLatents }

  /// What holds the rows of a side without a basis.
  package func rowFormat(keys: Bool) throws(KVError) -> SideFormat {
    if keys, let joined = format.joinedKeys { return try joined.format(layer: layers[0], of: shape) }
    return keys ? .dense(format.window) : try format.valueFormat(shape)
  }

  /// Empty stores of a side without a basis.
  package func rowStores(keys: Bool) throws(KVError) -> [RowStore] {
    let joined = keys && format.joinedKeys != nil
    let empty = RowStore(
      dim: dim(isKey: keys) * (joined ? headsPerUnit : 1), format: try rowFormat(keys: keys))
    return Array(repeating: empty, count: joined ? units : layers.count * shape.kvHeads)
  }

  // MARK: Taking rows in

  /// Segments of the group over the dense segments of its layers. Their rows become latents with the next call: as long
  /// as the segments they replace are there, no row gives its memory back.
  package func begin(_ plain: [RowSegment]) throws(KVError) -> [LowRankSegment] {
    var segments: [LowRankSegment] = []
    for rows in plain { segments.append(try LowRankSegment(storage: self, member: segments.count, plain: rows)) }
    isWaiting = true
    return segments
  }

  /// The rows of a prompt, then what decoded tokens have made due.
  package func extend(_ segments: [LowRankSegment]) throws(KVError) {
    guard segments.count == layers.count else { return }
    if layers.count > 1 { try compact(segments, eager: false) }
    if isWaiting {
      if case .blocks(let count) = format.continuation {
        try freeze(segments, keeping: 0, atLeast: count, of: count)
      } else {
        try freeze(segments, keeping: format.continuation.kept, atLeast: 1, of: 1)
      }
      isWaiting = false
      return
    }
    switch format.continuation {
    case .raw: return
    case .blocks(let count): try freeze(segments, keeping: 0, atLeast: count, of: count)
    case .project(let keeping):
      try freeze(segments, keeping: keeping, atLeast: format.together, of: format.together)
    case .refresh(let keeping, let every): try freeze(segments, keeping: keeping, atLeast: every, of: 1)
    }
  }

  /// Moves the oldest dense rows of every unit into latents: as many as all its heads have beyond `keeping`, when those
  /// are `atLeast`, in multiples of `step`.
  private func freeze(
    _ segments: [LowRankSegment], keeping: Int, atLeast: Int, of step: Int
  ) throws(KVError) {
    // Dead rows must not become latents.
    func due() -> [Int] {
      (0..<units).map { unit in
        let least =
          heads(of: unit).map {
            segments[$0.member].columns[$0.head].count - segments[$0.member].frozen[$0.head]
          }.min() ?? 0
        let count = max(0, least - keeping) / step * step
        return count >= atLeast ? count : 0
      }
    }
    if due().allSatisfy({ $0 == 0 }) { return }
    for segment in segments { try segment.reclaimWindow(eager: true) }
    let counts = due()
    if counts.allSatisfy({ $0 == 0 }) { return }
    if case .refresh = format.continuation, let sides, !isWaiting {
      let windows = segments.map(\.window)
      let keys = try refreshed(sides.keys, windows, counts, isKey: true)
      let values = try refreshed(sides.values, windows, counts, isKey: false)
      try finish(segments, windows, counts, isLast: true) { self.sides = (keys, values) }
      try encode()
    } else {
      try extendSides(segments, counts)
    }
  }

  /// Writes rows behind those that there are, a piece at a time: the rows of a piece give their memory back before the
  /// next ones become latents. What fails leaves whole pieces, and the rows of the others dense.
  private func extendSides(_ segments: [LowRankSegment], _ counts: [Int]) throws(KVError) {
    let piece = pieceRows(counts)
    if sides == nil {
      let windows = segments.map(\.window)
      let (keys, keyNorm) = try start(windows, counts, isKey: true)
      let (values, valueNorm) = try start(windows, counts, isKey: false)
      if keys.isPlain, values.isPlain { return }
      if counts.contains(where: { $0 > piece }) {
        try checkAll(keys, norm: keyNorm, windows, counts, isKey: true)
        try checkAll(values, norm: valueNorm, windows, counts, isKey: false)
      }
      sides = (keys, values)
    }
    var left = counts
    while left.contains(where: { $0 > 0 }) {
      let now = left.map { min($0, piece) }
      for unit in left.indices { left[unit] -= now[unit] }
      try move(segments, now, isLast: left.allSatisfy { $0 == 0 })
      try encode()
    }
  }

  /// Rows of a piece: what an extent of latents holds, but no more than an eighth of all where those are many.
  private func pieceRows(_ counts: [Int]) -> Int {
    let eighth = ((counts.max() ?? 0) / 8 + 1023) / 1024 * 1024
    let extent = [true, false].flatMap { keys in
      let latents = latentFormat(keys: keys)
      let channels = rank(isKey: keys) ?? dim(isKey: keys)
      return [.dense(latents.window), latents.body].compactMap { encoding in
        encoding.map { RowStore.extentRows($0, dim: channels) }
      }
    }
    return max(1024, min(eighth, extent.max() ?? 1024))
  }

  /// Existing stores are written in place, behind the rows that count: memory that is referred to twice would be copied.
  private func move(_ segments: [LowRankSegment], _ counts: [Int], isLast: Bool) throws(KVError) {
    guard var (keys, values) = sides else { return }
    let windows = segments.map(\.window)
    sides = nil
    do throws(KVError) {
      let keyRoom = try write(windows, counts, into: &keys, isKey: true)
      let valueRoom = try write(windows, counts, into: &values, isKey: false)
      try finish(segments, windows, counts, isLast: isLast) {
        for index in keys.stores.indices { keys.stores[index].commit(keyRoom[index][...]) }
        for index in values.stores.indices { values.stores[index].commit(valueRoom[index][...]) }
        sides = (keys, values)
      }
    } catch {
      for index in keys.stores.indices { keys.stores[index].cancelReservation() }
      for index in values.stores.indices { values.stores[index].cancelReservation() }
      sides = (keys, values)
      throw error
    }
  }

  /// Everything else that can fail, then `commit`, then the segments.
  private func finish(
    _ segments: [LowRankSegment], _ windows: [RowSegment], _ counts: [Int], isLast: Bool, commit: () -> Void
  ) throws(KVError) {
    var rests: [RowSegment] = []
    for member in segments.indices {
      rests.append(
        try LowRankStorage.withoutFront(
          windows[member], (0..<shape.kvHeads).map { counts[place(member: member, head: $0).unit] }, isLast: isLast))
    }
    commit()
    for (member, segment) in segments.enumerated() {
      let frozen = (0..<shape.kvHeads).map { segment.frozen[$0] + counts[place(member: member, head: $0).unit] }
      segment.replace(columns: segment.columns, frozen: frozen, window: rests[member])
    }
  }

  /// A segment with the rows behind the first `counts[h]` of each head: in memory of their own when no more will go.
  private static func withoutFront(_ window: RowSegment, _ counts: [Int], isLast: Bool) throws(KVError) -> RowSegment {
    if counts.indices.allSatisfy({ counts[$0] == window.slotCount(head: $0) }) {
      return RowSegment(layer: window.layer, format: window.format, backend: window.backend)
    }
    guard let rest = window.fork() as? RowSegment else { return window }
    if isLast {
      try rest.drop(counts.map { Array(0..<$0) })
      try rest.reclaim(eager: true)
    } else {
      for head in counts.indices { try rest.heads[head].removeFirst(counts[head], backend: rest.backend) }
    }
    SharedSegment<LowRankStorage>.clear(rest)
    return rest
  }

  /// Quantizes latents of which enough are there. What cannot be for lack of memory stays dense and is tried again.
  private func encode() throws(KVError) {
    guard var (keys, values) = sides else { return }
    sides = nil
    defer { sides = (keys, values) }
    for index in keys.stores.indices { try keys.stores[index].flush(batchEnds: false, backend: backend) }
    for index in values.stores.indices { try values.stores[index].flush(batchEnds: false, backend: backend) }
  }

  // MARK: Reading

  package func rows(member: Int, head: Int) -> Int {
    sides.map { store($0.keys, member: member, head: head).rows } ?? 0
  }

  /// A basis knows every row it was made of, and the prompt made it.
  package func fixedRows(head: Int) -> Int { layers.indices.map { rows(member: $0, head: head) }.max() ?? 0 }

  package func truncate(head: Int, to rows: Int) {}

  package func describe(
    member: Int, head: Int, range: Range<Int>, columns: SlotColumns, shift: Int, in plan: AttentionPlan
  ) {
    guard let sides else { return }
    let place = place(member: member, head: head)
    let keyStart = plan.slices.count
    store(sides.keys, member: member, head: head).slices(range, into: &plan.slices)
    let valueStart = plan.slices.count
    store(sides.values, member: member, head: head).slices(range, into: &plan.slices)
    var work = RowsWork(
      kvHead: head, count: range.count, keys: keyStart..<valueStart, values: valueStart..<plan.slices.count,
      shift: shift)
    columns.carry(range, to: &work)
    work.lowRank = LowRankRows(
      keyBasis: sides.keys.basis?.run(unit: place.unit, head: place.block),
      valueBasis: sides.values.basis?.run(unit: place.unit, head: place.block),
      keyMean: sides.keys.basis?.meanPointer(unit: place.unit, head: place.block),
      valueMean: sides.values.basis?.meanPointer(unit: place.unit, head: place.block), rotary: rotary)
    if sides.keys.isJoined { work.lowRank?.keyChannels = channels(block: place.block) }
    plan.rows.append(work)
  }

  package func read(
    member: Int, head: Int, range: Range<Int>, positions: PositionColumn, isKey: Bool,
    into destination: UnsafeMutablePointer<Float>
  ) {
    guard let side = isKey ? sides?.keys : sides?.values else { return }
    let slices = store(side, member: member, head: head).slices(range)
    guard let basis = side.basis else {
      if side.isJoined, let rotary {
        backend.restore(
          slices, channels: channels(block: place(member: member, head: head).block),
          positions: range.map { Int32(positions[$0]) }, rotary: rotary, into: destination)
        return
      }
      var next = destination
      for slice in slices {
        backend.read(slice, into: next, stride: slice.run.dim)
        next += slice.count * slice.run.dim
      }
      return
    }
    let place = place(member: member, head: head)
    backend.restore(
      slices, basis: basis.run(unit: place.unit, head: place.block),
      mean: basis.meanPointer(unit: place.unit, head: place.block),
      positions: isKey ? range.map { Int32(positions[$0]) } : nil, rotary: isKey ? rotary : nil, into: destination)
  }

  // MARK: Giving memory back

  /// Removes rows that are dead in every head that shares them: all of them when `eager`, else when there are enough.
  package func compact(_ segments: [LowRankSegment], eager: Bool) throws(KVError) {
    guard segments.count == layers.count, let before = sides else { return }
    var keys = before.keys
    var values = before.values
    var columns = segments.map(\.columns)
    var frozen = segments.map(\.frozen)
    var changed = false
    for unit in 0..<units {
      let heads = heads(of: unit)
      let rows = segments[heads[0].member].frozen[heads[0].head]
      if heads.allSatisfy({ segments[$0.member].columns[$0.head].dead == 0 }) { continue }
      var alive = [Bool](repeating: false, count: rows)
      for place in heads {
        let own = segments[place.member].columns[place.head]
        for slot in 0..<rows where own.isLive(slot) { alive[slot] = true }
      }
      let gone = alive.count { !$0 }
      if gone == 0 || !eager && gone < min(64, max(8, (rows - gone) / 8)) { continue }
      var physical = alive
      for side in [keys, values] where side.isShared {
        HeadRows.keepFullUnits(of: side.stores[unit], alive: alive, in: &physical)
      }
      let kept = (0..<rows).filter { physical[$0] }
      for place in heads {
        let own = columns[place.member][place.head]
        columns[place.member][place.head] = try own.gathered(kept + Array(rows..<own.count), backend: backend)
        frozen[place.member][place.head] = kept.count
      }
      for index in keys.isShared ? [unit] : heads.map({ $0.member * shape.kvHeads + $0.head }) {
        keys.stores[index] = try keys.stores[index].rebuilt(physical: physical, backend: backend)
      }
      for index in values.isShared ? [unit] : heads.map({ $0.member * shape.kvHeads + $0.head }) {
        values.stores[index] = try values.stores[index].rebuilt(physical: physical, backend: backend)
      }
      changed = true
    }
    if !changed { return }
    sides = (keys, values)
    for (member, segment) in segments.enumerated() {
      segment.replace(columns: columns[member], frozen: frozen[member], window: segment.window)
    }
  }

  package func tally(into tally: inout ByteTally) {
    guard let sides else { return }
    for side in [sides.keys, sides.values] {
      side.basis?.tally(into: &tally)
      for store in side.stores { store.tally(into: &tally) }
    }
  }
}
