/// How many latent channels a row of keys or values has.
public struct Rank: Hashable, Sendable {
  package enum Kind: Hashable, Sendable {
    case channels(Int)
    case share(Double)
    case full
  }

  package let kind: Kind
  private init(_ kind: Kind) { self.kind = kind }

  /// Latent channels for the whole width of what shares a basis.
  public static func channels(_ count: Int) -> Rank { Rank(.channels(count)) }
  /// A share of the channels that share a basis, rounded to the nearest number of latent channels.
  public static func share(_ share: Double) -> Rank { Rank(.share(share)) }
  /// Rows stay as they are.
  public static let full = Rank(.full)

  package func validate(_ name: String) throws(KVError) {
    switch kind {
    case .channels(let count):
      guard (1...4096).contains(count) else {
        throw KVError(.invalidOption, "\(name): a rank has 1...4096 channels; got \(count)")
      }
    case .share(let share):
      guard share > 0, share <= 1 else {
        throw KVError(.invalidOption, "\(name): a share of the channels lies in 0...1, above 0; got \(share)")
      }
    case .full: return
    }
  }

  /// Channels for rows of `width`, of a group that has `layers` of the usual `whole` layers. Nil: rows stay as they are.
  package func channels(width: Int, layers: Int = 1, of whole: Int = 1) -> Int? {
    switch kind {
    case .channels(let count):
      let own = layers == whole ? count : (count * layers + whole - 1) / whole
      return min(own, width, 4096)
    case .share(let share): return min(max(1, Int((share * Double(width)).rounded())), width, 4096)
    case .full: return nil
    }
  }
}

/// What becomes of tokens that come after a basis was made.
package enum LatentContinuation: Hashable, Sendable {
  /// They stay dense.
  case raw
  /// All but the newest are projected on the basis there is, 32 at a time.
  case project(keeping: Int)
  /// They are projected in whole blocks: 0 to `count` - 1 of them are dense.
  case blocks(of: Int)
  /// When `every` of them stand before the newest, they are factored together with what the basis describes.
  case refresh(keeping: Int, every: Int)

  package var kept: Int {
    switch self {
    case .raw, .blocks: 0
    case .project(let count), .refresh(let count, _): count
    }
  }
}

extension LatentContinuation {
  /// Dense tokens when rows leave as soon as they can.
  package var mostDense: Int {
    switch self {
    case .blocks(let count): count
    case .raw, .project, .refresh: kept + 32
    }
  }
}

/// Bases that were made before any prompt, for one layer.
package struct CalibratedBasis: Hashable, Sendable {
  /// Per unit (one for the layer, or one per KV head): [rank][width].
  package var decoders: [[Float]]
  /// Where latents are not decoder times row.
  package var encoders: [[Float]]?
  package var means: [[Float]]?

  package init(decoders: [[Float]], encoders: [[Float]]? = nil, means: [[Float]]? = nil) {
    self.decoders = decoders
    self.encoders = encoders
    self.means = means
  }

  /// As a factorisation would have returned it, cut to the first channels.
  package func factors(unit: Int, width: Int, rank: Int?) -> Factors {
    let all = decoders[unit].count / max(width, 1)
    let rank = min(rank ?? all, all)
    return Factors(
      rank: rank, width: width, basis: Array(decoders[unit][..<(rank * width)]), mean: means?[unit] ?? [])
  }

  package func encoder(unit: Int, width: Int, rank: Int) -> [Float]? {
    encoders.map { Array($0[unit][..<(rank * width)]) }
  }
}

/// Keys as rows of all heads side by side, before their rotary embedding: rotated over several heads and reordered, then
/// encoded. They have no basis.
package struct JoinedKeys: Hashable, Sendable {
  /// How the rows are encoded; neither rotated nor reordered.
  package var rows: SideFormat
  /// Heads that are rotated together, at most; a power of two.
  package var headGroup: Int
  /// By layer, the order of the channels of all heads behind the rotation. Nil: as they are.
  package var orders: [Int: [Int]]?

  package init(rows: SideFormat, headGroup: Int, orders: [Int: [Int]]? = nil) {
    self.rows = rows
    self.headGroup = headGroup
    self.orders = orders
  }

  /// What holds the keys of a layer.
  package func format(layer: Int, of shape: LayerShape, ordered: Bool = true) throws(KVError) -> SideFormat {
    let heads = min(headGroup, shape.kvHeads & -shape.kvHeads)
    let channels = heads * shape.keyDim
    var format = rows
    if channels & 1 == 0 { format = try format.rotated(.hadamard(block: min(channels & -channels, 4096))) }
    guard ordered, let orders else { return format }
    guard let order = orders[layer] else {
      throw KVError(.missingInput, "the calibration has no order of this layer's channels", layer: layer)
    }
    return try format.reordered(order)
  }
}

/// Rows as a few latent channels and a basis that many rows share.
///
/// ```
/// X [tokens, heads side by side] ≈ A [tokens, rank] · B [rank, heads side by side]
///
/// unit        heads that share latents: all heads of a group of layers, or one head
/// tier        ┌ latents of older tokens ┬ dense window of newer ones ┐
/// ```
/// Layers hold dense rows until the prompt of the last layer of their group is complete.
package struct LowRankFormat: JointFactory {
  package var keys: Rank
  package var values: Rank
  package var keyLatents: SideFormat
  package var valueLatents: SideFormat
  /// Element type of the rows of a basis.
  package var basis: ElementType
  /// Element type of dense rows.
  package var window: ElementType
  /// One basis per KV head instead of one for all heads.
  package var perHead = false
  /// Keys are turned back by their position first.
  package var beforeRotation = true
  /// Layers that share latents.
  package var layersPerGroup = 1
  package var firstLayer = 0
  package var centred = false
  /// Layers of a group count the same however large their rows are.
  package var equalised = false
  package var continuation = LatentContinuation.raw
  package var factoring = FactorOptions()
  /// Bases by layer, keys and values; nil: from the prompt.
  package var calibrated: [Int: (keys: CalibratedBasis?, values: CalibratedBasis?)]?
  /// Keys of this form instead of latents.
  package var joinedKeys: JoinedKeys?
  /// What holds values that have no basis; nil: dense rows.
  package var valueRows: SideFormat?
  /// Whether these are rotated first, in heads of an even number of channels.
  package var rotatesValues = false

  /// What holds the values of a layer.
  package func valueFormat(_ layer: LayerShape) throws(KVError) -> SideFormat {
    guard let valueRows else { return .dense(window) }
    return rotatesValues && layer.valueDim % 2 == 0 ? try valueRows.rotated(.hadamard()) : valueRows
  }
  /// Dense rows that become latents together.
  package var together = 32
  /// Why no model can have it: a calibration lacks.
  package var refusal: KVError?
  /// Latents even where they and the basis take more memory than the rows.
  package var evenIfLarger = false

  package init(
    keys: Rank, values: Rank, keyLatents: SideFormat, valueLatents: SideFormat, basis: ElementType,
    window: ElementType
  ) {
    self.keys = keys
    self.values = values
    self.keyLatents = keyLatents
    self.valueLatents = valueLatents
    self.basis = basis
    self.window = window
  }

  /// What layers hold before their group is joined, and tokens after it.
  package var plain: RowFormat { RowFormat(keys: .dense(window), values: .dense(window)) }

  /// The same for one layer: what its rows become may hold less than they.
  package func waiting(_ layer: LayerShape) -> RowFormat {
    var format = plain
    if let joinedKeys, let later = try? joinedKeys.format(layer: 0, of: layer, ordered: false) {
      // Turning back may bring both channels of a pair into one.
      let most = later.range(dim: layer.kvHeads * layer.keyDim).largest / Float(2).squareRoot()
      format = RowFormat(keys: format.keys.limited(to: .magnitude(most)), values: format.values)
    }
    if valueRows != nil, let later = try? valueFormat(layer) {
      format = RowFormat(keys: format.keys, values: format.values.limited(to: later.range(dim: layer.valueDim)))
    }
    return format
  }

  // MARK: Factory

  package func makeSegment(layer: LayerShape, backend: any ComputeBackend) -> any Segment {
    waiting(layer).makeSegment(layer: layer, backend: backend)
  }

  package func validate(backend: any ComputeBackend) throws(KVError) {
    guard backend.holdsLatents else {
      throw KVError(.unsupported, "\(backend.name) holds no latents; use the CPU backend for low-rank stores")
    }
    for format in [joinedKeys?.rows ?? keyLatents, valueRows ?? valueLatents, .dense(window)] {
      try backend.require(format)
    }
  }

  package func validate(layer: LayerShape) throws(KVError) {
    try keys.validate("keys")
    try values.validate("values")
    let heads = perHead ? 1 : layer.kvHeads * layersPerGroup
    guard heads * max(layer.keyDim, layer.valueDim) <= 1 << 17 else {
      throw KVError(
        .unsupported, "a basis for \(heads) heads of \(max(layer.keyDim, layer.valueDim)) channels is too wide")
    }
    try valueFormat(layer).validate(dim: layer.valueDim, of: "values")
    guard let joinedKeys else { return }
    let width = layer.kvHeads * layer.keyDim
    guard width <= 4096 else {
      throw KVError(.unsupported, "keys of all heads side by side have at most 4096 channels; got \(width)")
    }
    try joinedKeys.format(layer: 0, of: layer, ordered: false).validate(dim: width, of: "keys of all heads")
  }

  package func bytes(rows: Int, layer: LayerShape, observed: Int) -> Int {
    let slots = Column<Float>.grown(capacity: rows, count: rows, adding: 1)
    let window = plain.bytes(
      rows: min(rows, max(continuation.mostDense, continuation.kept + together)), layer: layer, observed: observed)
    let keyBytes =
      joinedKeys.map { $0.rows.bytes(rows: rows, dim: layer.kvHeads * layer.keyDim) / layer.kvHeads }
      ?? side(keys, keyLatents, rows: rows, dim: layer.keyDim, layer)
    let valueBytes =
      valueRows?.bytes(rows: rows, dim: layer.valueDim)
      ?? side(values, valueLatents, rows: rows, dim: layer.valueDim, layer)
    return keyBytes + valueBytes + window
      + slots * (2 + observed) * MemoryLayout<Float>.stride
  }

  private func side(_ rank: Rank, _ latents: SideFormat, rows: Int, dim: Int, _ layer: LayerShape) -> Int {
    let heads = perHead ? layersPerGroup : layer.kvHeads * layersPerGroup
    guard let channels = rank.channels(width: heads * dim) else {
      return SideFormat.dense(window).bytes(rows: rows, dim: dim)
    }
    return latents.bytes(rows: rows, dim: channels) / heads + channels * dim * basis.byteCount
  }

  package func groups(of shape: ModelShape) throws(KVError) -> [[Int]] {
    if let refusal { throw refusal }
    if beforeRotation {
      guard let rotary = shape.rotary else {
        throw KVError(
          .missingInput,
          "a store of keys before their rotary embedding turns cached keys back; give ModelShape the rotary embedding, "
            + (joinedKeys == nil ? "or factor keys as cached (rope=post)" : "or rotate keys as cached (rotated)"))
      }
      try rotary.requireStatic()
    }
    var groups: [[Int]] = []
    for (index, layer) in shape.layers.enumerated() where layer.cached && index >= firstLayer {
      // A sliding window forgets rows one by one: nothing there is worth a basis.
      if layer.slidingWindow != nil { continue }
      if let last = groups.last, last.count < layersPerGroup, let first = last.first, shape.layers[first] == layer {
        groups[groups.count - 1].append(index)
      } else {
        groups.append([index])
      }
    }
    if let calibrated { try check(calibrated, groups: groups, shape) }
    if let joinedKeys {
      for layer in groups.joined() {
        do throws(KVError) {
          let own = shape.layers[layer]
          try joinedKeys.format(layer: layer, of: own).validate(dim: own.kvHeads * own.keyDim, of: "keys of all heads")
        } catch {
          throw error.at(layer: layer)
        }
      }
    }
    return groups
  }

  /// Bases of a file must fit the model.
  private func check(
    _ calibrated: [Int: (keys: CalibratedBasis?, values: CalibratedBasis?)], groups: [[Int]], _ shape: ModelShape
  ) throws(KVError) {
    for group in groups {
      let layer = group[0]
      guard let found = calibrated[layer] else {
        throw KVError(.missingInput, "the calibrated bases have none for this layer", layer: layer)
      }
      let dims = [shape.layers[layer].keyDim, shape.layers[layer].valueDim]
      for (basis, dim) in zip([found.keys, found.values], dims) {
        guard let basis else { continue }
        let units = perHead ? shape.layers[layer].kvHeads : 1
        let width = perHead ? dim : shape.layers[layer].kvHeads * dim
        let means = basis.means?.allSatisfy { $0.count == width } ?? true
        let encoders = zip(basis.decoders, basis.encoders ?? basis.decoders).allSatisfy { $0.count == $1.count }
        guard basis.decoders.count == units, basis.decoders.allSatisfy({ $0.count % width == 0 && !$0.isEmpty }),
          means, encoders
        else {
          throw KVError(
            .shapeMismatch,
            "calibrated bases for \(units) units of \(width) channels expected; got \(basis.decoders.count) of "
              + "\(basis.decoders.map(\.count)) elements", layer: layer)
        }
      }
    }
  }

  package func join(
    _ members: [any Segment], layers: [Int], shape: ModelShape, decoding: Bool, backend: any ComputeBackend
  ) throws(KVError) -> [any Segment]? {
    if let joint = members as? [LowRankSegment] {
      try joint[0].lowRank.extend(joint)
      return nil
    }
    guard let plain = members as? [RowSegment] else {
      throw KVError(.unsupported, "a low-rank tier joins dense segments of its own", layer: layers.first)
    }
    let storage = LowRankStorage(
      format: self, layers: layers, shape: shape.layers[layers[0]], rotary: beforeRotation ? shape.rotary : nil,
      backend: backend)
    return try storage.begin(plain)
  }
}
