public import KVCore
public import KVTensorFiles

/// MatryoshkaKV: rows of each head on a basis from calibration, of which each head keeps as many of the first channels as
/// it needs. arXiv 2410.14731 (ICLR 2025).
///
/// Needs: a calibration with bases of every KV head, keys after their rotary embedding; see <doc:CalibrationFiles>. Runs:
/// when a prompt is complete, then for 32 tokens at a time.
///
/// Differs from the authors' code: bases belong to KV heads, where that code repeats keys and values to query heads before
/// it caches them; greedy rates follow from the variance that is lost, where the paper runs the model for every candidate
/// (``RateSearch`` does, and its ranks can be loaded); the attention of the prompt itself is exact; trained bases are
/// loaded, not trained.
///
/// ```
/// keys    k ≈ (k - mean)·U_r·U_rᵀ + mean     latents [tokens, r of the head], attention on latents
/// ```
/// Elements per token and head: r_k + r_v; bases 2·d·r once a cache.
extension Store {
  /// - Parameters:
  ///   - calibration: nil refuses every model.
  ///   - share: of all channels that stay, over all layers, heads and sides together.
  ///   - rates: how the share is divided.
  ///   - step: channels by which ranks differ.
  ///   - floor: channels that every head keeps.
  ///   - latents: how latents are held.
  ///   - basis: element type of the bases.
  ///   - window: element type of dense rows.
  ///   - keeping: newest tokens that stay dense.
  /// - Throws: `invalidOption` for numbers out of range and shares that cannot be reached; `missingInput`,
  ///   `shapeMismatch` for calibrations without what is needed.
  public static func matryoshka(
    calibration: NamedCalibration?, share: Double = 0.75, rates: RankRates = .greedy, step: Int = 32, floor: Int = 32,
    latents: LatentFormat = .f16, basis: ElementType = .f16, window: ElementType = .f16, keeping: Int = 0
  ) throws(KVError) -> Store {
    guard share > 0, share <= 1, (1...4096).contains(step), (1...4096).contains(floor) else {
      throw KVError(
        .invalidOption,
        "a share above 0 and up to 1, steps and a floor of 1...4096 channels expected; got \(share), \(step) and "
          + "\(floor)")
    }
    let tokens = LatentTokens.projected(keeping: keeping)
    var format = try lowRankFormat(
      keyRank: .share(share), valueRank: .share(share), latents: latents, basis: basis, window: window, tokens: tokens)
    format.perHead = true
    format.beforeRotation = false
    if let calibration = calibration?.calibration {
      try calibration.require(keysBeforeRotation: false)
      let bases = CalibratedBases(calibration: calibration)
      let ranks = try HeadRanks(bases, share: share, rates: rates, step: step, floor: floor)
      var layers: CalibratedBases.Layers = [:]
      for layer in ranks.layers {
        layers[layer] = (
          keys: try bases.basis(.keys, layer: layer, ranks: ranks.of(.keys, layer: layer)),
          values: try bases.basis(.values, layer: layer, ranks: ranks.of(.values, layer: layer))
        )
      }
      format.calibrated = layers
      // What no head has more of: budgets in bytes count with it.
      format.keys = .channels(ranks.most(.keys))
      format.values = .channels(ranks.most(.values))
    } else {
      format.refusal = NamedCalibration.missing("matryoshka")
    }
    return Store(
      spec: StageSpec(
        name: "matryoshka",
        options: NamedCalibration.options(calibration) + [
          SpecOption("share", .decimal(share)), SpecOption("rates", .text(rates.rawValue)),
          SpecOption("step", .integer(step)), SpecOption("floor", .integer(floor)),
          SpecOption("latents", .text(latents.name)), SpecOption("basis", .text(basis.name)),
          SpecOption("window", .text(window.name)), SpecOption("keep", .integer(keeping)),
        ]),
      factory: format)
  }

  /// `matryoshka(calibration="pca.safetensors",share=0.75)`.
  public static let matryoshkaMethod = MethodDescription(
    name: "matryoshka", role: .store,
    summary: "latents on calibrated bases of each head, as many as the head needs", paper: "arXiv 2410.14731",
    options: NamedCalibration.descriptions + [
      .init("share", "of all channels that stay, over all layers, heads and sides"),
      .init("rates", "ranks by greedy, weighted, uniform, or those of the file"),
      .init("step", "channels by which ranks differ"), .init("floor", "channels that every head keeps"),
      LowRankOptions.latents, LowRankOptions.basis, LowRankOptions.window,
      .init("keep", "newest tokens that stay dense"),
    ]
  ) { (reader) throws(KVError) in
    let calibration = try reader.calibration()
    return .store(
      try .matryoshka(
        calibration: calibration, share: reader.share("share", default: 0.75),
        rates: RankRates(
          rawValue: reader.name("rates", default: "greedy", among: RankRates.allCases.map(\.rawValue))) ?? .greedy,
        step: reader.int("step", default: 32, in: 1...4096), floor: reader.int("floor", default: 32, in: 1...4096),
        latents: reader.latents(default: .f16), basis: reader.elementType("basis", default: .f16),
        window: reader.elementType("window", default: .f16), keeping: reader.int("keep", default: 0, in: 0...1_048_576)
      ))
  }
}

/// How the channels that stay are divided between heads.
public enum RankRates: String, Hashable, Sendable, CaseIterable {
  /// One step at a time where the smallest share of a head's variance is lost.
  case greedy
  /// Likewise by the lost variance times the head's `weight`.
  case weighted
  /// The same for all.
  case uniform
  /// As the calibration's `ranks` say; the share does not count.
  case file
}

/// Latent channels of every head of every layer, keys and values.
struct HeadRanks {
  private struct Head {
    var layer: Int
    var side: Calibration.Side
    var rank: Int
    /// Variance of each channel, times what it counts.
    var costs: [Double]
  }

  let layers: [Int]
  private var heads: [Head] = []

  init(
    _ bases: CalibratedBases, share: Double, rates: RankRates, step: Int, floor: Int
  ) throws(KVError) {
    layers = try bases.layers()
    for layer in layers {
      for side in Calibration.Side.allCases {
        let shape = try bases.shape(side, layer: layer)
        heads += try Self.heads(bases, layer, side, shape, rates)
      }
    }
    switch rates {
    case .file: return
    case .uniform:
      for index in heads.indices {
        let whole = heads[index].rank
        let wanted = Int((share * Double(whole) / Double(step)).rounded()) * step
        heads[index].rank = min(whole, max(min(floor, whole), wanted, 1))
      }
    case .greedy, .weighted: try lower(to: share, step: step, floor: floor)
    }
  }

  private static func heads(
    _ bases: CalibratedBases, _ layer: Int, _ side: Calibration.Side, _ shape: [Int], _ rates: RankRates
  ) throws(KVError) -> [Head] {
    let (units, rows, width) = (shape[0], shape[1], shape[2])
    guard rows <= width else {
      throw KVError(
        .shapeMismatch, "layers.\(layer).\(side.rawValue).basis: at most \(width) rows expected; found \(rows)",
        layer: layer)
    }
    if rates == .file {
      return try bases.calibration.integers("ranks", of: side, layer: layer, shape: [units], in: 1...rows)
        .map { Head(layer: layer, side: side, rank: $0, costs: []) }
    }
    if rates == .uniform {
      return (0..<units).map { _ in Head(layer: layer, side: side, rank: rows, costs: []) }
    }
    let variance = try bases.elements("variance", side, layer, [units, rows])
    var weights = [Float](repeating: 1, count: units)
    if rates == .weighted { weights = try bases.elements("weight", side, layer, [units]) }
    return (0..<units).map { unit in
      var costs = variance[unit * rows..<(unit + 1) * rows].map { max(0, Double($0)) }
      let total = costs.reduce(0, +)
      let factor = rates == .weighted ? Double(weights[unit]) : total > 0 ? 1 / total : 0
      for index in costs.indices { costs[index] *= factor }
      return Head(layer: layer, side: side, rank: rows, costs: costs)
    }
  }

  /// One step at a time from the head that loses least; of equal ones the first.
  private mutating func lower(to share: Double, step: Int, floor: Int) throws(KVError) {
    var total = heads.reduce(0) { $0 + $1.rank }
    let wanted = Int((share * Double(total)).rounded())
    var losses = heads.map { Self.loss($0, step: step, floor: floor) }
    while total > wanted {
      guard let best = losses.indices.min(by: { losses[$0] < losses[$1] }), losses[best] < .infinity else {
        throw KVError(
          .invalidOption,
          "a share of \(share) cannot be reached: with \(floor) channels for every head and steps of \(step), "
            + "\(total) stay where \(wanted) should")
      }
      heads[best].rank -= step
      total -= step
      losses[best] = Self.loss(heads[best], step: step, floor: floor)
    }
  }

  /// What the next step of a head costs; infinite at its floor.
  private static func loss(_ head: Head, step: Int, floor: Int) -> Double {
    if head.rank - step < floor { return .infinity }
    return head.costs[head.rank - step..<head.rank].reduce(0, +)
  }

  func of(_ side: Calibration.Side, layer: Int) -> [Int] {
    heads.filter { $0.layer == layer && $0.side == side }.map(\.rank)
  }

  func most(_ side: Calibration.Side) -> Int { heads.filter { $0.side == side }.map(\.rank).max() ?? 1 }
}
