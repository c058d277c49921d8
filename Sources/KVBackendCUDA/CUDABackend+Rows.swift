internal import CKVCUDA
internal import KVBackendCPU
package import KVCore
internal import Synchronization

/// Moving rows: in from an engine's tensors, between encodings, out to f32.
extension CUDABackend {
  package func firstNonfinite(_ view: borrowing TensorView) -> ElementPlace? {
    guard view.heads * view.tokens > 0, session.accessible(view.base) else { return host.firstNonfinite(view) }
    let description = view.kernelView(base: view.base)
    let blocks = gridBlocks(view.heads * view.tokens * view.dim)
    let index = findPlace { session.launch(.nonfinite, x: blocks, description, $0) }
    return index.map { place in
      ElementPlace(
        head: place / view.dim / view.tokens, token: place / view.dim % view.tokens, channel: place % view.dim)
    }
  }

  /// Runs kernels that lower a place in pinned memory from "none", and reads it.
  private func findPlace(_ body: (UnsafeMutableRawPointer) -> Void) -> Int? {
    var found = UInt64.max
    exclusivelyRecording { scratch throws(KVError) in
      let place = try scratch.pinned.bytes(256, session)
      place.storeBytes(of: UInt64.max, as: UInt64.self)
      body(place)
      session.synchronize()
      found = place.load(as: UInt64.self)
    }
    return found == .max ? nil : Int(found)
  }

  package func append(
    keys: borrowing TensorView, to keyTargets: [WriteTarget], values: borrowing TensorView,
    to valueTargets: [WriteTarget]
  ) throws(KVError) -> AppendFault? {
    try session.surviving()
    let inPlace = (session.accessible(keys.base), session.accessible(values.base))
    if !inPlace.0, let place = host.firstNonfinite(keys) {
      return AppendFault(isKey: true, isFinite: false, place: place)
    }
    if !inPlace.1, let place = host.firstNonfinite(values) {
      return AppendFault(isKey: false, isFinite: false, place: place)
    }
    let fault = write(keys, keyTargets, values, valueTargets, inPlace: inPlace)
    // Rows of a card that was lost do not count.
    try session.surviving()
    return fault
  }

  package func write(_ view: borrowing TensorView, to targets: [WriteTarget]) -> ElementPlace? {
    let inPlace = session.accessible(view.base)
    let fault = write(view, targets, view, [], inPlace: (inPlace, inPlace))
    return fault.flatMap { $0.isFinite ? $0.place : nil }
  }

  /// Rows of two views in one launch and one wait, in several where their list or their staged rows need more memory than
  /// is always there.
  private func write(
    _ first: borrowing TensorView, _ firstTargets: [WriteTarget], _ second: borrowing TensorView,
    _ secondTargets: [WriteTarget], inPlace: (Bool, Bool)
  ) -> AppendFault? {
    let total = firstTargets.count + secondTargets.count
    var index = 0
    var token = 0
    var fault: AppendFault?
    while index < total, fault == nil {
      let start = (index, token)
      exclusivelyRecording { scratch throws(KVError) in
        let base = try scratch.pinned.bytes(CUDABackend.stagingBytes, session)
        base.initializeMemory(as: UInt64.self, repeating: .max, count: 2)
        let list = (base + CUDABackend.listOffset).assumingMemoryBound(to: kv_write.self)
        let staged = base + CUDABackend.listOffset + CUDABackend.halfStaging
        var views = (first.kernelView(base: first.base), second.kernelView(base: second.base))
        // A staged view is one head of as many tokens as were copied.
        if !inPlace.0 { views.0 = first.stagedView(base: staged) }
        if !inPlace.1 { views.1 = second.stagedView(base: staged) }
        scratch.written.removeAll(keepingCapacity: true)
        var bytes = 0
        var longest = 0
        while index < total, scratch.written.count < CUDABackend.mostWrites {
          let isFirst = index < firstTargets.count
          let near = isFirst ? inPlace.0 : inPlace.1
          let dim = isFirst ? first.dim : second.dim
          let rowBytes = dim * (isFirst ? first.type.byteCount : second.type.byteCount)
          let target = isFirst ? firstTargets[index] : secondTargets[index - firstTargets.count]
          // Rows of a view begin at whole rows of it.
          let begin = near ? 0 : (bytes + rowBytes - 1) / rowBytes
          let room = near ? Int.max : max(CUDABackend.halfStaging / rowBytes - begin, 0)
          let count = min(target.slice.count - token, room)
          if count == 0, target.slice.count > token { break }
          var slice = target.slice
          slice.first += token
          slice.count = count
          if !near {
            for row in 0..<count {
              let source =
                isFirst
                ? first.row(head: target.head, token: target.token + token + row)
                : second.row(head: target.head, token: target.token + token + row)
              (staged + (begin + row) * rowBytes).copyMemory(from: source, byteCount: rowBytes)
            }
            bytes = (begin + count) * rowBytes
          }
          list[scratch.written.count] = kv_write(
            slice: slice.kernelSlice(start: 0), head: UInt32(near ? target.head : 0),
            token: UInt32(near ? target.token + token : begin), range: target.range.kernelNumber,
            limit: target.range.largest, view: isFirst ? 0 : 1, padding: 0)
          scratch.written.append((index, token))
          longest = max(longest, count * dim)
          token += count
          if token < target.slice.count { break }
          index += 1
          token = 0
        }
        session.launch(
          .write, x: gridBlocks(longest), y: scratch.written.count, UnsafeMutableRawPointer(list), views.0, views.1,
          base)
        session.synchronize()
        for (isFinite, offset) in [(false, 0), (true, 8)] {
          let found = base.load(fromByteOffset: offset, as: UInt64.self)
          if found == .max { continue }
          let (number, token) = scratch.written[Int(found >> 40)]
          let isFirst = number < firstTargets.count
          let target = isFirst ? firstTargets[number] : secondTargets[number - firstTargets.count]
          let dim = isFirst ? first.dim : second.dim
          let element = Int(found & (1 << 40 - 1))
          fault = AppendFault(
            isKey: isFirst, isFinite: isFinite,
            place: ElementPlace(
              head: target.head, token: target.token + token + element / dim, channel: element % dim))
          break
        }
      }
      // Without the memory that is always there nothing goes on; the error is kept.
      if (index, token) == start { return fault }
    }
    return fault
  }

  package func read(_ slice: RunSlice, into destination: UnsafeMutablePointer<Float>, stride: Int) {
    let dim = slice.run.dim
    let most = max(CUDABackend.stagingBytes / 4 / dim, 1)
    exclusivelyRecording { scratch throws(KVError) in
      for first in Swift.stride(from: 0, to: slice.count, by: most) {
        let count = min(most, slice.count - first)
        let part = RunSlice(run: slice.run, first: slice.first + first, count: count)
        let table = try loadTable([part], &scratch)
        let rows = try scratch.pinned.bytes(count * dim * 4, session).assumingMemoryBound(to: Float.self)
        session.copy(to: rows, from: table, count * dim * 4)
        session.synchronize()
        for row in 0..<count {
          (destination + (first + row) * stride).update(from: rows + row * dim, count: dim)
        }
      }
    }
  }

  // MARK: Tables of f32

  /// Rows of some slices as rows of the model, f32, one after the other in device memory that the next call reuses.
  /// `offset` floats of it are left alone.
  func loadTable(
    _ slices: [RunSlice], _ scratch: inout Scratch, offset: Int = 0
  ) throws(KVError) -> UnsafeMutablePointer<Float> {
    let count = slices.reduce(0) { $0 + $1.count }
    guard let dim = slices.first?.run.dim, count > 0 else {
      return try scratch.table.bytes(offset * 4 + 4, session).assumingMemoryBound(to: Float.self) + offset
    }
    let base = try scratch.table.bytes((offset + count * dim) * 4, session).assumingMemoryBound(to: Float.self)
    try load(slices, rows: count, into: base + offset, stride: dim, &scratch)
    return base + offset
  }

  /// Rows of some slices as rows of the model, f32, `stride` floats apart.
  func load(
    _ slices: [RunSlice], rows count: Int, into table: UnsafeMutablePointer<Float>, stride: Int,
    _ scratch: inout Scratch
  ) throws(KVError) {
    guard let dim = slices.first?.run.dim, count > 0 else { return }
    let list = try self.list(slices, &scratch)
    session.launch(
      .read, x: gridBlocks(count * dim), list, UInt32(slices.count), UInt32(count), table, UInt64(stride))
    var next = table
    var index = 0
    while index < slices.count {
      // Neighbours behind the same map are restored together.
      var end = index + 1
      var rows = slices[index].count
      while end < slices.count, slices[end].run.map == slices[index].run.map {
        rows += slices[end].count
        end += 1
      }
      if let map = slices[index].run.map {
        try self.map(next, rows: rows, stride: stride, map, back: true, numbers: true, &scratch)
      }
      next += rows * stride
      index = end
    }
  }

  /// The same slices with rows in ordinary memory, dense ones, copied to the card, and what holds the copies.
  func near(_ slices: [RunSlice]) throws(KVError) -> (slices: [RunSlice], held: [Buffer]) {
    var held: [Buffer] = []
    var result = slices
    for (index, slice) in slices.enumerated() where slice.count > 0 && !session.accessible(slice.run.base) {
      let (elements, bytes) = slice.elements
      let buffer = try allocate(byteCount: bytes, hostVisible: false)
      session.copy(to: buffer.base, from: elements, bytes)
      held.append(buffer)
      result[index] = slice.copied(to: buffer.base)
    }
    return (result, held)
  }

  /// Brings rows of f32, `stride` floats apart, behind a map, or back.
  func map(
    _ rows: UnsafeMutablePointer<Float>, rows count: Int, stride: Int? = nil, _ map: UnsafePointer<MapDescriptor>,
    back: Bool, numbers: Bool, _ scratch: inout Scratch
  ) throws(KVError) {
    let own = map.pointee
    let ring = try scratch.ring.bytes(own.dim * 8 + 64, session)
    var description = kv_map(
      sign: 0, factor: own.factors.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
      offset: own.offsets.map { UInt64(UInt(bitPattern: $0)) } ?? 0, order: 0, dim: UInt32(own.dim),
      block: UInt32(own.block), dtype: UInt32(own.type.rawValue), padding: 0)
    if let signs = own.signs {
      ring.copyMemory(from: signs, byteCount: own.dim * 4)
      description.sign = UInt64(UInt(bitPattern: ring))
    }
    if let order = own.order {
      (ring + own.dim * 4).copyMemory(from: order, byteCount: own.dim * 4)
      description.order = UInt64(UInt(bitPattern: ring + own.dim * 4))
    }
    session.launch(
      .map, x: count, rows, UInt64(stride ?? own.dim), description, UInt32(back ? 1 : 0), UInt32(numbers ? 1 : 0))
  }

  /// The slices as the kernels read them, in pinned memory.
  func list(_ slices: [RunSlice], _ scratch: inout Scratch) throws(KVError) -> UnsafeMutableRawPointer {
    try slices.withUnsafeBufferPointer { (slices) throws(KVError) in try list(slices, &scratch) }
  }

  private func list(
    _ slices: UnsafeBufferPointer<RunSlice>, _ scratch: inout Scratch
  ) throws(KVError) -> UnsafeMutableRawPointer {
    let base = try scratch.ring.bytes(slices.count * MemoryLayout<kv_slice>.stride, session)
    let list = base.assumingMemoryBound(to: kv_slice.self)
    var start = 0
    for (index, slice) in slices.enumerated() {
      list[index] = slice.kernelSlice(start: start)
      start += slice.count
    }
    return base
  }

  // MARK: Between encodings

  /// Nothing waits for the card here: what follows on the stream, or reads host memory, does.
  package func transcode(_ sources: UnsafeBufferPointer<RunSlice>, to target: RowRun, row: Int) {
    // Lists of one launch fit into memory that is always there.
    let most = CUDABackend.stagingBytes / MemoryLayout<kv_slice>.stride / 2
    let unit = target.encoding.rowsPerUnit
    if sources.count > most {
      var left = Array(sources)[...]
      var next = row
      while !left.isEmpty {
        let count = max(left.prefix(most).reduce(0) { $0 + $1.count } / unit * unit, unit)
        let part = RunSlice.take(count, from: &left)
        part.withUnsafeBufferPointer { transcode($0, to: target, row: next) }
        next += count
      }
      return
    }
    let total = sources.reduce(0) { $0 + $1.count }
    if total == 0 { return }
    exclusivelyRecording { scratch throws(KVError) in
      if sources.allSatisfy({ session.accessible($0.run.base) }) {
        return try transcode(sources, total, to: target, row: row, &scratch)
      }
      let sources = try resident(Array(sources), &scratch)
      try sources.withUnsafeBufferPointer { (sources) throws(KVError) in
        try transcode(sources, total, to: target, row: row, &scratch)
      }
    }
  }

  /// Rows that kernels can reach.
  private func transcode(
    _ sources: UnsafeBufferPointer<RunSlice>, _ total: Int, to target: RowRun, row: Int, _ scratch: inout Scratch
  ) throws(KVError) {
    if sources.allSatisfy({ isVerbatim($0, target, row: row) }) {
      try gather(sources, total, to: target, row: row, &scratch)
      return
    }
    if target.map == nil, sources.allSatisfy({ $0.run.map == nil }) {
      let list = try list(sources, &scratch)
      encode(list, sources.count, rows: total, to: target, row: row)
      return
    }
    let unit = target.encoding.rowsPerUnit
    let rows = max(CUDABackend.tableElements / target.dim / unit, 1) * unit
    var left = ArraySlice(sources)
    var done = 0
    while done < total {
      let count = min(rows, total - done)
      let table = try loadTable(RunSlice.take(count, from: &left), &scratch)
      if let map = target.map { try self.map(table, rows: count, map, back: false, numbers: true, &scratch) }
      let run = RowRun(encoding: .dense(.f32), dim: target.dim, capacity: count, base: UnsafeMutableRawPointer(table))
      let list = try withUnsafePointer(to: RunSlice(run: run, first: 0, count: count)) { (slice) throws(KVError) in
        try self.list(UnsafeBufferPointer(start: slice, count: 1), &scratch)
      }
      encode(list, 1, rows: count, to: target, row: row + done)
      done += count
    }
  }

  /// The same slices with rows in ordinary memory copied to the card: dense ones, which other segments lend.
  private func resident(_ slices: [RunSlice], _ scratch: inout Scratch) throws(KVError) -> [RunSlice] {
    var bytes = 0
    var isFar = [Bool](repeating: false, count: slices.count)
    for (index, slice) in slices.enumerated() where !session.accessible(slice.run.base) {
      isFar[index] = true
      bytes += (slice.elements.bytes + 255) / 256 * 256
    }
    if bytes == 0 { return slices }
    // Their list comes after them, and must not take their place.
    try scratch.ring.reserve(bytes + slices.count * MemoryLayout<kv_slice>.stride, pieces: 2, session)
    let pinned = try scratch.ring.bytes(bytes, session)
    var offset = 0
    return slices.enumerated().map { index, slice in
      guard isFar[index] else { return slice }
      let (elements, bytes) = slice.elements
      let base = pinned + offset
      base.copyMemory(from: elements, byteCount: bytes)
      offset += (bytes + 255) / 256 * 256
      return slice.copied(to: base)
    }
  }

  func encode(_ list: UnsafeMutableRawPointer, _ slices: Int, rows: Int, to target: RowRun, row: Int) {
    let encoding = target.encoding
    let slice = RunSlice(run: target, first: row, count: rows).kernelSlice(start: 0)
    // Groups of tokens around zero points are a matter of their code.
    if let zero = encoding.zeroPoint, encoding.kind == .affinePerToken {
      let groups = (target.dim + encoding.group - 1) / encoding.group
      session.launch(
        .toZeroNumbers, x: gridBlocks(rows * groups), list, UInt32(slices), slice, Float(zero.clip),
        zero.steps(bits: encoding.bits))
      session.launch(
        .toZeroRow, x: gridBlocks(rows * encoding.payloadBytes(rows: 1, dim: target.dim) / 4), list, UInt32(slices),
        slice, Float(zero.clip))
      return
    }
    let kernel: CUDAKernel
    let elements: Int
    switch encoding.kind {
    case .dense: (kernel, elements) = (.toDense, rows * target.dim)
    case .affinePerChannel: (kernel, elements) = (.toChannel, rows / encoding.group * target.dim)
    case .affinePerToken: (kernel, elements) = (.toRow, rows * 32)
    case .codes: (kernel, elements) = (.toCodes, rows * encoding.payloadBytes(rows: 1, dim: target.dim) / 4)
    case .scaledPerToken, .scaledFixed: (kernel, elements) = (.toScaled, rows * 32)
    case .scaledPerBlock: (kernel, elements) = (.toScaled, rows / encoding.group * 32)
    case .ggml: (kernel, elements) = (.toBlocks, rows * target.dim / GGMLBlock.channels)
    }
    session.launch(kernel, x: gridBlocks(elements), list, UInt32(slices), slice)
  }

  private func isVerbatim(_ source: RunSlice, _ target: RowRun, row: Int) -> Bool {
    let unit = target.encoding.rowsPerUnit
    return source.run.encoding == target.encoding && source.run.map == target.map && source.first % unit == 0
      && source.count % unit == 0 && row % unit == 0
  }

  /// Whole units, byte for byte: one launch, however many runs of rows stay.
  private func gather(
    _ sources: UnsafeBufferPointer<RunSlice>, _ total: Int, to target: RowRun, row: Int, _ scratch: inout Scratch
  ) throws(KVError) {
    let encoding = target.encoding
    let unit = encoding.rowsPerUnit
    let payload = encoding.payloadBytes(rows: unit, dim: target.dim)
    // Buffers are 256-byte aligned: the size of a unit decides how wide its copies are.
    let width = payload % 16 == 0 && sources.allSatisfy(\.isAligned) && target.isAligned ? 16 : payload % 4 == 0 ? 4 : 1
    let list = try self.list(sources, &scratch)
    session.launch(
      .gather, x: gridBlocks(total / unit * 32), list, UInt32(sources.count),
      RunSlice(run: target, first: row, count: total).kernelSlice(start: 0), UInt32(unit), UInt32(payload),
      UInt32(encoding.scaleBytes(rows: unit, dim: target.dim)),
      UInt32(encoding.minimumBytes(rows: unit, dim: target.dim)), UInt32(width))
  }
}

extension RowRun {
  fileprivate var isAligned: Bool { Int(bitPattern: base) % 16 == 0 }
}

extension RunSlice {
  fileprivate var isAligned: Bool { run.isAligned }

  /// Where dense rows in ordinary memory lie.
  fileprivate var elements: (base: UnsafeMutableRawPointer, bytes: Int) {
    let (encoding, dim) = (run.encoding, run.dim)
    precondition(encoding.kind == .dense, "\(encoding) rows in ordinary memory")
    return (run.base + encoding.payloadBytes(rows: first, dim: dim), encoding.payloadBytes(rows: count, dim: dim))
  }

  /// The same rows where they were copied.
  fileprivate func copied(to base: UnsafeMutableRawPointer) -> RunSlice {
    RunSlice(run: RowRun(encoding: run.encoding, dim: run.dim, capacity: count, base: base), first: 0, count: count)
  }
}

extension ElementRange {
  fileprivate var kernelNumber: UInt32 {
    switch self {
    case .window: 0
    case .half: 1
    case .halfOfFloat, .magnitude: 2
    }
  }
}

extension TensorView {
  /// Rows that were copied one behind the other.
  fileprivate func stagedView(base: UnsafeRawPointer) -> kv_view {
    kv_view(
      base: UInt64(UInt(bitPattern: base)), head_stride: 0, token_stride: Int64(dim), type: UInt32(type.rawValue),
      heads: 1, tokens: 0, dim: UInt32(dim))
  }

  func kernelView(base: UnsafeRawPointer) -> kv_view {
    kv_view(
      base: UInt64(UInt(bitPattern: base)), head_stride: Int64(headStride), token_stride: Int64(tokenStride),
      type: UInt32(type.rawValue), heads: UInt32(heads), tokens: UInt32(tokens), dim: UInt32(dim))
  }
}
