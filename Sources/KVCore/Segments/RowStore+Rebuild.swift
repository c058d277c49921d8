/// A store without some of its rows.
extension RowStore {
  /// A store with the rows flagged in `physical` only, in order. Units (per-channel groups) that keep all their rows
  /// are copied code by code; of others the remaining rows are decoded once, into dense rows.
  ///
  /// - Parameter thawed: rows whose units are decoded though they are whole; nil: none.
  package func rebuilt(
    physical: [Bool], thawed: [Bool]? = nil, backend: any ComputeBackend
  ) throws(KVError) -> RowStore {
    var result = RowStore(dim: dim, format: format, fixedMap: fixedMap, isSparse: isSparse)
    result.sharedMap = sharedMap
    var pieces = PieceList()
    var start = 0
    for (index, extent) in extents.enumerated() {
      if index == bodyExtents { try result.appendBody(&pieces, backend: backend) }
      let unit = extent.encoding.rowsPerUnit
      let run = extent.run(dim: dim)
      if unit == 1 {
        pieces.append(
          flagged: physical[start..<start + extent.rows], of: run, first: extent.first, as: extent.encoding,
          map: extent.map)
      } else {
        for group in stride(from: 0, to: extent.rows, by: unit) {
          let flags = physical[start + group..<start + group + unit]
          let thaws = thawed.map { $0[start + group..<start + group + unit].contains(true) } ?? false
          let whole = flags.allSatisfy { $0 } && !thaws
          pieces.append(
            flagged: flags, of: run, first: extent.first + group,
            as: whole ? extent.encoding : .dense(format.window), map: whole ? extent.map : nil)
        }
      }
      start += extent.rows
    }
    if extents.count <= bodyExtents { try result.appendBody(&pieces, backend: backend) }
    try result.appendTail(&pieces, backend: backend)
    return result
  }

  private mutating func appendBody(_ pieces: inout PieceList, backend: any ComputeBackend) throws(KVError) {
    try appendExtents(&pieces, growth: 0, backend: backend)
    bodyExtents = extents.count
    bodyRows = rows
  }

  private mutating func appendTail(_ pieces: inout PieceList, backend: any ComputeBackend) throws(KVError) {
    try appendExtents(&pieces, growth: isSparse ? 0 : format.growth, backend: backend)
  }

  private mutating func appendExtents(
    _ pieces: inout PieceList, growth: Int, backend: any ComputeBackend
  ) throws(KVError) {
    for piece in pieces.list {
      var extent = try Extent(
        encoding: piece.encoding, capacity: max(piece.rows, growth), dim: dim, map: piece.map, backend: backend)
      backend.transcode(piece.sources, to: extent.run(dim: dim), row: 0)
      extent.rows = piece.rows
      extents.append(extent)
      rows += piece.rows
    }
    pieces.list.removeAll()
  }
}

/// Rows on their way into new extents, grouped by the encoding they will have.
private struct PieceList {
  struct Piece {
    var encoding: RowEncoding
    var map: RowMap?
    var rows: Int
    var sources: [RunSlice]
  }

  var list: [Piece] = []

  mutating func append(
    flagged: ArraySlice<Bool>, of run: RowRun, first: Int, as encoding: RowEncoding, map: RowMap?
  ) {
    flagged.withUnsafeBufferPointer { flags in
      var index = 0
      while index < flags.count {
        guard flags[index] else {
          index += 1
          continue
        }
        var end = index
        while end < flags.count, flags[end] { end += 1 }
        add(run, first + index, end - index, encoding, map)
        index = end
      }
    }
  }

  private mutating func add(_ run: RowRun, _ first: Int, _ count: Int, _ encoding: RowEncoding, _ map: RowMap?) {
    let most = RowStore.extentRows(encoding, dim: run.dim)
    var first = first
    var left = count
    while left > 0 {
      if list.last.map({ $0.encoding != encoding || $0.map !== map || $0.rows >= most }) ?? true {
        list.append(Piece(encoding: encoding, map: map, rows: 0, sources: []))
      }
      let last = list.count - 1
      let unit = encoding.rowsPerUnit
      let room = max((most - list[last].rows) / unit * unit, unit)
      let taken = min(left, room)
      list[last].sources.append(RunSlice(run: run, first: first, count: taken))
      list[last].rows += taken
      first += taken
      left -= taken
    }
  }
}
