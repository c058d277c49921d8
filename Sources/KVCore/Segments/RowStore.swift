internal import Synchronization

/// Consecutive rows of one side of one head in one encoding and one buffer.
///
/// ```
/// buffer ┌ … ┬ first … first+rows (live) ┬ room … capacity ┐
/// ```
package struct Extent {
  package let encoding: RowEncoding
  package let capacity: Int
  /// What its rows went through before they were encoded.
  package let map: RowMap?
  package var buffer: Buffer
  package var first = 0
  package var rows = 0

  package init(
    encoding: RowEncoding, capacity: Int, dim: Int, map: RowMap? = nil, backend: any ComputeBackend
  ) throws(KVError) {
    self.encoding = encoding
    self.capacity = capacity
    self.map = map
    buffer = try backend.allocate(byteCount: encoding.bytes(rows: capacity, dim: dim), hostVisible: false)
  }

  package var room: Int { capacity - first - rows }

  package func run(dim: Int) -> RowRun {
    RowRun(encoding: encoding, dim: dim, capacity: capacity, base: buffer.base, map: map?.descriptor)
  }
}

/// The rows of one side (keys or values) of one KV head: encoded body first, dense tail behind it.
///
/// ```
/// ┌ body: extents in any encoding, written once, never re-encoded ┬ tail: dense extents, newest rows ┐
/// 0                                                        bodyRows                               rows
/// ```
/// An extent holds about half a megabyte (see `extentRows`): long enough that reading it runs at the speed of memory,
/// short enough that memory can be given back piece by piece.
package struct RowStore {
  /// Rows of one extent at most: half a megabyte of codes or elements, a multiple of 1024 rows, at least that many. Narrow
  /// codes of 1024 rows alone are so short that every extent would begin with a wait for memory.
  package static func extentRows(_ encoding: RowEncoding, dim: Int) -> Int {
    max(1, (1 << 19) / max(encoding.payloadBytes(rows: 1024, dim: dim), 1)) * 1024
  }

  package let dim: Int
  package let format: SideFormat
  /// Changes to the list count as changes of structure, whatever they are.
  package internal(set) var extents: ContiguousArray<Extent> {
    _read { yield list }
    _modify {
      structure = RowStore.nextStructure()
      yield &list
    }
  }
  private var list: ContiguousArray<Extent> = []
  /// Says, as long as it is the same, that the store has the same extents, and that those before `frozenExtents` hold the
  /// same rows: what was described of them stays true. No two stores have the same number, but for copies of one. 0: says
  /// nothing.
  package private(set) var structure: UInt64 = 0
  package internal(set) var bodyExtents = 0
  package internal(set) var bodyRows = 0
  package internal(set) var rows = 0
  /// Extents at the end that `reserve` made and `commit` has not confirmed.
  private var reservedExtents = 0
  /// The format's map without numbers from data; shared by the heads of a segment.
  package let fixedMap: RowMap?
  /// The map of all rows to come, once its numbers are known, where the format shares them.
  package internal(set) var sharedMap: RowMap?

  /// Whether rows are few and far between: room for an eighth more of them at a time, instead of the format's.
  package internal(set) var isSparse: Bool

  /// - Parameter fixedMap: that of another store of this format and head size; nil: a new one where one is needed.
  package init(dim: Int, format: SideFormat, fixedMap: RowMap? = nil, isSparse: Bool = false) {
    self.dim = dim
    self.format = format
    self.isSparse = isSparse
    self.fixedMap = format.map.isNone ? nil : fixedMap ?? RowMap(fixed: FixedMap(format.map, dim: dim))
  }

  private static func nextStructure() -> UInt64 {
    structures.wrappingAdd(1, ordering: .relaxed).newValue
  }

  /// Extents whose rows no token changes that is appended, or that goes from the tail into the body.
  package var frozenExtents: Int { bodyExtents > 0 ? bodyExtents - 1 : max(list.count - 1, 0) }

  package var tailRows: Int { rows - bodyRows }
  /// Rows of room a new dense extent has at least.
  private var growth: Int { isSparse ? rows == 0 ? 1 : min(format.growth, max(8, rows / 8)) : format.growth }
  /// Rows of room that an empty store keeps, at most.
  private var keptRoom: Int { isSparse ? min(format.growth, 8) : format.growth }

  // MARK: Appending

  /// Makes room for `count` rows at the end and returns where they go. Rows appear only with `commit`.
  package mutating func reserve(
    _ count: Int, backend: any ComputeBackend, into targets: inout [RunSlice]
  ) throws(KVError) {
    var left = count
    let last = list.count - 1
    if last >= bodyExtents, list[last].room > 0, isKnownUniquelyReferenced(&list[last].buffer) {
      let taken = min(left, list[last].room)
      targets.append(RunSlice(run: list[last].run(dim: dim), first: list[last].first + list[last].rows, count: taken))
      left -= taken
    }
    while left > 0 {
      let taken = min(left, RowStore.extentRows(.dense(format.window), dim: dim))
      let extent = try Extent(
        encoding: .dense(format.window), capacity: max(taken, growth), dim: dim, backend: backend)
      targets.append(RunSlice(run: extent.run(dim: dim), first: 0, count: taken))
      extents.append(extent)
      reservedExtents += 1
      left -= taken
    }
  }

  /// Makes the reserved rows part of the store. `targets` are the slices `reserve` returned.
  package mutating func commit(_ targets: ArraySlice<RunSlice>) {
    targets.withUnsafeBufferPointer { commit($0) }
  }

  mutating func commit(_ targets: UnsafeBufferPointer<RunSlice>) {
    // Rows at the end of the last extent, and extents that `reserve` has made known.
    var index = list.count - 1
    for target in stride(from: targets.count - 1, through: 0, by: -1) {
      list[index].rows += targets[target].count
      rows += targets[target].count
      index -= 1
    }
    reservedExtents = 0
  }

  /// Gives back what `reserve` allocated and nobody committed.
  package mutating func cancelReservation() {
    if reservedExtents > 0 { extents.removeLast(reservedExtents) }
    reservedExtents = 0
  }

  /// Copies rows that lie elsewhere into what `reserve` returned, as dense rows, and makes them part of the store.
  package mutating func fill(_ targets: [RunSlice], from sources: [RunSlice], backend: any ComputeBackend) {
    var left = sources[...]
    for target in targets {
      backend.transcode(RunSlice.take(target.count, from: &left), to: target.run, row: target.first)
    }
    commit(targets[...])
  }

  /// Room for `count` rows that come encoded as the store's rows end. They appear only with `commit`; the tail of a store
  /// with a body is empty.
  package mutating func makeRoom(_ count: Int, _ room: inout RoomForRows, backend: any ComputeBackend) throws(KVError) {
    guard let encoding = format.body else {
      try reserve(count, backend: backend, into: &room.slices)
      return
    }
    precondition(tailRows == 0 && encoding.rowsPerUnit == 1, "\(tailRows) dense rows before encoded ones")
    if bodyExtents > 0, extents[bodyExtents - 1].encoding == encoding,
      isKnownUniquelyReferenced(&extents[bodyExtents - 1].buffer)
    {
      let last = extents[bodyExtents - 1]
      room.inLast = min(count, last.room)
      if room.inLast > 0 {
        room.slices.append(RunSlice(run: last.run(dim: dim), first: last.first + last.rows, count: room.inLast))
      }
    }
    var left = count - room.inLast
    while left > 0 {
      let taken = min(left, RowStore.extentRows(encoding, dim: dim))
      var extent = try Extent(
        encoding: encoding, capacity: max(taken, format.growth), dim: dim, backend: backend)
      extent.rows = taken
      room.slices.append(RunSlice(run: extent.run(dim: dim), first: 0, count: taken))
      room.fresh.append(extent)
      left -= taken
    }
  }

  /// Makes the rows of that room part of the store.
  package mutating func commit(_ room: RoomForRows) {
    if format.body == nil {
      commit(room.slices[...])
      return
    }
    let count = room.slices.reduce(0) { $0 + $1.count }
    if room.inLast > 0 { extents[bodyExtents - 1].rows += room.inLast }
    extents.insert(contentsOf: room.fresh, at: bodyExtents)
    bodyExtents += room.fresh.count
    bodyRows += count
    rows += count
  }

  // MARK: Reading

  /// Appends the slices that hold `range`, in row order.
  package func slices(_ range: Range<Int>, into result: inout ContiguousArray<RunSlice>) {
    forEachSlice(range) { result.append($0) }
  }

  func forEachSlice(_ range: Range<Int>, _ body: (RunSlice) -> Void) {
    if range.isEmpty { return }
    // In place: a copy of an extent would count the owners of its memory up and down, for every slice of every token.
    list.withUnsafeBufferPointer { extents in
      var start = 0
      for index in extents.indices {
        let rows = extents[index].rows
        let end = start + rows
        if rows > 0, end > range.lowerBound, start < range.upperBound {
          let low = max(range.lowerBound, start)
          let high = min(range.upperBound, end)
          body(
            RunSlice(run: extents[index].run(dim: dim), first: extents[index].first + low - start, count: high - low))
        }
        start = end
        if start >= range.upperBound { break }
      }
    }
  }

  /// How many slices of all rows come before those of `frozenExtents`.
  package var frozenSlices: Int {
    var count = 0
    for index in 0..<frozenExtents where list[index].rows > 0 { count += 1 }
    return count
  }

  /// Writes the slices of the last extents over those of an earlier description of the same structure, in which `frozen`
  /// of `slices` come before them. False when their number is another.
  package func describeAgain(frozen: Int, in slices: UnsafeMutableBufferPointer<RunSlice>) -> Bool {
    var next = frozen
    for index in frozenExtents..<list.count where list[index].rows > 0 {
      if next == slices.count { return false }
      slices[next].first = list[index].first
      slices[next].count = list[index].rows
      next += 1
    }
    return next == slices.count
  }

  package func slices(_ range: Range<Int>) -> [RunSlice] {
    var result: ContiguousArray<RunSlice> = []
    slices(range, into: &result)
    return Array(result)
  }

  // MARK: Moving rows from the tail into the body

  /// Tail rows that are due to be encoded.
  func due(batchEnds: Bool) -> Int { format.rowsToFlush(tail: tailRows, dim: dim, batchEnds: batchEnds) }

  /// Encodes what is due, one batch at a time: numbers per channel never depend on how many tokens came at once.
  ///
  /// - Parameter batchEnds: no more rows belong together with those there are.
  package mutating func flush(batchEnds: Bool, backend: any ComputeBackend) throws(KVError) {
    var due = due(batchEnds: batchEnds)
    while due > 0 {
      let count = batchEnds ? due : min(due, format.batch)
      try encodeTail(count, backend: backend)
      due -= count
    }
  }

  /// Encodes the oldest `count` tail rows into the body. They leave the tail.
  package mutating func encodeTail(_ count: Int, backend: any ComputeBackend) throws(KVError) {
    guard count > 0, let encoding = format.body else { return }
    precondition(
      count <= tailRows && count % encoding.rowsPerUnit == 0,
      "encoding \(count) of \(tailRows) tail rows in units of \(encoding.rowsPerUnit)")

    // Everything that can fail comes first: the extents.
    let map = try mapForTail(count, encoding, backend: backend)
    var fresh: [Extent] = []
    var appended = 0
    if bodyExtents > 0, list[bodyExtents - 1].encoding == encoding, list[bodyExtents - 1].map === map,
      encoding.rowsPerUnit == 1, isKnownUniquelyReferenced(&list[bodyExtents - 1].buffer)
    {
      appended = min(count, list[bodyExtents - 1].room)
    }
    var left = count - appended
    let unit = encoding.rowsPerUnit
    while left > 0 {
      let taken = min(left, max(RowStore.extentRows(encoding, dim: dim) / unit, 1) * unit)
      // Rows that arrive one by one get room for the next ones; units arrive whole.
      // Later rows of a batch format that finds new numbers never join these.
      let isFinal = unit > 1 || (format.map.scaling != .none && !format.map.scaling.isShared)
      let capacity = isFinal ? taken : max(taken, format.growth)
      fresh.append(try Extent(encoding: encoding, capacity: capacity, dim: dim, map: map, backend: backend))
      left -= taken
    }

    var next = bodyRows
    if appended > 0 {
      let target = list[bodyExtents - 1].run(dim: dim)
      var row = list[bodyExtents - 1].first + list[bodyExtents - 1].rows
      // Slice by slice without a list: this is the path of every decoded token.
      var left = appended
      var index = bodyExtents
      while left > 0 {
        let slice = RunSlice(
          run: list[index].run(dim: dim), first: list[index].first, count: min(left, list[index].rows))
        if slice.count > 0 {
          withUnsafePointer(to: slice) {
            backend.transcode(UnsafeBufferPointer(start: $0, count: 1), to: target, row: row)
          }
        }
        row += slice.count
        left -= slice.count
        index += 1
      }
      next += appended
    }
    for index in fresh.indices {
      let taken = min(bodyRows + count - next, fresh[index].capacity)
      backend.transcode(slices(next..<next + taken), to: fresh[index].run(dim: dim), row: 0)
      fresh[index].rows = taken
      next += taken
    }

    if appended > 0 { list[bodyExtents - 1].rows += appended }
    removeTailFront(count)
    if !fresh.isEmpty {
      extents.insert(contentsOf: fresh, at: bodyExtents)
      bodyExtents += fresh.count
    }
    bodyRows += count
    rows += count
    try repackTail(backend: backend)
  }

  /// Forgets the oldest `count` tail rows; their extents are freed or, when small, kept for the next rows.
  mutating func removeTailFront(_ count: Int) {
    var left = count
    // Without a body these are rows that were to stay.
    if bodyExtents == 0, left > 0 { structure = RowStore.nextStructure() }
    while left > 0 {
      let taken = min(left, list[bodyExtents].rows)
      list[bodyExtents].first += taken
      list[bodyExtents].rows -= taken
      left -= taken
      if list[bodyExtents].rows > 0 { break }
      let isLast = bodyExtents == list.count - 1
      if isLast, list[bodyExtents].capacity <= keptRoom, isKnownUniquelyReferenced(&list[bodyExtents].buffer) {
        list[bodyExtents].first = 0
      } else {
        extents.remove(at: bodyExtents)
      }
    }
    rows -= count
  }

  /// Copies a tail that rattles in a large extent (what is left of a prompt) into one of the right size.
  private mutating func repackTail(backend: any ComputeBackend) throws(KVError) {
    var held = 0
    for index in bodyExtents..<list.count { held += list[index].capacity }
    if held <= format.tailCapacity(rows: tailRows) { return }
    var packed = RowStore(dim: dim, format: format, fixedMap: fixedMap)
    var targets: [RunSlice] = []
    if tailRows > 0 { try packed.reserve(tailRows, backend: backend, into: &targets) }
    var next = bodyRows
    for target in targets {
      backend.transcode(slices(next..<next + target.count), to: target.run, row: target.first)
      next += target.count
    }
    packed.commit(targets[...])
    extents.replaceSubrange(bodyExtents..., with: packed.extents)
  }

  // MARK: Removing rows

  /// Cuts off the newest `count` rows, which must all be in the tail.
  package mutating func removeLast(_ count: Int) {
    precondition(count <= tailRows, "cutting \(count) rows of a tail of \(tailRows)")
    var left = count
    while left > 0 {
      let last = extents.count - 1
      let taken = min(left, extents[last].rows)
      extents[last].rows -= taken
      left -= taken
      if extents[last].rows == 0 { extents.removeLast() }
    }
    rows -= count
  }

  // MARK: Accounting

  package func tally(into tally: inout ByteTally) {
    for extent in extents {
      tally.add(
        extent.buffer, kind: \.payload,
        metadata: extent.encoding.metadataBytes(rows: extent.capacity, dim: dim))
      if let numbers = extent.map?.numbers { tally.add(numbers, kind: \.metadata) }
    }
    if let numbers = sharedMap?.numbers { tally.add(numbers, kind: \.metadata) }
  }

  /// Rebuilds a store from a saved cache; see `RowStore+Coding.swift`.
  package init(
    restoring extents: ContiguousArray<Extent>, bodyExtents: Int, dim: Int, format: SideFormat,
    fixedMap: RowMap? = nil, sharedMap: RowMap? = nil, isSparse: Bool = false
  ) {
    self.init(dim: dim, format: format, fixedMap: fixedMap, isSparse: isSparse)
    self.sharedMap = sharedMap
    self.extents = extents
    self.bodyExtents = bodyExtents
    bodyRows = extents[..<bodyExtents].reduce(0) { $0 + $1.rows }
    rows = extents.reduce(0) { $0 + $1.rows }
  }
}

/// Numbers for structures of stores.
private let structures = Atomic<UInt64>(0)
