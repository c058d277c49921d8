internal import CKVCUDA
package import KVCore

/// Choosing rows by their scores: one block of a kernel a head, and what comes to the host is the list of those that stay.
extension CUDABackend {
  package func selectsRows(of scores: Int) -> Bool { scores >= max(leastSelected, 1) }

  package func selectLargest(_ choices: [RowChoice]) -> [UInt32]? {
    let total = choices.reduce(0) { $0 + $1.count }
    let taken = choices.reduce(0) { $0 + $1.take }
    var result: [UInt32]?
    exclusivelyRecording(
      { scratch throws(KVError) in
        let table = try scratch.table.bytes((total + taken) * 4, session)
        // The lists and the scores at once: a ring that begins anew would overwrite the first.
        var layout = CUDALayout()
        let place = layout.take(1, of: UInt64.self)
        let list = layout.take(choices.count, of: kv_choice.self)
        let scores = layout.take(total, of: Float.self)
        let base = try scratch.ring.bytes(layout.total, session)
        (base + place).storeBytes(of: UInt64.max, as: UInt64.self)
        let items = (base + list).assumingMemoryBound(to: kv_choice.self)
        var (row, first) = (0, 0)
        for (index, choice) in choices.enumerated() {
          (base + scores).assumingMemoryBound(to: Float.self).advanced(by: row)
            .update(from: choice.scores, count: choice.count)
          items[index] = kv_choice(
            scores: UInt64(UInt(bitPattern: table + row * 4)), count: UInt32(choice.count), take: UInt32(choice.take),
            offset: UInt32(choice.offset), first: UInt32(first))
          row += choice.count
          first += choice.take
        }
        session.copy(to: table, from: base + scores, total * 4)
        let out = try scratch.columns.bytes(taken * 4, session)
        session.launch(.select, x: choices.count, base + list, table + total * 4, base + place)
        session.copy(to: out, from: table + total * 4, taken * 4)
        session.synchronize()
        result = chosen(in: out, taken)
      }, otherwise: {})
    return result.flatMap { isChoice($0, choices) ? $0 : nil }
  }

  /// After an error of the driver, which the next call throws, the memory holds anything.
  private func isChoice(_ rows: [UInt32], _ choices: [RowChoice]) -> Bool {
    var next = 0
    for choice in choices {
      for index in next..<next + choice.take
      where !(choice.offset..<choice.offset + choice.count).contains(Int(rows[index])) { return false }
      next += choice.take
    }
    return true
  }

  private func chosen(in memory: UnsafeMutableRawPointer, _ count: Int) -> [UInt32] {
    Array(UnsafeBufferPointer(start: memory.assumingMemoryBound(to: UInt32.self), count: count))
  }

  package func selectByWindow(_ request: WindowScoreRequest, _ choice: WindowChoice) -> ChosenRows? {
    let total = request.heads.reduce(0) { $0 + $1.count }
    let taken = choice.take.reduce(0, +)
    // The rule of `belowEvenShare` and totals are for the host.
    guard request.statistic == .sum, request.totals == nil, total > 0, taken > 0 else { return nil }
    var result: ChosenRows?
    exclusivelyRecording(
      { scratch throws(KVError) in
        // Scores, pooled scores, the chosen.
        let table = try scratch.table.bytes((2 * total + taken) * 4, session)
        try attendWindow(request, to: table, &scratch)
        let base = try lists(request, choice, table, total: total, &scratch)
        let heads = request.heads.count
        let longest = request.heads.map(\.count).max() ?? 0
        session.launch(
          .pool, x: gridBlocks(longest), y: heads, base.pooled, UInt32(choice.kernel),
          UInt32(choice.pooling == .max ? 1 : 0))
        let out = try scratch.columns.bytes(Self.faultBytes + taken * 4, session)
        // Behind what the attention of the window may put on record.
        let found = out + 64
        found.storeBytes(of: UInt64.max, as: UInt64.self)
        session.launch(.select, x: base.count, base.choices, table + 2 * total * 4, found)
        session.copy(to: out + Self.faultBytes, from: table + 2 * total * 4, taken * 4)
        session.synchronize()
        let place = found.load(as: UInt64.self)
        let rows = chosen(in: out + Self.faultBytes, taken)
        result = ChosenRows(rows: rows)
        if place != .max {
          let head = base.heads[Int(place >> 32)]
          result?.nan = (head, choice.candidates[head].lowerBound + Int(place & 0xffff_ffff))
        }
      }, otherwise: {})
    guard let result, session.isWell else { return nil }
    return result
  }

  /// What the two kernels read, in pinned memory; `heads` are those of the choices.
  private func lists(
    _ request: WindowScoreRequest, _ choice: WindowChoice, _ table: UnsafeMutableRawPointer, total: Int,
    _ scratch: inout Scratch
  ) throws(KVError) -> (
    pooled: UnsafeMutableRawPointer, choices: UnsafeMutableRawPointer, count: Int, heads: [Int]
  ) {
    var layout = CUDALayout()
    let pooled = layout.take(request.heads.count, of: kv_pooled.self)
    let choices = layout.take(request.heads.count, of: kv_choice.self)
    let base = try scratch.ring.bytes(layout.total, session)
    let (items, list) = (
      (base + pooled).assumingMemoryBound(to: kv_pooled.self), (base + choices).assumingMemoryBound(to: kv_choice.self)
    )
    var (next, first) = (0, 0)
    var heads: [Int] = []
    for (head, rows) in request.heads.enumerated() {
      let target = UInt64(UInt(bitPattern: table + (total + next) * 4))
      items[head] = kv_pooled(
        source: UInt64(UInt(bitPattern: table + next * 4)), target: target, count: UInt32(rows.count),
        past: UInt32(choice.past[head]))
      if choice.take[head] > 0 {
        let range = choice.candidates[head]
        list[heads.count] = kv_choice(
          scores: target + UInt64(range.lowerBound * 4), count: UInt32(range.count), take: UInt32(choice.take[head]),
          offset: UInt32(range.lowerBound), first: UInt32(first))
        heads.append(head)
      }
      next += rows.count
      first += choice.take[head]
    }
    return (base + pooled, base + choices, heads.count, heads)
  }
}
