public import KVCore

/// FP8: numbers of eight bits, E4M3 or E5M2, times a scale, as engines ship them (vLLM's `fp8_e4m3` and `fp8_e5m2`).
///
/// Needs: nothing but keys and values. Runs: after the prompt, then as tokens arrive; without a window every token is
/// encoded once it was attended.
///
/// The cast of `x / scale`: to nearest even, saturating. With one scale for the tensor, 1 when none was found
/// beforehand, as in vLLM; per token or head the largest magnitude becomes 448 (E4M3) or 57344 (E5M2).
///
/// Differs from vLLM's code: scales are never frozen after a first batch; a scale per head belongs to a block of tokens.
///
/// ```
/// one KV head, one scale   ┌ codes: tokens x d bytes ┐
/// ```
/// Bytes per token and head, for K or V: d; with a scale per token d + m with m bytes of `metadata` (4 for f32).
extension Store {
  /// - Parameters:
  ///   - keys: `e4m3` or `e5m2`, and what shares a scale.
  ///   - values: likewise.
  ///   - residual: newest tokens kept dense; with a scale per head, blocks of at least the tokens that share it.
  ///   - window: element type of the dense window.
  ///   - metadata: element type of scales.
  /// - Throws: `invalidOption` for numbers outside what ``RowEncoding`` allows.
  public static func fp8(
    keys: ScaledSide = .init(.e4m3, sharing: .tensor(1)), values: ScaledSide = .init(.e4m3, sharing: .tensor(1)),
    residual: Int = 0, window: ElementType = .f16, metadata: ElementType = .f32
  ) throws(KVError) -> Store {
    try scaled(
      name: "fp8", keys: keys, values: values, residual: residual, window: window, metadata: metadata)
  }

  /// `fp8(format=e4m3,scale=tensor)`.
  public static let fp8Method = scaledMethod(
    name: "fp8", summary: "8-bit floating point, E4M3 or E5M2, one scale per tensor, head or token",
    formats: [.e4m3, .e5m2], scale: "tensor", factor: 1, metadata: .f32)
}
