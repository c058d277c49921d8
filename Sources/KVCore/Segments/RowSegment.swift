/// The representation behind dense and quantized stores: per head, keys and values apart, an encoded body and a dense
/// tail. Dense caches, KIVI, per-token integer formats and any mixture of them for K and V are values of `RowFormat`.
package final class RowSegment: Segment {
  package let layer: LayerShape
  package let format: RowFormat
  package let backend: any ComputeBackend
  package internal(set) var heads: [HeadRows]
  /// Reused by every append; never shrinks.
  private var targets: [RunSlice] = []
  private var keyWrites: [WriteTarget] = []
  private var valueWrites: [WriteTarget] = []

  package init(layer: LayerShape, format: RowFormat, backend: any ComputeBackend) {
    self.layer = layer
    self.format = format
    self.backend = backend
    // Values: every head begins empty, and all share the fixed maps of the first.
    heads = Array(
      repeating: HeadRows(
        keyDim: layer.keyDim, valueDim: layer.valueDim, keys: format.keys, values: format.values),
      count: layer.kvHeads)
  }

  package init(restoring heads: [HeadRows], layer: LayerShape, format: RowFormat, backend: any ComputeBackend) {
    self.layer = layer
    self.format = format
    self.backend = backend
    self.heads = heads
  }

  package var kvHeads: Int { heads.count }
  func rows(_ head: Int) -> HeadRows { heads[head] }
  func withRows(_ head: Int, _ body: (inout HeadRows) throws(KVError) -> Void) throws(KVError) {
    try body(&heads[head])
  }
  func withRows(_ head: Int, _ body: (inout HeadRows) -> Void) { body(&heads[head]) }
  package func slotCount(head: Int) -> Int { heads[head].slots }
  package func liveCount(head: Int) -> Int { heads[head].live }
  package func position(head: Int, slot: Int) -> Int { heads[head].columns.positions[slot] }
  package func isLive(head: Int, slot: Int) -> Bool { heads[head].isLive(slot) }
  package func sortedFrom(head: Int) -> Int { heads[head].columns.positions.sortedFrom }
  package func logBias(head: Int, slot: Int) -> Float { heads[head].columns.logBias(slot) }
  package func count(head: Int, slot: Int) -> Int { heads[head].columns.tokens(slot) }

  // MARK: Appending

  package func append(
    keys: borrowing TensorView, values: borrowing TensorView, firstPosition: Int, observed: [Float]
  ) throws(KVError) {
    let count = keys.tokens
    targets.removeAll(keepingCapacity: true)
    do throws(KVError) {
      // Rows are written behind those that count; columns come last, when nothing but memory can still fail.
      let keyTargets = try reserve(count, keyDim: keys.dim, valueDim: values.dim)
      if let fault = try backend.append(keys: keys, to: keyWrites, values: values, to: valueWrites) {
        throw error(fault, keyDim: keys.dim, valueDim: values.dim, firstPosition: firstPosition)
      }
      try reserve(count, firstPosition: firstPosition, observed: observed.count)
      commit(count, firstPosition: firstPosition, keyTargets: keyTargets, observed: observed)
    } catch {
      for head in heads.indices {
        heads[head].keys.cancelReservation()
        heads[head].values.cancelReservation()
      }
      throw error
    }
  }

  private func reserve(_ count: Int, firstPosition: Int, observed: Int) throws(KVError) {
    try heads.withUnsafeMutableBufferPointer { (heads) throws(KVError) in
      for head in heads.indices {
        try heads[head].columns.reserve(next: firstPosition, adding: count, observed: observed, backend: backend)
      }
    }
  }

  /// Room for the next rows of every head, keys before values; returns how many targets are of keys.
  private func reserve(_ count: Int, keyDim: Int, valueDim: Int) throws(KVError) -> Int {
    keyWrites.removeAll(keepingCapacity: true)
    valueWrites.removeAll(keepingCapacity: true)
    // One access to the heads and to each list: this is the path of every decoded token.
    return try heads.withUnsafeMutableBufferPointer { (heads) throws(KVError) in
      try RowSegment.reserve(count, dim: keyDim, of: heads, isKey: true, &targets, &keyWrites, backend)
      let keyTargets = targets.count
      try RowSegment.reserve(count, dim: valueDim, of: heads, isKey: false, &targets, &valueWrites, backend)
      return keyTargets
    }
  }

  private static func reserve(
    _ count: Int, dim: Int, of heads: UnsafeMutableBufferPointer<HeadRows>, isKey: Bool, _ targets: inout [RunSlice],
    _ writes: inout [WriteTarget], _ backend: any ComputeBackend
  ) throws(KVError) {
    let range = (isKey ? heads[0].keys.format : heads[0].values.format).range(dim: dim)
    for head in heads.indices {
      let before = targets.count
      if isKey {
        try heads[head].keys.reserve(count, backend: backend, into: &targets)
      } else {
        try heads[head].values.reserve(count, backend: backend, into: &targets)
      }
      var token = 0
      for index in before..<targets.count {
        writes.append(WriteTarget(head: head, token: token, slice: targets[index], range: range))
        token += targets[index].count
      }
    }
  }

  private func error(_ fault: AppendFault, keyDim: Int, valueDim: Int, firstPosition: Int) -> KVError {
    let name = fault.isKey ? "key" : "value"
    let (head, position) = (fault.place.head, firstPosition + fault.place.token)
    guard fault.isFinite else {
      return KVError(
        .nonFinite, "channel \(fault.place.channel) of a \(name) is NaN or infinite", head: head, position: position)
    }
    let format = fault.isKey ? heads[0].keys.format : heads[0].values.format
    let largest = min(format.range(dim: fault.isKey ? keyDim : valueDim).largest, format.window.largestFinite)
    let what = format.limit == nil ? format.body?.description ?? format.window.name : "what it will be stored in"
    return KVError(
      .unrepresentable,
      "channel \(fault.place.channel) of a \(name) is beyond ±\(largest), the largest that \(what) can hold; "
        + "store rows and metadata in a wider type",
      head: head, position: position)
  }

  private func commit(_ count: Int, firstPosition: Int, keyTargets: Int, observed: [Float]) {
    targets.withUnsafeBufferPointer { targets in
      heads.withUnsafeMutableBufferPointer { heads in
        var key = 0
        var value = keyTargets
        for head in heads.indices {
          let keyEnd = RowSegment.end(of: count, from: key, targets)
          heads[head].keys.commit(UnsafeBufferPointer(rebasing: targets[key..<keyEnd]))
          key = keyEnd
          let valueEnd = RowSegment.end(of: count, from: value, targets)
          heads[head].values.commit(UnsafeBufferPointer(rebasing: targets[value..<valueEnd]))
          value = valueEnd
          heads[head].columns.append(next: firstPosition, adding: count, observed: observed)
        }
      }
    }
  }

  /// Index behind the targets that hold `count` rows from `start` on.
  private static func end(of count: Int, from start: Int, _ targets: UnsafeBufferPointer<RunSlice>) -> Int {
    var index = start
    var left = count
    while left > 0 {
      left -= targets[index].count
      index += 1
    }
    return index
  }

  // MARK: Taking rows over from another tier

  package func slices(head: Int, slots: [Int]) -> (keys: [RunSlice], values: [RunSlice]) {
    var keys: [RunSlice] = []
    var values: [RunSlice] = []
    var index = 0
    while index < slots.count {
      var end = index + 1
      while end < slots.count, slots[end] == slots[end - 1] + 1 { end += 1 }
      keys += heads[head].keys.slices(slots[index]..<slots[end - 1] + 1)
      values += heads[head].values.slices(slots[index]..<slots[end - 1] + 1)
      index = end
    }
    return (keys, values)
  }

  package func absorb(from other: any Segment, slots: [[Int]], observed: Int) throws(KVError) {
    // All memory first, then rows: nothing has changed when it runs out.
    var room = heads.map { _ in (keys: [RunSlice](), values: [RunSlice]()) }
    do throws(KVError) {
      for head in heads.indices where !slots[head].isEmpty {
        let count = slots[head].count
        try heads[head].keys.reserve(count, backend: backend, into: &room[head].keys)
        try heads[head].values.reserve(count, backend: backend, into: &room[head].values)
        try heads[head].columns.reserve(slots[head], of: other, head: head, observed: observed, backend: backend)
      }
    } catch {
      for head in heads.indices {
        heads[head].keys.cancelReservation()
        heads[head].values.cancelReservation()
      }
      throw error
    }
    for head in heads.indices where !slots[head].isEmpty {
      let sources = other.slices(head: head, slots: slots[head])
      heads[head].keys.fill(room[head].keys, from: sources.keys, backend: backend)
      heads[head].values.fill(room[head].values, from: sources.values, backend: backend)
      heads[head].columns.append(slots[head], of: other, head: head)
    }
  }

  package var largestTaken: (keys: Float, values: Float) {
    (format.keys.largest(dim: layer.keyDim), format.values.largest(dim: layer.valueDim))
  }

  // A decoded code beyond what it was made from is brought back to the range where it is written.
  package var largestHeld: (keys: Float, values: Float) { largestTaken }

  package func retract(_ counts: [Int]) {
    for head in heads.indices where counts[head] > 0 { heads[head].removeLast(counts[head]) }
  }

  // MARK: Removing

  package func settle() throws(KVError) { try settle(keysEnd: false, valuesEnd: false) }

  package func settleBatch(interval: Int?) throws(KVError) {
    // A policy that chooses more often than a batch is complete does not end one.
    let tokens = interval ?? .max
    try settle(keysEnd: format.keys.batch <= tokens, valuesEnd: format.values.batch <= tokens)
  }

  /// - Parameters: whether the batch of a side has all rows it will get.
  private func settle(keysEnd: Bool, valuesEnd: Bool) throws(KVError) {
    try heads.withUnsafeMutableBufferPointer { (heads) throws(KVError) in
      for head in heads.indices {
        let due = (heads[head].keys.due(batchEnds: keysEnd), heads[head].values.due(batchEnds: valuesEnd))
        if due == (0, 0) { continue }
        if heads[head].tailHasDead { heads[head] = try heads[head].reclaimed(backend: backend) }
        try heads[head].keys.flush(batchEnds: keysEnd, backend: backend)
        try heads[head].values.flush(batchEnds: valuesEnd, backend: backend)
      }
    }
  }

  package var wantsQueries: Bool {
    heads.contains {
      $0.keys.format.map.scaling == .balanced && $0.keys.isUncalibrated
        || $0.values.format.map.scaling == .balanced && $0.values.isUncalibrated
    }
  }

  package func calibrate(over segments: [any Segment], queries: [[Float]]?) throws(KVError) -> Bool {
    guard format.keys.map.scaling.isShared || format.values.map.scaling.isShared else { return false }
    var changed = false
    for head in heads.indices where heads[head].keys.isUncalibrated || heads[head].values.isUncalibrated {
      var keys: [RunSlice] = []
      var values: [RunSlice] = []
      for segment in segments {
        var live: ContiguousArray<Int32> = []
        segment.appendLiveSlots(head: head, to: &live)
        let slices = segment.slices(head: head, slots: live.map { Int($0) })
        keys += slices.keys
        values += slices.values
      }
      if keys.isEmpty { continue }
      try heads[head].keys.calibrate(over: keys, queries: queries?[head], backend: backend)
      try heads[head].values.calibrate(over: values, queries: queries?[head], backend: backend)
      changed = true
    }
    return changed
  }

  package func prepareDrop(_ slots: [[Int]]) throws(KVError) {
    for head in heads.indices where !slots[head].isEmpty { try heads[head].columns.prepareDrop(backend: backend) }
  }

  package func drop(_ slots: [[Int]]) throws(KVError) {
    for head in heads.indices { try heads[head].drop(slots[head], backend: backend) }
  }

  package var dropsInPlace: Bool { true }

  package func prepareDrop() throws(KVError) {
    for head in heads.indices { try heads[head].columns.prepareDrop(backend: backend) }
  }

  package func drop(head: Int, slot: Int) { heads[head].columns.drop(slot) }

  package func reclaimInPlace() throws(KVError) {
    for head in heads.indices where heads[head].dead > 0 {
      if try heads[head].compactInPlace(backend: backend) { continue }
      heads[head] = try heads[head].reclaimed(backend: backend)
    }
  }

  package func reclaim(eager: Bool) throws(KVError) {
    for head in heads.indices where heads[head].dead > 0 {
      if !eager, heads[head].dead < heads[head].reclaimThreshold { continue }
      if !eager, try heads[head].compactInPlace(backend: backend) { continue }
      heads[head] = try heads[head].reclaimed(backend: backend)
    }
  }

  package var minimumTruncation: Int {
    heads.reduce(0) { most, head in
      // What is out of order moved here from another tier, which cannot be undone either.
      let fixed = max(head.keys.bodyRows, head.values.bodyRows, head.columns.positions.sortedFrom)
      if fixed == 0 { return most }
      let newest =
        fixed == head.columns.positions.sortedFrom ? head.columns.positions.highest : head.columns.positions[fixed - 1]
      return max(most, newest + 1)
    }
  }

  package func truncate(to position: Int) throws(KVError) {
    for head in heads.indices {
      let kept = heads[head].columns.positions.lowerBound(position)
      let removed = heads[head].slots - kept
      if removed == 0 { continue }
      heads[head].removeLast(removed)
    }
  }

  // MARK: Reading

  package func describe(head: Int, range: Range<Int>, shift: Int, in plan: AttentionPlan) {
    if range.isEmpty { return }
    let keyStart = plan.slices.count
    heads[head].keys.slices(range, into: &plan.slices)
    let valueStart = plan.slices.count
    heads[head].values.slices(range, into: &plan.slices)
    var work = RowsWork(
      kvHead: head, count: range.count, keys: keyStart..<valueStart, values: valueStart..<plan.slices.count,
      shift: shift)
    heads[head].columns.carry(range, to: &work)
    if range.count == heads[head].slots, backend.keepsPlans {
      work.structure = (heads[head].keys.structure, heads[head].values.structure)
      work.frozen = (heads[head].keys.frozenSlices, heads[head].values.frozenSlices)
    }
    plan.rows.append(work)
  }

  package func describeAgain(first: Int, stride: Int, in plan: AttentionPlan) -> Bool {
    // In place: copies of heads would count the owners of their memory, for every token.
    heads.withUnsafeBufferPointer { heads in
      plan.rows.withUnsafeMutableBufferPointer { rows in
        plan.slices.withUnsafeMutableBufferPointer { slices in
          for head in heads.indices {
            let index = first + head * stride
            let (keys, values) = rows[index].structure
            guard keys != 0, values != 0, heads[head].keys.structure == keys, heads[head].values.structure == values,
              heads[head].keys.describeAgain(
                frozen: rows[index].frozen.keys, in: .init(rebasing: slices[rows[index].keys])),
              heads[head].values.describeAgain(
                frozen: rows[index].frozen.values, in: .init(rebasing: slices[rows[index].values]))
            else { return false }
            rows[index].count = heads[head].slots
            heads[head].columns.carry(0..<heads[head].slots, to: &rows[index])
          }
          return true
        }
      }
    }
  }

  package func readKeys(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    read(heads[head].keys, range, into: destination)
  }

  package func readValues(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    read(heads[head].values, range, into: destination)
  }

  private func read(_ store: RowStore, _ range: Range<Int>, into destination: UnsafeMutablePointer<Float>) {
    var next = destination
    for slice in store.slices(range) {
      backend.read(slice, into: next, stride: store.dim)
      next += slice.count * store.dim
    }
  }

  package func denseRun(head: Int, keys: Bool) -> RunSlice? {
    let rows = heads[head]
    let store = keys ? rows.keys : rows.values
    let slices = store.slices(0..<store.rows)
    guard rows.dead == 0, rows.columns.positions.isAscending, slices.count == 1, slices[0].run.encoding.kind == .dense
    else {
      return nil
    }
    return slices[0]
  }

  // MARK: Observed attention

  package func observed(head: Int) -> ObservedColumns { heads[head].columns.observedColumns }

  package func appendLiveSlots(head: Int, to slots: inout ContiguousArray<Int32>) {
    heads[head].columns.appendLive(to: &slots)
  }

  package func enterLiveSlots(
    head: Int, as segment: Int32, in table: UnsafeMutableBufferPointer<LayerView.RowReference>
  ) {
    heads[head].columns.enterLive(as: segment, in: table)
  }

  package func forgetObserved() { for head in heads.indices { heads[head].columns.forgetObserved() } }

  package func prepareObserved() throws(KVError) {
    for head in heads.indices { try heads[head].columns.makeObservedUnique(backend: backend) }
  }

  // MARK: Life cycle

  package func tally(into tally: inout ByteTally) { for head in heads { head.tally(into: &tally) } }

  package func fork() -> any Segment {
    RowSegment(restoring: heads, layer: layer, format: format, backend: backend)
  }

  package func checkInvariants() { for head in heads { head.checkInvariants() } }
}

/// Keys and values of a tier, each in its own side format.
package struct RowFormat: SegmentFactory, Hashable {
  package let keys: SideFormat
  package let values: SideFormat

  package init(keys: SideFormat, values: SideFormat) {
    self.keys = keys
    self.values = values
  }

  package func makeSegment(layer: LayerShape, backend: any ComputeBackend) -> any Segment {
    RowSegment(layer: layer, format: self, backend: backend)
  }

  package var merging: MergingSides? { MergingSides(keys: keys, values: values) }
  package var keyTurning: KeyTurning { keys.body == nil ? .always : .whileDense }

  package func validate(layer: LayerShape) throws(KVError) {
    try keys.validate(dim: layer.keyDim, of: "keys")
    try values.validate(dim: layer.valueDim, of: "values")
  }

  package func rotated(
    keys keyRotation: Rotation?, values valueRotation: Rotation?
  ) throws(KVError) -> any SegmentFactory {
    RowFormat(
      keys: try keyRotation.map { (rotation) throws(KVError) in try keys.rotated(rotation) } ?? keys,
      values: try valueRotation.map { (rotation) throws(KVError) in try values.rotated(rotation) } ?? values)
  }

  package func validate(backend: any ComputeBackend) throws(KVError) {
    try backend.require(keys)
    try backend.require(values)
  }

  package func balanced() throws(KVError) -> any SegmentFactory {
    RowFormat(keys: try keys.scaled(.balanced), values: values)
  }

  package var wantsQueries: Bool { keys.map.scaling == .balanced || values.map.scaling == .balanced }

  package func bytes(rows: Int, layer: LayerShape, observed: Int) -> Int {
    let slots = Column<Float>.grown(capacity: rows, count: rows, adding: 1)
    return keys.bytes(rows: rows, dim: layer.keyDim) + values.bytes(rows: rows, dim: layer.valueDim)
      + slots * (2 + observed) * MemoryLayout<Float>.stride
  }
}
