/// The rows of a group as matrices, their bases, and their latents.
extension LowRankStorage {
  func dim(isKey: Bool) -> Int { isKey ? shape.keyDim : shape.valueDim }

  func matrix(_ windows: [RowSegment], unit: Int, rows: Int, isKey: Bool, scales: [Float]) -> RowMatrix {
    RowMatrix(
      rows: rows,
      columns: heads(of: unit).map { member, head in
        let held = windows[member].heads[head]
        return RowMatrix.Columns(
          slices: (isKey ? held.keys : held.values).slices(0..<rows), dim: dim(isKey: isKey),
          positions: held.columns.positions.explicit.map { column in column.withSpan { Array($0[..<rows]) } },
          firstPosition: held.columns.positions.first, rotary: isKey ? rotary : nil,
          scale: scales.isEmpty ? 1 : scales[member])
      })
  }

  func rank(isKey: Bool) -> Int? {
    (isKey ? format.keys : format.values).channels(
      width: headsPerUnit * dim(isKey: isKey), layers: layers.count, of: format.layersPerGroup)
  }

  func calibrated(isKey: Bool) -> CalibratedBasis? {
    guard let found = format.calibrated?[layers[0]] else { return nil }
    return isKey ? found.keys : found.values
  }

  /// A side without rows: its basis from the file or from these rows, and empty stores. With it a bound on the length of
  /// a latent row; infinite where none is known.
  func start(
    _ windows: [RowSegment], _ counts: [Int], isKey: Bool
  ) throws(KVError) -> (side: Side, norm: Double) {
    if isKey, format.joinedKeys != nil { return (Side(isJoined: true, stores: try rowStores(keys: true)), 0) }
    if !isKey, format.valueRows != nil { return (Side(stores: try rowStores(keys: false)), 0) }
    var norm = 0.0
    let width = headsPerUnit * dim(isKey: isKey)
    let basis: LatentBasis?
    if let made = calibrated(isKey: isKey) {
      let factors = (0..<units).map { made.factors(unit: $0, width: width, rank: rank(isKey: isKey)) }
      let encoders =
        made.encoders == nil
        ? nil : factors.indices.map { made.encoder(unit: $0, width: width, rank: factors[$0].rank) ?? [] }
      basis = try LatentBasis.make(
        factors, encoders: encoders, type: format.basis, dim: dim(isKey: isKey), headsPerUnit: headsPerUnit,
        backend: backend)
      norm = .infinity
    } else if let rank = rank(isKey: isKey), isWorthIt(rank, counts, width) {
      let found = try factor(windows, counts, rank, isKey: isKey)
      basis = found.basis
      norm = found.norm
    } else {
      basis = nil
    }
    let stores: [RowStore]
    if let basis {
      stores = basis.ranks.map { RowStore(dim: $0, format: latentFormat(keys: isKey)) }
    } else {
      stores = try rowStores(keys: isKey)
    }
    return (Side(basis: basis, stores: stores), norm)
  }

  /// Whether latents and their basis are fewer numbers than the rows.
  private func isWorthIt(_ rank: Int, _ counts: [Int], _ width: Int) -> Bool {
    if format.evenIfLarger { return true }
    let rows = counts.reduce(0, +)
    let latents = counts.reduce(0) { $0 + min(rank, $1) * ($1 + width) }
    return latents < rows * width
  }

  private func factor(
    _ windows: [RowSegment], _ counts: [Int], _ rank: Int, isKey: Bool
  ) throws(KVError) -> (basis: LatentBasis, norm: Double) {
    let scales =
      format.equalised && layers.count > 1 ? try norms(windows, counts, isKey: isKey).map { 1 / $0 } : []
    var options = format.factoring
    options.centred = format.centred
    var factors = try backend.factor(
      (0..<units).map { matrix(windows, unit: $0, rows: counts[$0], isKey: isKey, scales: scales) },
      ranks: counts.map { min(rank, $0) }, options: options)
    // An orthonormal basis makes no row longer.
    let norm = factors.map(\.energy).max()?.squareRoot() ?? 0
    var encoders: [[Float]]?
    if !scales.isEmpty {
      // Latents of scaled rows; the basis takes the scale back.
      var weights: [[Float]] = []
      for unit in factors.indices {
        var encoder = factors[unit].basis
        let dim = dim(isKey: isKey)
        for (block, place) in heads(of: unit).enumerated() {
          for row in 0..<(encoder.isEmpty ? 0 : factors[unit].rank) {
            for c in 0..<dim {
              let index = row * factors[unit].width + block * dim + c
              encoder[index] *= scales[place.member]
              factors[unit].basis[index] /= scales[place.member]
            }
          }
        }
        weights.append(encoder)
      }
      encoders = weights
    }
    let basis = try LatentBasis.make(
      factors, encoders: encoders, type: format.basis, dim: dim(isKey: isKey), headsPerUnit: headsPerUnit,
      backend: backend)
    return (basis, norm)
  }

  /// Frobenius norm of the rows of each layer; 1 where there is none.
  private func norms(_ windows: [RowSegment], _ counts: [Int], isKey: Bool) throws(KVError) -> [Float] {
    var norms: [Float] = []
    for member in layers.indices {
      var sum = 0.0
      for head in 0..<shape.kvHeads {
        let rows = counts[place(member: member, head: head).unit]
        let held = windows[member].heads[head]
        let columns = RowMatrix.Columns(
          slices: (isKey ? held.keys : held.values).slices(0..<rows), dim: dim(isKey: isKey))
        sum +=
          try backend.project([
            Projection(matrix: RowMatrix(rows: rows, columns: [columns]), encoder: [], mean: [], targets: [])
          ])[0].energy
      }
      norms.append(sum > 0 ? Float(sum.squareRoot()) : 1)
    }
    return norms
  }

  /// Writes rows behind those that count and returns where, per store.
  func write(
    _ windows: [RowSegment], _ counts: [Int], into side: inout Side, isKey: Bool
  ) throws(KVError) -> [[RunSlice]] {
    var room: [[RunSlice]] = []
    guard side.isShared else {
      for member in layers.indices {
        for head in 0..<shape.kvHeads {
          let rows = counts[place(member: member, head: head).unit]
          var targets: [RunSlice] = []
          try side.stores[room.count].reserve(rows, backend: backend, into: &targets)
          let held = windows[member].heads[head]
          var source = (isKey ? held.keys : held.values).slices(0..<rows)[...]
          for target in targets {
            backend.transcode(RunSlice.take(target.count, from: &source), to: target.run, row: target.first)
          }
          room.append(targets)
        }
      }
      return room
    }
    var projections: [Projection] = []
    for unit in 0..<units {
      var targets: [RunSlice] = []
      try side.stores[unit].reserve(counts[unit], backend: backend, into: &targets)
      room.append(targets)
      projections.append(
        Projection(
          matrix: matrix(windows, unit: unit, rows: counts[unit], isKey: isKey, scales: []),
          encoder: side.basis?.encoderRows(unit: unit, backend: backend),
          mean: side.basis?.meanRow(unit: unit, backend: backend) ?? [], targets: targets))
    }
    let results = try backend.project(projections)
    // Rows were checked against what they become when they came.
    if side.basis != nil { try check(results, isKey: isKey) }
    return room
  }

  /// Refuses latents that their format cannot hold before any row has become one. A basis rounded to its type may make
  /// rows a little longer.
  func checkAll(
    _ side: Side, norm: Double, _ windows: [RowSegment], _ counts: [Int], isKey: Bool
  ) throws(KVError) {
    guard let basis = side.basis, norm * 1.01 > Double(largestLatent(isKey: isKey)) else { return }
    let projections = (0..<units).map { unit in
      Projection(
        matrix: matrix(windows, unit: unit, rows: counts[unit], isKey: isKey, scales: []),
        encoder: basis.encoderRows(unit: unit, backend: backend), mean: basis.meanRow(unit: unit, backend: backend),
        targets: [])
    }
    try check(backend.project(projections), isKey: isKey)
  }

  private func largestLatent(isKey: Bool) -> Float {
    let latents = latentFormat(keys: isKey)
    return min(latents.range(dim: 1).largest, latents.window.largestFinite)
  }

  /// Latents are longer than rows: what a row's type holds need not be enough for them.
  func check(_ results: [ProjectionResult], isKey: Bool) throws(KVError) {
    let limit = largestLatent(isKey: isKey)
    let largest = results.map(\.largest).reduce(0) { $1 <= $0 ? $0 : $1 }
    guard largest <= limit else {
      throw KVError(
        .unrepresentable,
        "latents of \(isKey ? "keys" : "values") reach \(largest), more than ±\(limit); hold them in a wider type "
          + "(latents=bf16 or f32)", layer: layers[0])
    }
  }
}
