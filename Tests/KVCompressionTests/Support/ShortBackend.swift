import KVBackendCPU
import KVCompression

@testable import KVCore

/// A backend that runs out of memory when it is told to.
final class ShortBackend: ComputeBackend {
  let base: CPUBackend
  /// Allocations that still succeed; nil: any number.
  nonisolated(unsafe) var left: Int?
  nonisolated(unsafe) var asked = 0

  init() throws { base = try CPUBackend(threads: 1) }

  var name: String { base.name }
  var meter: MemoryMeter { base.meter }
  var holdsLatents: Bool { base.holdsLatents }

  func allocate(byteCount: Int, hostVisible: Bool) throws(KVError) -> Buffer {
    asked += 1
    if let left {
      guard left > 0 else { throw KVError(.outOfMemory, "could not allocate \(byteCount) bytes") }
      self.left = left - 1
    }
    return try base.allocate(byteCount: byteCount, hostVisible: hostVisible)
  }

  func firstNonfinite(_ view: borrowing TensorView) -> ElementPlace? { base.firstNonfinite(view) }
  func write(_ view: borrowing TensorView, to targets: [WriteTarget]) -> ElementPlace? { base.write(view, to: targets) }
  func transcode(_ sources: UnsafeBufferPointer<RunSlice>, to target: RowRun, row: Int) {
    base.transcode(sources, to: target, row: row)
  }
  func channelRange(
    _ sources: UnsafeBufferPointer<RunSlice>, map: UnsafePointer<MapDescriptor>?, low: UnsafeMutablePointer<Float>,
    high: UnsafeMutablePointer<Float>
  ) { base.channelRange(sources, map: map, low: low, high: high) }
  func moveRows(_ source: RunSlice, to target: RowRun, row: Int) { base.moveRows(source, to: target, row: row) }
  func hidden(_ bias: UnsafePointer<Float>, count: Int) -> Int { base.hidden(bias, count: count) }
  func lowest(_ values: UnsafePointer<Float>, bias: UnsafePointer<Float>?, count: Int) -> Int {
    base.lowest(values, bias: bias, count: count)
  }
  func read(_ slice: RunSlice, into destination: UnsafeMutablePointer<Float>, stride: Int) {
    base.read(slice, into: destination, stride: stride)
  }
  func copy(from host: UnsafeRawPointer, to device: UnsafeMutableRawPointer, byteCount: Int) {
    base.copy(from: host, to: device, byteCount: byteCount)
  }
  func copy(from device: UnsafeRawPointer, toHost host: UnsafeMutableRawPointer, byteCount: Int) {
    base.copy(from: device, toHost: host, byteCount: byteCount)
  }
  func attend(_ plan: AttentionPlan) throws(KVError) { try base.attend(plan) }
  func compare(_ request: RowComparison, into result: UnsafeMutablePointer<Float>) {
    base.compare(request, into: result)
  }
  func nearest(_ request: NearestRequest, into result: inout NearestRows) { base.nearest(request, into: &result) }
  func mix(_ request: RowMix, into target: RowRun) -> Int? { base.mix(request, into: target) }
  func scan(_ request: RowScan, into result: UnsafeMutablePointer<Float>) { base.scan(request, into: result) }
  func addRows(
    _ rows: [RunSlice], dim: Int, weights: UnsafePointer<Float>, to sums: UnsafeMutablePointer<Float>
  ) { base.addRows(rows, dim: dim, weights: weights, to: sums) }
  func windowScores(_ request: WindowScoreRequest, into scores: inout ScoreTable) {
    base.windowScores(request, into: &scores)
  }
  func factor(_ matrices: [RowMatrix], ranks: [Int], options: FactorOptions) throws(KVError) -> [Factors] {
    try base.factor(matrices, ranks: ranks, options: options)
  }
  func project(_ projections: [Projection]) -> [ProjectionResult] { base.project(projections) }
  func restore(
    _ latents: [RunSlice], basis: RowRun, mean: UnsafePointer<Float>?, positions: [Int32]?,
    rotary: RotaryEmbedding?, into destination: UnsafeMutablePointer<Float>
  ) {
    base.restore(latents, basis: basis, mean: mean, positions: positions, rotary: rotary, into: destination)
  }
  func restore(
    _ rows: [RunSlice], channels: Range<Int>, positions: [Int32], rotary: RotaryEmbedding,
    into destination: UnsafeMutablePointer<Float>
  ) { base.restore(rows, channels: channels, positions: positions, rotary: rotary, into: destination) }

  var holdsDirections: Bool { base.holdsDirections }
  func shareDirections(_ request: DirectionRequest, into angles: UnsafeMutablePointer<Float>) {
    base.shareDirections(request, into: angles)
  }
  func scaleRows(_ rows: UnsafeMutablePointer<Float>, dim: Int, factors: UnsafePointer<Float>, count: Int) {
    base.scaleRows(rows, dim: dim, factors: factors, count: count)
  }
}
