/// Rows that come in, and go out, as they are stored.
extension RowSegment {
  /// Appends encoded rows to every head; positions `firstPosition ...`. Nothing has changed when it throws.
  package func append(
    keys: borrowing EncodedRows, values: borrowing EncodedRows, firstPosition: Int, observed: [Float]
  ) throws(KVError) {
    try format.keys.check(keys.encoding, "keys")
    try format.values.check(values.encoding, "values")
    for head in 0..<kvHeads {
      let dense = (format.keys.body == nil ? 0 : rows(head).keys.tailRows)
      let denseValues = (format.values.body == nil ? 0 : rows(head).values.tailRows)
      guard dense == 0, denseValues == 0 else {
        throw KVError(
          .wrongPhase,
          "encoded rows go behind encoded rows; \(max(dense, denseValues)) tokens are still dense. Attend or commit them "
            + "first, and take a store without a residual", head: head)
      }
    }
    let count = keys.tokens
    // All memory first.
    var fresh: [(keys: RoomForRows, values: RoomForRows)] = []
    do throws(KVError) {
      for head in 0..<kvHeads {
        var room = (keys: RoomForRows(), values: RoomForRows())
        try withRows(head) { rows throws(KVError) in
          try rows.keys.makeRoom(count, &room.keys, backend: backend)
          try rows.values.makeRoom(count, &room.values, backend: backend)
          try rows.columns.reserve(next: firstPosition, adding: count, observed: observed.count, backend: backend)
        }
        fresh.append(room)
      }
    } catch {
      for head in 0..<kvHeads {
        withRows(head) { rows in
          rows.keys.cancelReservation()
          rows.values.cancelReservation()
        }
      }
      throw error
    }
    for head in 0..<kvHeads {
      let (backend, room) = (backend, fresh[head])
      RoomForRows.copy(keys, head: head, to: room.keys.slices, backend)
      RoomForRows.copy(values, head: head, to: room.values.slices, backend)
      withRows(head) { rows in
        rows.keys.commit(room.keys)
        rows.values.commit(room.values)
        rows.columns.append(next: firstPosition, adding: count, observed: observed)
      }
    }
  }

  package func encodedContents(head: Int) throws(KVError) -> EncodedContents {
    let rows = rows(head)
    var slots: ContiguousArray<Int32> = []
    appendLiveSlots(head: head, to: &slots)
    let live = slots.map { Int($0) }
    let slices = slices(head: head, slots: live)
    return EncodedContents(
      positions: live.map { rows.columns.positions[$0] }, keyEncoding: format.keys.settled,
      valueEncoding: format.values.settled,
      keys: try bytes(slices.keys, as: format.keys.settled), values: try bytes(slices.values, as: format.values.settled)
    )
  }

  private func bytes(_ slices: [RunSlice], as encoding: RowEncoding) throws(KVError) -> [UInt8] {
    guard encoding.carriesScales else {
      throw KVError(.unsupported, "the scales of \(encoding) lie apart from its rows")
    }
    var result: [UInt8] = []
    for slice in slices {
      guard slice.run.encoding == encoding else {
        throw KVError(.wrongPhase, "\(slice.count) tokens are not \(encoding) yet but \(slice.run.encoding)")
      }
      let row = encoding.payloadBytes(rows: 1, dim: slice.run.dim)
      let bytes = [UInt8](unsafeUninitializedCapacity: slice.count * row) { buffer, filled in
        if let base = buffer.baseAddress {
          backend.copy(from: slice.run.base + slice.first * row, toHost: base, byteCount: slice.count * row)
        }
        filled = slice.count * row
      }
      result += bytes
    }
    return result
  }
}

extension SideFormat {
  /// The encoding that rows end in.
  package var settled: RowEncoding { body ?? .dense(window) }

  fileprivate func check(_ encoding: RowEncoding, _ what: String) throws(KVError) {
    guard map == .none else {
      throw KVError(
        .unsupported, "the store rotates or scales \(what) before it encodes them; encoded rows would not be")
    }
    guard encoding == settled else {
      throw KVError(.invalidOption, "the store holds \(what) as \(settled); the rows are \(encoding)")
    }
  }
}

extension RowEncoding {
  /// Whether a row alone can be read: no scales lie behind the payload.
  package var carriesScales: Bool { kind == .dense || kind == .scaledFixed || kind == .ggml }
}

/// Where encoded rows will go: room in the last extent of the body, and new extents behind it; or the dense tail.
package struct RoomForRows {
  package var slices: [RunSlice] = []
  var inLast = 0
  var fresh: [Extent] = []

  package init() {}

  fileprivate static func copy(
    _ rows: borrowing EncodedRows, head: Int, to slices: [RunSlice], _ backend: any ComputeBackend
  ) {
    let row = rows.rowBytes
    var token = 0
    for slice in slices {
      let target = slice.run.base + slice.first * row
      if rows.tokenStride == row {
        backend.copy(from: rows.row(head: head, token: token), to: target, byteCount: slice.count * row)
      } else {
        for i in 0..<slice.count {
          backend.copy(from: rows.row(head: head, token: token + i), to: target + i * row, byteCount: row)
        }
      }
      token += slice.count
    }
  }
}
