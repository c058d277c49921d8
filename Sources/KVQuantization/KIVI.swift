public import KVCore

/// KIVI: keys quantized per channel, values per token, the newest tokens dense. arXiv 2402.02750 (ICML 2024).
///
/// Needs: nothing but keys and values, as cached (post-RoPE). Runs: after the prompt, then as tokens arrive.
///
/// Keys have a few channels with fixed large values, so one scale per channel over `group` tokens; a channel group needs
/// all its tokens, so keys wait dense until `residual` of them are complete and are encoded together. Values have no such
/// channels, so one scale per token over `group` channels; the newest `residual` values stay dense, older ones are
/// encoded one by one.
///
/// Differs from the authors' code: codes are computed from the metadata as it is stored (rounded to `metadata` first), a
/// group of equal values has scale 0 and is reproduced exactly, several tokens at once are appended and then flushed in
/// whole blocks, and the two windows are counted apart.
///
/// ```
/// one KV head   keys    ┌ groups of `group` tokens: codes, scale[d], min[d] ┬ 0 … residual-1 dense ┐
///               values  ┌ tokens: codes, scale[d/group], min[d/group]  ┬ residual dense            ┐
/// ```
/// Bytes per token and head, for K or V: d·(bits/8 + 2·m/group) with m bytes of `metadata` (2 for f16).
extension Store {
  /// - Parameters:
  ///   - keyBits: 2, 3, 4 or 8.
  ///   - valueBits: likewise; nil for the same.
  ///   - group: tokens of a key group and channels of a value group; a multiple of 32.
  ///   - residual: dense window, a positive multiple of `group`.
  ///   - window: element type of the dense window.
  ///   - metadata: element type of scales and minima.
  /// - Throws: `invalidOption` for numbers outside these.
  public static func kivi(
    keyBits: Int = 2, valueBits: Int? = nil, group: Int = 32, residual: Int = 128, window: ElementType = .f16,
    metadata: ElementType = .f16
  ) throws(KVError) -> Store {
    let keys = try RowEncoding.affinePerChannel(bits: keyBits, group: group, metadata: metadata)
    let values = try RowEncoding.affinePerToken(bits: valueBits ?? keyBits, group: group, metadata: metadata)
    guard residual > 0, residual <= 1 << 20, residual % group == 0 else {
      throw KVError(
        .invalidOption, "kivi's residual must be a positive multiple of its group of \(group) tokens; got \(residual)")
    }
    let bits = CodeBits(keys: keys.bits, values: values.bits).specOptions
    return Store(
      spec: StageSpec(
        name: "kivi",
        options: bits + [
          SpecOption("group", .integer(group)), SpecOption("residual", .integer(residual)),
          SpecOption("window", .text(window.name)), SpecOption("metadata", .text(metadata.name)),
        ]),
      keys: try .blocks(of: residual, window: window, body: keys),
      values: try .newest(residual, window: window, body: values))
  }

  /// `kivi(bits=2,group=32,residual=128)`.
  public static let kiviMethod = MethodDescription(
    name: "kivi", role: .store,
    summary: "keys per channel, values per token, asymmetric codes of 2, 3, 4 or 8 bits, newest tokens dense",
    paper: "arXiv 2402.02750",
    options: CodeBits.options + [
      .init("group", "tokens (keys) or channels (values) that share a scale and minimum"),
      .init("residual", "newest tokens kept dense, a multiple of group"),
      .init("window", "element type of the dense window: f32, f16 or bf16"),
      .init("metadata", "element type of scales and minima: f32, f16 or bf16"),
    ]
  ) { (reader) throws(KVError) in
    let bits = try CodeBits(from: &reader, default: 2)
    return .store(
      try .kivi(
        keyBits: bits.keys, valueBits: bits.values, group: reader.int("group", default: 32, in: 32...1024),
        residual: reader.int("residual", default: 128, in: 32...1_048_576),
        window: reader.elementType("window", default: .f16),
        metadata: reader.elementType("metadata", default: .f16)))
  }
}
