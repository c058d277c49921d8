/// Counts allocations and computes nothing: the a-priori estimate of a policy's bytes is the policy itself, run on
/// this.
package final class DryRunBackend: ComputeBackend {
  package let name = "dry run"
  package let meter = MemoryMeter()

  package init() {}

  package func allocate(byteCount: Int, hostVisible: Bool) throws(KVError) -> Buffer {
    // Columns are written by the core and need real memory; rows only need to be counted.
    let real = UnsafeMutableRawPointer.allocate(byteCount: hostVisible ? max(byteCount, 1) : 1, alignment: 64)
    return Buffer(base: real, byteCount: byteCount, meter: meter) { $0.deallocate() }
  }

  package func firstNonfinite(_ view: borrowing TensorView) -> ElementPlace? { nil }
  package func write(_ view: borrowing TensorView, to targets: [WriteTarget]) -> ElementPlace? { nil }
  package func transcode(_ sources: UnsafeBufferPointer<RunSlice>, to target: RowRun, row: Int) {}

  package func channelRange(
    _ sources: UnsafeBufferPointer<RunSlice>, map: UnsafePointer<MapDescriptor>?, low: UnsafeMutablePointer<Float>,
    high: UnsafeMutablePointer<Float>
  ) {}

  package func moveRows(_ source: RunSlice, to target: RowRun, row: Int) {}

  package func lowest(_ values: UnsafePointer<Float>, bias: UnsafePointer<Float>?, count: Int) -> Int {
    var best = -1
    for index in 0..<count where bias?[index] != -.infinity {
      if values[index].isNaN { return -2 }
      if best < 0 || values[index] <= values[best] { best = index }
    }
    return best
  }

  package func hidden(_ bias: UnsafePointer<Float>, count: Int) -> Int {
    UnsafeBufferPointer(start: bias, count: count).count { $0 == -.infinity }
  }

  /// Zeros: a scorer that looks at keys sees equal ones, never what happened to lie in memory.
  package func read(_ slice: RunSlice, into destination: UnsafeMutablePointer<Float>, stride: Int) {
    for row in 0..<slice.count { (destination + row * stride).update(repeating: 0, count: slice.run.dim) }
  }

  package func copy(from host: UnsafeRawPointer, to device: UnsafeMutableRawPointer, byteCount: Int) {}
  package func copy(from device: UnsafeRawPointer, toHost host: UnsafeMutableRawPointer, byteCount: Int) {
    host.initializeMemory(as: UInt8.self, repeating: 0, count: byteCount)
  }
  package func attend(_ plan: AttentionPlan) throws(KVError) {}
  package func compare(_ request: RowComparison, into result: UnsafeMutablePointer<Float>) {
    result.update(repeating: 0, count: request.first.count)
  }
  package func nearest(_ request: NearestRequest, into result: inout NearestRows) {
    result.reset(count: request.sources.reduce(0) { $0 + $1.count })
  }
  package func mix(_ request: RowMix, into target: RowRun) -> Int? { nil }
  package func scan(_ request: RowScan, into result: UnsafeMutablePointer<Float>) {
    result.update(repeating: 0, count: request.count)
  }
  package func addRows(
    _ rows: [RunSlice], dim: Int, weights: UnsafePointer<Float>, to sums: UnsafeMutablePointer<Float>
  ) {}
  package func windowScores(_ request: WindowScoreRequest, into scores: inout ScoreTable) {}

  package var turnsKeys: Bool { true }
  package func turn(_ turns: [KeyTurn], rotary: RotaryEmbedding, limit: Float, writes: Bool) -> Int? { nil }

  package var holdsLatents: Bool { true }

  /// Bases of the right size: what a cache allocates depends on shapes alone.
  package func factor(
    _ matrices: [RowMatrix], ranks: [Int], options: FactorOptions
  ) throws(KVError) -> [Factors] {
    zip(matrices, ranks).map { matrix, rank in
      Factors(
        rank: min(rank, matrix.height, matrix.width), width: matrix.width, basis: [],
        mean: options.centred ? Array(repeating: 0, count: matrix.width) : [])
    }
  }

  package func project(_ projections: [Projection]) -> [ProjectionResult] {
    projections.map { _ in ProjectionResult() }
  }

  package func restore(
    _ latents: [RunSlice], basis: RowRun, mean: UnsafePointer<Float>?, positions: [Int32]?,
    rotary: RotaryEmbedding?, into destination: UnsafeMutablePointer<Float>
  ) {
    destination.update(repeating: 0, count: latents.reduce(0) { $0 + $1.count } * basis.dim)
  }

  package func restore(
    _ rows: [RunSlice], channels: Range<Int>, positions: [Int32], rotary: RotaryEmbedding,
    into destination: UnsafeMutablePointer<Float>
  ) {
    destination.update(repeating: 0, count: rows.reduce(0) { $0 + $1.count } * channels.count)
  }

  package var holdsDirections: Bool { true }

  package func shareDirections(_ request: DirectionRequest, into angles: UnsafeMutablePointer<Float>) {
    angles.update(repeating: 0, count: request.count)
  }

  package func scaleRows(_ rows: UnsafeMutablePointer<Float>, dim: Int, factors: UnsafePointer<Float>, count: Int) {}
}
