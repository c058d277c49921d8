public import KVCore

/// PyramidKV: SnapKV with more rows in the first layers and fewer in the last. arXiv 2406.02069.
///
/// Needs: post-RoPE queries of the last `window` tokens. Runs: after the prompt; with `every`, again while decoding.
///
/// Attention is broad in the first layers and narrow in the last: budgets fall linearly over the layers, and rows are
/// chosen as SnapKV does. A budget is the mean over the layers.
///
/// Differs from the authors' code: scores are per KV head, not per query head after repeating keys; equal scores keep
/// the lower position; layers without a cache or with a sliding window do not count.
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept per layer in the mean, window included.
  ///   - beta: the last layer keeps this part of the mean beyond the window.
  ///   - form: how the line is rounded; the authors' sums are a few rows above the budget.
  public static func pyramidKV(
    budget: Budget = .tokens(2048), window: Int = 8, kernel: Int = 7, pooling: Pooling = .max,
    reduction: GroupReduction = .mean, every: Int? = nil, beta: Double = 20,
    form: PyramidAllocator.Form = .official, short: PyramidAllocator.Short = .uniform
  ) throws(KVError) -> Selection {
    let allocator = try PyramidAllocator(beta: beta, form: form, short: short)
    return try ObservationOptions(
      budget: budget, window: window, kernel: kernel, pooling: pooling, reduction: reduction, every: every
    ).selection(named: "pyramidkv", and: allocator.options, allocator: allocator)
  }

  /// `pyramidkv(budget=2048,beta=20)`.
  public static let pyramidKVMethod = MethodDescription(
    name: "pyramidkv", role: .selection, summary: "snapkv with budgets that fall from the first layer to the last",
    paper: "arXiv 2406.02069", options: ObservationOptions.descriptions + PyramidAllocator.descriptions
  ) { (reader) throws(KVError) in
    let options = try ObservationOptions(budget: .tokens(2048), window: 8, kernel: 7, pooling: .max).read(&reader)
    let (beta, form, short) = try PyramidAllocator.read(&reader, form: .official)
    return .selection(
      try .pyramidKV(
        budget: options.budget, window: options.window, kernel: options.kernel, pooling: options.pooling,
        reduction: options.reduction, every: options.every, beta: beta, form: form, short: short))
  }
}
