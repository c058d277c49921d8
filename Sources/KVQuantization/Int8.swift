public import KVCore

/// INT8: symmetric integers times a scale, as engines ship them (vLLM's `int8_per_token_head` and static scales).
///
/// Needs: nothing but keys and values. Runs: after the prompt, then as tokens arrive; without a window every token is
/// encoded once it was attended.
///
/// `scale = max|x| / 127`, codes of `x / scale` to nearest even, in -127 ... 127; four bits with a largest code of 7.
///
/// Differs from vLLM's code: codes are computed from the scale as it is stored, a group of zeros has scale 0 (vLLM: at
/// least 1e-6), -128 is not used.
///
/// ```
/// one KV head, scale per token   ┌ codes: tokens x d bytes ┬ scale of each token ┐
/// ```
/// Bytes per token and head, for K or V: d·bits/8 + m with m bytes of `metadata` (4 for f32); d·bits/8 with one scale.
extension Store {
  /// - Parameters:
  ///   - keys: `int8` or `int4`, and what shares a scale.
  ///   - values: likewise.
  ///   - residual: newest tokens kept dense; with a scale per head, blocks of at least the tokens that share it.
  ///   - window: element type of the dense window.
  ///   - metadata: element type of scales.
  /// - Throws: `invalidOption` for numbers outside what ``RowEncoding`` allows.
  public static func int8(
    keys: ScaledSide = .init(.int8), values: ScaledSide = .init(.int8), residual: Int = 0, window: ElementType = .f16,
    metadata: ElementType = .f32
  ) throws(KVError) -> Store {
    try scaled(
      name: "int8", keys: keys, values: values, residual: residual, window: window, metadata: metadata)
  }

  /// `int8(scale=token)`.
  public static let int8Method = scaledMethod(
    name: "int8", summary: "signed integers of 8 (or 4) bits, one scale per token, head or tensor",
    formats: [.int8, .int4], scale: "token", factor: nil, metadata: .f32)
}
