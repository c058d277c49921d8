public import KVCore
public import KVTensorFiles

/// CSKV: rows of a layer on factors from calibration, beside a window of exact ones. arXiv 2409.10593.
///
/// Needs: a calibration with bases over all KV heads of a layer, keys before their rotary embedding, and the embedding;
/// see <doc:CalibrationFiles>. Runs: when a prompt is complete, then for a block of tokens at a time.
///
/// Differs from the authors' code: latents are made of the cached keys and values, where that code makes them of the
/// layer's input (see the page: for factors without training that is the same); tokens of the window have no latents yet;
/// codes have a minimum in f16, where that code clamps an integer zero point (`zero=integer`); the factors' rank is a
/// share of all channels, where that code rounds each head's down.
///
/// ```
/// keys, values    ┌ latents on the layer's basis ┬ exact rows, the newest ┐
/// ```
/// Elements per token and layer: (density_k + density_v)·D for latents, 2·D for the window's rows.
extension Store {
  /// - Parameters:
  ///   - calibration: nil refuses every model.
  ///   - keyRank: latent channels of a layer's keys.
  ///   - valueRank: likewise of values.
  ///   - window: exact tokens: in a rolling window those kept at least, else those of a block.
  ///   - rolling: the newest `window` tokens are always exact, and up to 31 before them; otherwise tokens leave in whole
  ///     blocks, so that 0 to `window` - 1 are exact.
  ///   - integerZero: codes of latents have a clamped integer zero point, as in the authors' code.
  /// - Throws: `invalidOption` for numbers out of range; `missingInput`, `shapeMismatch` for calibrations without what is
  ///   needed.
  public static func cskv(
    calibration: NamedCalibration?, keyRank: Rank = .share(0.25), valueRank: Rank = .share(0.75), window: Int = 32,
    rolling: Bool = false, latents: LatentFormat = .f16, integerZero: Bool = false, basis: ElementType = .f16,
    dense: ElementType = .f16
  ) throws(KVError) -> Store {
    guard (rolling ? 0...1_048_576 : 1...1_048_576).contains(window) else {
      throw KVError(
        .invalidOption, "a window of \(rolling ? 0 : 1)...1048576 tokens expected; got \(window)")
    }
    var format = try lowRankFormat(
      keyRank: keyRank, valueRank: valueRank, latents: latents, basis: basis, window: dense, tokens: .raw)
    format.keyLatents = try latents.keys(zero: integerZero)
    format.valueLatents = try latents.values(zero: integerZero)
    format.continuation = rolling ? .project(keeping: window) : .blocks(of: window)
    if let calibration = calibration?.calibration {
      try calibration.require(keysBeforeRotation: true)
      let bases = CalibratedBases(calibration: calibration)
      var layers: CalibratedBases.Layers = [:]
      for layer in try bases.layers() {
        layers[layer] = (
          keys: try shrunk(bases, .keys, keyRank, layer), values: try shrunk(bases, .values, valueRank, layer)
        )
      }
      format.calibrated = layers
    } else {
      format.refusal = NamedCalibration.missing("cskv")
    }
    return Store(
      spec: StageSpec(
        name: "cskv",
        options: NamedCalibration.options(calibration) + [
          SpecOption("density_k", keyRank.specValue), SpecOption("density_v", valueRank.specValue),
          SpecOption("window", .integer(window)), SpecOption("mode", .text(rolling ? "rolling" : "block")),
          SpecOption("latents", .text(latents.name)), SpecOption("zero", .text(integerZero ? "integer" : "minimum")),
          SpecOption("basis", .text(basis.name)), SpecOption("type", .text(dense.name)),
        ]),
      factory: format)
  }

  private static func shrunk(
    _ bases: CalibratedBases, _ side: Calibration.Side, _ rank: Rank, _ layer: Int
  ) throws(KVError) -> CalibratedBasis? {
    let shape = try bases.shape(side, layer: layer)
    guard shape[0] == 1, shape[1] <= shape[2] else {
      throw KVError(
        .shapeMismatch,
        "layers.\(layer).\(side.rawValue).basis: one basis for all heads of a layer, of at most as many rows as channels, "
          + "expected; found \(shape)", layer: layer)
    }
    guard let wanted = rank.channels(width: shape[2]) else { return nil }
    guard wanted <= shape[1] else {
      throw KVError(
        .invalidOption, "\(wanted) channels of \(side.rawValue) wanted; the calibration has \(shape[1])", layer: layer)
    }
    return try bases.basis(side, layer: layer, ranks: [wanted])
  }

  /// `cskv(calibration="factors.safetensors",density_k=0.25,density_v=0.75)`.
  public static let cskvMethod = MethodDescription(
    name: "cskv", role: .store, summary: "latents on calibrated factors of each layer, beside exact rows",
    paper: "arXiv 2409.10593",
    options: NamedCalibration.descriptions + [
      .init("density_k", "latent channels of keys: a share of the channels, a number, or full"),
      .init("density_v", "latent channels of values, likewise"),
      .init("window", "exact tokens: those of a block, or those kept at least"),
      .init("mode", "tokens leave in whole blocks, or from a rolling window"),
      LowRankOptions.latents,
      .init("zero", "codes of latents begin at the minimum, or lie around an integer zero point, clamped"),
      LowRankOptions.basis, .init("type", "element type of exact rows: f32, f16 or bf16"),
    ]
  ) { (reader) throws(KVError) in
    let calibration = try reader.calibration()
    let keyRank = try reader.rank("density_k", default: .share(0.25))
    let valueRank = try reader.rank("density_v", default: .share(0.75))
    let window = try reader.int("window", default: 32, in: 0...1_048_576)
    return .store(
      try .cskv(
        calibration: calibration, keyRank: keyRank, valueRank: valueRank, window: window,
        rolling: reader.name("mode", default: "block", among: ["block", "rolling"]) == "rolling",
        latents: reader.latents(default: .f16),
        integerZero: reader.name("zero", default: "minimum", among: ["minimum", "integer"]) == "integer",
        basis: reader.elementType("basis", default: .f16),
        dense: reader.elementType("type", default: .f16)))
  }
}
