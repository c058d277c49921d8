public import KVCore

/// Mixed precision in general: any selection's scores share the kept rows between any stores, the best first.
///
/// Needs: what the selection needs. Runs: when the selection runs.
extension Selection {
  /// The same choice, its survivors shared between as many stores as there are shares.
  ///
  /// Without a scorer newer rows are better. A selection that never chooses does so after the prompt and after every
  /// decoded token.
  ///
  /// - Parameters:
  ///   - shares: part of the kept rows for each store, in order; they add up to 1.
  ///   - sinks: first rows that stay in the first store, if more than the selection protects.
  ///   - window: newest rows that stay in the first store, likewise.
  ///   - settle: rows stay in the store they were sent to first; false moves them on as their rank falls.
  ///   - every: decoded tokens between choices, 0 for none after the prompt; nil for the selection's own.
  /// - Throws: `invalidOption` for numbers outside these and for a selection that uses several stores already.
  public func tiers(
    shares: TierShares, sinks: Int = 0, window: Int = 0, settle: Bool = false, every: Int? = nil
  ) throws(KVError) -> Selection {
    guard router.tierCount == 1 else {
      throw KVError(
        .invalidOption, "tiers shares rows once; the selection left of it uses \(router.tierCount) stores already")
    }
    guard !router.merges else {
      throw KVError(.invalidOption, "tiers cannot share rows that the selection left of it merges into others already")
    }
    guard (0...1 << 30).contains(sinks), (0...1 << 30).contains(window), every ?? 0 >= 0 else {
      throw KVError(
        .invalidOption,
        "sinks, window and interval must not be negative; got \(sinks), \(window) and \(every ?? 0)")
    }
    var options = [
      SpecOption("shares", shares.specValue), SpecOption("sinks", .integer(sinks)),
      SpecOption("window", .integer(window)), SpecOption("settle", .bool(settle)),
    ]
    if let every { options.append(SpecOption("every", .integer(every))) }
    var first = router.protection
    first.sinks = max(first.sinks, sinks)
    first.window = max(first.window, window)
    return modified(by: StageSpec(name: "tiers", options: options)) { selection in
      selection.router = ShareRouter(selection.router, shares: shares, first: first, settles: settle)
      if selection.scorer == nil { selection.scorer = Recency() }
      if selection.schedule == .never { selection.schedule = Schedule(decodeInterval: 1) }
      if let every { selection.schedule.decodeInterval = every == 0 ? nil : every }
    }
  }

  /// `tiers(shares=[0.1,0.3,0.6])`.
  public static let tiersMethod = MethodDescription(
    name: "tiers", role: .modifier, summary: "the best rows to the first store, the next to the second, and so on",
    options: [
      .init("shares", "part of the kept rows for each store; one list, or one per layer, or per layer and head"),
      .init("sinks", "first rows that stay in the first store"),
      .init("window", "newest rows that stay in the first store"),
      .init("settle", "whether rows stay in the store they were sent to first"),
      .init("every", "decoded tokens between choices, 0 for none; default: as the selection says"),
    ]
  ) { (reader) throws(KVError) in
    let shares = try reader.tierShares("shares", default: TierShares([0.2, 0.8]))
    let sinks = try reader.int("sinks", default: 0, in: 0...1_073_741_823)
    let window = try reader.int("window", default: 0, in: 0...1_073_741_823)
    let settle = try reader.bool("settle", default: false)
    let every = try reader.optionalInt("every", in: 0...1_048_576)
    return .modifier { (selection) throws(KVError) in
      try selection.tiers(shares: shares, sinks: sinks, window: window, settle: settle, every: every)
    }
  }
}
