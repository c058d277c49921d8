/// What latents of one side are multiplied by, for every unit of heads that share latents. Written once, shared by forks.
///
/// ```
/// decoder   unit 0: head block 0 [rank 0][dim] │ head block 1 [rank 0][dim] │ …   unit 1: …    in `type`
/// encoder   unit 0: [rank 0][width 0] │ …                                                       f32, where it is not the decoder
/// mean      unit 0: [width 0] │ …                                                               f32
/// ```
package final class LatentBasis {
  package let type: ElementType
  /// Latent channels of each unit.
  package let ranks: [Int]
  /// Channels of a row of one head.
  package let dim: Int
  /// Heads of a unit, those of the first layer first.
  package let headsPerUnit: Int
  package let decoder: Buffer
  package let encoder: Buffer?
  package let mean: Buffer?

  package var width: Int { headsPerUnit * dim }

  package init(
    type: ElementType, ranks: [Int], dim: Int, headsPerUnit: Int, decoder: Buffer, encoder: Buffer?, mean: Buffer?
  ) {
    self.type = type
    self.ranks = ranks
    self.dim = dim
    self.headsPerUnit = headsPerUnit
    self.decoder = decoder
    self.encoder = encoder
    self.mean = mean
  }

  /// Memory for a basis of these sizes, contents unspecified.
  package static func allocate(
    type: ElementType, ranks: [Int], dim: Int, headsPerUnit: Int, encoder: Bool, mean: Bool,
    backend: any ComputeBackend
  ) throws(KVError) -> LatentBasis {
    let width = headsPerUnit * dim
    let elements = ranks.reduce(0, +) * width
    return LatentBasis(
      type: type, ranks: ranks, dim: dim, headsPerUnit: headsPerUnit,
      decoder: try backend.allocate(byteCount: elements * type.byteCount, hostVisible: false),
      encoder: encoder ? try backend.allocate(byteCount: elements * 4, hostVisible: false) : nil,
      mean: mean ? try backend.allocate(byteCount: ranks.count * width * 4, hostVisible: false) : nil)
  }

  /// A basis from what a factorisation found, one per unit. `encoders` differ from the bases where those are not
  /// orthonormal.
  package static func make(
    _ factors: [Factors], encoders: [[Float]]?, type: ElementType, dim: Int, headsPerUnit: Int,
    backend: any ComputeBackend
  ) throws(KVError) -> LatentBasis {
    let basis = try allocate(
      type: type, ranks: factors.map(\.rank), dim: dim, headsPerUnit: headsPerUnit, encoder: encoders != nil,
      mean: factors.contains { !$0.mean.isEmpty }, backend: backend)
    for (unit, factor) in factors.enumerated() {
      basis.write(factor.basis, unit: unit, backend: backend)
      if let encoders, let buffer = basis.encoder, !encoders[unit].isEmpty {
        backend.copy(
          from: encoders[unit], to: buffer.base + basis.elementsBefore(unit) * 4, byteCount: encoders[unit].count * 4)
      }
      if let buffer = basis.mean, !factor.mean.isEmpty {
        backend.copy(from: factor.mean, to: buffer.base + unit * basis.width * 4, byteCount: basis.width * 4)
      }
    }
    return basis
  }

  private func elementsBefore(_ unit: Int) -> Int { ranks[..<unit].reduce(0, +) * width }

  /// Rows [rank][width] into head blocks, rounded to the type.
  private func write(_ rows: [Float], unit: Int, backend: any ComputeBackend) {
    if rows.isEmpty { return }
    let rank = ranks[unit]
    for head in 0..<headsPerUnit {
      var block: [Float] = []
      block.reserveCapacity(rank * dim)
      for row in 0..<rank { block += rows[row * width + head * dim..<row * width + (head + 1) * dim] }
      block.withUnsafeMutableBytes { raw in
        guard let base = raw.baseAddress else { return }
        backend.transcode(
          [RunSlice(run: RowRun(encoding: .dense(.f32), dim: dim, capacity: rank, base: base), first: 0, count: rank)],
          to: run(unit: unit, head: head), row: 0)
      }
    }
  }

  /// The rows that restore one head of a unit.
  package func run(unit: Int, head: Int) -> RowRun {
    let start = elementsBefore(unit) + head * ranks[unit] * dim
    return RowRun(
      encoding: .dense(type), dim: dim, capacity: ranks[unit], base: decoder.base + start * type.byteCount)
  }

  package func meanPointer(unit: Int, head: Int) -> UnsafePointer<Float>? {
    mean.map { UnsafePointer(($0.base + (unit * width + head * dim) * 4).assumingMemoryBound(to: Float.self)) }
  }

  /// The weights that make latents of rows, [rank][width], as f32.
  package func encoderRows(unit: Int, backend: any ComputeBackend) -> [Float] {
    let rank = ranks[unit]
    var rows = [Float](repeating: 0, count: rank * width)
    if rows.isEmpty { return rows }
    if let encoder {
      rows.withUnsafeMutableBytes {
        backend.copy(
          from: encoder.base + elementsBefore(unit) * 4, toHost: $0.baseAddress!, byteCount: rank * width * 4)
      }
      return rows
    }
    rows.withUnsafeMutableBufferPointer { buffer in
      guard let base = buffer.baseAddress else { return }
      for head in 0..<headsPerUnit {
        backend.read(
          RunSlice(run: run(unit: unit, head: head), first: 0, count: rank), into: base + head * dim, stride: width)
      }
    }
    return rows
  }

  /// [width]; empty for none.
  package func meanRow(unit: Int, backend: any ComputeBackend) -> [Float] {
    guard let mean else { return [] }
    var row = [Float](repeating: 0, count: width)
    row.withUnsafeMutableBytes {
      backend.copy(from: mean.base + unit * width * 4, toHost: $0.baseAddress!, byteCount: width * 4)
    }
    return row
  }

  package func tally(into tally: inout ByteTally) {
    tally.add(decoder, kind: \.metadata)
    if let encoder { tally.add(encoder, kind: \.metadata) }
    if let mean { tally.add(mean, kind: \.metadata) }
  }
}
