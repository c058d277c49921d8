internal import CKVCUDA
package import KVCore

/// Keys that move to other positions, turned where they lie.
extension CUDABackend {
  package var turnsKeys: Bool { true }

  package func turn(_ turns: [KeyTurn], rotary: RotaryEmbedding, limit: Float, writes: Bool) -> Int? {
    // Lists of one launch fit into memory that is always there.
    let most = CUDABackend.stagingBytes / (MemoryLayout<kv_slice>.stride + 8) / 2
    var rows = 0
    for first in stride(from: 0, to: turns.count, by: most) {
      let part = turns[first..<min(first + most, turns.count)]
      if let found = turn(part, rotary, limit, writes: writes) { return rows + found }
      rows += part.reduce(0) { $0 + $1.slice.count }
    }
    return nil
  }

  /// Waits for the card only where it asks for something.
  private func turn(
    _ turns: ArraySlice<KeyTurn>, _ rotary: RotaryEmbedding, _ limit: Float, writes: Bool
  ) -> Int? {
    var found = UInt64.max
    exclusivelyRecording { scratch throws(KVError) in
      var layout = CUDALayout()
      let slices = layout.take(turns.count, of: kv_slice.self)
      let by = layout.take(turns.count, of: Int64.self)
      let frequencies = layout.take(rotary.pairs, of: Float.self)
      let base = try scratch.ring.bytes(layout.total, session)
      var rows = 0
      for (index, turn) in turns.enumerated() {
        (base + slices).assumingMemoryBound(to: kv_slice.self)[index] = turn.slice.kernelSlice(start: rows)
        (base + by).assumingMemoryBound(to: Int64.self)[index] = Int64(turn.by)
        rows += turn.slice.count
      }
      (base + frequencies).assumingMemoryBound(to: Float.self)
        .update(from: rotary.inverseFrequencies, count: rotary.pairs)
      let place = try scratch.pinned.bytes(256, session)
      if !writes { place.storeBytes(of: UInt64.max, as: UInt64.self) }
      let dim = turns.first?.slice.run.dim ?? 0
      session.launch(
        .turnKeys, x: rows == 0 ? 0 : gridBlocks(rows * (dim - rotary.pairs)), base + slices, base + by,
        UInt32(turns.count), UInt32(rows),
        kv_rotary(
          frequencies: UInt64(UInt(bitPattern: base + frequencies)), pairs: UInt32(rotary.pairs),
          interleaved: rotary.layout == .interleaved ? 1 : 0, rounded: 0, padding: 0), limit, UInt32(writes ? 1 : 0),
        place)
      if writes { return }
      session.synchronize()
      found = place.load(as: UInt64.self)
    }
    return found == .max ? nil : Int(found)
  }
}
