internal import CKVCUDA
internal import KVCore

/// Memory on the card for one operation, counted where the cache's is: it is there at the peak. What was queued may use
/// it until this is gone, or until it was given back.
final class CUDAWorkspace {
  private let backend: CUDABackend
  private var buffers: [Buffer] = []

  init(_ backend: CUDABackend) { self.backend = backend }

  func take<Element: BitwiseCopyable>(
    _ count: Int, of type: Element.Type
  ) throws(KVError) -> UnsafeMutablePointer<Element> {
    let buffer = try backend.allocate(byteCount: max(count, 1) * MemoryLayout<Element>.stride, hostVisible: false)
    buffers.append(buffer)
    return buffer.base.assumingMemoryBound(to: type)
  }

  func hold(_ more: [Buffer]) { buffers += more }

  func giveBack(_ pointer: UnsafeMutableRawPointer) { buffers.removeAll { $0.base == pointer } }
}

/// A matrix of cached rows, of which blocks are read into memory of the card as f32: decoded, scaled, turned back to
/// position 0, the mean subtracted.
struct CUDAMatrix {
  let backend: CUDABackend
  let workspace: CUDAWorkspace
  let width: Int
  let height: Int
  private let matrix: RowMatrix
  /// On the card.
  private(set) var mean: UnsafeMutablePointer<Float>?

  init(_ matrix: RowMatrix, _ workspace: CUDAWorkspace, _ backend: CUDABackend) throws(KVError) {
    self.backend = backend
    self.workspace = workspace
    var own = matrix
    for index in own.columns.indices {
      let (slices, held) = try backend.near(own.columns[index].slices)
      own.columns[index].slices = slices
      workspace.hold(held)
    }
    self.matrix = own
    width = matrix.width
    height = matrix.height
  }

  /// Rows that are read from now on have this subtracted; empty: nothing.
  mutating func subtract(_ mean: [Float]) throws(KVError) {
    if mean.isEmpty { return }
    let held = try workspace.take(mean.count, of: Float.self)
    backend.session.copy(to: held, from: mean, mean.count * 4)
    self.mean = held
  }

  /// Queues reading rows `range` to `target`, `width` floats apart.
  func load(
    _ range: Range<Int>, into target: UnsafeMutablePointer<Float>, _ scratch: inout CUDABackend.Scratch
  ) throws(KVError) {
    let session = backend.session
    let leading = min(max(matrix.leadingRows - range.lowerBound, 0), range.count)
    if leading > 0 {
      matrix.leading.withUnsafeBufferPointer { rows in
        guard let base = rows.baseAddress else { return }
        session.copy(to: target, from: base + range.lowerBound * width, leading * width * 4)
      }
    }
    let first = range.lowerBound + leading - matrix.leadingRows
    let count = range.count - leading
    var place = target + leading * width
    for columns in matrix.columns where count > 0 && columns.dim > 0 {
      var slices: [RunSlice] = []
      columns.slices.forEachPart(in: first..<first + count) { slice, _ in slices.append(slice) }
      let held = slices.reduce(0) { $0 + $1.count }
      try backend.load(slices, rows: held, into: place, stride: width, &scratch)
      if held > 0 { try turn(columns, first, held, place, &scratch) }
      if held < count {
        session.launch(
          .zeroRows, x: gridBlocks((count - held) * columns.dim), place + held * width, UInt64(width),
          UInt32(count - held), UInt32(columns.dim))
      }
      place += columns.dim
    }
    if let mean {
      session.launch(
        .subtractRow, x: gridBlocks(range.count * width), target, UInt32(range.count), UInt32(width), mean)
    }
  }

  private func turn(
    _ columns: RowMatrix.Columns, _ first: Int, _ count: Int, _ rows: UnsafeMutablePointer<Float>,
    _ scratch: inout CUDABackend.Scratch
  ) throws(KVError) {
    if columns.scale == 1, columns.rotary == nil { return }
    var rotary = kv_rotary(frequencies: 0, pairs: 0, interleaved: 0, rounded: 0, padding: 0)
    var positions: UInt64 = 0
    if let turning = columns.rotary {
      var layout = CUDALayout()
      let frequencies = layout.take(turning.pairs, of: Float.self)
      let places = layout.take(count, of: Int32.self)
      let base = try scratch.ring.bytes(layout.total, backend.session)
      (base + frequencies).assumingMemoryBound(to: Float.self)
        .update(from: turning.inverseFrequencies, count: turning.pairs)
      rotary.frequencies = UInt64(UInt(bitPattern: base + frequencies))
      rotary.pairs = UInt32(turning.pairs)
      rotary.interleaved = turning.layout == .interleaved ? 1 : 0
      if let explicit = columns.positions {
        explicit.withUnsafeBufferPointer { list in
          guard let list = list.baseAddress else { return }
          (base + places).assumingMemoryBound(to: Int32.self).update(from: list + first, count: count)
        }
        positions = UInt64(UInt(bitPattern: base + places))
      }
    }
    backend.session.launch(
      .turnBack, x: count, rows, UInt64(width), UInt32(columns.dim), columns.scale, positions,
      Int64(columns.firstPosition + first), rotary)
  }
}
