internal import KVBackendCPU
package import KVCore

/// Directions that layers share. They are found on the host, over copies of the rows, once a prompt; attention multiplies
/// them with their lengths on the card.
extension CUDABackend {
  package var holdsDirections: Bool { true }

  package func shareDirections(_ request: DirectionRequest, into angles: UnsafeMutablePointer<Float>) {
    let copies = HostRows(self)
    var own = request
    own.lower = copies.copy(request.lower)
    own.upper = copies.copy(request.upper)
    own.directions = copies.room(for: request.directions)
    own.lowerLengths = copies.room(for: request.lowerLengths)
    own.upperLengths = copies.room(for: request.upperLengths)
    host.shareDirections(own, into: angles)
    for (sources, targets) in [
      (own.directions, request.directions), (own.lowerLengths, request.lowerLengths),
      (own.upperLengths, request.upperLengths),
    ] {
      for (source, target) in zip(sources, targets) {
        let row = target.run.encoding.payloadBytes(rows: 1, dim: target.run.dim)
        session.copy(to: target.run.base + target.first * row, from: source.run.base, target.count * row)
      }
    }
    session.synchronize()
  }

  package func scaleRows(_ rows: UnsafeMutablePointer<Float>, dim: Int, factors: UnsafePointer<Float>, count: Int) {
    host.scaleRows(rows, dim: dim, factors: factors, count: count)
  }
}
