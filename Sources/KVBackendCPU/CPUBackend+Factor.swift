internal import CKVKernels
package import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// Bases of cached rows.
extension CPUBackend {
  /// Columns up to which a matrix is one piece of work.
  private static let smallWidth = 256

  package var holdsLatents: Bool { true }

  package func factor(
    _ matrices: [RowMatrix], ranks: [Int], options: FactorOptions
  ) throws(KVError) -> [Factors] {
    precondition(matrices.count == ranks.count, "\(ranks.count) ranks for \(matrices.count) matrices")
    SerialBLAS.begin()
    defer { SerialBLAS.end() }
    var results: [Result<Factors, KVError>] = []
    if matrices.count > 1, matrices.allSatisfy({ $0.width <= CPUBackend.smallWidth }) {
      results = Array(repeating: .success(Factors(rank: 0, width: 0, basis: [])), count: matrices.count)
      results.withUnsafeMutableBufferPointer { buffer in
        nonisolated(unsafe) let results = buffer
        parallel(matrices.count) { _, item in
          results[item] = Factorisation(matrices[item], rank: ranks[item], options, self, isParallel: false).run()
        }
      }
      options.progress?(1)
    } else {
      for (index, matrix) in matrices.enumerated() {
        var own = options
        if let report = options.progress {
          let count = Double(matrices.count)
          own.progress = { share in report((Double(index) + share) / count) }
        }
        results.append(Factorisation(matrix, rank: ranks[index], own, self, isParallel: true).run())
      }
    }
    var factors: [Factors] = []
    for result in results {
      switch result {
      case .success(let value): factors.append(value)
      case .failure(let error): throw error
      }
    }
    return factors
  }

  // MARK: Latents

  package func project(_ projections: [Projection]) -> [ProjectionResult] {
    SerialBLAS.begin()
    defer { SerialBLAS.end() }
    let readers = projections.map { RowReader($0.matrix, mean: $0.mean, backend: self) }
    var pieces: [(projection: Int, rows: Range<Int>)] = []
    for (index, reader) in readers.enumerated() {
      for first in stride(from: 0, to: reader.height, by: RowReader.chunk) {
        pieces.append((index, first..<min(first + RowReader.chunk, reader.height)))
      }
    }
    var partial = Array(repeating: ProjectionResult(), count: pieces.count)
    partial.withUnsafeMutableBufferPointer { buffer in
      nonisolated(unsafe) let partial = buffer
      parallel(pieces.count) { _, item in
        let piece = pieces[item]
        partial[item] = project(projections[piece.projection], readers[piece.projection], piece.rows)
      }
    }
    var results = Array(repeating: ProjectionResult(), count: projections.count)
    for (piece, part) in zip(pieces, partial) {
      results[piece.projection].largest = max(results[piece.projection].largest, part.largest)
      results[piece.projection].energy += part.energy
      results[piece.projection].kept += part.kept
    }
    return results
  }

  private func project(_ projection: Projection, _ reader: RowReader, _ rows: Range<Int>) -> ProjectionResult {
    let width = reader.width
    let rank = width == 0 ? 0 : projection.encoder.map { $0.count / width } ?? width
    var result = ProjectionResult()
    withUnsafeTemporaryAllocation(of: Float.self, capacity: rows.count * (width + rank)) { buffer in
      guard let x = buffer.baseAddress else { return }
      reader.load(rows, into: x, isParallel: false)
      var latents = x
      if let encoder = projection.encoder {
        latents = x + rows.count * width
        SerialBLAS.multiply(
          x, width, transposed: false, encoder, width, transposed: true, m: rows.count, n: rank, k: width,
          into: latents, rank)
      }
      for i in 0..<rows.count * width { result.energy += Double(x[i]) * Double(x[i]) }
      for i in 0..<rows.count * rank {
        result.kept += Double(latents[i]) * Double(latents[i])
        // A NaN must not hide behind the numbers after it.
        let size = latents[i].isNaN ? .infinity : abs(latents[i])
        result.largest = size > result.largest ? size : result.largest
      }
      projection.targets.forEachPart(in: rows) { target, offset in
        let type = target.run.encoding.type
        kernels.pointee.convert!(
          target.run.base + target.first * rank * type.byteCount, UInt32(type.rawValue), latents + offset * rank,
          UInt32(ElementType.f32.rawValue), target.count * rank)
      }
    }
    return result
  }

  // MARK: Restoring

  package func restore(
    _ latents: [RunSlice], basis: RowRun, mean: UnsafePointer<Float>?, positions: [Int32]?,
    rotary: RotaryEmbedding?, into destination: UnsafeMutablePointer<Float>
  ) {
    let dim = basis.dim
    let rank = basis.capacity
    let chunk = RowReader.chunk
    let scratch = Int(ckv_scratch_floats(UInt32(max(dim, 1)), UInt32(chunk)))
    withUnsafeTemporaryAllocation(of: Float.self, capacity: chunk * rank + scratch) { buffer in
      guard let rows = buffer.baseAddress else { return }
      var done = 0
      for slice in latents {
        for first in stride(from: 0, to: slice.count, by: chunk) {
          let count = min(chunk, slice.count - first)
          read(RunSlice(run: slice.run, first: slice.first + first, count: count), into: rows, stride: rank)
          multiply(
            latents: rows, count: count, basis: basis, mean: mean, into: destination + done * dim,
            scratch: rows + chunk * rank)
          done += count
        }
      }
    }
    guard let positions, let rotary else { return }
    offsets(of: rotary).turn(destination, stride: dim, count: positions.count, back: false, kernels) {
      Int(positions[$0])
    }
  }

  package func restore(
    _ rows: [RunSlice], channels: Range<Int>, positions: [Int32], rotary: RotaryEmbedding,
    into destination: UnsafeMutablePointer<Float>
  ) {
    let chunk = RowReader.chunk
    var next = destination
    for slice in rows {
      let width = slice.run.dim
      withUnsafeTemporaryAllocation(of: Float.self, capacity: min(chunk, slice.count) * width) { buffer in
        guard let base = buffer.baseAddress else { return }
        for first in stride(from: 0, to: slice.count, by: chunk) {
          let count = min(chunk, slice.count - first)
          read(RunSlice(run: slice.run, first: slice.first + first, count: count), into: base, stride: width)
          for row in 0..<count {
            next.update(from: base + row * width + channels.lowerBound, count: channels.count)
            next += channels.count
          }
        }
      }
    }
    offsets(of: rotary).turn(destination, stride: channels.count, count: positions.count, back: false, kernels) {
      Int(positions[$0])
    }
  }

  /// Rows from latents in f32: one product for all rows, the basis read once for several of them.
  func multiply(
    latents: UnsafePointer<Float>, count: Int, basis: RowRun, mean: UnsafePointer<Float>?,
    into rows: UnsafeMutablePointer<Float>, scratch: UnsafeMutablePointer<Float>
  ) {
    let dim = basis.dim
    if let mean {
      for row in 0..<count { (rows + row * dim).update(from: mean, count: dim) }
    } else {
      rows.update(repeating: 0, count: count * dim)
    }
    var run = basis.kernelRun
    kernels.pointee.accumulate!(
      &run, 0, UInt32(basis.capacity), latents, UInt32(count), basis.capacity, rows, dim, scratch)
  }
}
