internal import CKVCUDA
internal import KVBackendCPU
package import KVCore
internal import Synchronization

/// Comparing, mixing and measuring rows on the card, over tables of f32: what policies ask between steps. Where the card
/// has no memory for a table the host does it, over copies of the rows.
extension CUDABackend {
  /// Rows of one block where their results are added in order.
  private static let rowsPerSum = 4096
  private static let rowsPerRange = 256

  /// Runs `body` with rows as a table and lists in pinned memory, then copies `count` floats of its result.
  private func measure(
    _ rows: [RunSlice], count: Int, into result: UnsafeMutablePointer<Float>, otherwise: (() -> Void)? = nil,
    _ body: (
      _ table: UnsafeMutablePointer<Float>, _ out: UnsafeMutablePointer<Float>, inout Scratch
    ) throws(KVError) -> Void
  ) {
    if count == 0 { return }
    exclusivelyRecording(
      { scratch throws(KVError) in
        let table = try loadTable(rows, &scratch)
        let out = try scratch.columns.bytes(count * 4, session).assumingMemoryBound(to: Float.self)
        try body(table, out, &scratch)
        session.synchronize()
        result.update(from: out, count: count)
      }, otherwise: otherwise)
  }

  private func upload<Value: BitwiseCopyable>(
    _ values: UnsafeBufferPointer<Value>, _ scratch: inout Scratch
  ) throws(KVError) -> UnsafeMutableRawPointer {
    let bytes = values.count * MemoryLayout<Value>.stride
    let target = try scratch.ring.bytes(bytes, session)
    if let base = values.baseAddress { target.copyMemory(from: base, byteCount: bytes) }
    return target
  }

  private func upload<Value: BitwiseCopyable>(
    _ values: [Value], _ scratch: inout Scratch
  ) throws(KVError) -> UnsafeMutableRawPointer {
    var outcome: Result<UnsafeMutableRawPointer, KVError> = .failure(KVError(.outOfMemory, "no pinned memory"))
    values.withUnsafeBufferPointer { buffer in
      do throws(KVError) { outcome = .success(try upload(buffer, &scratch)) } catch { outcome = .failure(error) }
    }
    return try outcome.get()
  }

  package func compare(_ request: RowComparison, into result: UnsafeMutablePointer<Float>) {
    let count = request.first.count
    func onHost() {
      let copies = HostRows(self)
      var request = request
      request.rows = copies.copy(request.rows)
      host.compare(request, into: result)
    }
    measure(request.rows, count: count, into: result, otherwise: onHost) { table, out, scratch throws(KVError) in
      // Both lists at once: a ring that begins anew would overwrite the first.
      let lists = try upload(request.first + request.second, &scratch)
      session.launch(
        .compare, x: gridBlocks(count * 32), table, UInt32(request.dim), lists, lists + count * 4, UInt32(count),
        request.measure.rawValue, out)
    }
  }

  package func nearest(_ request: NearestRequest, into result: inout NearestRows) {
    let sources = request.sources.reduce(0) { $0 + $1.count }
    let targets = request.targets.reduce(0) { $0 + $1.count }
    result.reset(count: sources)
    if sources == 0 || targets == 0 { return }
    let dim = request.dim
    var found = NearestRows()
    func onHost() {
      let copies = HostRows(self)
      host.nearest(
        NearestRequest(sources: copies.copy(request.sources), targets: copies.copy(request.targets), dim: dim),
        into: &found)
    }
    func onCard(_ scratch: inout Scratch) throws(KVError) {
      found.reset(count: sources)
      let rows = try loadTable(request.sources + request.targets, &scratch)
      session.launch(.normalise, x: gridBlocks((sources + targets) * 32), rows, UInt32(sources + targets), UInt32(dim))
      let out = try scratch.columns.bytes(sources * 8, session)
      session.launch(
        .nearest, x: sources, rows, rows + sources * dim, UInt32(targets), UInt32(dim), out, out + sources * 4)
      session.synchronize()
      for row in 0..<sources {
        found.cosines[row] = out.load(fromByteOffset: row * 4, as: Float.self)
        found.targets[row] = Int(out.load(fromByteOffset: (sources + row) * 4, as: UInt32.self))
      }
    }
    exclusivelyRecording(onCard, otherwise: onHost)
    if found.targets.count == sources { result = found }
  }

  package func scan(_ request: RowScan, into result: UnsafeMutablePointer<Float>) {
    let count = request.count
    func onHost() {
      let copies = HostRows(self)
      var request = request
      request.rows = copies.copy(request.rows)
      host.scan(request, into: result)
    }
    measure(request.rows, count: count, into: result, otherwise: onHost) { table, out, scratch throws(KVError) in
      var quantity: UInt32 = 0
      var numbers: [Float] = []
      var (stride, vectors, fold) = (0, 0, UInt32(0))
      switch request.quantity {
      case .squares: quantity = 0
      case .absolutes: quantity = 1
      case .spread(let low, let inverse):
        quantity = 2
        numbers = low + inverse
      case .products(let matrix, let offset, let step, let number, let folding):
        quantity = 3
        numbers = Array(matrix[offset..<offset + (number == 0 ? 0 : (number - 1) * step + request.dim)])
        (stride, vectors, fold) = (step, number, folding.rawValue)
      }
      let list = try upload(numbers, &scratch)
      session.launch(
        .scan, x: gridBlocks(count * 32), table, UInt32(count), UInt32(request.dim), quantity, list,
        list + request.dim * 4, list, UInt32(stride), UInt32(vectors), fold, out)
    }
  }

  package func addRows(
    _ rows: [RunSlice], dim: Int, weights: UnsafePointer<Float>, to sums: UnsafeMutablePointer<Float>
  ) {
    let count = rows.reduce(0) { $0 + $1.count }
    let chunks = (count + CUDABackend.rowsPerSum - 1) / CUDABackend.rowsPerSum
    if chunks == 0 { return }
    var partial = [Float](repeating: 0, count: chunks * dim)
    func onHost() {
      let copies = HostRows(self)
      host.addRows(copies.copy(rows), dim: dim, weights: weights, to: sums)
    }
    partial.withUnsafeMutableBufferPointer { buffer in
      guard let base = buffer.baseAddress else { return }
      measure(rows, count: chunks * dim, into: base, otherwise: onHost) { table, out, scratch throws(KVError) in
        let list = try upload(UnsafeBufferPointer(start: weights, count: count), &scratch)
        session.launch(
          .addRows, x: chunks, table, UInt32(count), UInt32(dim), UInt32(CUDABackend.rowsPerSum), list, out)
      }
    }
    for index in partial.indices { sums[index % dim] += partial[index] }
  }

  package func channelRange(
    _ sources: UnsafeBufferPointer<RunSlice>, map: UnsafePointer<MapDescriptor>?, low: UnsafeMutablePointer<Float>,
    high: UnsafeMutablePointer<Float>
  ) {
    let rows = Array(sources)
    let count = rows.reduce(0) { $0 + $1.count }
    guard let dim = rows.first?.run.dim, count > 0 else { return }
    let chunks = (count + CUDABackend.rowsPerRange - 1) / CUDABackend.rowsPerRange
    // Low and high of every chunk: no range where nothing was measured.
    var ranges = [Float](repeating: .nan, count: chunks * 2 * dim)
    func onHost() {
      let copies = HostRows(self)
      copies.copy(rows).withUnsafeBufferPointer { host.channelRange($0, map: map, low: low, high: high) }
    }
    ranges.withUnsafeMutableBufferPointer { buffer in
      guard let base = buffer.baseAddress else { return }
      measure(rows, count: chunks * 2 * dim, into: base, otherwise: onHost) { table, out, scratch throws(KVError) in
        // Signs, rotation and order only: the numbers are what is looked for.
        if let map { try self.map(table, rows: count, map, back: false, numbers: false, &scratch) }
        session.launch(
          .channelRange, x: chunks, table, UInt32(count), UInt32(dim), UInt32(CUDABackend.rowsPerRange), out)
      }
      for chunk in 0..<chunks {
        for channel in 0..<dim {
          let place = base + chunk * 2 * dim + channel
          low[channel] = place[0] < low[channel] ? place[0] : low[channel]
          high[channel] = place[dim] > high[channel] ? place[dim] : high[channel]
        }
      }
    }
  }

  package func mix(_ request: RowMix, into target: RowRun) -> Int? {
    let count = request.count
    if count == 0 { return nil }
    var found = UInt64.max
    func onHost() {
      let copies = HostRows(self)
      var request = request
      request.rows = copies.copy(request.rows)
      // The sums lie in pinned memory.
      found = host.mix(request, into: target).map { UInt64($0) } ?? .max
    }
    func onCard(_ scratch: inout Scratch) throws(KVError) {
      let table = try loadTable(request.rows, &scratch)
      var layout = CUDALayout()
      let place = layout.take(1, of: UInt64.self)
      let starts = layout.take(count + 1, of: UInt32.self)
      let index = layout.take(request.index.count, of: UInt32.self)
      let weights = layout.take(request.weights.count, of: Float.self)
      let divisors = layout.take(count, of: Float.self)
      let turns = layout.take(request.turns.count, of: kv_turn.self)
      let frequencies = layout.take(request.rotary?.pairs ?? 0, of: Float.self)
      let base = try scratch.pinned.bytes(layout.total, session)
      (base + place).storeBytes(of: UInt64.max, as: UInt64.self)
      (base + starts).assumingMemoryBound(to: UInt32.self).update(from: request.starts, count: count + 1)
      (base + index).assumingMemoryBound(to: UInt32.self).update(from: request.index, count: request.index.count)
      (base + weights).assumingMemoryBound(to: Float.self).update(from: request.weights, count: request.weights.count)
      (base + divisors).assumingMemoryBound(to: Float.self).update(from: request.divisors, count: count)
      if let rotary = request.rotary, !request.turns.isEmpty {
        let list = (base + turns).assumingMemoryBound(to: kv_turn.self)
        for (index, turn) in request.turns.enumerated() {
          list[index] = kv_turn(row: UInt32(turn.row), padding: 0, from: Int64(turn.from), to: Int64(turn.to))
        }
        (base + frequencies).assumingMemoryBound(to: Float.self)
          .update(from: rotary.inverseFrequencies, count: rotary.pairs)
        let description = kv_rotary(
          frequencies: UInt64(UInt(bitPattern: base + frequencies)), pairs: UInt32(rotary.pairs),
          interleaved: rotary.layout == .interleaved ? 1 : 0, rounded: rotary.angleProduct == .f32 ? 1 : 0, padding: 0)
        session.launch(.turn, x: request.turns.count, table, UInt32(request.dim), base + turns, description)
      }
      session.launch(
        .mix, x: count, table, UInt32(request.dim), base + starts, base + index, base + weights, base + divisors,
        target.base, min(request.range.largest, request.type.largestFinite), base + place)
      session.synchronize()
      found = (base + place).load(as: UInt64.self)
    }
    exclusivelyRecording(onCard, otherwise: onHost)
    return found == .max ? nil : Int(found)
  }
}
