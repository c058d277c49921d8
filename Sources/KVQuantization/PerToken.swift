public import KVCore

/// One scale and minimum per token and group of channels, for keys and values alike: the quantizer of MiKV (arXiv
/// 2402.18096) and of many engines.
///
/// Needs: nothing but keys and values. Runs: after the prompt, then on every row that leaves the window.
///
/// It is ``quant(keys:values:)`` with the format `token` on both sides, under the name and with the defaults that MiKV's
/// readers expect.
///
/// Rows stand for themselves, so a row can leave, move to another tier and be dropped alone. Keys with outlier channels
/// lose more than in ``kivi(keyBits:valueBits:group:residual:window:metadata:)``; `balanced` or `rotated` behind it help.
///
/// ```
/// one KV head   keys, values   ┌ tokens: codes, scale[d/group], min[d/group] ┬ 0 … window dense ┐
/// ```
/// Bytes per token and head, for K or V: d·bits/8 + 2·m·ceil(d/group) with m bytes of `metadata` (2 for f16).
extension Store {
  /// - Parameters:
  ///   - keyBits: 2, 3, 4 or 8.
  ///   - valueBits: likewise; nil for the same.
  ///   - group: channels that share a scale and minimum. MiKV has half a head, so that the two halves of the rotary
  ///     embedding are apart: 64 of 128.
  ///   - window: newest rows that stay dense, in `type`.
  /// - Throws: `invalidOption` for numbers outside these.
  public static func perToken(
    keyBits: Int = 2, valueBits: Int? = nil, group: Int = 64, window: Int = 0, type: ElementType = .f16,
    metadata: ElementType = .f16
  ) throws(KVError) -> Store {
    guard (0...1 << 20).contains(window) else {
      throw KVError(.invalidOption, "pertoken's window must lie in 0...1048576; got \(window)")
    }
    func side(_ bits: Int) throws(KVError) -> SideFormat {
      try QuantSide.token(bits: bits, group: group, residual: window, window: type, metadata: metadata).sideFormat()
    }
    let valueBits = valueBits ?? keyBits
    let bits = CodeBits(keys: keyBits, values: valueBits).specOptions
    return Store(
      spec: StageSpec(
        name: "pertoken",
        options: bits + [
          SpecOption("group", .integer(group)), SpecOption("window", .integer(window)),
          SpecOption("type", .text(type.name)), SpecOption("metadata", .text(metadata.name)),
        ]),
      keys: try side(keyBits), values: try side(valueBits))
  }

  /// `pertoken(bits=2,group=64)`.
  public static let perTokenMethod = MethodDescription(
    name: "pertoken", role: .store,
    summary: "keys and values per token, asymmetric codes of 2, 3, 4 or 8 bits", paper: "arXiv 2402.18096",
    options: CodeBits.options + [
      .init("group", "channels that share a scale and minimum"),
      .init("window", "newest rows that stay dense"),
      .init("type", "element type of these: f32, f16 or bf16"),
      .init("metadata", "element type of scales and minima: f32, f16 or bf16"),
    ]
  ) { (reader) throws(KVError) in
    let bits = try CodeBits(from: &reader, default: 2)
    let group = try reader.int("group", default: 64, in: 8...4096)
    let window = try reader.int("window", default: 0, in: 0...1_048_576)
    return .store(
      try .perToken(
        keyBits: bits.keys, valueBits: bits.values, group: group, window: window,
        type: reader.elementType("type", default: .f16), metadata: reader.elementType("metadata", default: .f16)))
  }
}
