public import KVCore

/// xKV: layers next to each other share the latents of a token. arXiv 2503.18893 (ICML 2026).
///
/// Needs: keys and values, the rotary embedding. Runs: when the prompt of a group's last layer is complete; until then
/// its layers are held dense.
///
/// The dominant token directions of neighbouring layers are much alike. So the keys of `layers` layers stand side by
/// side, one row per token, and one set of latents serves them all; values likewise, with a rank of their own.
///
/// Differs from the authors' code: what <doc:SVD> says; the last group, when it is shorter, gets a rank in proportion
/// (that code keeps the full one); groups are cut where the shapes of layers differ, and layers with a sliding window
/// stay dense.
///
/// ```
/// [ K layer 0 | K layer 1 | … ]  ≈  latents [prompt, rank_k] · [ B layer 0 | B layer 1 | … ]
/// ```
/// Elements per group of W layers: (r_k + r_v)·(T + W·D).
extension Store {
  /// - Parameters:
  ///   - layers: layers of a group, 1...64.
  ///   - keyRank: latent channels that the keys of a whole group share.
  ///   - valueRank: likewise of values.
  ///   - firstLayer: layers before this one stay dense.
  ///   - equalised: rows of every layer are scaled to the same norm before they are factored, so that no layer's error
  ///     counts more than another's.
  /// - Throws: `invalidOption` for numbers out of range.
  public static func xKV(
    layers: Int = 4, keyRank: Rank = .channels(512), valueRank: Rank = .channels(768), firstLayer: Int = 0,
    equalised: Bool = false, latents: LatentFormat = .f16, basis: ElementType = .f16, window: ElementType = .f16,
    tokens: LatentTokens = .raw
  ) throws(KVError) -> Store {
    guard (1...64).contains(layers), (0...4096).contains(firstLayer) else {
      throw KVError(
        .invalidOption, "groups of 1...64 layers from a layer in 0...4096 on expected; got \(layers) and \(firstLayer)")
    }
    var format = try lowRankFormat(
      keyRank: keyRank, valueRank: valueRank, latents: latents, basis: basis, window: window, tokens: tokens)
    format.layersPerGroup = layers
    format.firstLayer = firstLayer
    format.equalised = equalised
    return Store(
      spec: StageSpec(
        name: "xkv",
        options: [
          SpecOption("layers", .integer(layers)), SpecOption("rank_k", keyRank.specValue),
          SpecOption("rank_v", valueRank.specValue), SpecOption("first_layer", .integer(firstLayer)),
          SpecOption("equalise", .bool(equalised)), SpecOption("latents", .text(latents.name)),
          SpecOption("basis", .text(basis.name)), SpecOption("window", .text(window.name)),
        ] + LowRankOptions.tokens(tokens, keep: 128, every: 512)),
      factory: format)
  }

  /// `xkv(layers=4,rank_k=512,rank_v=768)`.
  public static let xKVMethod = MethodDescription(
    name: "xkv", role: .store, summary: "latents that the layers of a group share, on bases of their own",
    paper: "arXiv 2503.18893",
    options: [
      .init("layers", "layers of a group"),
      .init("rank_k", "latent channels of the keys of a group: a number, a share of the channels, or full"),
      .init("rank_v", "latent channels of values, likewise"),
      .init("first_layer", "layers before this one stay dense"),
      .init("equalise", "scale the layers of a group to the same norm before factoring"),
      LowRankOptions.latents, LowRankOptions.basis, LowRankOptions.window, LowRankOptions.new, LowRankOptions.keep,
      LowRankOptions.every,
    ]
  ) { (reader) throws(KVError) in
    .store(
      try .xKV(
        layers: reader.int("layers", default: 4, in: 1...64), keyRank: reader.rank("rank_k", default: .channels(512)),
        valueRank: reader.rank("rank_v", default: .channels(768)),
        firstLayer: reader.int("first_layer", default: 0, in: 0...4096),
        equalised: reader.bool("equalise", default: false), latents: reader.latents(default: .f16),
        basis: reader.elementType("basis", default: .f16), window: reader.elementType("window", default: .f16),
        tokens: reader.tokens(default: "raw", keep: 128, every: 512)))
  }
}
