internal import CKVKernels
package import KVCore

/// Turning keys where they lie.
extension CPUBackend {
  /// Rows of one piece of work.
  private static let rowsPerPiece = 256

  package var turnsKeys: Bool { true }

  package func turn(_ turns: [KeyTurn], rotary: RotaryEmbedding, limit: Float, writes: Bool) -> Int? {
    guard let dim = turns.first?.slice.run.dim else { return nil }
    var pieces: [(turn: KeyTurn, row: Int)] = []
    var rows = 0
    for turn in turns {
      for first in stride(from: 0, to: turn.slice.count, by: CPUBackend.rowsPerPiece) {
        var piece = turn
        piece.slice.first += first
        piece.slice.count = min(CPUBackend.rowsPerPiece, turn.slice.count - first)
        pieces.append((piece, rows + first))
      }
      rows += turn.slice.count
    }
    let offsets = offsets(of: rotary)
    let perWorker = CPUBackend.rowsPerPiece * dim
    let workspace = Workspace()
    let scratch = workspace.floats(min(threads, pieces.count) * perWorker)
    // The first of every piece: which is found does not depend on threads.
    var found = [Int](repeating: .max, count: pieces.count)
    found.withUnsafeMutableBufferPointer { found in
      nonisolated(unsafe) let found = found
      nonisolated(unsafe) let scratch = scratch
      let pieces = pieces
      parallel(pieces.count) { worker, item in
        let slice = pieces[item].turn.slice
        let tile = scratch + worker * perWorker
        read(slice, into: tile, stride: dim)
        offsets.turn(tile, stride: dim, by: pieces[item].turn.by, count: slice.count, back: false, kernels)
        if writes {
          let turned = RowRun(
            encoding: .dense(.f32), dim: dim, capacity: slice.count, base: UnsafeMutableRawPointer(tile))
          withUnsafePointer(to: RunSlice(run: turned, first: 0, count: slice.count)) {
            transcode(UnsafeBufferPointer(start: $0, count: 1), to: slice.run, row: slice.first)
          }
        } else {
          // One vector loop over everything; NaN fails the comparison.
          var fine = true
          for index in 0..<slice.count * dim { fine = fine && abs(tile[index]) <= limit }
          if !fine, let index = (0..<slice.count * dim).first(where: { !(abs(tile[$0]) <= limit) }) {
            found[item] = pieces[item].row + index / dim
          }
        }
      }
    }
    let first = found.min() ?? .max
    return first == .max ? nil : first
  }
}
