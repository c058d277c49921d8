internal import CKVKernels
package import KVCore

/// Rows of two layers that share a direction.
extension CPUBackend {
  package var holdsDirections: Bool { true }

  /// Pairs of one piece of work: both rows stay in the first-level cache.
  private static let pairs = 64

  package func shareDirections(_ request: DirectionRequest, into angles: UnsafeMutablePointer<Float>) {
    let (dim, total) = (request.dim, request.count)
    let writes = !request.directions.isEmpty
    nonisolated(unsafe) let angles = angles
    parallel((total + CPUBackend.pairs - 1) / CPUBackend.pairs) { _, item in
      let first = item * CPUBackend.pairs
      let count = min(CPUBackend.pairs, total - first)
      withUnsafeTemporaryAllocation(of: Float.self, capacity: count * (2 * dim + 2)) { buffer in
        guard let lower = buffer.baseAddress else { return }
        let upper = lower + count * dim
        let lengths = upper + count * dim
        read(request.lower, first..<first + count, dim: dim, into: lower)
        read(request.upper, first..<first + count, dim: dim, into: upper)
        // Directions take the place of the lower rows.
        ckv_directions(
          lower, upper, dim, UInt32(count), UInt32(dim), request.weight, request.largest, writes ? lower : nil, lengths,
          lengths + count, angles + first)
        if !writes { return }
        write(lower, dim: dim, to: request.directions, first..<first + count)
        write(lengths, dim: 1, to: request.lowerLengths, first..<first + count)
        write(lengths + count, dim: 1, to: request.upperLengths, first..<first + count)
      }
    }
  }

  package func scaleRows(_ rows: UnsafeMutablePointer<Float>, dim: Int, factors: UnsafePointer<Float>, count: Int) {
    for row in 0..<count { kernels.pointee.scale_in_place!(rows + row * dim, factors[row], dim) }
  }

  private func read(
    _ slices: [RunSlice], _ range: Range<Int>, dim: Int, into target: UnsafeMutablePointer<Float>
  ) {
    slices.forEachPart(in: range) { slice, offset in read(slice, into: target + offset * dim, stride: dim) }
  }

  private func write(
    _ rows: UnsafeMutablePointer<Float>, dim: Int, to slices: [RunSlice], _ range: Range<Int>
  ) {
    slices.forEachPart(in: range) { slice, offset in
      let source = RunSlice(
        run: RowRun(
          encoding: .dense(.f32), dim: dim, capacity: slice.count, base: UnsafeMutableRawPointer(rows + offset * dim)),
        first: 0, count: slice.count)
      withUnsafePointer(to: source) {
        transcode(UnsafeBufferPointer(start: $0, count: 1), to: slice.run, row: slice.first)
      }
    }
  }
}
