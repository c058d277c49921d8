internal import KVCompression
internal import KVExperiments
internal import ReferenceEngine

/// Attention through a compressed cache, with a full f32 cache of the same keys and values beside it: the same queries
/// are attended over both, and the outputs compared. The session goes on with the compressed cache's.
final class ShadowedAttention: AttentionProvider {
  private let measured: CacheAttention
  private let shadow: KVCache
  /// Compares from now on. Before, the shadow only takes in keys and values.
  var comparing = false
  private(set) var errors = RowErrorAccumulator()
  /// Time spent on the shadow, to be taken off measurements.
  private(set) var shadowTime = Duration.zero

  init(_ cache: KVCache) throws(KVError) {
    measured = CacheAttention(cache)
    // A backend of its own: its bytes are not the measured cache's.
    shadow = try KVCache(
      shape: cache.shape, policy: Policy(store: .dense(.f32)), backend: .cpu(), attention: cache.attention)
  }

  func tokensSeen(layer: Int) -> Int { measured.tokensSeen(layer: layer) }

  func attend(_ input: AttentionInput, into output: inout [Float]) throws(KVError) {
    try measured.attend(input, into: &output)
    let clock = ContinuousClock()
    let start = clock.now
    try compare(input, output)
    shadowTime += start.duration(to: clock.now)
  }

  private func compare(_ input: AttentionInput, _ output: [Float]) throws(KVError) {
    let n = input.tokens
    let keys = try TensorView(
      input.keys.span, heads: input.kvHeads, tokens: n, dim: input.headDim, layout: .tokenMajor)
    let values = try TensorView(
      input.values.span, heads: input.kvHeads, tokens: n, dim: input.headDim, layout: .tokenMajor)
    try shadow.append(layer: input.layer, keys: keys, values: values)
    guard comparing else { return }
    var expected = [Float](repeating: 0, count: output.count)
    let queries = try TensorView(
      input.queries.span, heads: input.queryHeads, tokens: n, dim: input.headDim, layout: .tokenMajor)
    var span = expected.mutableSpan
    var target = try MutableTensorView(
      &span, heads: input.queryHeads, tokens: n, dim: input.headDim, layout: .tokenMajor)
    try shadow.attend(layer: input.layer, queries: queries, into: &target)
    try errors.add(output, reference: expected)
  }

  /// What latents lost of the rows so far.
  func latentErrors() throws(KVError) -> [LatentError] {
    try LatentError.measure(measured.cache, against: shadow)
  }

  func finishPrefill() throws(KVError) {
    try measured.finishPrefill()
    try shadow.finishPrefill()
  }
}
