internal import KVBackendCPU
package import KVCore

/// What has no kernels on the card yet runs on the host, over copies of the rows: occasional operations of policies, not
/// of the decode path.
extension CUDABackend {
  package func compare(_ request: RowComparison, into result: UnsafeMutablePointer<Float>) {
    let copies = HostCopies(session)
    var request = request
    request.rows = copies.copy(request.rows)
    host.compare(request, into: result)
  }

  package func channelRange(
    _ sources: UnsafeBufferPointer<RunSlice>, map: UnsafePointer<MapDescriptor>?, low: UnsafeMutablePointer<Float>,
    high: UnsafeMutablePointer<Float>
  ) {
    let copies = HostCopies(session)
    copies.copy(Array(sources)).withUnsafeBufferPointer { host.channelRange($0, map: map, low: low, high: high) }
  }

  package func nearest(_ request: NearestRequest, into result: inout NearestRows) {
    let copies = HostCopies(session)
    host.nearest(
      NearestRequest(
        sources: copies.copy(request.sources), targets: copies.copy(request.targets), dim: request.dim),
      into: &result)
  }

  package func scan(_ request: RowScan, into result: UnsafeMutablePointer<Float>) {
    let copies = HostCopies(session)
    var request = request
    request.rows = copies.copy(request.rows)
    host.scan(request, into: result)
  }

  package func addRows(
    _ rows: [RunSlice], dim: Int, weights: UnsafePointer<Float>, to sums: UnsafeMutablePointer<Float>
  ) {
    let copies = HostCopies(session)
    host.addRows(copies.copy(rows), dim: dim, weights: weights, to: sums)
  }

  package func mix(_ request: RowMix, into target: RowRun) -> Int? {
    let copies = HostCopies(session)
    var request = request
    request.rows = copies.copy(request.rows)
    let rows = copies.copy(target)
    let place = host.mix(request, into: rows)
    session.copy(to: target.base, from: rows.base, target.byteCount)
    session.synchronize()
    return place
  }
}

/// Host copies of device runs for the time of one operation; each run is copied once.
private final class HostCopies {
  private let session: CUDASession
  private var copies: [UnsafeMutableRawPointer: UnsafeMutableRawPointer] = [:]

  init(_ session: CUDASession) { self.session = session }

  deinit { for copy in copies.values { copy.deallocate() } }

  func copy(_ slices: [RunSlice]) -> [RunSlice] {
    slices.map { RunSlice(run: copy($0.run), first: $0.first, count: $0.count) }
  }

  func copy(_ run: RowRun) -> RowRun {
    let base: UnsafeMutableRawPointer
    if let known = copies[run.base] {
      base = known
    } else {
      base = .allocate(byteCount: max(run.byteCount, 64), alignment: 64)
      session.copy(to: base, from: run.base, run.byteCount)
      session.synchronize()
      copies[run.base] = base
    }
    return RowRun(encoding: run.encoding, dim: run.dim, capacity: run.capacity, base: base, map: run.map)
  }
}

extension RowRun {
  fileprivate var byteCount: Int { encoding.bytes(rows: capacity, dim: dim) }
}
