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
  /// When `every` of them stand before the newest, they are factored together with what the basis describes.
  case refresh(keeping: Int, every: Int)

  package var kept: Int {
    switch self {
    case .raw: 0
    case .project(let count), .refresh(let count, _): count
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

  // MARK: Factory

  package func makeSegment(layer: LayerShape, backend: any ComputeBackend) -> any Segment {
    plain.makeSegment(layer: layer, backend: backend)
  }

  package func validate(backend: any ComputeBackend) throws(KVError) {
    guard backend.holdsLatents else {
      throw KVError(.unsupported, "\(backend.name) holds no latents; use the CPU backend for low-rank stores")
    }
    for format in [keyLatents, valueLatents, .dense(window)] { try backend.require(format) }
  }

  package func validate(layer: LayerShape) throws(KVError) {
    try keys.validate("keys")
    try values.validate("values")
    let heads = perHead ? 1 : layer.kvHeads * layersPerGroup
    guard heads * max(layer.keyDim, layer.valueDim) <= 1 << 17 else {
      throw KVError(
        .unsupported, "a basis for \(heads) heads of \(max(layer.keyDim, layer.valueDim)) channels is too wide")
    }
  }

  package func bytes(rows: Int, layer: LayerShape, observed: Int) -> Int {
    let slots = Column<Float>.grown(capacity: rows, count: rows, adding: 1)
    let window = plain.bytes(rows: min(rows, continuation.kept + 32), layer: layer, observed: observed)
    return side(keys, keyLatents, rows: rows, dim: layer.keyDim, layer)
      + side(values, valueLatents, rows: rows, dim: layer.valueDim, layer) + window
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
    if beforeRotation {
      guard let rotary = shape.rotary else {
        throw KVError(
          .missingInput,
          "a basis for keys before their rotary embedding turns cached keys back; give ModelShape the rotary embedding, "
            + "or factor keys as cached (rope=post)")
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
