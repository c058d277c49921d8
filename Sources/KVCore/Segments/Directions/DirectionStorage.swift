/// One layer of a tier of shared directions.
package typealias DirectionSegment = SharedSegment<DirectionStorage>

/// The rows that a pair of layers holds together.
///
/// Slot i of a head is the same token in both layers. A token that one of them dropped before the pair was joined has its
/// own direction, and its slot in the other layer is dead.
package final class DirectionStorage: SharedRows {
  /// Keys or values of one KV head.
  package struct Side {
    /// In the base format. Rows that stay exact have one too, for the rows encoded with them, and nobody reads it.
    package var directions: RowStore
    /// Per layer, a length per slot: dense rows of one channel.
    package var lengths: [RowStore]
    /// Per layer, the rows of the slots that stay exact.
    package var exact: [RowStore]
    package var exactSlots = Column<Int32>()
    /// The angle that decides which rows stay exact; set by the first rows.
    package var threshold: Float?
  }

  package struct Head {
    package var keys: Side
    package var values: Side
    /// Slots that set the thresholds.
    package var fixed = 0

    package var rows: Int { keys.directions.rows }
  }

  package let format: DirectionFormat
  package let layers: [Int]
  package let shape: LayerShape
  package let backend: any ComputeBackend
  package private(set) var heads: [Head]
  /// Angles of the rows in work, and a row of zeros for the layer that lacks a token.
  private let angles = Workspace()
  private let nothing = Workspace()

  package init(format: DirectionFormat, layers: [Int], shape: LayerShape, backend: any ComputeBackend) {
    self.format = format
    self.layers = layers
    self.shape = shape
    self.backend = backend
    let keys = DirectionStorage.side(format.base.keys, dim: shape.keyDim, format, layers.count)
    let values = DirectionStorage.side(format.base.values, dim: shape.valueDim, format, layers.count)
    heads = Array(repeating: Head(keys: keys, values: values), count: shape.kvHeads)
  }

  private static func side(_ base: SideFormat, dim: Int, _ format: DirectionFormat, _ layers: Int) -> Side {
    Side(
      directions: RowStore(dim: dim, format: base),
      lengths: Array(repeating: RowStore(dim: 1, format: .dense(format.lengths)), count: layers),
      exact: Array(repeating: RowStore(dim: dim, format: .dense(base.window), isSparse: true), count: layers))
  }

  func restore(_ heads: [Head]) { self.heads = heads }

  package func fork() -> any JointStorage {
    let copy = DirectionStorage(format: format, layers: layers, shape: shape, backend: backend)
    copy.heads = heads
    return copy
  }

  package func rows(member: Int, head: Int) -> Int { heads[head].rows }

  // MARK: Taking rows in

  /// Brings the dense rows of the segments together, head by head.
  package func extend(_ segments: [DirectionSegment]) throws(KVError) {
    guard segments.count == layers.count else { return }
    try compact(segments, eager: false)
    // Dead rows must not set ranges of codes or thresholds.
    for segment in segments { try segment.reclaimWindow(eager: true) }
    if format.retention.acrossHeads { try findCommonThresholds(segments) }
    for head in heads.indices { try extend(head, segments) }
  }

  /// Where a token lies in the windows of the layers: -1 where it does not.
  private struct Token {
    var position: Int
    var rows: (Int, Int)
  }

  /// The tokens of both windows in order of position; nil where both hold the same in the same order.
  private func union(_ segments: [DirectionSegment], head: Int) -> [Token]? {
    let windows = segments.map { $0.window.heads[head].columns.positions }
    if windows[0].count == windows[1].count, (0..<windows[0].count).allSatisfy({ windows[0][$0] == windows[1][$0] }) {
      return nil
    }
    var rows: [Int: (Int, Int)] = [:]
    for row in 0..<windows[0].count { rows[windows[0][row]] = (row, -1) }
    for row in 0..<windows[1].count { rows[windows[1][row], default: (-1, -1)].1 = row }
    return rows.map { Token(position: $0.key, rows: $0.value) }.sorted { $0.position < $1.position }
  }

  /// Rows of a layer's window in the order of the tokens, a row of zeros where it has none.
  private func slices(
    _ segments: [DirectionSegment], _ member: Int, _ head: Int, _ tokens: [Token]?, isKey: Bool
  ) -> [RunSlice] {
    let held = segments[member].window.heads[head]
    let store = isKey ? held.keys : held.values
    guard let tokens else { return store.slices(0..<store.rows) }
    let zeros = nothing.floats(store.dim)
    zeros.update(repeating: 0, count: store.dim)
    let none = RunSlice(
      run: RowRun(encoding: .dense(.f32), dim: store.dim, capacity: 1, base: UnsafeMutableRawPointer(zeros)), first: 0,
      count: 1)
    return tokens.flatMap { token -> [RunSlice] in
      let row = member == 0 ? token.rows.0 : token.rows.1
      return row < 0 ? [none] : store.slices(row..<row + 1)
    }
  }

  /// What a side of a head needs before its rows can join the storage.
  private struct Room {
    var directions: [RunSlice] = []
    var lengths: [[RunSlice]] = [[], []]
    /// Tokens that stay exact, and where their rows go.
    var kept: [Int] = []
    var exact: [[RunSlice]] = [[], []]
    var threshold: Float?
  }

  private func extend(_ head: Int, _ segments: [DirectionSegment]) throws(KVError) {
    let tokens = union(segments, head: head)
    let count = tokens?.count ?? segments[0].window.slotCount(head: head)
    if count == 0 { return }
    let isFirst = heads[head].rows == 0
    var columns: [SlotColumns?] = [nil, nil]
    let keys: Room
    let values: Room
    do throws(KVError) {
      keys = try prepare(head, \.keys, count, tokens, segments, isKey: true)
      values = try prepare(head, \.values, count, tokens, segments, isKey: false)
      if let tokens {
        for (member, segment) in segments.enumerated() {
          let first = segment.frozen[head]
          columns[member] = try segment.columns[head].spread(
            keeping: first,
            tokens.map { token in
              let row = member == 0 ? token.rows.0 : token.rows.1
              return (token.position, row < 0 ? nil : first + row)
            }, backend: backend)
        }
      }
    } catch {
      cancel(head, \.keys)
      cancel(head, \.values)
      throw error
    }
    commit(head, \.keys, keys, tokens, segments, isKey: true)
    commit(head, \.values, values, tokens, segments, isKey: false)
    for (member, segment) in segments.enumerated() { segment.freeze(head: head, columns: columns[member]) }
    if isFirst { heads[head].fixed = heads[head].rows }
    try encode(head, \.keys, batchEnds: isFirst)
    try encode(head, \.values, batchEnds: isFirst)
  }

  private func cancel(_ head: Int, _ side: WritableKeyPath<Head, Side>) {
    heads[head][keyPath: side].directions.cancelReservation()
    for member in layers.indices {
      heads[head][keyPath: side].lengths[member].cancelReservation()
      heads[head][keyPath: side].exact[member].cancelReservation()
    }
  }

  /// Everything that can fail.
  private func prepare(
    _ head: Int, _ side: WritableKeyPath<Head, Side>, _ count: Int, _ tokens: [Token]?, _ segments: [DirectionSegment],
    isKey: Bool
  ) throws(KVError) -> Room {
    var room = Room()
    try heads[head][keyPath: side].directions.reserve(count, backend: backend, into: &room.directions)
    for member in layers.indices {
      try heads[head][keyPath: side].lengths[member].reserve(count, backend: backend, into: &room.lengths[member])
    }
    var request = request(segments, head, tokens, isKey: isKey)
    request.directions = room.directions
    request.lowerLengths = room.lengths[0]
    request.upperLengths = room.lengths[1]
    let found = angles.floats(count)
    backend.shareDirections(request, into: found)
    let measured = UnsafeBufferPointer(start: found, count: count)
    room.threshold = heads[head][keyPath: side].threshold
    if room.threshold == nil {
      room.threshold = format.retention.threshold(measured.filter { $0 >= 0 && $0 < .infinity })
      room.kept = retained(measured, room.threshold, isFirst: true)
    } else {
      room.kept = retained(measured, room.threshold, isFirst: false)
    }
    if room.kept.isEmpty { return room }
    for member in layers.indices {
      try heads[head][keyPath: side].exact[member].reserve(
        room.kept.count, backend: backend, into: &room.exact[member])
    }
    try heads[head][keyPath: side].exactSlots.reserve(room.kept.count, backend: backend)
    return room
  }

  private func request(
    _ segments: [DirectionSegment], _ head: Int, _ tokens: [Token]?, isKey: Bool
  ) -> DirectionRequest {
    DirectionRequest(
      lower: slices(segments, 0, head, tokens, isKey: isKey), upper: slices(segments, 1, head, tokens, isKey: isKey),
      dim: isKey ? shape.keyDim : shape.valueDim, weight: format.weight, largest: format.lengths.largestFinite)
  }

  /// Rows that stay exact: those the rule names, and those without a direction between them. Rows that are zero in one
  /// layer are exact as they are.
  private func retained(
    _ angles: UnsafeBufferPointer<Float>, _ threshold: Float?, isFirst: Bool
  ) -> [Int] {
    var kept: [Int] = []
    var left = Int.max
    if case .share(let share) = format.retention.kind, isFirst {
      // Of equal angles the first stay.
      left = Int((share * Double(angles.count { $0 >= 0 && $0 < .infinity })).rounded(.up))
      if let threshold { left -= angles.count { $0 > threshold && $0 < .infinity } }
    }
    for (row, angle) in angles.enumerated() {
      if angle == .infinity {
        kept.append(row)
      } else if angle >= 0, let threshold, format.retention.retains(angle, threshold) {
        if left != Int.max, angle == threshold {
          if left <= 0 { continue }
          left -= 1
        }
        kept.append(row)
      }
    }
    return kept
  }

  private func findCommonThresholds(_ segments: [DirectionSegment]) throws(KVError) {
    for (side, isKey) in [(\Head.keys, true), (\Head.values, false)] where heads[0][keyPath: side].threshold == nil {
      var all: [Float] = []
      for head in heads.indices {
        let tokens = union(segments, head: head)
        let count = tokens?.count ?? segments[0].window.slotCount(head: head)
        let found = angles.floats(count)
        backend.shareDirections(request(segments, head, tokens, isKey: isKey), into: found)
        all += UnsafeBufferPointer(start: found, count: count).filter { $0 >= 0 && $0 < .infinity }
      }
      guard let threshold = format.retention.threshold(all) else { continue }
      for head in heads.indices { heads[head][keyPath: side].threshold = threshold }
    }
  }

  private func commit(
    _ head: Int, _ side: WritableKeyPath<Head, Side>, _ room: Room, _ tokens: [Token]?, _ segments: [DirectionSegment],
    isKey: Bool
  ) {
    let first = heads[head][keyPath: side].directions.rows
    heads[head][keyPath: side].threshold = room.threshold
    heads[head][keyPath: side].directions.commit(room.directions[...])
    for member in layers.indices {
      heads[head][keyPath: side].lengths[member].commit(room.lengths[member][...])
      if room.kept.isEmpty { continue }
      let rows = slices(segments, member, head, tokens, isKey: isKey)
      heads[head][keyPath: side].exact[member].fill(
        room.exact[member], from: DirectionStorage.rows(room.kept, of: rows), backend: backend)
    }
    for row in room.kept { heads[head][keyPath: side].exactSlots.append(Int32(first + row)) }
  }

  /// Single rows of a list of slices, ascending.
  private static func rows(_ wanted: [Int], of slices: [RunSlice]) -> [RunSlice] {
    var result: [RunSlice] = []
    var index = 0
    var start = 0
    for row in wanted {
      while row >= start + slices[index].count {
        start += slices[index].count
        index += 1
      }
      result.append(RunSlice(run: slices[index].run, first: slices[index].first + row - start, count: 1))
    }
    return result
  }

  /// Encodes directions of which enough are there. What cannot be for lack of memory stays dense and is tried again.
  private func encode(
    _ head: Int, _ side: WritableKeyPath<Head, Side>, batchEnds: Bool
  ) throws(KVError) {
    if heads[head][keyPath: side].directions.isUncalibrated {
      let rows = heads[head][keyPath: side].directions.slices(0..<heads[head][keyPath: side].directions.rows)
      try heads[head][keyPath: side].directions.calibrate(over: rows, queries: nil, backend: backend)
    }
    try heads[head][keyPath: side].directions.flush(batchEnds: batchEnds, backend: backend)
  }

  // MARK: Removing

  package func fixedRows(head: Int) -> Int {
    max(heads[head].fixed, heads[head].keys.directions.bodyRows, heads[head].values.directions.bodyRows)
  }

  package func truncate(head: Int, to rows: Int) {
    let removed = heads[head].rows - rows
    if removed <= 0 { return }
    truncate(head, \.keys, to: rows, removing: removed)
    truncate(head, \.values, to: rows, removing: removed)
  }

  private func truncate(_ head: Int, _ side: WritableKeyPath<Head, Side>, to rows: Int, removing removed: Int) {
    heads[head][keyPath: side].directions.removeLast(removed)
    let exact = heads[head][keyPath: side].exactSlots.withSpan { $0.count { Int($0) >= rows } }
    heads[head][keyPath: side].exactSlots.removeLast(exact)
    for member in layers.indices {
      heads[head][keyPath: side].lengths[member].removeLast(removed)
      heads[head][keyPath: side].exact[member].removeLast(exact)
    }
  }

  package func compact(_ segments: [DirectionSegment], eager: Bool) throws(KVError) {
    guard segments.count == layers.count else { return }
    for head in heads.indices {
      if segments.contains(where: { $0.columns[head].dead == 0 }) { continue }
      let rows = heads[head].rows
      let alive = (0..<rows).map { slot in segments.contains { $0.columns[head].isLive(slot) } }
      let gone = alive.count { !$0 }
      if gone == 0 || !eager && gone < min(64, max(8, (rows - gone) / 8)) { continue }
      var physical = alive
      HeadRows.keepFullUnits(of: heads[head].keys.directions, alive: alive, in: &physical)
      HeadRows.keepFullUnits(of: heads[head].values.directions, alive: alive, in: &physical)
      let kept = (0..<rows).filter { physical[$0] }
      var columns: [SlotColumns] = []
      for segment in segments {
        let own = segment.columns[head]
        columns.append(try own.gathered(kept + Array(rows..<own.count), backend: backend))
      }
      var result = heads[head]
      result.keys = try compacted(result.keys, physical)
      result.values = try compacted(result.values, physical)
      result.fixed = physical[..<result.fixed].count { $0 }
      heads[head] = result
      for (segment, own) in zip(segments, columns) { segment.replace(head: head, columns: own, frozen: kept.count) }
    }
  }

  private func compacted(_ side: Side, _ physical: [Bool]) throws(KVError) -> Side {
    var result = side
    result.directions = try side.directions.rebuilt(physical: physical, backend: backend)
    var number = -1
    let numbers = physical.map { kept -> Int32 in
      number += kept ? 1 : 0
      return kept ? Int32(number) : -1
    }
    let flags = side.exactSlots.withSpan { $0.map { physical[Int($0)] } }
    let slots = side.exactSlots.withSpan { $0.map { numbers[Int($0)] }.filter { $0 >= 0 } }
    result.exactSlots = Column<Int32>()
    try result.exactSlots.reserve(slots.count, backend: backend)
    for slot in slots { result.exactSlots.append(slot) }
    for member in layers.indices {
      result.lengths[member] = try side.lengths[member].rebuilt(physical: physical, backend: backend)
      result.exact[member] = try side.exact[member].rebuilt(physical: flags, backend: backend)
    }
    return result
  }

  // MARK: Reading

  package func describe(
    member: Int, head: Int, range: Range<Int>, columns: SlotColumns, shift: Int, in plan: AttentionPlan
  ) {
    let keyStart = plan.slices.count
    heads[head].keys.directions.slices(range, into: &plan.slices)
    let valueStart = plan.slices.count
    heads[head].values.directions.slices(range, into: &plan.slices)
    var work = RowsWork(
      kvHead: head, count: range.count, keys: keyStart..<valueStart, values: valueStart..<plan.slices.count,
      shift: shift)
    columns.carry(range, to: &work)
    work.factored = FactoredRows(
      keys: describe(heads[head].keys, member, range, in: plan),
      values: describe(heads[head].values, member, range, in: plan))
    plan.rows.append(work)
  }

  private func describe(
    _ side: Side, _ member: Int, _ range: Range<Int>, in plan: AttentionPlan
  ) -> FactoredRows.Side {
    let lengths = plan.slices.count
    side.lengths[member].slices(range, into: &plan.slices)
    let exact = plan.slices.count
    let rows = exactRows(of: side, in: range)
    side.exact[member].slices(rows, into: &plan.slices)
    return FactoredRows.Side(
      lengths: lengths..<exact, exact: exact..<plan.slices.count,
      slots: side.exactSlots.base.map { UnsafePointer($0) + rows.lowerBound }, count: rows.count,
      offset: range.lowerBound)
  }

  /// Those of the exact rows whose slots lie in a range.
  private func exactRows(of side: Side, in range: Range<Int>) -> Range<Int> {
    side.exactSlots.withSpan { slots in
      func first(from slot: Int) -> Int {
        var (low, high) = (0, slots.count)
        while low < high {
          let middle = (low + high) / 2
          if Int(slots[middle]) < slot { low = middle + 1 } else { high = middle }
        }
        return low
      }
      return first(from: range.lowerBound)..<first(from: range.upperBound)
    }
  }

  package func read(
    member: Int, head: Int, range: Range<Int>, positions: PositionColumn, isKey: Bool,
    into destination: UnsafeMutablePointer<Float>
  ) {
    let side = isKey ? heads[head].keys : heads[head].values
    let dim = side.directions.dim
    var next = destination
    side.directions.forEachSlice(range) { slice in
      backend.read(slice, into: next, stride: dim)
      next += slice.count * dim
    }
    withUnsafeTemporaryAllocation(of: Float.self, capacity: range.count) { buffer in
      guard let lengths = buffer.baseAddress else { return }
      var place = lengths
      side.lengths[member].forEachSlice(range) { slice in
        backend.read(slice, into: place, stride: 1)
        place += slice.count
      }
      backend.scaleRows(destination, dim: dim, factors: lengths, count: range.count)
    }
    let rows = exactRows(of: side, in: range)
    var row = rows.lowerBound
    side.exact[member].forEachSlice(rows) { slice in
      for index in 0..<slice.count {
        let slot = Int(side.exactSlots[row])
        backend.read(
          RunSlice(run: slice.run, first: slice.first + index, count: 1),
          into: destination + (slot - range.lowerBound) * dim, stride: dim)
        row += 1
      }
    }
  }

  // MARK: Counting

  package func tally(into tally: inout ByteTally) {
    for head in heads {
      for side in [head.keys, head.values] {
        side.directions.tally(into: &tally)
        for lengths in side.lengths {
          for extent in lengths.extents { tally.add(extent.buffer, kind: \.metadata) }
        }
        for rows in side.exact { rows.tally(into: &tally) }
        if let buffer = side.exactSlots.buffer { tally.add(buffer, kind: \.index) }
      }
    }
  }
}
