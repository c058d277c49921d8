internal import CKVCUDA
internal import KVBackendCPU
package import KVCore
internal import Synchronization

/// Latents. Bases are found with cuBLAS and cuSOLVER where they are installed, and rows projected on them where they lie;
/// else on the host, over copies of the rows, with the BLAS of the processor. Restoring happens on the card.
extension CUDABackend {
  package var holdsLatents: Bool { true }

  package func factor(
    _ matrices: [RowMatrix], ranks: [Int], options: FactorOptions
  ) throws(KVError) -> [Factors] {
    precondition(matrices.count == ranks.count, "\(ranks.count) ranks for \(matrices.count) matrices")
    try session.surviving()
    guard let algebra = try cardAlgebra() else { return try factorOnHost(matrices, ranks: ranks, options: options) }
    var factors: [Factors] = []
    for (index, matrix) in matrices.enumerated() {
      var own = options
      if let report = options.progress {
        let count = Double(matrices.count)
        own.progress = { share in report((Double(index) + share) / count) }
      }
      factors.append(try CUDAFactorisation(matrix, rank: ranks[index], own, algebra, self).run())
    }
    return factors
  }

  private func factorOnHost(
    _ matrices: [RowMatrix], ranks: [Int], options: FactorOptions
  ) throws(KVError) -> [Factors] {
    let copies = HostRows(self)
    let own = matrices.map { matrix in
      var matrix = matrix
      for index in matrix.columns.indices { matrix.columns[index].slices = copies.copy(matrix.columns[index].slices) }
      return matrix
    }
    try session.surviving()
    let factors = try host.factor(own, ranks: ranks, options: options)
    withExtendedLifetime(copies) {}
    return factors
  }

  package func project(_ projections: [Projection]) throws(KVError) -> [ProjectionResult] {
    try session.surviving()
    guard let algebra = try cardAlgebra() else { return try projectOnHost(projections) }
    var results: [ProjectionResult] = []
    for projection in projections { results.append(try project(projection, algebra)) }
    return results
  }

  /// Numbers whose magnitudes a block sums.
  private static let measured = 1 << 14

  private func project(_ projection: Projection, _ algebra: CUDAAlgebra) throws(KVError) -> ProjectionResult {
    let workspace = CUDAWorkspace(self)
    defer { withExtendedLifetime(workspace) {} }
    var matrix = try CUDAMatrix(projection.matrix, workspace, self)
    try matrix.subtract(projection.mean)
    let (height, width) = (matrix.height, matrix.width)
    var result = ProjectionResult()
    if height * width == 0 { return result }
    let rank = projection.encoder.map { $0.count / width } ?? width
    let block = min(FactorRoute.blockRows(height: height, width: width), height)
    let rows = try workspace.take(block * width, of: Float.self)
    var latents = rows
    var encoder: UnsafeMutablePointer<Float>?
    if let weights = projection.encoder, rank > 0 {
      let held = try workspace.take(rank * width, of: Float.self)
      session.copy(to: held, from: weights, rank * width * 4)
      encoder = held
      latents = try workspace.take(block * rank, of: Float.self)
    }
    func sums(_ count: Int) -> Int { (count + CUDABackend.measured - 1) / CUDABackend.measured }
    let (most, mostLatents) = (sums(block * width), sums(block * rank))
    let measures = try workspace.take(2 * (most + mostLatents), of: Double.self)
    for first in stride(from: 0, to: height, by: block) {
      let range = first..<min(first + block, height)
      try exclusively { scratch throws(KVError) in
        try matrix.load(range, into: rows, &scratch)
        if let encoder {
          try algebra.multiply(
            rows, width, transposed: false, encoder, width, transposed: true, m: range.count, n: rank, k: width,
            into: latents, rank)
        }
        session.launch(
          .magnitudes, x: sums(range.count * width), rows, UInt64(range.count * width), UInt32(CUDABackend.measured),
          measures)
        session.launch(
          .magnitudes, x: sums(range.count * rank), latents, UInt64(range.count * rank), UInt32(CUDABackend.measured),
          measures + 2 * most)
        try write(latents, range, rank, to: projection.targets, &scratch)
      }
      let found: [Double] = try fetch(measures, 2 * (most + mostLatents))
      for index in 0..<sums(range.count * width) { result.energy += found[2 * index] }
      for index in most..<most + sums(range.count * rank) {
        result.kept += found[2 * index]
        result.largest = max(result.largest, Float(found[2 * index + 1]))
      }
    }
    return result
  }

  /// Queues latents of rows `range` on their way to the rows they belong to.
  private func write(
    _ latents: UnsafeMutablePointer<Float>, _ range: Range<Int>, _ rank: Int, to targets: [RunSlice],
    _ scratch: inout Scratch
  ) throws(KVError) {
    if rank == 0 { return }
    try targets.forEachPart(in: range) { (target, offset) throws(KVError) in
      let source = latents + offset * rank
      if session.accessible(target.run.base) {
        let run = RowRun(
          encoding: .dense(.f32), dim: rank, capacity: target.count, base: UnsafeMutableRawPointer(source))
        let list = try self.list([RunSlice(run: run, first: 0, count: target.count)], &scratch)
        encode(list, 1, rows: target.count, to: target.run, row: target.first)
      } else {
        precondition(target.run.encoding.type == .f32, "\(target.run.encoding) rows in ordinary memory")
        session.copy(to: target.run.base + target.first * rank * 4, from: source, target.count * rank * 4)
      }
    }
  }

  private func projectOnHost(_ projections: [Projection]) throws(KVError) -> [ProjectionResult] {
    let copies = HostRows(self)
    var results: [ProjectionResult] = []
    for projection in projections {
      var own = projection
      for index in own.matrix.columns.indices {
        own.matrix.columns[index].slices = copies.copy(own.matrix.columns[index].slices)
      }
      // The same products as on the CPU, rounded once to the type of the store; then over the bus.
      let width = projection.matrix.width
      let rank = width == 0 ? 0 : projection.encoder.map { $0.count / width } ?? width
      let count = projection.targets.reduce(0) { $0 + $1.count }
      let type = projection.targets.first?.run.encoding.type ?? .f32
      let memory = UnsafeMutableRawPointer.allocate(
        byteCount: max(count * rank * type.byteCount, 64), alignment: 64)
      defer { memory.deallocate() }
      own.targets = [
        RunSlice(
          run: RowRun(encoding: .dense(type), dim: rank, capacity: count, base: memory), first: 0, count: count)
      ]
      results += host.project([own])
      var next = memory
      for target in projection.targets {
        let bytes = target.count * rank * type.byteCount
        session.copy(to: target.run.base + target.first * rank * type.byteCount, from: next, bytes)
        next += bytes
      }
      session.synchronize()
      try session.surviving()
    }
    return results
  }

  package func restore(
    _ latents: [RunSlice], basis: RowRun, mean: UnsafePointer<Float>?, positions: [Int32]?,
    rotary: RotaryEmbedding?, into destination: UnsafeMutablePointer<Float>
  ) {
    let count = latents.reduce(0) { $0 + $1.count }
    let dim = basis.dim
    if count == 0 || dim == 0 { return }
    exclusivelyRecording { scratch throws(KVError) in
      let offset = (count * dim + 63) / 64 * 64
      let (latents, held) = try near(latents)
      defer { withExtendedLifetime(held) {} }
      let table = try loadTable(latents, &scratch, offset: offset)
      let rows = table - offset
      restore(
        UInt64(UInt(bitPattern: table)), rows: count, basis.kernelBasis(mean: mean),
        to: UInt64(UInt(bitPattern: rows)))
      if let positions, let rotary {
        try turn(rows, stride: dim, channels: 0..<dim, positions, rotary, to: rows, &scratch)
      }
      try fetch(rows, count * dim, into: destination, &scratch)
    }
  }

  package func restore(
    _ rows: [RunSlice], channels: Range<Int>, positions: [Int32], rotary: RotaryEmbedding,
    into destination: UnsafeMutablePointer<Float>
  ) {
    let count = rows.reduce(0) { $0 + $1.count }
    guard let width = rows.first?.run.dim, count > 0 else { return }
    exclusivelyRecording { scratch throws(KVError) in
      let offset = (count * channels.count + 63) / 64 * 64
      let table = try loadTable(rows, &scratch, offset: offset)
      let target = table - offset
      try turn(table, stride: width, channels: channels, positions, rotary, to: target, &scratch)
      try fetch(target, count * channels.count, into: destination, &scratch)
    }
  }

  private func turn(
    _ rows: UnsafeMutablePointer<Float>, stride: Int, channels: Range<Int>, _ positions: [Int32],
    _ rotary: RotaryEmbedding, to target: UnsafeMutablePointer<Float>, _ scratch: inout Scratch
  ) throws(KVError) {
    var layout = CUDALayout()
    let places = layout.take(positions.count, of: Int32.self)
    let frequencies = layout.take(rotary.pairs, of: Float.self)
    let base = try scratch.ring.bytes(layout.total, session)
    (base + places).assumingMemoryBound(to: Int32.self).update(from: positions, count: positions.count)
    (base + frequencies).assumingMemoryBound(to: Float.self)
      .update(from: rotary.inverseFrequencies, count: rotary.pairs)
    session.launch(
      .turnChannels, x: positions.count, rows, UInt64(stride), UInt32(channels.lowerBound), UInt32(channels.count),
      base + places, Int64(0),
      kv_rotary(
        frequencies: UInt64(UInt(bitPattern: base + frequencies)), pairs: UInt32(rotary.pairs),
        interleaved: rotary.layout == .interleaved ? 1 : 0, rounded: 0, padding: 0), target)
  }

  /// Copies floats of the card to ordinary memory and waits for them.
  private func fetch(
    _ source: UnsafeMutablePointer<Float>, _ count: Int, into destination: UnsafeMutablePointer<Float>,
    _ scratch: inout Scratch
  ) throws(KVError) {
    let out = try scratch.pinned.bytes(count * 4, session).assumingMemoryBound(to: Float.self)
    session.copy(to: out, from: source, count * 4)
    session.synchronize()
    destination.update(from: out, count: count)
  }

  /// Queues the product of latents, f32 rows, with a basis.
  func restore(_ latents: UInt64, rows: Int, _ basis: kv_basis, to target: UInt64) {
    let block = KV_LATENT_ROWS
    session.launch(
      .restoreRows, x: (rows + block - 1) / block, y: (Int(basis.dim) + KV_THREADS - 1) / KV_THREADS, latents,
      UInt32(rows), basis, target)
  }
}

/// Rows of the card as f32 rows in ordinary memory, for the time of one operation.
final class HostRows {
  private let backend: CUDABackend
  private var memory: [UnsafeMutablePointer<Float>] = []

  init(_ backend: CUDABackend) { self.backend = backend }

  deinit { for rows in memory { rows.deallocate() } }

  /// Room for dense rows that come back.
  func room(for slices: [RunSlice]) -> [RunSlice] {
    slices.map { slice in
      precondition(slice.run.encoding.kind == .dense, "\(slice.run.encoding) rows are not written by the host")
      let (dim, encoding) = (slice.run.dim, slice.run.encoding)
      let rows = UnsafeMutablePointer<Float>.allocate(capacity: max(slice.count * dim, 1))
      memory.append(rows)
      let run = RowRun(encoding: encoding, dim: dim, capacity: slice.count, base: UnsafeMutableRawPointer(rows))
      return RunSlice(run: run, first: 0, count: slice.count)
    }
  }

  func copy(_ slices: [RunSlice]) -> [RunSlice] {
    slices.map { slice in
      if slice.run.encoding.kind == .dense, !backend.session.accessible(slice.run.base) { return slice }
      let dim = slice.run.dim
      let rows = UnsafeMutablePointer<Float>.allocate(capacity: max(slice.count * dim, 1))
      memory.append(rows)
      backend.read(slice, into: rows, stride: dim)
      let run = RowRun(
        encoding: .dense(.f32), dim: dim, capacity: slice.count, base: UnsafeMutableRawPointer(rows))
      return RunSlice(run: run, first: 0, count: slice.count)
    }
  }
}
