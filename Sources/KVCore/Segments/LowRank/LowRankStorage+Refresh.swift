/// Bases that are made anew from what they describe and from new rows.
extension LowRankStorage {
  /// A side whose basis describes its old rows, as far as they were described before, and the new ones.
  func refreshed(
    _ side: Side, _ windows: [RowSegment], _ counts: [Int], isKey: Bool
  ) throws(KVError) -> Side {
    var side = side
    guard let old = side.basis else {
      let room = try write(windows, counts, into: &side, isKey: isKey)
      for index in side.stores.indices { side.stores[index].commit(room[index][...]) }
      return side
    }
    let width = old.width
    var factors: [Factors] = []
    var turns: [[Float]] = []
    let wanted = rank(isKey: isKey) ?? 0
    for unit in 0..<units {
      let latents = RowMatrix(
        rows: side.stores[unit].rows,
        columns: [.init(slices: side.stores[unit].slices(0..<side.stores[unit].rows), dim: old.ranks[unit])])
      let own = try backend.factor([latents], ranks: [old.ranks[unit]], options: format.factoring)[0]
      var matrix = matrix(windows, unit: unit, rows: counts[unit], isKey: isKey, scales: [])
      matrix.leading = weighted(own, old, unit: unit)
      let fresh = try backend.factor([matrix], ranks: [wanted], options: format.factoring)[0]
      factors.append(fresh)
      turns.append(try product(fresh, old.encoderRows(unit: unit, backend: backend), width: width))
    }
    let basis = try LatentBasis.make(
      factors, encoders: nil, type: format.basis, dim: old.dim, headsPerUnit: old.headsPerUnit, backend: backend)
    var result = Side(
      basis: basis, stores: basis.ranks.map { RowStore(dim: $0, format: latentFormat(keys: isKey)) })
    for unit in 0..<units {
      let rows = side.stores[unit].rows
      var targets: [RunSlice] = []
      try result.stores[unit].reserve(rows, backend: backend, into: &targets)
      let latents = RowMatrix(
        rows: rows, columns: [.init(slices: side.stores[unit].slices(0..<rows), dim: old.ranks[unit])])
      let results = try backend.project([
        Projection(matrix: latents, encoder: turns[unit], mean: [], targets: targets)
      ])
      try check(results, isKey: isKey)
      result.stores[unit].commit(targets[...])
    }
    let room = try write(windows, counts, into: &result, isKey: isKey)
    for index in result.stores.indices { result.stores[index].commit(room[index][...]) }
    return result
  }

  /// diag(s)·W·B: as many rows as the rank, with the Gram matrix of what A·B describes, where A = U·diag(s)·W.
  private func weighted(_ factors: Factors, _ old: LatentBasis, unit: Int) -> [Float] {
    let width = old.width
    var result = [Float](repeating: 0, count: factors.rank * width)
    if factors.basis.isEmpty { return result }
    var weights = factors.basis
    for i in 0..<factors.rank {
      for c in 0..<factors.width { weights[i * factors.width + c] *= Float(factors.singularValues[i]) }
    }
    var block = [Float](repeating: 0, count: factors.rank * old.dim)
    weights.withUnsafeMutableBytes { raw in
      guard let base = raw.baseAddress else { return }
      let slice = RunSlice(
        run: RowRun(encoding: .dense(.f32), dim: factors.width, capacity: factors.rank, base: base), first: 0,
        count: factors.rank)
      for head in 0..<old.headsPerUnit {
        block.withUnsafeMutableBufferPointer {
          backend.restore(
            [slice], basis: old.run(unit: unit, head: head), mean: nil, positions: nil, rotary: nil,
            into: $0.baseAddress!)
        }
        for i in 0..<factors.rank {
          for c in 0..<old.dim { result[i * width + head * old.dim + c] = block[i * old.dim + c] }
        }
      }
    }
    return result
  }

  /// New basis times old: [new rank][old rank].
  private func product(_ fresh: Factors, _ old: [Float], width: Int) throws(KVError) -> [Float] {
    let oldRank = old.count / max(width, 1)
    let count = fresh.rank * oldRank
    if fresh.basis.isEmpty || count == 0 { return [Float](repeating: 0, count: count) }
    let rows = UnsafeMutablePointer<Float>.allocate(capacity: fresh.basis.count)
    let result = UnsafeMutablePointer<Float>.allocate(capacity: count)
    defer {
      rows.deallocate()
      result.deallocate()
    }
    rows.update(from: fresh.basis, count: fresh.basis.count)
    func slice(_ base: UnsafeMutablePointer<Float>, _ dim: Int) -> RunSlice {
      RunSlice(
        run: RowRun(
          encoding: .dense(.f32), dim: dim, capacity: fresh.rank, base: UnsafeMutableRawPointer(base)), first: 0,
        count: fresh.rank)
    }
    _ = try backend.project([
      Projection(
        matrix: RowMatrix(rows: fresh.rank, columns: [.init(slices: [slice(rows, width)], dim: width)]),
        encoder: old, mean: [], targets: [slice(result, oldRank)])
    ])
    return Array(UnsafeBufferPointer(start: result, count: count))
  }
}
