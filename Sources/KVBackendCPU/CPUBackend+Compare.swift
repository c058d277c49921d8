internal import CKVKernels
package import KVCore

/// Comparing rows with one another and mixing them: what merging is made of.
extension CPUBackend {
  /// Pairs or sums of one item, and sources of one item of a search. Fixed, so that results do not depend on threads.
  private static let jobsPerItem = 256
  private static let sourcesPerItem = 32

  package func compare(_ request: RowComparison, into result: UnsafeMutablePointer<Float>) {
    let count = request.first.count
    if count == 0 { return }
    nonisolated(unsafe) let result = result
    withRows(request.rows, dim: request.dim) { table in
      request.first.withUnsafeBufferPointer { first in
        request.second.withUnsafeBufferPointer { second in
          inBlocks(count, of: CPUBackend.jobsPerItem) { range in
            kernels.pointee.compare_rows!(
              table, request.dim, UInt32(request.dim), first.baseAddress! + range.lowerBound,
              second.baseAddress! + range.lowerBound, range.count, request.measure.rawValue, result + range.lowerBound)
          }
        }
      }
    }
  }

  package func nearest(_ request: NearestRequest, into result: inout NearestRows) {
    let sources = request.sources.reduce(0) { $0 + $1.count }
    let targets = request.targets.reduce(0) { $0 + $1.count }
    result.reset(count: sources)
    if sources == 0 || targets == 0 { return }
    let dim = request.dim
    let workspace = Workspace()
    let block = CPUBackend.sourcesPerItem
    let scratch = Int(ckv_scratch_floats(UInt32(dim), UInt32(block)))
    let items = (sources + block - 1) / block
    let workers = min(threads, items)
    var layout = Layout()
    let table = layout.take(targets * dim)
    let rows = layout.take(sources * dim)
    let logits = layout.take(workers * block * blockRows)
    let perWorker = (scratch + 15) / 16 * 16
    let spare = layout.take(workers * perWorker)
    let memory = workspace.floats(layout.total)
    load(request.targets, into: memory + table, dim: dim)
    load(request.sources, into: memory + rows, dim: dim)
    kernels.pointee.normalise_rows!(memory + table, dim, UInt32(dim), targets)
    kernels.pointee.normalise_rows!(memory + rows, dim, UInt32(dim), sources)
    let run = RowRun(encoding: .dense(.f32), dim: dim, capacity: targets, base: UnsafeMutableRawPointer(memory + table))
    result.targets.withUnsafeMutableBufferPointer { indices in
      result.cosines.withUnsafeMutableBufferPointer { cosines in
        nonisolated(unsafe) let indices = indices
        nonisolated(unsafe) let cosines = cosines
        parallel(items) { worker, item in
          let range = item * block..<min((item + 1) * block, sources)
          let lines = memory + logits + worker * block * blockRows
          for row in range { cosines[row] = -.infinity }
          var description = run.kernelRun
          for first in stride(from: 0, to: targets, by: blockRows) {
            let count = min(blockRows, targets - first)
            kernels.pointee.logits!(
              &description, UInt32(first), UInt32(count), memory + rows + range.lowerBound * dim, UInt32(range.count),
              dim, 1, lines, blockRows, memory + spare + worker * perWorker)
            for row in range {
              let line = UnsafeBufferPointer(start: lines + (row - range.lowerBound) * blockRows, count: count)
              // The maximum alone is a vector loop; where it is, is looked for once.
              var top = cosines[row]
              for value in line { top = value > top ? value : top }
              if top > cosines[row], let index = line.firstIndex(of: top) {
                cosines[row] = top
                indices[row] = first + index
              }
            }
          }
          for row in range { cosines[row] = min(max(cosines[row], -1), 1) }
        }
      }
    }
  }

  package func mix(_ request: RowMix, into target: RowRun) -> Int? {
    let count = request.count
    if count == 0 { return nil }
    let dim = request.dim
    nonisolated(unsafe) let sums = target.base.assumingMemoryBound(to: Float.self)
    withRows(request.rows, dim: dim, copied: !request.turns.isEmpty) { table in
      if let rotary = request.rotary {
        for turn in request.turns {
          rotary.move(row: UnsafeMutablePointer(mutating: table + turn.row * dim), from: turn.from, to: turn.to)
        }
      }
      request.starts.withUnsafeBufferPointer { starts in
        request.index.withUnsafeBufferPointer { index in
          request.weights.withUnsafeBufferPointer { weights in
            request.divisors.withUnsafeBufferPointer { divisors in
              inBlocks(count, of: CPUBackend.jobsPerItem) { range in
                kernels.pointee.mix_rows!(
                  table, dim, UInt32(dim), starts.baseAddress! + range.lowerBound, index.baseAddress!,
                  weights.baseAddress!, divisors.baseAddress! + range.lowerBound, range.count,
                  sums + range.lowerBound * dim, dim)
              }
            }
          }
        }
      }
    }
    let limit = min(request.range.largest, request.type.largestFinite)
    let elements = UnsafeBufferPointer(start: sums, count: count * dim)
    // One vector loop over everything; NaN fails the comparison.
    var fine = true
    for element in elements { fine = fine && abs(element) <= limit }
    if fine { return nil }
    return elements.firstIndex { !(abs($0) <= limit) }.map { $0 / dim }
  }

  // MARK: Rows as one table

  /// Calls `body` with the rows of some slices as f32, `dim` floats apart: in place when they are that already.
  private func withRows(
    _ slices: [RunSlice], dim: Int, copied: Bool = false, _ body: (UnsafePointer<Float>) -> Void
  ) {
    if !copied, slices.count == 1, slices[0].run.encoding == .dense(.f32) {
      body(slices[0].run.base.assumingMemoryBound(to: Float.self) + slices[0].first * dim)
      return
    }
    let workspace = Workspace()
    let table = workspace.floats(slices.reduce(0) { $0 + $1.count } * dim)
    load(slices, into: table, dim: dim)
    body(table)
  }

  private func load(_ slices: [RunSlice], into table: UnsafeMutablePointer<Float>, dim: Int) {
    var next = table
    for slice in slices {
      read(slice, into: next, stride: dim)
      next += slice.count * dim
    }
  }

  private func inBlocks(_ count: Int, of size: Int, _ body: (Range<Int>) -> Void) {
    parallel((count + size - 1) / size) { _, item in body(item * size..<min((item + 1) * size, count)) }
  }
}
