/// Keys that move to other positions.
extension RowSegment {
  package func turnKeys(_ turns: [[SlotTurn]], rotary: RotaryEmbedding) throws(KVError) {
    for head in heads.indices {
      for turn in turns[head] {
        guard heads[head].keys.isDense(turn.slots) else {
          throw KVError(
            .unsupported,
            "a key that is encoded would be turned and encoded anew; drop rows before that, or store keys dense",
            head: head, position: position(head: head, slot: turn.slots.lowerBound))
        }
      }
    }
    var fresh: [RowStore] = []
    for head in heads.indices {
      fresh.append(
        try heads[head].keys.writable(turns[head].flatMap { Array($0.slots) }, backend: backend))
    }
    let limit = format.keys.largest(dim: layer.keyDim)
    var work: [KeyTurn] = []
    for head in heads.indices {
      for turn in turns[head] {
        fresh[head].forEachSlice(turn.slots) { work.append(KeyTurn(slice: $0, by: turn.by)) }
      }
    }
    if let bad = backend.turn(work, rotary: rotary, limit: limit, writes: false) {
      let place = place(bad, of: turns)
      throw KVError(
        .unrepresentable,
        "a turned key would be beyond ±\(limit), the largest its store can hold; store rows in a wider type",
        head: place.head, position: position(head: place.head, slot: place.slot))
    }
    for head in heads.indices { heads[head].keys = fresh[head] }
    _ = backend.turn(work, rotary: rotary, limit: limit, writes: true)
  }

  /// Where the row is that comes `index`-th among all that are turned.
  private func place(_ index: Int, of turns: [[SlotTurn]]) -> (head: Int, slot: Int) {
    var left = index
    for head in turns.indices {
      for turn in turns[head] {
        if left < turn.slots.count { return (head, turn.slots.lowerBound + left) }
        left -= turn.slots.count
      }
    }
    preconditionFailure("row \(index) of those turned")
  }
}

extension RowStore {
  /// Whether some rows lie as they came, in a type of floating point.
  func isDense(_ range: Range<Int>) -> Bool {
    var dense = true
    forEachSlice(range) { if $0.run.encoding.kind != .dense || $0.run.map != nil { dense = false } }
    return dense
  }
}
