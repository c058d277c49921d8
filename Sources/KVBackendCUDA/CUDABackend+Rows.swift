internal import CKVCUDA
internal import KVBackendCPU
package import KVCore
internal import Synchronization

/// Moving rows: in from an engine's tensors, between encodings, out to f32.
extension CUDABackend {
  package func firstNonfinite(_ view: borrowing TensorView) -> ElementPlace? {
    guard view.heads * view.tokens > 0, session.accessible(view.base) else { return host.firstNonfinite(view) }
    let index = findPlace { place in
      var description = view.kernelView(base: view.base)
      var address = place
      withUnsafeMutablePointer(to: &description) { description in
        withUnsafeMutablePointer(to: &address) { address in
          var arguments: [UnsafeMutableRawPointer?] = [.init(description), .init(address)]
          session.launch(.nonfinite, x: gridBlocks(view.heads * view.tokens * view.dim), &arguments)
        }
      }
    }
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

  package func write(_ view: borrowing TensorView, to targets: [WriteTarget]) -> ElementPlace? {
    if targets.isEmpty { return nil }
    let inPlace = session.accessible(view.base)
    var layout = CUDALayout()
    let place = layout.take(1, of: UInt64.self)
    let writes = layout.take(targets.count, of: kv_write.self)
    let elementBytes = view.type.byteCount
    let rows = inPlace ? 0 : layout.take(view.heads * view.tokens * view.dim * elementBytes, of: UInt8.self)
    var description = view.kernelView(base: view.base)
    var found = UInt64.max
    exclusivelyRecording { scratch throws(KVError) in
      let base = try scratch.pinned.bytes(layout.total, session)
      (base + place).storeBytes(of: UInt64.max, as: UInt64.self)
      let list = (base + writes).assumingMemoryBound(to: kv_write.self)
      var longest = 0
      for (index, target) in targets.enumerated() {
        let slice = target.slice
        longest = max(longest, slice.count * slice.run.dim)
        list[index] = kv_write(
          slice: slice.kernelSlice(start: 0), head: UInt32(target.head), token: UInt32(target.token),
          range: target.range.kernelNumber, element: 0)
      }
      if !inPlace { description = view.stage(at: base + rows) }
      var listAddress = UnsafeMutableRawPointer(list)
      var placeAddress = base + place
      withUnsafeMutablePointer(to: &listAddress) { list in
        withUnsafeMutablePointer(to: &description) { description in
          withUnsafeMutablePointer(to: &placeAddress) { place in
            var arguments: [UnsafeMutableRawPointer?] = [.init(list), .init(description), .init(place)]
            session.launch(.write, x: gridBlocks(longest), y: targets.count, &arguments)
          }
        }
      }
      session.synchronize()
      found = (base + place).load(as: UInt64.self)
    }
    if found == .max { return nil }
    let target = targets[Int(found >> 40)]
    let element = Int(found & (1 << 40 - 1))
    return ElementPlace(head: target.head, token: target.token + element / view.dim, channel: element % view.dim)
  }

  package func read(_ slice: RunSlice, into destination: UnsafeMutablePointer<Float>, stride: Int) {
    let dim = slice.run.dim
    var layout = CUDALayout()
    let description = layout.take(1, of: kv_slice.self)
    let rows = layout.take(slice.count * dim, of: Float.self)
    exclusivelyRecording { scratch throws(KVError) in
      let base = try scratch.pinned.bytes(layout.total, session)
      (base + description).storeBytes(of: slice.kernelSlice(start: 0), as: kv_slice.self)
      var list = base + description
      var one: UInt32 = 1
      var count = UInt32(slice.count)
      var out = base + rows
      var pitch = UInt64(dim)
      withUnsafeMutablePointer(to: &list) { list in
        withUnsafeMutablePointer(to: &one) { one in
          withUnsafeMutablePointer(to: &count) { count in
            withUnsafeMutablePointer(to: &out) { out in
              withUnsafeMutablePointer(to: &pitch) { pitch in
                var arguments: [UnsafeMutableRawPointer?] = [
                  .init(list), .init(one), .init(count), .init(out), .init(pitch),
                ]
                session.launch(.read, x: gridBlocks(slice.count * dim), &arguments)
              }
            }
          }
        }
      }
      session.synchronize()
      let source = (base + rows).assumingMemoryBound(to: Float.self)
      for row in 0..<slice.count {
        (destination + row * stride).update(from: source + row * dim, count: dim)
      }
    }
  }

  package func transcode(_ sources: UnsafeBufferPointer<RunSlice>, to target: RowRun, row: Int) {
    let total = sources.reduce(0) { $0 + $1.count }
    if total == 0 { return }
    if sources.allSatisfy({ isVerbatim($0, target, row: row) }) {
      var next = row
      for source in sources {
        copyRows(source, to: target, row: next)
        next += source.count
      }
      session.synchronize()
      return
    }
    let encoding = target.encoding
    let kernel: CUDAKernel
    let elements: Int
    if encoding.kind == .dense {
      (kernel, elements) = (.toDense, total * target.dim)
    } else if encoding.kind == .affinePerChannel {
      (kernel, elements) = (.toChannel, total / encoding.group * target.dim)
    } else if encoding.kind == .affinePerToken {
      (kernel, elements) = (.toRow, total)
    } else {
      // `require` has refused such caches.
      session.record(KVError(.unsupported, "the CUDA backend has no kernels for \(encoding)"))
      return
    }
    exclusivelyRecording { scratch throws(KVError) in
      let bytes = sources.count * MemoryLayout<kv_slice>.stride
      let base = try scratch.pinned.bytes(bytes, session)
      let list = base.assumingMemoryBound(to: kv_slice.self)
      var start = 0
      for (index, source) in sources.enumerated() {
        list[index] = source.kernelSlice(start: start)
        start += source.count
      }
      var address = base
      var count = UInt32(sources.count)
      var to = RunSlice(run: target, first: row, count: total).kernelSlice(start: 0)
      withUnsafeMutablePointer(to: &address) { address in
        withUnsafeMutablePointer(to: &count) { count in
          withUnsafeMutablePointer(to: &to) { to in
            var arguments: [UnsafeMutableRawPointer?] = [.init(address), .init(count), .init(to)]
            session.launch(kernel, x: gridBlocks(elements), &arguments)
          }
        }
      }
      session.synchronize()
    }
  }

  private func isVerbatim(_ source: RunSlice, _ target: RowRun, row: Int) -> Bool {
    let unit = target.encoding.rowsPerUnit
    return source.run.encoding == target.encoding && source.first % unit == 0 && source.count % unit == 0
      && row % unit == 0
  }

  private func copyRows(_ source: RunSlice, to target: RowRun, row: Int) {
    let encoding = target.encoding
    let dim = target.dim
    session.copy(
      to: target.base + encoding.payloadBytes(rows: row, dim: dim),
      from: source.run.base + encoding.payloadBytes(rows: source.first, dim: dim),
      encoding.payloadBytes(rows: source.count, dim: dim))
    let scaleBytes = encoding.scaleBytes(rows: source.count, dim: dim)
    if scaleBytes == 0 { return }
    let from = encoding.scaleBytes(rows: source.first, dim: dim)
    let to = encoding.scaleBytes(rows: row, dim: dim)
    session.copy(to: target.scales + to, from: source.run.scales + from, scaleBytes)
    session.copy(to: target.minima + to, from: source.run.minima + from, scaleBytes)
  }
}

extension ElementRange {
  fileprivate var kernelNumber: UInt32 {
    switch self {
    case .window: 0
    case .half: 1
    case .halfOfFloat: 2
    // Of maps, which `require` refuses.
    case .magnitude: 2
    }
  }
}

extension TensorView {
  func kernelView(base: UnsafeRawPointer) -> kv_view {
    kv_view(
      base: UInt64(UInt(bitPattern: base)), head_stride: Int64(headStride), token_stride: Int64(tokenStride),
      type: UInt32(type.rawValue), heads: UInt32(heads), tokens: UInt32(tokens), dim: UInt32(dim))
  }

  /// Copies the rows to pinned memory, one after the other.
  func stage(at target: UnsafeMutableRawPointer) -> kv_view {
    let bytes = dim * type.byteCount
    for head in 0..<heads {
      for token in 0..<tokens {
        (target + (head * tokens + token) * bytes).copyMemory(from: row(head: head, token: token), byteCount: bytes)
      }
    }
    return kv_view(
      base: UInt64(UInt(bitPattern: target)), head_stride: Int64(tokens * dim), token_stride: Int64(dim),
      type: UInt32(type.rawValue), heads: UInt32(heads), tokens: UInt32(tokens), dim: UInt32(dim))
  }
}
