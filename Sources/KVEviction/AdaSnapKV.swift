public import KVCore

/// Ada-SnapKV and Ada-PyramidKV: SnapKV's and PyramidKV's scores with Ada-KV's heads. arXiv 2407.11550 (NeurIPS 2025).
///
/// Needs: post-RoPE queries of the last `window` tokens. Runs: after the prompt; with `every`, again while decoding.
///
/// Differs from the authors' code: as ``AdaKVAllocator`` and SnapKV do; `skip`, which leaves the first layers uniform, is
/// not there (its default is none); without grouped queries theirs stores one cache per query head.
extension Selection {
  /// - Parameter floor: share of a uniform budget that every head keeps.
  public static func adaSnapKV(
    budget: Budget = .tokens(1024), window: Int = 32, kernel: Int = 7, pooling: Pooling = .max,
    reduction: GroupReduction = .mean, every: Int? = nil, floor: Double = 0.2,
    form: AdaKVAllocator.Form = .official
  ) throws(KVError) -> Selection {
    let allocator = try AdaKVAllocator(floor: floor, form: form)
    return try ObservationOptions(
      budget: budget, window: window, kernel: kernel, pooling: pooling, reduction: reduction, every: every
    ).selection(named: "adasnapkv", and: allocator.options, allocator: allocator)
  }

  /// The same with budgets that fall over the layers, as the authors' pyramid mode: short prompts clip the line.
  public static func adaPyramidKV(
    budget: Budget = .tokens(1024), window: Int = 32, kernel: Int = 7, pooling: Pooling = .max,
    reduction: GroupReduction = .mean, every: Int? = nil, floor: Double = 0.2,
    form: AdaKVAllocator.Form = .official, beta: Double = 20, rounding: PyramidAllocator.Form = .official
  ) throws(KVError) -> Selection {
    let heads = try AdaKVAllocator(floor: floor, form: form)
    let allocator = try PyramidAllocator(beta: beta, form: rounding, short: .clip, heads: heads)
    return try ObservationOptions(
      budget: budget, window: window, kernel: kernel, pooling: pooling, reduction: reduction, every: every
    ).selection(
      named: "adapyramidkv",
      and: heads.options + [SpecOption("beta", .decimal(beta)), SpecOption("rounding", .text(rounding.rawValue))],
      allocator: allocator)
  }

  private static let adaptive = ObservationOptions(budget: .tokens(1024), window: 32, kernel: 7, pooling: .max)

  /// `adasnapkv(budget=1024,floor=0.2)`.
  public static let adaSnapKVMethod = MethodDescription(
    name: "adasnapkv", role: .selection, summary: "snapkv whose heads compete for the rows of their layer",
    paper: "arXiv 2407.11550", options: ObservationOptions.descriptions + AdaKVAllocator.descriptions
  ) { (reader) throws(KVError) in
    let options = try adaptive.read(&reader)
    let (floor, form) = try AdaKVAllocator.read(&reader)
    return .selection(
      try .adaSnapKV(
        budget: options.budget, window: options.window, kernel: options.kernel, pooling: options.pooling,
        reduction: options.reduction, every: options.every, floor: floor, form: form))
  }

  /// `adapyramidkv(budget=1024,floor=0.2,beta=20)`.
  public static let adaPyramidKVMethod = MethodDescription(
    name: "adapyramidkv", role: .selection, summary: "pyramidkv whose heads compete for the rows of their layer",
    paper: "arXiv 2407.11550",
    options: ObservationOptions.descriptions + AdaKVAllocator.descriptions + [
      .init("beta", "the last layer gets this part of the mean, beyond the window"),
      .init("rounding", "of the layers' budgets: official, exact or kvpress"),
    ]
  ) { (reader) throws(KVError) in
    let options = try adaptive.read(&reader)
    let (floor, form) = try AdaKVAllocator.read(&reader)
    let beta = try reader.double("beta", default: 20, in: 1...1_048_576)
    let rounding = try reader.name(
      "rounding", default: "official", among: PyramidAllocator.Form.allCases.map(\.rawValue))
    return .selection(
      try .adaPyramidKV(
        budget: options.budget, window: options.window, kernel: options.kernel, pooling: options.pooling,
        reduction: options.reduction, every: options.every, floor: floor, form: form, beta: beta,
        rounding: PyramidAllocator.Form(rawValue: rounding) ?? .official))
  }
}
