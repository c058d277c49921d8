public import KVCore

/// ZipCache's codec without its choice of tokens: channel-separable tokenwise quantization (CST). arXiv 2405.14256
/// (NeurIPS 2024).
///
/// Needs: nothing but keys and values, as cached (post-RoPE). Runs: after the prompt on all of it, then on every `gap` new
/// tokens together; those wait dense.
///
/// Values: each channel is divided by the square root of its largest magnitude in the prompt, then every token has one
/// scale and minimum for all channels of a head. Keys: one scale and minimum per channel over all rows that are encoded
/// together (the configuration the authors chose), or as the values. So metadata is per channel and per token, never per
/// group.
///
/// Differs from the authors' code: the scale and minimum of a token are per KV head, because heads may hold different
/// tokens (theirs mix the positions of different heads once ids differ); codes are computed from the metadata as it is
/// stored, and clamped; an all-zero channel has the factor 1; what was encoded is never encoded again: `gap` new tokens
/// are a batch of their own, divided by the factors of the prompt.
///
/// ```
/// one KV head   keys    ┌ batch: codes ┬ … ┬ dense, 0 … gap-1 ┐   per batch: step[d], min[d]
///               values  ┌ tokens: codes, step, min ┬ dense    ┐   factor[d] once
/// ```
extension Store {
  /// How the keys of ``cst(keyBits:valueBits:keys:gap:window:metadata:)`` are encoded.
  public enum CSTKeys: String, Sendable, Hashable, CaseIterable {
    /// A scale and minimum per channel over a whole batch.
    case channel
    /// A factor per channel, a scale and minimum per token, as values are.
    case separable
  }

  /// - Parameters:
  ///   - keyBits: 2, 3, 4 or 8.
  ///   - valueBits: likewise; nil for the same.
  ///   - gap: new tokens that are encoded together.
  ///   - window: element type of the tokens that wait.
  ///   - metadata: element type of factors, scales and minima.
  /// - Throws: `invalidOption` for numbers outside these.
  public static func cst(
    keyBits: Int = 4, valueBits: Int? = nil, keys: CSTKeys = .channel, gap: Int = 100, window: ElementType = .f16,
    metadata: ElementType = .f16
  ) throws(KVError) -> Store {
    guard (1...1 << 20).contains(gap) else {
      throw KVError(.invalidOption, "cst's gap must lie in 1...1048576; got \(gap)")
    }
    let valueBits = valueBits ?? keyBits
    let wholeRow = 4096
    func separable(_ bits: Int) throws(KVError) -> SideFormat {
      try .batches(
        of: gap, window: window, body: .affinePerToken(bits: bits, group: wholeRow, metadata: metadata)
      ).scaled(.separable)
    }
    let bits = CodeBits(keys: keyBits, values: valueBits).specOptions
    return Store(
      spec: StageSpec(
        name: "cst",
        options: bits + [
          SpecOption("keys", .text(keys.rawValue)), SpecOption("gap", .integer(gap)),
          SpecOption("window", .text(window.name)), SpecOption("metadata", .text(metadata.name)),
        ]),
      keys: keys == .channel
        ? try .channelCodes(bits: keyBits, batch: gap, window: window, metadata: metadata) : try separable(keyBits),
      values: try separable(valueBits))
  }

  /// `cst(bits=4,keys=channel,gap=100)`.
  public static let cstMethod = MethodDescription(
    name: "cst", role: .store,
    summary: "ZipCache's codec: keys per channel of a batch, values per token after a division per channel",
    paper: "arXiv 2405.14256",
    options: CodeBits.options + [
      .init("keys", "channel: a scale per channel of a batch; separable: as values"),
      .init("gap", "new tokens that wait dense and are encoded together"),
      .init("window", "element type of the tokens that wait: f32, f16 or bf16"),
      .init("metadata", "element type of factors, scales and minima: f32, f16 or bf16"),
    ]
  ) { (reader) throws(KVError) in
    let bits = try CodeBits(from: &reader, default: 4)
    let keys = try reader.name("keys", default: CSTKeys.channel.rawValue, among: CSTKeys.allCases.map(\.rawValue))
    return .store(
      try .cst(
        keyBits: bits.keys, valueBits: bits.values, keys: CSTKeys(rawValue: keys) ?? .channel,
        gap: reader.int("gap", default: 100, in: 1...1_048_576),
        window: reader.elementType("window", default: .f16),
        metadata: reader.elementType("metadata", default: .f16)))
  }
}
