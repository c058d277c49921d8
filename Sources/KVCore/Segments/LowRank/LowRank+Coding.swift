/// Low-rank tiers in a saved cache.
///
/// ```
/// JOIN   whether there are latents: flag · keys · values
///   side whether there is a basis: flag
///        1: type u8 · encoder flag · mean flag · rank of each unit count · decoder · encoder · mean, as in `LatentBasis`
///        rows count and row store of each store
/// SEGM   as `SharedSegment` writes it
/// ```
extension LowRankStorage {
  package func encode(to writer: inout ByteWriter) {
    writer.bool(sides != nil)
    guard let sides else { return }
    for side in [sides.keys, sides.values] {
      writer.bool(side.basis != nil)
      side.basis?.encode(to: &writer, backend: backend)
      for store in side.stores {
        writer.count(store.rows)
        store.encode(to: &writer, backend: backend)
      }
    }
  }

  fileprivate func decode(from reader: inout ByteReader, tokensSeen: Int) throws(KVError) {
    guard try reader.bool("whether there are latents") else { return }
    let keys = try side(from: &reader, isKey: true, tokensSeen: tokensSeen)
    let values = try side(from: &reader, isKey: false, tokensSeen: tokensSeen)
    for member in layers.indices {
      for head in 0..<shape.kvHeads {
        let rows = [keys, values].map { store($0, member: member, head: head).rows }
        guard rows[0] == rows[1] else {
          throw reader.corrupt("expected as many latents of keys as of values; found \(rows[0]) and \(rows[1])")
        }
      }
    }
    restore(sides: (keys, values))
  }

  private func side(from reader: inout ByteReader, isKey: Bool, tokensSeen: Int) throws(KVError) -> Side {
    let dim = isKey ? shape.keyDim : shape.valueDim
    var basis: LatentBasis?
    if try reader.bool("whether there is a basis") {
      basis = try LatentBasis(
        from: &reader, type: format.basis, units: units, dim: dim, headsPerUnit: headsPerUnit, backend: backend)
    }
    let isJoined = isKey && format.joinedKeys != nil
    guard basis == nil || !isJoined && (isKey || format.valueRows == nil) else {
      throw reader.corrupt("expected rows without a basis")
    }
    let empty: [RowStore]
    if let basis {
      empty = basis.ranks.map { RowStore(dim: $0, format: latentFormat(keys: isKey)) }
    } else {
      empty = try rowStores(keys: isKey)
    }
    var stores: [RowStore] = []
    for store in empty {
      let rows = try reader.count("rows of a store", in: 0...tokensSeen)
      stores.append(try RowStore(from: &reader, slots: rows, like: store, backend: backend))
    }
    return Side(basis: basis, isJoined: isJoined, stores: stores)
  }
}

extension LatentBasis {
  fileprivate func encode(to writer: inout ByteWriter, backend: any ComputeBackend) {
    writer.u8(type.rawValue)
    writer.bool(encoder != nil)
    writer.bool(mean != nil)
    for rank in ranks { writer.count(rank) }
    for (buffer, width) in [(decoder, type.byteCount), (encoder, 4), (mean, 4)] {
      guard let buffer else { continue }
      var bytes = [UInt8](repeating: 0, count: buffer.byteCount)
      bytes.withUnsafeMutableBytes {
        if let base = $0.baseAddress { backend.copy(from: buffer.base, toHost: base, byteCount: buffer.byteCount) }
      }
      swapToLittleEndian(&bytes, from: 0, width: width)
      writer.raw(bytes)
    }
  }

  fileprivate convenience init(
    from reader: inout ByteReader, type: ElementType, units: Int, dim: Int, headsPerUnit: Int,
    backend: any ComputeBackend
  ) throws(KVError) {
    let number = try reader.u8("the type of a basis")
    guard number == type.rawValue else {
      throw reader.corrupt("expected a basis in \(type.name), type \(type.rawValue); found type \(number)")
    }
    let hasEncoder = try reader.bool("whether there is an encoder")
    let hasMean = try reader.bool("whether there is a mean")
    var ranks: [Int] = []
    for _ in 0..<units { ranks.append(try reader.count("the rank of a basis", in: 0...min(4096, dim * headsPerUnit))) }
    let width = dim * headsPerUnit
    let elements = ranks.reduce(0, +) * width
    var parts: [[UInt8]] = []
    for (wanted, count, type) in [
      (true, elements, type), (hasEncoder, elements, .f32), (hasMean, units * width, .f32),
    ] {
      let bytes = wanted ? try reader.raw(count * type.byteCount, "a basis") : []
      guard RowEncoding.isFinite(bytes, type) else {
        throw reader.corrupt("expected finite numbers of a basis before this byte; found NaN or infinity")
      }
      parts.append(bytes)
    }
    let made = try LatentBasis.allocate(
      type: type, ranks: ranks, dim: dim, headsPerUnit: headsPerUnit, encoder: hasEncoder, mean: hasMean,
      backend: backend)
    for (buffer, (var bytes, size)) in zip(
      [made.decoder, made.encoder, made.mean], zip(parts, [type.byteCount, 4, 4]))
    {
      guard let buffer else { continue }
      swapToLittleEndian(&bytes, from: 0, width: size)
      bytes.withUnsafeBytes {
        if let base = $0.baseAddress { backend.copy(from: base, to: buffer.base, byteCount: buffer.byteCount) }
      }
    }
    self.init(
      type: type, ranks: ranks, dim: dim, headsPerUnit: headsPerUnit, decoder: made.decoder, encoder: made.encoder,
      mean: made.mean)
  }
}

extension LowRankFormat {
  package func decodeSegment(
    from reader: inout ByteReader, layer: LayerShape, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) -> any Segment {
    try waiting(layer).decodeSegment(from: &reader, layer: layer, tokensSeen: tokensSeen, backend: backend)
  }

  package func decodeStorage(
    from reader: inout ByteReader, layers: [Int], shape: ModelShape, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) -> any JointStorage {
    let storage = LowRankStorage(
      format: self, layers: layers, shape: shape.layers[layers[0]], rotary: beforeRotation ? shape.rotary : nil,
      backend: backend)
    try storage.decode(from: &reader, tokensSeen: tokensSeen)
    return storage
  }

  package func decodeSegment(
    from reader: inout ByteReader, on storage: any JointStorage, layer: Int, shape: ModelShape, tokensSeen: Int,
    backend: any ComputeBackend
  ) throws(KVError) -> any Segment {
    guard let storage = storage as? LowRankStorage else {
      throw reader.corrupt("expected low-rank storage of this layer")
    }
    return try LowRankSegment.decode(
      from: &reader, storage: storage, layer: layer, shape: shape.layers[layer],
      format: waiting(shape.layers[layer]), tokensSeen: tokensSeen, backend: backend)
  }
}
