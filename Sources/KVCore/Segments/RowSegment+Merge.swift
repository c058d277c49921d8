/// Rows that take others in.
///
/// Dense rows are rounded once to their type. Rows encoded one by one (per token) are encoded anew from the f32 sum: one
/// more error of encoding, for the rows that took something in. Groups of rows that are encoded together (per channel)
/// are never encoded again: a group with such a row is decoded once into dense rows, and stays dense.
extension RowSegment {
  package func merge(_ merges: [HeadMerges], head numbers: [Int]) throws(KVError) -> () -> Void {
    // Sums first: what can be wrong about them is known before anything changes.
    var keys: [RowRun?] = []
    var values: [RowRun?] = []
    var scratch: [Buffer] = []
    for (merge, head) in zip(merges, numbers) {
      keys.append(try sums(merge.keys, of: merge.keySlots, "key", head: head, keeping: &scratch))
      values.append(try sums(merge.values, of: merge.valueSlots, "value", head: head, keeping: &scratch))
    }
    var fresh: [(keys: RowStore, values: RowStore)] = []
    for (merge, head) in zip(merges, numbers) {
      let biased = merge.slots.contains { $0.logBias != 0 }
      let counted = merge.slots.contains { $0.count != 1 }
      try heads[head].columns.reserve(0, biased: biased, observed: 0, counted: counted, backend: backend)
      fresh.append(
        (
          try heads[head].keys.writable(merge.keySlots, backend: backend),
          try heads[head].values.writable(merge.valueSlots, backend: backend)
        ))
    }
    // Closures do not know that these are done with.
    let (prepared, memory, runs) = (fresh, scratch, (keys: keys, values: values))
    return { [self] in
      for (index, head) in numbers.enumerated() {
        let merge = merges[index]
        (heads[head].keys, heads[head].values) = prepared[index]
        if let run = runs.keys[index] { heads[head].keys.replace(merge.keySlots, with: run, backend: backend) }
        if let run = runs.values[index] { heads[head].values.replace(merge.valueSlots, with: run, backend: backend) }
        for slot in merge.slots {
          heads[head].columns.bias?.set(slot.slot, slot.logBias)
          heads[head].columns.counts?.set(slot.slot, UInt32(slot.count))
          for (plane, value) in slot.observed.enumerated() {
            heads[head].columns.observed?.set(slot.slot, plane: plane, value)
          }
        }
      }
      withExtendedLifetime(memory) {}
    }
  }

  /// The sums as rows of f32 in memory that `scratch` keeps.
  private func sums(
    _ mix: RowMix, of slots: [Int], _ name: String, head: Int, keeping scratch: inout [Buffer]
  ) throws(KVError) -> RowRun? {
    if mix.count == 0 { return nil }
    precondition(mix.count == slots.count, "\(mix.count) sums for \(slots.count) slots")
    let buffer = try backend.allocate(
      byteCount: mix.count * mix.dim * MemoryLayout<Float>.stride, hostVisible: true)
    scratch.append(buffer)
    let run = RowRun(encoding: .dense(.f32), dim: mix.dim, capacity: mix.count, base: buffer.base)
    if let bad = backend.mix(mix, into: run) {
      throw KVError(
        .unrepresentable,
        "a merged \(name) would be beyond ±\(min(mix.range.largest, mix.type.largestFinite)), the largest its store can "
          + "hold; store rows in a wider type, or merge by means instead of sums",
        head: head, position: position(head: head, slot: slots[bad]))
    }
    return run
  }
}
