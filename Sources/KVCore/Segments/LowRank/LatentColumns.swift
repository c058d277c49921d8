/// What the slots of one KV head carry beside their latents: positions, log biases, accumulated attention.
package struct LatentColumns {
  package private(set) var positions = PositionColumn()
  package private(set) var bias: Column<Float>?
  package private(set) var score: Column<Float>?
  package private(set) var dead = 0

  package init() {}

  package init(restoring positions: PositionColumn, bias: Column<Float>?, score: Column<Float>?, dead: Int) {
    self.positions = positions
    self.bias = bias
    self.score = score
    self.dead = dead
  }

  package var count: Int { positions.count }
  package var live: Int { count - dead }
  package func isLive(_ slot: Int) -> Bool { bias.map { $0[slot] != -.infinity } ?? true }

  /// The columns with the first `rows` slots of a head of rows behind them, all of which are alive.
  package func appending(
    _ rows: Int, of head: HeadRows, backend: any ComputeBackend
  ) throws(KVError) -> LatentColumns {
    var result = self
    let old = count
    try result.positions.append((0..<rows).map { head.positions[$0] }, backend: backend)
    if bias != nil || head.bias != nil {
      var column = Column<Float>()
      try column.reserve(old + rows, backend: backend)
      for slot in 0..<old { column.append(bias?[slot] ?? 0) }
      for slot in 0..<rows { column.append(head.bias?[slot] ?? 0) }
      result.bias = column
    }
    if score != nil || head.score != nil {
      var column = Column<Float>()
      try column.reserve(old + rows, backend: backend)
      for slot in 0..<old { column.append(score?[slot] ?? 0) }
      for slot in 0..<rows { column.append(head.score?[slot] ?? 0) }
      result.score = column
    }
    return result
  }

  /// Marks slots dead. Everything that can fail happens before the first slot changes.
  package mutating func drop(_ slots: [Int], backend: any ComputeBackend) throws(KVError) {
    if slots.isEmpty { return }
    if bias == nil {
      var column = Column<Float>()
      try column.reserve(count, backend: backend)
      column.append(repeating: 0, count: count)
      bias = column
    } else {
      try bias!.makeUnique(backend: backend)
    }
    for slot in slots where bias![slot] != -.infinity {
      bias!.set(slot, -.infinity)
      dead += 1
    }
  }

  /// The columns of the slots `kept` alone.
  package func gathered(_ kept: [Int], backend: any ComputeBackend) throws(KVError) -> LatentColumns {
    var result = LatentColumns()
    result.positions = try positions.gathered(kept, backend: backend)
    result.dead = kept.count { !isLive($0) }
    if let bias, kept.contains(where: { bias[$0] != 0 }) { result.bias = try bias.gathered(kept, backend: backend) }
    if let score { result.score = try score.gathered(kept, backend: backend) }
    return result
  }

  package mutating func forgetScores() { score = nil }

  package mutating func makeScoresUnique(backend: any ComputeBackend) throws(KVError) {
    if score != nil { try score!.makeUnique(backend: backend) }
  }

  package mutating func addScore(_ slot: Int, _ added: Float) {
    guard let old = score?[slot] else { return }
    score?.set(slot, old + added)
  }

  package func tally(into tally: inout ByteTally) {
    if let buffer = positions.explicit?.buffer { tally.add(buffer, kind: \.index) }
    if let buffer = bias?.buffer { tally.add(buffer, kind: \.metadata) }
    if let buffer = score?.buffer { tally.add(buffer, kind: \.state) }
  }

  package func checkInvariants() {
    precondition((1..<max(count, 1)).allSatisfy { positions[$0 - 1] < positions[$0] }, "positions increase")
    precondition((0..<count).count { !isLive($0) } == dead, "\(dead) dead slots counted")
    precondition(bias.map { $0.count == count } ?? true, "one bias per slot")
    precondition(score.map { $0.count == count } ?? true, "one score per slot")
  }
}
