internal import CKVKernels
package import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// Moving rows: in from an engine's tensors, between encodings, out to f32.
extension CPUBackend {
  package func firstNonfinite(_ view: borrowing TensorView) -> ElementPlace? {
    let check = kernels.pointee.first_nonfinite!
    let type = UInt32(view.type.rawValue)
    if view.tokenStride == view.dim || view.tokens == 1 {
      for head in 0..<view.heads where view.tokens > 0 {
        let index = check(view.row(head: head, token: 0), type, view.tokens * view.dim)
        if index >= 0 { return ElementPlace(head: head, token: Int(index) / view.dim, channel: Int(index) % view.dim) }
      }
      return nil
    }
    if view.headStride == view.dim {
      // [token, head, dim]: the heads of a token lie together. The first place in memory is the first token's.
      for token in 0..<view.tokens {
        let index = check(view.row(head: 0, token: token), type, view.heads * view.dim)
        if index >= 0 { return ElementPlace(head: Int(index) / view.dim, token: token, channel: Int(index) % view.dim) }
      }
      return nil
    }
    for head in 0..<view.heads {
      for token in 0..<view.tokens {
        let index = check(view.row(head: head, token: token), type, view.dim)
        if index >= 0 { return ElementPlace(head: head, token: token, channel: Int(index)) }
      }
    }
    return nil
  }

  package func write(_ view: borrowing TensorView, to targets: [WriteTarget]) -> ElementPlace? {
    let convert = kernels.pointee.convert!
    let sourceType = UInt32(view.type.rawValue)
    let dim = view.dim
    for target in targets {
      let slice = target.slice
      let type = slice.run.encoding.type
      let rowBytes = dim * type.byteCount
      let base = slice.run.base + slice.first * rowBytes
      if view.tokenStride == dim {
        convert(
          base, UInt32(type.rawValue), view.row(head: target.head, token: target.token), sourceType,
          slice.count * dim)
      } else {
        for row in 0..<slice.count {
          convert(
            base + row * rowBytes, UInt32(type.rawValue), view.row(head: target.head, token: target.token + row),
            sourceType, dim)
        }
      }
      // The check is on what was written, before any of it counts as a row.
      if let index = firstBeyond(target.range, base, type, slice.count * dim, source: view.type) {
        return ElementPlace(head: target.head, token: target.token + index / dim, channel: index % dim)
      }
    }
    return nil
  }

  /// Index of the first converted element that its range does not hold.
  private func firstBeyond(
    _ range: ElementRange, _ elements: UnsafeRawPointer, _ type: ElementType, _ count: Int, source: ElementType
  ) -> Int? {
    if type != .f32, type != source {
      let index = kernels.pointee.first_nonfinite!(elements, UInt32(type.rawValue), count)
      if index >= 0 { return Int(index) }
    }
    switch range {
    case .window: return nil
    case .half: return source == .f16 || type == .f16 ? nil : firstBeyondHalf(elements, type, count)
    case .magnitude(let limit): return firstBeyond(limit, elements, type, count)
    case .halfOfFloat: return firstBeyondHalfOfFloat(elements, type, count)
    }
  }

  /// Index of the first element above half of what f32 holds: the exponent field at its largest finite value.
  private func firstBeyondHalfOfFloat(_ elements: UnsafeRawPointer, _ type: ElementType, _ count: Int) -> Int? {
    let limit = Float.greatestFiniteMagnitude / 2
    if type == .f32 {
      let values = UnsafeBufferPointer(start: elements.assumingMemoryBound(to: Float.self), count: count)
      return values.firstIndex { abs($0) > limit }
    }
    let bits = UnsafeBufferPointer(start: elements.assumingMemoryBound(to: UInt16.self), count: count)
    return type == .bf16 ? bits.firstIndex { abs(Float(bitPattern: UInt32($0) << 16)) > limit } : nil
  }

  /// Index of the first element beyond a magnitude.
  private func firstBeyond(
    _ limit: Float, _ elements: UnsafeRawPointer, _ type: ElementType, _ count: Int
  ) -> Int? {
    let block = 1024
    return withUnsafeTemporaryAllocation(of: Float.self, capacity: block) { buffer in
      guard let scratch = buffer.baseAddress else { return nil }
      for start in stride(from: 0, to: count, by: block) {
        let length = min(block, count - start)
        kernels.pointee.convert!(
          scratch, UInt32(ElementType.f32.rawValue), elements + start * type.byteCount, UInt32(type.rawValue), length)
        let index = ckv_first_beyond(scratch, length, limit)
        if index >= 0 { return start + Int(index) }
      }
      return nil
    }
  }

  /// Index of the first element that is infinite in f16.
  private func firstBeyondHalf(_ elements: UnsafeRawPointer, _ type: ElementType, _ count: Int) -> Int? {
    let half = UInt32(ElementType.f16.rawValue)
    if type == .f16 {
      let index = kernels.pointee.first_nonfinite!(elements, half, count)
      return index < 0 ? nil : Int(index)
    }
    let block = 1024
    return withUnsafeTemporaryAllocation(of: UInt16.self, capacity: block) { buffer in
      guard let scratch = buffer.baseAddress else { return nil }
      for start in stride(from: 0, to: count, by: block) {
        let length = min(block, count - start)
        kernels.pointee.convert!(
          scratch, half, elements + start * type.byteCount, UInt32(type.rawValue), length)
        let index = kernels.pointee.first_nonfinite!(scratch, half, length)
        if index >= 0 { return start + Int(index) }
      }
      return nil
    }
  }

  package func read(_ slice: RunSlice, into destination: UnsafeMutablePointer<Float>, stride: Int) {
    slice.run.withKernelMap { map in
      withUnsafePointer(to: slice.run.kernelRun) {
        ckv_mapped_decode(kernels, map, $0, UInt32(slice.first), UInt32(slice.count), destination, stride)
      }
    }
  }

  package func channelRange(
    _ sources: UnsafeBufferPointer<RunSlice>, map: UnsafePointer<MapDescriptor>?, low: UnsafeMutablePointer<Float>,
    high: UnsafeMutablePointer<Float>
  ) {
    let block = 256
    for source in sources where source.count > 0 {
      let dim = source.run.dim
      withUnsafeTemporaryAllocation(of: Float.self, capacity: min(block, source.count) * dim) { buffer in
        guard let rows = buffer.baseAddress else { return }
        for first in Swift.stride(from: 0, to: source.count, by: block) {
          let count = min(block, source.count - first)
          read(RunSlice(run: source.run, first: source.first + first, count: count), into: rows, stride: dim)
          if let map = map?.pointee {
            // Signs, rotation and order only: the numbers are what is looked for.
            var fixed = map.kernelMap
            fixed.factor = nil
            fixed.offset = nil
            ckv_map_rows(kernels, &fixed, rows, dim, UInt32(count))
          }
          ckv_channel_range(rows, dim, UInt32(count), UInt32(dim), low, high)
        }
      }
    }
  }

  package func moveRows(_ source: RunSlice, to target: RowRun, row: Int) {
    let bytes = source.run.dim * source.run.encoding.type.byteCount
    memmove(target.base + row * bytes, source.run.base + source.first * bytes, source.count * bytes)
  }

  package func hidden(_ bias: UnsafePointer<Float>, count: Int) -> Int { kernels.pointee.count_hidden!(bias, count) }

  package func lowest(_ values: UnsafePointer<Float>, bias: UnsafePointer<Float>?, count: Int) -> Int {
    Int(kernels.pointee.lowest!(values, bias, count))
  }

  package func transcode(_ sources: UnsafeBufferPointer<RunSlice>, to target: RowRun, row: Int) {
    var next = row
    if sources.allSatisfy({ verbatim($0, target, row: row) }) {
      for source in sources {
        copyRows(source, to: target, row: next)
        next += source.count
      }
      return
    }
    let total = sources.reduce(0) { $0 + $1.count }
    let dim = target.dim
    // A block of rows at a time through f32 that stays in the cache of the core.
    let unit = target.encoding.rowsPerUnit
    let block = max(256 / unit, 1) * unit
    withUnsafeTemporaryAllocation(of: Float.self, capacity: min(block, total) * dim) { buffer in
      guard let scratch = buffer.baseAddress else { return }
      var source = 0
      var offset = 0
      var done = 0
      while done < total {
        let count = min(block, total - done)
        var filled = 0
        while filled < count {
          let taken = min(count - filled, sources[source].count - offset)
          read(
            RunSlice(run: sources[source].run, first: sources[source].first + offset, count: taken),
            into: scratch + filled * dim, stride: dim)
          filled += taken
          offset += taken
          if offset == sources[source].count {
            source += 1
            offset = 0
          }
        }
        target.withKernelMap { map in
          if let map { ckv_map_rows(kernels, map, scratch, dim, UInt32(count)) }
        }
        encode(scratch, rows: count, to: target, row: next)
        next += count
        done += count
      }
    }
  }

  private func verbatim(_ source: RunSlice, _ target: RowRun, row: Int) -> Bool {
    let unit = target.encoding.rowsPerUnit
    return source.run.encoding == target.encoding && source.run.map == target.map && source.first % unit == 0
      && source.count % unit == 0 && row % unit == 0
  }

  private func copyRows(_ source: RunSlice, to target: RowRun, row: Int) {
    let encoding = target.encoding
    let dim = target.dim
    let from = encoding.payloadBytes(rows: source.first, dim: dim)
    let to = encoding.payloadBytes(rows: row, dim: dim)
    (target.base + to).copyMemory(
      from: source.run.base + from, byteCount: encoding.payloadBytes(rows: source.count, dim: dim))
    let scaleBytes = encoding.scaleBytes(rows: source.count, dim: dim)
    if scaleBytes == 0 { return }
    let scaleFrom = encoding.scaleBytes(rows: source.first, dim: dim)
    let scaleTo = encoding.scaleBytes(rows: row, dim: dim)
    (target.scales + scaleTo).copyMemory(from: source.run.scales + scaleFrom, byteCount: scaleBytes)
    let minimumBytes = encoding.minimumBytes(rows: source.count, dim: dim)
    if minimumBytes == 0 { return }
    (target.minima + scaleTo).copyMemory(from: source.run.minima + scaleFrom, byteCount: minimumBytes)
  }

  /// A decoded code can exceed the value it was made from by half a step: near the end of the f16 range that is infinity.
  private func saturateHalf(_ elements: UnsafeMutableRawPointer, _ count: Int) {
    var start = 0
    while start < count {
      let index = kernels.pointee.first_nonfinite!(
        elements + start * 2, UInt32(ElementType.f16.rawValue), count - start)
      if index < 0 { return }
      start += Int(index)
      let bits = (elements + start * 2).assumingMemoryBound(to: UInt16.self)
      bits.pointee = bits.pointee & 0x8000 | 0x7BFF
    }
  }

  /// Writes f32 rows into a run of any encoding.
  private func encode(_ rows: UnsafePointer<Float>, rows count: Int, to target: RowRun, row: Int) {
    let encoding = target.encoding
    let dim = target.dim
    let data = target.base + encoding.payloadBytes(rows: row, dim: dim)
    let metadata = encoding.scaleBytes(rows: row, dim: dim)
    let f32 = UInt32(ElementType.f32.rawValue)
    let type = UInt32(encoding.type.rawValue)
    switch encoding.kind {
    case .dense:
      kernels.pointee.convert!(data, type, rows, f32, count * dim)
      if encoding.type == .f16 { saturateHalf(data, count * dim) }
    case .affinePerChannel where encoding.zeroPoint != nil:
      ckv_encode_clamped_channel(
        rows, dim, UInt32(count), UInt32(dim), UInt32(encoding.group), UInt32(encoding.bits), type,
        data.assumingMemoryBound(to: UInt32.self), target.scales + metadata, target.minima + metadata)
    case .affinePerChannel:
      kernels.pointee.encode_channel!(
        rows, f32, dim, UInt32(count), UInt32(dim), UInt32(encoding.group), UInt32(encoding.bits), type,
        data.assumingMemoryBound(to: UInt32.self), target.scales + metadata, target.minima + metadata)
    case .codes:
      ckv_encode_codes(
        rows, dim, UInt32(count), UInt32(dim), UInt32(encoding.bits), data.assumingMemoryBound(to: UInt32.self))
    case .affinePerToken:
      if encoding.zeroPoint?.isClamped == true {
        ckv_encode_clamped_row(
          rows, dim, UInt32(count), UInt32(dim), UInt32(encoding.group), UInt32(encoding.bits), type,
          data.assumingMemoryBound(to: UInt32.self), target.scales + metadata, target.minima + metadata)
        return
      }
      if let zero = encoding.zeroPoint {
        ckv_encode_zero_row(
          rows, dim, UInt32(count), UInt32(dim), UInt32(encoding.group), UInt32(encoding.bits), Float(zero.clip),
          zero.steps(bits: encoding.bits), type, data.assumingMemoryBound(to: UInt32.self), target.scales + metadata,
          target.minima + metadata)
        return
      }
      kernels.pointee.encode_row!(
        rows, f32, dim, UInt32(count), UInt32(dim), UInt32(encoding.group), UInt32(encoding.bits), type,
        data.assumingMemoryBound(to: UInt32.self), target.scales + metadata, target.minima + metadata)
    case .scaledPerToken, .scaledPerBlock, .scaledFixed, .ggml:
      var run = target.kernelRun
      kernels.pointee.encode_blocks!(&run, UInt32(row), UInt32(count), rows, dim)
    }
  }
}
