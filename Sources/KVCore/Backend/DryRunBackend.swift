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
  package func read(_ slice: RunSlice, into destination: UnsafeMutablePointer<Float>, stride: Int) {}
  package func copy(from host: UnsafeRawPointer, to device: UnsafeMutableRawPointer, byteCount: Int) {}
  package func copy(from device: UnsafeRawPointer, toHost host: UnsafeMutableRawPointer, byteCount: Int) {}
  package func attend(_ plan: AttentionPlan) {}
  package func windowScores(_ request: WindowScoreRequest, into scores: inout ScoreTable) {}
}
