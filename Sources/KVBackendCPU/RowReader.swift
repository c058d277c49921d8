internal import CKVKernels
internal import KVCore

/// Reads blocks of a matrix of cached rows as f32: decoded, scaled, turned back to position 0, the mean subtracted.
struct RowReader {
  /// Rows of one piece of work.
  static let chunk = 256

  let backend: CPUBackend
  let matrix: RowMatrix
  /// First column of each block.
  let starts: [Int]
  let width: Int
  let height: Int
  let mean: [Float]
  private let offsets: RotaryOffsets?

  init(_ matrix: RowMatrix, mean: [Float] = [], backend: CPUBackend) {
    self.backend = backend
    self.matrix = matrix
    self.mean = mean
    var starts: [Int] = []
    var width = 0
    for block in matrix.columns {
      starts.append(width)
      width += block.dim
    }
    self.starts = starts
    self.width = width
    height = matrix.height
    offsets = matrix.columns.lazy.compactMap(\.rotary).first.map(backend.offsets(of:))
  }

  /// Rows `range` to `target`, `width` floats apart; on several threads when `isParallel`.
  func load(_ range: Range<Int>, into target: UnsafeMutablePointer<Float>, isParallel: Bool) {
    let blocks = matrix.columns.count
    let pieces = (range.count + Self.chunk - 1) / Self.chunk
    func piece(_ item: Int) {
      let first = range.lowerBound + item / blocks * Self.chunk
      load(
        block: item % blocks, first..<min(first + Self.chunk, range.upperBound),
        into: target + (first - range.lowerBound) * width)
    }
    if isParallel {
      backend.parallel(pieces * blocks) { _, item in piece(item) }
    } else {
      for item in 0..<pieces * blocks { piece(item) }
    }
  }

  private func load(block: Int, _ range: Range<Int>, into target: UnsafeMutablePointer<Float>) {
    let columns = matrix.columns[block]
    let dim = columns.dim
    let base = target + starts[block]
    let leading = min(max(matrix.leadingRows - range.lowerBound, 0), range.count)
    for row in 0..<leading {
      matrix.leading.withUnsafeBufferPointer { source in
        if let from = source.baseAddress {
          (base + row * width).update(from: from + (range.lowerBound + row) * width + starts[block], count: dim)
        }
      }
    }
    let first = range.lowerBound + leading - matrix.leadingRows
    let rows = base + leading * width
    let count = range.count - leading
    let read = decode(columns.slices, first..<first + count, into: rows)
    for row in read..<count { (rows + row * width).update(repeating: 0, count: dim) }
    if columns.scale != 1 {
      for row in 0..<read { backend.kernels.pointee.scale_in_place!(rows + row * width, columns.scale, dim) }
    }
    if columns.rotary != nil, let offsets {
      offsets.turn(rows, stride: width, count: read, back: true, backend.kernels) { row in
        columns.positions.map { Int($0[first + row]) } ?? columns.firstPosition + first + row
      }
    }
    if mean.isEmpty { return }
    mean.withUnsafeBufferPointer { mean in
      guard let mean = mean.baseAddress else { return }
      for row in 0..<range.count { backend.kernels.pointee.axpy!(base + row * width, mean + starts[block], -1, dim) }
    }
  }

  /// Rows of the slices that lie in `range`; returns how many there were.
  private func decode(_ slices: [RunSlice], _ range: Range<Int>, into rows: UnsafeMutablePointer<Float>) -> Int {
    var done = 0
    slices.forEachPart(in: range) { slice, offset in
      backend.read(slice, into: rows + offset * width, stride: width)
      done = offset + slice.count
    }
    return done
  }
}
