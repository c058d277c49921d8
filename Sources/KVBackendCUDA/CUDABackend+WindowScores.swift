internal import CKVCUDA
internal import KVBackendCPU
package import KVCore
internal import Synchronization

/// Window attention for scorers: the attention kernels without values, then statistics of columns.
extension CUDABackend {
  package func windowScores(_ request: WindowScoreRequest, into scores: inout ScoreTable) {
    let total = request.heads.reduce(0) { $0 + $1.count }
    if total == 0 { return }
    do throws(KVError) {
      try exclusively { scratch throws(KVError) in try score(request, total, into: &scores, &scratch) }
    } catch {
      if error.code != .outOfMemory || request.heads.contains(where: { $0.lowRank != nil || $0.factored != nil }) {
        return session.record(error)
      }
      // Without memory for the logits of the window the host forms them a few rows at a time.
      let copies = HostRows(self)
      var request = request
      request.slices = copies.copy(request.slices)
      host.windowScores(request, into: &scores)
    }
  }

  private func score(
    _ request: WindowScoreRequest, _ total: Int, into scores: inout ScoreTable, _ scratch: inout Scratch
  ) throws(KVError) {
    let hasTotals = request.totals != nil
    // Queries were looked at when they were captured: what is found here interests nobody.
    let found = try scratch.columns.bytes(Self.faultBytes + (hasTotals ? 3 : 1) * total * 4, session)
    let columns = (found + Self.faultBytes).assumingMemoryBound(to: Float.self)
    let plan = windowPlan(request, to: columns)
    let staging = CUDADescriptions.Staging(queries: !session.accessible(request.queries), output: false)
    try describe(plan, [staging], &scratch, whole: true)
    let shares = try addShares(request, &scratch)
    var work = -1
    var next = 0
    for index in scratch.plan.statistics.indices {
      // One statistic for each list of rows that is not empty, in their order.
      repeat { work += 1 } while request.heads[work].count == 0
      let rows = request.heads[work]
      scratch.plan.setWindow(
        index, shares: shares.isEmpty ? 0 : shares[work],
        entropy: hasTotals ? UInt64(UInt(bitPattern: columns + total + next)) : 0,
        variance: hasTotals ? UInt64(UInt(bitPattern: columns + 2 * total + next)) : 0,
        past: rows.lowerBound(request.firstPosition))
      next += rows.count
    }
    try run(plan, &scratch, window: request.kernelRule, found: found)
    session.synchronize()
    next = 0
    for (index, rows) in request.heads.enumerated() {
      for row in 0..<rows.count { scores[index, row] = columns[next + row] }
      if let totals = request.totals, rows.count > 0 {
        for slot in next..<next + rows.lowerBound(request.firstPosition) {
          totals[rows.kvHead].entropy += Double(columns[total + slot])
          totals[rows.kvHead].variance += Double(columns[2 * total + slot])
        }
      }
      next += rows.count
    }
  }

  /// Scores of the window, one list after another in memory of the card; nothing waits.
  func attendWindow(
    _ request: WindowScoreRequest, to target: UnsafeMutableRawPointer, _ scratch: inout Scratch
  ) throws(KVError) {
    let plan = windowPlan(request, to: target.assumingMemoryBound(to: Float.self))
    let staging = CUDADescriptions.Staging(queries: !session.accessible(request.queries), output: false)
    try describe(plan, [staging], &scratch, whole: true)
    let found = try scratch.columns.bytes(Self.faultBytes, session)
    try run(plan, &scratch, window: request.kernelRule, found: found)
  }

  /// Attention without outputs, whose statistics go to `columns`, one list of rows after another.
  private func windowPlan(_ request: WindowScoreRequest, to columns: UnsafeMutablePointer<Float>) -> AttentionPlan {
    let plan = AttentionPlan()
    plan.slices = ContiguousArray(request.slices)
    var next = 0
    for rows in request.heads {
      var work = rows
      work.score = columns + next
      plan.rows.append(work)
      next += rows.count
    }
    // Nothing is written to an output of no channels.
    plan.sequences.append(
      SequenceWork(
        queries: UnsafeRawPointer(request.queries), queryType: .f32,
        queryHeadStride: request.window * request.keyDim, queryTokenStride: request.keyDim, output: columns,
        outputHeadStride: 0, outputTokenStride: 0, logSumExp: nil, tokens: request.window,
        kvHeads: (request.heads.map(\.kvHead).max() ?? 0) + 1, group: request.group, keyDim: request.keyDim,
        valueDim: 0, scale: request.scale, softcap: request.softcap, firstPosition: request.firstPosition,
        slidingWindow: 0, rotary: nil, work: 0..<plan.rows.count))
    return plan
  }

  /// For every list of rows: what an even share is for each query of the window, and which rows it sees. In pinned
  /// memory; empty where nobody asks.
  private func addShares(_ request: WindowScoreRequest, _ scratch: inout Scratch) throws(KVError) -> [UInt64] {
    guard request.statistic == .belowEvenShare else { return [] }
    let bytes = request.heads.count * request.window * MemoryLayout<kv_share>.stride
    let base = try scratch.pinned.bytes(bytes, session).assumingMemoryBound(to: kv_share.self)
    for token in 0..<request.window {
      let position = request.firstPosition + token
      var live = [Int](repeating: 0, count: (request.heads.map(\.kvHead).max() ?? 0) + 1)
      for rows in request.heads { live[rows.kvHead] += rows.live(upTo: position) }
      for (index, rows) in request.heads.enumerated() {
        base[index * request.window + token] = kv_share(
          share: 1 / Float(max(live[rows.kvHead], 1)), visible: UInt32(rows.lowerBound(position + 1)))
      }
    }
    return request.heads.indices.map { UInt64(UInt(bitPattern: base + $0 * request.window)) }
  }
}

extension WindowScoreRequest {
  fileprivate var kernelRule: kv_window_rule {
    var rule = kv_window_rule(
      statistic: 0, reduction: 0, group: UInt32(group), window: UInt32(window), gamma: 0)
    switch statistic {
    case .sum: break
    case .meanVariance(let gamma):
      rule.statistic = 1
      rule.gamma = gamma
    case .max: rule.statistic = 2
    case .belowEvenShare: rule.statistic = 3
    }
    switch reduction {
    case .mean: rule.reduction = 0
    case .max: rule.reduction = 1
    case .sum: rule.reduction = 2
    }
    return rule
  }
}

extension RowsWork {
  private func position(_ row: Int) -> Int { positions.map { Int($0[row]) } ?? firstPosition + row }

  /// First row whose position is at least `position`, of those in order.
  fileprivate func lowerBound(_ position: Int) -> Int {
    guard positions != nil else { return min(max(position - firstPosition, 0), count) }
    var low = sortedFrom
    var high = count
    while low < high {
      let middle = (low + high) / 2
      if self.position(middle) < position { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// Live rows at or before a position.
  fileprivate func live(upTo position: Int) -> Int {
    let visible = lowerBound(position + 1)
    guard let bias else { return visible }
    return (0..<visible).reduce(0) { $0 + (bias[$1] == -.infinity ? 0 : 1) }
  }
}
