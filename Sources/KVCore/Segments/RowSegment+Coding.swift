/// Row segments in a saved cache, drawn in ``SavedCache``.
extension RowSegment {
  package func encode(to writer: inout ByteWriter) {
    writer.count(heads.count)
    for head in heads { head.encode(to: &writer, backend: backend) }
  }
}

extension RowFormat {
  package func decodeSegment(
    from reader: inout ByteReader, layer: LayerShape, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) -> any Segment {
    let count = try reader.count("heads of a segment")
    guard count == layer.kvHeads else {
      throw reader.corrupt("expected all \(layer.kvHeads) KV heads; found \(count)")
    }
    var heads: [HeadRows] = []
    let empty = HeadRows(keyDim: layer.keyDim, valueDim: layer.valueDim, keys: keys, values: values)
    for head in 0..<count {
      do throws(KVError) {
        var rows = empty
        try rows.decode(from: &reader, tokensSeen: tokensSeen, backend: backend)
        heads.append(rows)
      } catch {
        throw error.at(head: head)
      }
    }
    return RowSegment(restoring: heads, layer: layer, format: self, backend: backend)
  }
}

extension HeadRows {
  fileprivate func encode(to writer: inout ByteWriter, backend: any ComputeBackend) {
    columns.encode(to: &writer)
    keys.encode(to: &writer, backend: backend)
    values.encode(to: &writer, backend: backend)
    columns.encodeCounts(to: &writer)
  }

  /// Fills empty rows.
  fileprivate mutating func decode(
    from reader: inout ByteReader, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) {
    columns = try SlotColumns(from: &reader, tokensSeen: tokensSeen, backend: backend)
    keys = try RowStore(from: &reader, slots: slots, like: keys, backend: backend)
    values = try RowStore(from: &reader, slots: slots, like: values, backend: backend)
    try columns.decodeCounts(from: &reader, tokensSeen: tokensSeen, backend: backend)
  }
}

// MARK: - Columns

extension Column where Element: StoredNumber {
  func encode(to writer: inout ByteWriter) {
    writer.count(Swift.min(capacity, Column.roomiest(count)))
    guard let base else { return }
    for plane in 0..<width {
      for slot in 0..<count { writer.array([base[plane * capacity + slot]]) }
    }
  }

  /// - Parameter accepts: whether a value may be there.
  init(
    from reader: inout ByteReader, width: Int = 1, count: Int, _ what: String, backend: any ComputeBackend,
    accepts: (Element) -> Bool
  ) throws(KVError) {
    self.init(width: width)
    let capacity = try reader.count("room for \(what)", in: count...Column.roomiest(count))
    let place = reader
    let values = try reader.array(of: Element.self, count: count * width, what)
    for (index, value) in values.enumerated() where !accepts(value) {
      throw place.corrupt("unexpected \(value) among the \(what), in slot \(index % count)")
    }
    try reserve(capacity, backend: backend)
    guard let zero = values.first else { return }
    append(repeating: zero, count: count)
    for (index, value) in values.enumerated() { set(index % count, plane: index / count, value) }
  }
}

extension PositionColumn {
  func encode(to writer: inout ByteWriter) {
    writer.u8(explicit == nil ? 0 : isAscending ? 1 : 2)
    if let explicit {
      explicit.encode(to: &writer)
    } else {
      writer.count(count == 0 ? 0 : first)
    }
  }

  init(
    from reader: inout ByteReader, count: Int, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) {
    let place = reader
    let form = try reader.u8("how positions are listed")
    switch form {
    case 0:
      let first = try reader.count("the first position", in: 0...(tokensSeen - count))
      self.init(restoring: nil, first: first, count: count)
    case 1, 2:
      var last: Int32 = -1
      let what = form == 1 ? "ascending positions" : "positions"
      let column = try Column<Int32>(from: &reader, count: count, what, backend: backend) { position in
        defer { last = position }
        return position > (form == 1 ? last : -1) && Int(position) < tokensSeen
      }
      self.init(restoring: column, first: count == 0 ? 0 : Int(column[0]), count: count)
      guard isAscending == (form == 1) else { throw place.corrupt("expected positions in no order; they ascend") }
    default:
      throw place.corrupt(
        "expected positions listed as 0 (consecutive), 1 (ascending) or 2 (in no order); found \(form)")
    }
  }
}
