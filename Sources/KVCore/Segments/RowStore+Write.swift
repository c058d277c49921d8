/// Rows that change, and rows that move down over others, inside the memory of a store.
extension RowStore {
  // MARK: Replacing rows

  /// The same store with memory of its own for some rows, ascending, that can be written row by row: what forks share is
  /// copied, and units that hold any of them are decoded once into dense rows, as when most of a unit was dropped. This
  /// store stays as it is.
  package mutating func writable(_ slots: [Int], backend: any ComputeBackend) throws(KVError) -> RowStore {
    var thawed: [Bool]?
    var start = 0
    var next = 0
    var shared: [Int] = []
    for index in extents.indices {
      let end = start + extents[index].rows
      let first = next
      while next < slots.count, slots[next] < end { next += 1 }
      if next > first {
        if !isKnownUniquelyReferenced(&extents[index].buffer) { shared.append(index) }
        if extents[index].encoding.rowsPerUnit > 1 {
          if thawed == nil { thawed = Array(repeating: false, count: rows) }
          for slot in slots[first..<next] { thawed![slot] = true }
        }
      }
      start = end
    }
    if let thawed {
      // Its memory is new.
      return try rebuilt(physical: Array(repeating: true, count: rows), thawed: thawed, backend: backend)
    }
    var result = self
    for index in shared {
      let extent = extents[index]
      var copy = try Extent(
        encoding: extent.encoding, capacity: extent.capacity, dim: dim, map: extent.map, backend: backend)
      backend.transcode(
        [RunSlice(run: extent.run(dim: dim), first: extent.first, count: extent.rows)], to: copy.run(dim: dim),
        row: extent.first)
      copy.first = extent.first
      copy.rows = extent.rows
      result.extents[index] = copy
    }
    return result
  }

  /// Writes row i of `source` to slot `slots[i]`, ascending, converting or encoding each row anew. They are writable.
  package func replace(_ slots: [Int], with source: RowRun, backend: any ComputeBackend) {
    var index = 0
    while index < slots.count {
      var end = index + 1
      while end < slots.count, slots[end] == slots[end - 1] + 1 { end += 1 }
      forEachSlice(slots[index]..<slots[end - 1] + 1) { slice in
        backend.transcode([RunSlice(run: source, first: index, count: slice.count)], to: slice.run, row: slice.first)
        index += slice.count
      }
    }
  }

  // MARK: Closing gaps

  /// Whether all rows are dense and in memory that no fork reads.
  package mutating func movesInPlace(_ backend: any ComputeBackend) -> Bool {
    if bodyRows > 0 || !backend.movesOverlappingRows { return false }
    for index in extents.indices where !isKnownUniquelyReferenced(&extents[index].buffer) { return false }
    return true
  }

  /// Moves live rows down over dead ones, inside the extents. Extents behind the last row are given back, but for one
  /// that is not larger than what new rows would open: it is their room.
  package mutating func compact(without bias: UnsafePointer<Float>, backend: any ComputeBackend) {
    var to = (extent: 0, row: 0)
    var from = (extent: 0, row: 0)
    var slot = 0
    var moved = 0
    var moving = false
    while slot < rows {
      while from.row == extents[from.extent].rows { from = (from.extent + 1, 0) }
      let dead = bias[slot] == -.infinity
      var end = slot + 1
      let limit = min(rows, slot + extents[from.extent].rows - from.row)
      while end < limit, (bias[end] == -.infinity) == dead { end += 1 }
      var left = end - slot
      if dead {
        moving = true
        from.row += left
      }
      while !dead, left > 0 {
        while to.row == extents[to.extent].rows { to = (to.extent + 1, 0) }
        let taken = min(left, extents[to.extent].rows - to.row)
        if moving {
          backend.moveRows(
            RunSlice(
              run: extents[from.extent].run(dim: dim), first: extents[from.extent].first + from.row, count: taken),
            to: extents[to.extent].run(dim: dim), row: extents[to.extent].first + to.row)
        }
        to.row += taken
        from.row += taken
        moved += taken
        left -= taken
      }
      slot = end
    }
    rows = 0
    for index in extents.indices {
      extents[index].rows = min(extents[index].rows, moved - rows)
      rows += extents[index].rows
    }
    while extents.count > 1, let last = extents.last, last.rows == 0,
      extents[extents.count - 2].rows == 0 || last.capacity > format.growth
    {
      extents.removeLast()
    }
  }
}
