internal import CKVCUDA
internal import KVBackendCPU
package import KVCore
internal import Synchronization

/// Latents. Bases are found on the host, over copies of the rows: once a prompt, in f64, where the CPU's BLAS is at hand.
/// Projecting on them and restoring happens on the card.
extension CUDABackend {
  package var holdsLatents: Bool { true }

  package func require(_ format: SideFormat) throws(KVError) {
    guard format.body?.zeroPoint?.isClamped != true else {
      throw KVError(
        .unsupported, "\(name) encodes no clamped zero points; use the CPU backend, or codes from the minimum")
    }
  }

  package func factor(
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

  package func project(_ projections: [Projection]) -> [ProjectionResult] {
    let copies = HostRows(self)
    return projections.map { projection in
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
      let result = host.project([own])
      var next = memory
      for target in projection.targets {
        let bytes = target.count * rank * type.byteCount
        session.copy(to: target.run.base + target.first * rank * type.byteCount, from: next, bytes)
        next += bytes
      }
      session.synchronize()
      return result[0]
    }
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
