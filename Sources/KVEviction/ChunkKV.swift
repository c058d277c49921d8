public import KVCore

/// ChunkKV: whole chunks of neighbouring tokens stay, by SnapKV's scores. arXiv 2502.00299.
///
/// Needs: post-RoPE queries of the last `window` tokens. Runs: after the prompt; with `every`, while decoding too.
///
/// A phrase that loses half of its tokens means little: scores are summed over the heads, averaged over chunks, and the
/// best chunks stay in all heads of the layer.
///
/// Differs from kvpress's code: the budget is met exactly, by cutting the last chunk (`whole=true` keeps whole chunks as
/// kvpress does); equal scores keep the earlier chunk; protected rows stay even where a chunk is not.
extension Selection {
  /// - Parameters: as ``snapKV(budget:window:kernel:pooling:reduction:every:)`` and
  ///   ``chunks(length:shared:whole:)``.
  public static func chunkKV(
    budget: Budget = .fraction(0.5), window: Int = 32, kernel: Int = 5, pooling: Pooling = .average,
    reduction: GroupReduction = .mean, every: Int? = nil, length: Int = 20, shared: Bool = true, whole: Bool = false
  ) throws(KVError) -> Selection {
    let rule = try ChunkRule(length: length, shared: shared)
    return try ObservationOptions(
      budget: budget, window: window, kernel: kernel, pooling: pooling, reduction: reduction, every: every
    ).selection(
      named: "chunkkv", and: rule.options(whole: whole),
      allocator: whole ? WholeChunks(rule: rule) : UniformAllocator(), rule: rule)
  }

  /// `chunkkv(budget=0.5,length=20)`.
  public static let chunkKVMethod = MethodDescription(
    name: "chunkkv", role: .selection, summary: "whole chunks of neighbours, by snapkv's scores",
    paper: "arXiv 2502.00299", options: ObservationOptions.descriptions + ChunkRule.descriptions
  ) { (reader) throws(KVError) in
    let options = try ObservationOptions(budget: .fraction(0.5), window: 32, kernel: 5, pooling: .average)
      .read(&reader)
    let (length, shared, whole) = try ChunkRule.read(&reader)
    return .selection(
      try .chunkKV(
        budget: options.budget, window: options.window, kernel: options.kernel, pooling: options.pooling,
        reduction: options.reduction, every: options.every, length: length, shared: shared, whole: whole))
  }
}
