/// Rows in a saved cache, drawn in ``SavedCache``. Their memory is the backend's: only its copies reach it.
extension RowStore {
  func encode(to writer: inout ByteWriter, backend: any ComputeBackend) {
    // An empty extent at the end is room for the next rows; elsewhere it is nothing.
    let kept = extents.indices.filter { extents[$0].rows > 0 || ($0 >= bodyExtents && $0 == extents.count - 1) }
    writer.count(kept.count { $0 < bodyExtents })
    writer.count(kept.count)
    if format.map.scaling.isShared {
      writer.bool(sharedMap != nil)
      sharedMap?.encodeNumbers(to: &writer, backend: backend)
    }
    var previous: RowMap?
    for index in kept {
      let map = extents[index].map
      let source: MapSource? =
        map == nil
        ? nil : map === fixedMap ? .fixed : map === sharedMap ? .shared : map === previous ? .previous : .own
      extents[index].encode(to: &writer, dim: dim, map: source, backend: backend)
      if map != nil { previous = map }
    }
  }

  /// Where the map of a saved extent comes from.
  fileprivate enum MapSource: UInt8 {
    /// The format's, which has no numbers.
    case fixed = 1
    /// That of all rows to come.
    case shared = 2
    /// Its numbers follow.
    case own = 3
    /// That of the extent before it that has one.
    case previous = 4
  }

  /// - Parameter slots: rows there must be.
  init(
    from reader: inout ByteReader, slots: Int, like empty: RowStore, backend: any ComputeBackend
  ) throws(KVError) {
    let (dim, format) = (empty.dim, empty.format)
    let body = try reader.count("body extents", in: 0...slots)
    let count = try reader.count("extents", of: Extent.headerSize)
    guard body <= count else { throw reader.corrupt("expected \(body) body extents; found \(count) extents in all") }
    var shared: RowMap?
    if format.map.scaling.isShared, try reader.bool("whether there are numbers per channel") {
      shared = try empty.decodeMap(from: &reader, backend: backend)
    }
    var previous: RowMap?
    var extents: ContiguousArray<Extent> = []
    var left = slots
    for index in 0..<count {
      let extent = try Extent(
        from: &reader, place: index < body ? .body : index < count - 1 ? .tail : .end, atMost: left, like: empty,
        shared: shared, previous: previous, backend: backend)
      if let map = extent.map { previous = map }
      left -= extent.rows
      extents.append(extent)
    }
    guard left == 0 else { throw reader.corrupt("expected \(slots) rows; found \(slots - left)") }
    self.init(
      restoring: extents, bodyExtents: body, dim: dim, format: format, fixedMap: empty.fixedMap, sharedMap: shared,
      isSparse: empty.isSparse)
  }

  /// The map of an encoded extent: one that the format allows.
  fileprivate func map(
    from reader: inout ByteReader, shared: RowMap?, previous: RowMap?, backend: any ComputeBackend
  ) throws(KVError) -> RowMap? {
    guard fixedMap != nil else { return nil }
    let number = try reader.u8("the map of rows")
    let map: RowMap?
    switch MapSource(rawValue: number) {
    case .fixed: map = format.map.scaling == .none ? fixedMap : nil
    case .shared: map = shared
    case .own: map = format.map.scaling == .none ? nil : try decodeMap(from: &reader, backend: backend)
    case .previous: map = previous
    case nil: map = nil
    }
    guard let map else { throw reader.corrupt("expected a map that the format has; found \(number)") }
    return map
  }

  fileprivate func decodeMap(from reader: inout ByteReader, backend: any ComputeBackend) throws(KVError) -> RowMap {
    guard let fixedMap, let type = format.body?.type else { throw reader.corrupt("expected rows without a map") }
    let rows = format.map.scaling.numbers
    var bytes = try reader.raw(rows * dim * type.byteCount, "numbers per channel")
    guard RowEncoding.isFinite(bytes, type) else {
      throw reader.corrupt("expected finite numbers per channel before this byte; found NaN or infinity")
    }
    let buffer = try backend.allocate(byteCount: bytes.count, hostVisible: false)
    swapToLittleEndian(&bytes, from: 0, width: type.byteCount)
    bytes.withUnsafeBytes { raw in
      if let base = raw.baseAddress { backend.copy(from: base, to: buffer.base, byteCount: raw.count) }
    }
    return RowMap(fixed: fixedMap.fixed, numbers: buffer, count: rows, type: type)
  }
}

extension RowMap {
  fileprivate func encodeNumbers(to writer: inout ByteWriter, backend: any ComputeBackend) {
    guard let numbers else { return }
    var host = [UInt8](unsafeUninitializedCapacity: numbers.byteCount) { buffer, filled in
      if let base = buffer.baseAddress {
        backend.copy(from: numbers.base, toHost: base, byteCount: numbers.byteCount)
      }
      filled = numbers.byteCount
    }
    swapToLittleEndian(&host, from: 0, width: descriptor.pointee.type.byteCount)
    writer.raw(host)
  }
}

extension Extent {
  fileprivate static let headerSize = 32

  /// Where an extent lies in its store.
  fileprivate enum Place { case body, tail, end }

  /// Where the elements or codes, the scales and the minima of the rows lie. `width`: bytes that a machine of the other
  /// byte order would reverse.
  private func parts(dim: Int) -> [(address: UnsafeMutableRawPointer, bytes: Int, width: Int)] {
    let run = run(dim: dim)
    let width = encoding.type.byteCount
    let parts: [(address: UnsafeMutableRawPointer, bytes: Int, width: Int)] = [
      (
        run.base + encoding.payloadBytes(rows: first, dim: dim),
        bytes: encoding.payloadBytes(rows: rows, dim: dim), width: encoding.payloadWidth
      ),
      (run.scales + encoding.scaleBytes(rows: first, dim: dim), encoding.scaleBytes(rows: rows, dim: dim), width),
      (run.minima + encoding.minimumBytes(rows: first, dim: dim), encoding.minimumBytes(rows: rows, dim: dim), width),
    ]
    return parts.filter { $0.bytes > 0 }
  }

  fileprivate func encode(
    to writer: inout ByteWriter, dim: Int, map source: RowStore.MapSource?, backend: any ComputeBackend
  ) {
    writer.u8(encoding.kind.rawValue)
    writer.u8(encoding.type.rawValue)
    writer.u8(UInt8(encoding.bits))
    writer.u8(encoding.code)
    writer.u32(encoding.groupField)
    writer.count(rows)
    writer.count(capacity)
    writer.count(first)
    if let source { writer.u8(source.rawValue) }
    if source == .own { map?.encodeNumbers(to: &writer, backend: backend) }
    for part in parts(dim: dim) {
      var host = [UInt8](unsafeUninitializedCapacity: part.bytes) { buffer, filled in
        if let base = buffer.baseAddress { backend.copy(from: part.address, toHost: base, byteCount: part.bytes) }
        filled = part.bytes
      }
      swapToLittleEndian(&host, from: 0, width: part.width)
      writer.raw(host)
    }
  }

  /// - Parameter limit: rows there may be.
  fileprivate init(
    from reader: inout ByteReader, place: Place, atMost limit: Int, like store: RowStore, shared: RowMap?,
    previous: RowMap?, backend: any ComputeBackend
  ) throws(KVError) {
    let (dim, format) = (store.dim, store.format)
    let encoding = try Extent.encoding(from: &reader, place: place, format: format)
    let unit = encoding.rowsPerUnit
    let rows = try reader.count("rows of an extent", in: 0...limit)
    guard rows > 0 || place == .end else { throw reader.corrupt("expected rows in an extent; found none") }
    guard rows % unit == 0 else {
      throw reader.corrupt("expected whole groups of \(unit) rows; found \(rows) rows")
    }
    let roomiest = max(rows, format.growth, RowStore.extentRows(encoding, dim: dim) + unit)
    let capacity = try reader.count("room for rows", in: max(rows, 1)...roomiest)
    guard capacity % unit == 0 else {
      throw reader.corrupt("expected room for whole groups of \(unit) rows; found \(capacity)")
    }
    // Rows leave at the front of a tail only.
    let first = try reader.count("the first row", in: 0...(place == .body ? 0 : capacity - rows))

    let map =
      encoding.kind == .dense
      ? nil : try store.map(from: &reader, shared: shared, previous: previous, backend: backend)
    var data = [try reader.raw(encoding.payloadBytes(rows: rows, dim: dim), "rows")]
    try encoding.checkPayload(data[0]) { message in reader.corrupt(message) }
    for (name, bytes) in [
      ("scales", encoding.scaleBytes(rows: rows, dim: dim)), ("minima", encoding.minimumBytes(rows: rows, dim: dim)),
    ] where bytes > 0 {
      data.append(try reader.raw(bytes, name))
      guard RowEncoding.isFinite(data[data.count - 1], encoding.type) else {
        throw reader.corrupt("expected finite \(name) before this byte; found NaN or infinity")
      }
    }

    try self.init(encoding: encoding, capacity: capacity, dim: dim, map: map, backend: backend)
    self.first = first
    self.rows = rows
    for (part, var bytes) in zip(parts(dim: dim), data) {
      swapToLittleEndian(&bytes, from: 0, width: part.width)
      bytes.withUnsafeBytes { source in
        if let base = source.baseAddress { backend.copy(from: base, to: part.address, byteCount: part.bytes) }
      }
    }
  }

  /// An encoding that rows in this place of a store can have.
  private static func encoding(
    from reader: inout ByteReader, place: Place, format: SideFormat
  ) throws(KVError) -> RowEncoding {
    let start = reader
    let kind = try reader.u8("the kind of an encoding")
    let type = try reader.u8("an element type")
    let bits = try reader.u8("the bits of a code")
    let code = try reader.u8("the code of an encoding")
    let group = try reader.u32("the group of an encoding")
    guard let encoding = RowEncoding(kind: kind, type: type, bits: Int(bits), code: code, groupField: group) else {
      throw start.corrupt(
        "expected a known encoding; found kind \(kind), type \(type), \(bits) bits, code \(code), group \(group)")
    }
    // What was decoded again after most of its group was dropped lies dense in the body.
    let dense = RowEncoding.dense(format.window)
    let accepted = place == .body && format.body != nil ? [format.body, dense] : [dense]
    guard place != .body || format.body != nil, accepted.contains(encoding) else {
      throw start.corrupt(
        "expected rows in \(accepted.compactMap { $0?.description }.joined(separator: " or ")); found \(encoding)")
    }
    return encoding
  }
}

extension RowEncoding {
  /// Bytes of the payload that a machine of the other byte order would reverse.
  fileprivate var payloadWidth: Int {
    switch kind {
    case .dense: type.byteCount
    case .affinePerChannel, .affinePerToken, .codes: 4
    case .scaledPerToken, .scaledPerBlock, .scaledFixed, .ggml: 1
    }
  }

  /// Refuses elements, FP8 codes and block scales that are not finite.
  ///
  /// - Parameter failure: makes the error of a message.
  package func checkPayload(_ bytes: [UInt8], _ failure: (String) -> KVError) throws(KVError) {
    switch kind {
    case .dense:
      guard RowEncoding.isFinite(bytes, type) else {
        throw failure("expected finite elements before this byte; found NaN or infinity")
      }
    case .ggml, .scaledPerToken, .scaledPerBlock, .scaledFixed:
      let index = bytes.withUnsafeBytes { firstNonfinite($0) }
      if let index { throw failure("expected finite \(self) rows; byte \(index) of \(bytes.count) is NaN or infinity") }
    case .affinePerChannel, .affinePerToken, .codes: return
    }
  }

  /// The byte of the first element, FP8 code or block scale that is not finite, of dense rows or rows of codes or blocks.
  package func firstNonfinite(_ bytes: UnsafeRawBufferPointer) -> Int? {
    if kind == .dense {
      let width = type.byteCount
      let exponent: UInt32 = type == .f16 ? 0x7C00 : type == .bf16 ? 0x7F80 : 0x7F80_0000
      return stride(from: 0, to: bytes.count, by: width).first { at in
        let bits =
          width == 4
          ? UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: at, as: UInt32.self))
          : UInt32(UInt16(littleEndian: bytes.loadUnaligned(fromByteOffset: at, as: UInt16.self)))
        return bits & exponent == exponent
      }
    }
    if let block {
      for start in stride(from: 0, to: bytes.count, by: block.byteCount) {
        for half in 0..<block.halves {
          let bits = UInt16(littleEndian: bytes.loadUnaligned(fromByteOffset: start + 2 * half, as: UInt16.self))
          if bits & 0x7C00 == 0x7C00 { return start + 2 * half }
        }
      }
    }
    switch scaledCode {
    case .e4m3: return bytes.firstIndex { $0 & 0x7F == 0x7F }
    case .e5m2: return bytes.firstIndex { $0 & 0x7C == 0x7C }
    default: return nil
    }
  }

  package static func isFinite(_ bytes: [UInt8], _ type: ElementType) -> Bool {
    bytes.withUnsafeBytes { raw in
      switch type {
      case .f32: allBelow(0x7F80_0000 as UInt32, raw)
      case .bf16: allBelow(0x7F80 as UInt16, raw)
      default: allBelow(0x7C00 as UInt16, raw)
      }
    }
  }

  /// Whether no number has all bits of `exponent` set. No early end, so that it runs as fast as memory.
  private static func allBelow<Bits: FixedWidthInteger & BitwiseCopyable>(
    _ exponent: Bits, _ raw: UnsafeRawBufferPointer
  ) -> Bool {
    var clean = true
    for at in stride(from: 0, to: raw.count, by: MemoryLayout<Bits>.size) {
      let bits = Bits(littleEndian: raw.loadUnaligned(fromByteOffset: at, as: Bits.self))
      clean = clean && bits & exponent != exponent
    }
    return clean
  }
}
