/// Tiers of shared directions in a saved cache.
///
/// ```
/// JOIN   per head: rows count · slots that set the thresholds count · keys · values
///   side maybe threshold f32 · directions · lengths of each layer · exact rows count · rows of each layer
///        · their slots: capacity count, i32 each, ascending
/// SEGM   as `SharedSegment` writes it
/// ```
extension DirectionStorage {
  package func encode(to writer: inout ByteWriter) {
    for head in heads {
      writer.count(head.rows)
      writer.count(head.fixed)
      for side in [head.keys, head.values] {
        writer.bool(side.threshold != nil)
        if let threshold = side.threshold { writer.f32(threshold) }
        side.directions.encode(to: &writer, backend: backend)
        for lengths in side.lengths { lengths.encode(to: &writer, backend: backend) }
        writer.count(side.exactSlots.count)
        for rows in side.exact { rows.encode(to: &writer, backend: backend) }
        side.exactSlots.encode(to: &writer)
      }
    }
  }

  fileprivate func decode(from reader: inout ByteReader, tokensSeen: Int) throws(KVError) {
    var result = heads
    for head in result.indices {
      do throws(KVError) {
        // Tokens that moved back and forth between tiers may have several slots.
        let rows = try reader.count("shared rows", in: 0...SavedCache.maximumTokens)
        result[head].fixed = try reader.count("slots that set a threshold", in: 0...rows)
        try decode(&result[head].keys, rows, from: &reader)
        try decode(&result[head].values, rows, from: &reader)
      } catch {
        throw error.at(head: head)
      }
    }
    restore(result)
  }

  private func decode(_ side: inout Side, _ rows: Int, from reader: inout ByteReader) throws(KVError) {
    if try reader.bool("whether there is a threshold") {
      let threshold = try reader.f32("a threshold")
      guard !threshold.isNaN else { throw reader.corrupt("expected an angle or infinity; found \(threshold)") }
      side.threshold = threshold
    }
    side.directions = try RowStore(from: &reader, slots: rows, like: side.directions, backend: backend)
    for member in layers.indices {
      side.lengths[member] = try RowStore(from: &reader, slots: rows, like: side.lengths[member], backend: backend)
    }
    let exact = try reader.count("exact rows", in: 0...rows)
    for member in layers.indices {
      side.exact[member] = try RowStore(from: &reader, slots: exact, like: side.exact[member], backend: backend)
    }
    var last: Int32 = -1
    side.exactSlots = try Column<Int32>(from: &reader, count: exact, "ascending slots of rows", backend: backend) {
      slot in
      defer { last = slot }
      return slot > last && Int(slot) < rows
    }
  }
}

extension DirectionFormat {
  package func decodeSegment(
    from reader: inout ByteReader, layer: LayerShape, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) -> any Segment {
    try base.decodeSegment(from: &reader, layer: layer, tokensSeen: tokensSeen, backend: backend)
  }

  package func decodeStorage(
    from reader: inout ByteReader, layers: [Int], shape: ModelShape, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) -> any JointStorage {
    let storage = DirectionStorage(format: self, layers: layers, shape: shape.layers[layers[0]], backend: backend)
    try storage.decode(from: &reader, tokensSeen: tokensSeen)
    return storage
  }

  package func decodeSegment(
    from reader: inout ByteReader, on storage: any JointStorage, layer: Int, shape: ModelShape, tokensSeen: Int,
    backend: any ComputeBackend
  ) throws(KVError) -> any Segment {
    guard let storage = storage as? DirectionStorage else {
      throw reader.corrupt("expected shared directions of this layer")
    }
    return try DirectionSegment.decode(
      from: &reader, storage: storage, layer: layer, shape: shape.layers[layer], format: waiting(shape.layers[layer]),
      tokensSeen: tokensSeen, backend: backend)
  }
}
