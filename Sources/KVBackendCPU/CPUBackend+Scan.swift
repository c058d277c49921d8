internal import CKVKernels
package import KVCore

/// Measures of rows in tiles: what scorers that look at keys and values are made of.
extension CPUBackend {
  /// Rows that are f32 at a time: they stay in the cache of a core. Fixed, so that results do not depend on threads.
  private static let tileRows = 128
  /// Products formed at a time.
  private static let tileVectors = 64
  /// Rows whose sum is made in one go; the sums of all are added in order.
  private static let rowsPerSum = 4096

  /// Some rows of a list, and where they begin in it.
  private struct Tile {
    var slice: RunSlice
    var start: Int
  }

  private func tiles(_ rows: [RunSlice], of size: Int) -> [Tile] {
    var result: [Tile] = []
    var start = 0
    for slice in rows {
      for first in stride(from: 0, to: slice.count, by: size) {
        let count = min(size, slice.count - first)
        result.append(
          Tile(slice: RunSlice(run: slice.run, first: slice.first + first, count: count), start: start + first))
      }
      start += slice.count
    }
    return result
  }

  package func scan(_ request: RowScan, into result: UnsafeMutablePointer<Float>) {
    let tiles = tiles(request.rows, of: CPUBackend.tileRows)
    if tiles.isEmpty { return }
    let dim = request.dim
    let workers = min(threads, tiles.count)
    var vectors = 0
    if case .products(_, _, _, let count, _) = request.quantity { vectors = min(count, CPUBackend.tileVectors) }
    var layout = Layout()
    let tileFloats = CPUBackend.tileRows * dim
    let table = layout.take(workers * tileFloats)
    let productFloats = vectors * CPUBackend.tileRows
    let products = layout.take(workers * productFloats)
    let spareFloats = (Int(ckv_scratch_floats(UInt32(dim), UInt32(max(vectors, 1)))) + 15) / 16 * 16
    let spare = layout.take(workers * spareFloats)
    let workspace = Workspace()
    nonisolated(unsafe) let memory = workspace.floats(layout.total)
    nonisolated(unsafe) let result = result
    parallel(tiles.count) { worker, item in
      let tile = tiles[item]
      let rows = memory + table + worker * tileFloats
      self.read(tile.slice, into: rows, stride: dim)
      let target = result + tile.start
      let count = tile.slice.count
      let scan = self.kernels.pointee.scan_rows!
      switch request.quantity {
      case .squares: scan(rows, dim, UInt32(dim), count, UInt32(CKV_SQUARES), nil, nil, target)
      case .absolutes: scan(rows, dim, UInt32(dim), count, UInt32(CKV_ABSOLUTES), nil, nil, target)
      case .spread(let low, let inverse):
        scan(rows, dim, UInt32(dim), count, UInt32(CKV_SPREAD), low, inverse, target)
      case .products(let matrix, let offset, let stride, let total, let fold):
        self.fold(
          matrix, offset: offset, stride: stride, count: total, fold, over: rows, rows: count, dim: dim,
          products: memory + products + worker * productFloats, scratch: memory + spare + worker * spareFloats,
          into: target)
      }
    }
  }

  private func fold(
    _ matrix: [Float], offset: Int, stride: Int, count: Int, _ fold: RowScan.Fold,
    over rows: UnsafeMutablePointer<Float>, rows rowCount: Int, dim: Int, products: UnsafeMutablePointer<Float>,
    scratch: UnsafeMutablePointer<Float>, into target: UnsafeMutablePointer<Float>
  ) {
    var run = RowRun(
      encoding: .dense(.f32), dim: dim, capacity: rowCount, base: UnsafeMutableRawPointer(rows)
    ).kernelRun
    target.update(repeating: 0, count: rowCount)
    matrix.withUnsafeBufferPointer { buffer in
      guard let base = buffer.baseAddress else { return }
      for first in Swift.stride(from: 0, to: count, by: CPUBackend.tileVectors) {
        let vectors = min(CPUBackend.tileVectors, count - first)
        kernels.pointee.logits!(
          &run, 0, UInt32(rowCount), base + offset + first * stride, UInt32(vectors), stride, 1, products,
          CPUBackend.tileRows, scratch)
        for vector in 0..<vectors {
          kernels.pointee.fold!(products + vector * CPUBackend.tileRows, rowCount, fold.rawValue, target)
        }
      }
    }
  }

  package func addRows(
    _ rows: [RunSlice], dim: Int, weights: UnsafePointer<Float>, to sums: UnsafeMutablePointer<Float>
  ) {
    let total = rows.reduce(0) { $0 + $1.count }
    if total == 0 { return }
    let items = (total + CPUBackend.rowsPerSum - 1) / CPUBackend.rowsPerSum
    let tiles = tiles(rows, of: CPUBackend.tileRows)
    let workers = min(threads, items)
    var layout = Layout()
    let partial = layout.take(items * dim)
    let tileFloats = CPUBackend.tileRows * dim
    let table = layout.take(workers * tileFloats)
    let spareFloats = (Int(ckv_scratch_floats(UInt32(dim), 1)) + 15) / 16 * 16
    let spare = layout.take(workers * spareFloats)
    let workspace = Workspace()
    nonisolated(unsafe) let memory = workspace.floats(layout.total)
    nonisolated(unsafe) let weights = weights
    (memory + partial).update(repeating: 0, count: items * dim)
    parallel(items) { worker, item in
      let range = item * CPUBackend.rowsPerSum..<min((item + 1) * CPUBackend.rowsPerSum, total)
      let rows = memory + table + worker * tileFloats
      for tile in tiles where tile.start >= range.lowerBound && tile.start < range.upperBound {
        self.read(tile.slice, into: rows, stride: dim)
        var run = RowRun(
          encoding: .dense(.f32), dim: dim, capacity: tile.slice.count, base: UnsafeMutableRawPointer(rows)
        ).kernelRun
        self.kernels.pointee.accumulate!(
          &run, 0, UInt32(tile.slice.count), weights + tile.start, 1, tile.slice.count,
          memory + partial + item * dim, dim, memory + spare + worker * spareFloats)
      }
    }
    for item in 0..<items { kernels.pointee.axpy!(sums, memory + partial + item * dim, 1, dim) }
  }
}
