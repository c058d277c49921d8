internal import CKVCUDA
internal import KVCore

/// What descriptions point at, one behind the other in memory that is copied to the card: maps, bases, rotary embeddings,
/// and their signs and frequencies. Each is there once.
struct CUDATables {
  private(set) var words: [UInt64] = []
  private var base: UInt64 = 0
  private var maps: [UnsafePointer<MapDescriptor>: (value: kv_map, address: UInt64)] = [:]
  private var bases: [(data: UInt64, mean: UInt64, address: UInt64)] = []
  private var rotaries: [(rotary: RotaryEmbedding, rounded: Bool, address: UInt64, value: kv_rotary)] = []

  /// Forgets everything; what follows will lie at `base`.
  mutating func begin(at base: UInt64) {
    words.removeAll(keepingCapacity: true)
    maps.removeAll(keepingCapacity: true)
    bases.removeAll(keepingCapacity: true)
    rotaries.removeAll(keepingCapacity: true)
    self.base = base
  }

  /// Appends some values and returns where they will lie.
  mutating func add<Value: BitwiseCopyable>(_ values: UnsafeBufferPointer<Value>) -> UInt64 {
    let address = base + UInt64(words.count * 8)
    let bytes = UnsafeRawBufferPointer(values)
    let first = words.count
    words.append(contentsOf: repeatElement(0, count: (bytes.count + 7) / 8))
    words.withUnsafeMutableBytes { $0[(first * 8)...].copyBytes(from: bytes) }
    return address
  }

  mutating func add<Value: BitwiseCopyable>(_ value: Value) -> UInt64 {
    withUnsafePointer(to: value) { add(UnsafeBufferPointer(start: $0, count: 1)) }
  }

  mutating func add(_ values: [Float]) -> UInt64 { values.withUnsafeBufferPointer { add($0) } }

  /// The description of a map, with its signs and order copied to where kernels reach them.
  mutating func map(_ map: UnsafePointer<MapDescriptor>) -> kv_map { entry(map).value }

  mutating func address(of map: UnsafePointer<MapDescriptor>) -> UInt64 { entry(map).address }

  private mutating func entry(_ map: UnsafePointer<MapDescriptor>) -> (value: kv_map, address: UInt64) {
    if let known = maps[map] { return known }
    let own = map.pointee
    let value = kv_map(
      sign: own.signs.map { add(UnsafeBufferPointer(start: $0, count: own.dim)) } ?? 0,
      factor: own.factors.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
      offset: own.offsets.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
      order: own.order.map { add(UnsafeBufferPointer(start: $0, count: own.dim)) } ?? 0, dim: UInt32(own.dim),
      block: UInt32(own.block), dtype: UInt32(own.type.rawValue), padding: 0)
    let entry = (value, add(value))
    maps[map] = entry
    return entry
  }

  mutating func address(of basis: RowRun, mean: UnsafePointer<Float>?) -> UInt64 {
    let value = basis.kernelBasis(mean: mean)
    if let known = bases.last(where: { $0.data == value.data && $0.mean == value.mean }) { return known.address }
    let address = add(value)
    bases.append((value.data, value.mean, address))
    return address
  }

  /// - Parameter rounded: whether the angle is the product rounded to f32.
  mutating func rotary(_ rotary: RotaryEmbedding, rounded: Bool) -> kv_rotary {
    entry(rotary, rounded).value
  }

  mutating func address(of rotary: RotaryEmbedding, rounded: Bool) -> UInt64 { entry(rotary, rounded).address }

  private mutating func entry(_ rotary: RotaryEmbedding, _ rounded: Bool) -> (address: UInt64, value: kv_rotary) {
    if let known = rotaries.first(where: { $0.rounded == rounded && $0.rotary == rotary }) {
      return (known.address, known.value)
    }
    let value = kv_rotary(
      frequencies: add(rotary.inverseFrequencies), pairs: UInt32(rotary.pairs),
      interleaved: rotary.layout == .interleaved ? 1 : 0, rounded: rounded ? 1 : 0, padding: 0)
    let address = add(value)
    rotaries.append((rotary, rounded, address, value))
    return (address, value)
  }
}

extension RunSlice {
  /// The description the kernels take; `start` rows of its list come before it.
  func kernelSlice(start: Int) -> kv_slice {
    let (encoding, capacity, dim) = (run.encoding, run.capacity, run.dim)
    var (scale, least) = (UInt64(0), UInt64(0))
    if encoding.kind.rawValue != RowEncoding.Kind.dense.rawValue {
      // Every decoded token describes every slice: sizes are asked for once.
      let scales = run.base + encoding.payloadBytes(rows: capacity, dim: dim)
      scale = UInt64(UInt(bitPattern: scales))
      least = UInt64(UInt(bitPattern: scales + encoding.scaleBytes(rows: capacity, dim: dim)))
    }
    return kv_slice(
      data: UInt64(UInt(bitPattern: run.base)), scale: scale, min: least, kind: UInt32(encoding.kind.rawValue),
      code: UInt32(encoding.code), dtype: UInt32(encoding.type.rawValue), bits: UInt32(encoding.bits),
      group: UInt32(encoding.group), factor: encoding.factor, dim: UInt32(dim), first: UInt32(first),
      count: UInt32(count), start: UInt32(start))
  }
}

extension RowRun {
  /// Rows that latents are multiplied by.
  func kernelBasis(mean: UnsafePointer<Float>?) -> kv_basis {
    kv_basis(
      data: UInt64(UInt(bitPattern: base)), mean: mean.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
      dtype: UInt32(encoding.type.rawValue), rank: UInt32(capacity), dim: UInt32(dim), padding: 0)
  }
}
