public import KVCore

/// Per-layer SVD: keys and values of one layer's prompt as latents and a basis, each the best of its rank. The baseline
/// "Single SVD" of xKV, arXiv 2503.18893.
///
/// Needs: keys and values; for keys before their rotary embedding the `ModelShape`'s rotary. Runs: when a layer's prompt
/// is complete.
///
/// Differs from the authors' code: latents and bases are what is stored, where that code multiplies them back and keeps
/// full tensors; factored by the Gram matrix or a randomised range finder instead of a full SVD; latents are the rows
/// times the basis, so that both have entries of ordinary size.
///
/// ```
/// keys    ┌ latents [prompt, rank_k] ┬ dense, new tokens ┐   basis [rank_k, heads · d]
/// values  ┌ latents [prompt, rank_v] ┬ dense, new tokens ┐   basis [rank_v, heads · d]
/// ```
/// Elements per layer for a prompt of T tokens: T·r + r·D for K and V each, D = heads · d.
extension Store {
  /// - Parameters:
  ///   - keyRank: latent channels of a row of keys; of all heads together, or of each head with `perHead`.
  ///   - valueRank: likewise of values.
  ///   - beforeRotation: keys are turned back by their position before they are factored, and turned again on reading.
  ///   - perHead: a basis for each KV head.
  ///   - latents: how latents are held.
  ///   - basis: element type of the basis.
  ///   - window: element type of dense rows.
  ///   - tokens: what becomes of tokens after the prompt.
  /// - Throws: `invalidOption` for ranks and windows out of range.
  public static func svd(
    keyRank: Rank = .channels(128), valueRank: Rank = .channels(192), beforeRotation: Bool = true,
    perHead: Bool = false, latents: LatentFormat = .f16, basis: ElementType = .f16, window: ElementType = .f16,
    tokens: LatentTokens = .raw
  ) throws(KVError) -> Store {
    var format = try lowRankFormat(
      keyRank: keyRank, valueRank: valueRank, latents: latents, basis: basis, window: window, tokens: tokens)
    format.beforeRotation = beforeRotation
    format.perHead = perHead
    return Store(
      spec: StageSpec(
        name: "svd",
        options: [
          SpecOption("rank_k", keyRank.specValue), SpecOption("rank_v", valueRank.specValue),
          SpecOption("rope", .text(beforeRotation ? "pre" : "post")),
          SpecOption("scope", .text(perHead ? "head" : "layer")), SpecOption("latents", .text(latents.name)),
          SpecOption("basis", .text(basis.name)), SpecOption("window", .text(window.name)),
        ] + LowRankOptions.tokens(tokens, keep: 128, every: 512)),
      factory: format)
  }

  /// `svd(rank_k=128,rank_v=192)`.
  public static let svdMethod = MethodDescription(
    name: "svd", role: .store,
    summary: "keys and values of a layer's prompt as latents on the best basis of their rank, new tokens dense",
    paper: "arXiv 2503.18893",
    options: [
      .init("rank_k", "latent channels of keys: a number, a share of the channels, or full"),
      .init("rank_v", "latent channels of values, likewise"),
      .init("rope", "keys are factored before (pre) or after (post) their rotary embedding"),
      .init("scope", "one basis for all heads of a layer, or one for each head"),
      LowRankOptions.latents, LowRankOptions.basis, LowRankOptions.window, LowRankOptions.new, LowRankOptions.keep,
      LowRankOptions.every,
    ]
  ) { (reader) throws(KVError) in
    .store(
      try .svd(
        keyRank: reader.rank("rank_k", default: .channels(128)),
        valueRank: reader.rank("rank_v", default: .channels(192)),
        beforeRotation: reader.name("rope", default: "pre", among: ["pre", "post"]) == "pre",
        perHead: reader.name("scope", default: "layer", among: ["layer", "head"]) == "head",
        latents: reader.latents(default: .f16), basis: reader.elementType("basis", default: .f16),
        window: reader.elementType("window", default: .f16),
        tokens: reader.tokens(default: "raw", keep: 128, every: 512)))
  }

  static func lowRankFormat(
    keyRank: Rank, valueRank: Rank, latents: LatentFormat, basis: ElementType, window: ElementType,
    tokens: LatentTokens
  ) throws(KVError) -> LowRankFormat {
    try keyRank.validate("keys")
    try valueRank.validate("values")
    try tokens.validate(latents)
    var format = LowRankFormat(
      keys: keyRank, values: valueRank, keyLatents: try latents.keys(), valueLatents: try latents.values(),
      basis: basis, window: window)
    format.continuation = tokens.continuation
    return format
  }
}
