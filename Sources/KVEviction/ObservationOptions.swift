internal import KVCore

/// The options of SnapKV that methods built on its scores share, so that they are read, checked and printed alike.
struct ObservationOptions {
  var budget: Budget
  var window: Int
  var kernel: Int
  var pooling: Pooling
  var reduction: GroupReduction = .mean
  var every: Int?

  /// Reads all of them; those of `self` are the defaults.
  func read(_ reader: inout OptionReader) throws(KVError) -> ObservationOptions {
    var result = self
    result.budget = try reader.budget("budget", default: budget)
    result.window = try reader.int("window", default: window, in: 1...65_536)
    result.kernel = try reader.int("kernel", default: kernel, in: 1...65_535)
    let pooling = try reader.name("pooling", default: pooling.rawValue, among: Pooling.allCases.map(\.rawValue))
    let reduction = try reader.name(
      "reduction", default: reduction.rawValue, among: GroupReduction.allCases.map(\.rawValue))
    let every = try reader.int("every", default: every ?? 0, in: 0...1_048_576)
    result.pooling = Pooling(rawValue: pooling) ?? result.pooling
    result.reduction = GroupReduction(rawValue: reduction) ?? result.reduction
    result.every = every == 0 ? nil : every
    return result
  }

  static let descriptions: [MethodDescription.Option] = [
    .init("budget", "tokens, share of the tokens seen, or bytes kept in all, window included"),
    .init("window", "last tokens whose queries observe, and which always stay"),
    .init("kernel", "neighbouring tokens pooled, odd"),
    .init("pooling", "avg or max"),
    .init("reduction", "query heads of a KV head: mean, max or sum, before pooling"),
    .init("every", "decoded tokens between further selections; 0 for never"),
  ]

  /// SnapKV's row under another name, with further options and another allocator or rule.
  func selection(
    named name: String, and more: [SpecOption], allocator: any Allocator = UniformAllocator(),
    rule: (any SelectionRule)? = nil
  ) throws(KVError) -> Selection {
    let snapKV: Selection
    do throws(KVError) {
      snapKV = try .snapKV(
        budget: budget, window: window, kernel: kernel, pooling: pooling, reduction: reduction, every: every)
    } catch {
      var error = error
      error.message = "\(name), which scores as snapkv: \(error.message)"
      throw error
    }
    return Selection(
      spec: StageSpec(name: name, options: (snapKV.spec?.options ?? []) + more), scorer: snapKV.scorer, budget: budget,
      allocator: allocator, router: TopKRouter(Protection(window: window), rule: rule), schedule: snapKV.schedule)
  }
}
