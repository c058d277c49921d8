internal import KVCore

/// The options of selections that score rows by themselves share.
struct RowOptions {
  var budget: Budget = .fraction(0.5)
  var sinks = 0
  var recent = 0
  var every: Int?

  func read(_ reader: inout OptionReader) throws(KVError) -> RowOptions {
    var result = self
    result.budget = try reader.budget("budget", default: budget)
    result.sinks = try reader.int("sinks", default: sinks, in: 0...1_048_576)
    result.recent = try reader.int("recent", default: recent, in: 0...1_048_576)
    let every = try reader.int("every", default: every ?? 0, in: 0...1_048_576)
    result.every = every == 0 ? nil : every
    return result
  }

  static let descriptions: [MethodDescription.Option] = [
    .init("budget", "tokens, share of the tokens seen, or bytes kept in all"),
    .init("sinks", "first tokens that always stay"),
    .init("recent", "newest tokens that always stay"),
    .init("every", "decoded tokens between further selections; 0 for never"),
  ]

  func selection(named name: String, and more: [SpecOption] = [], scorer: any Scorer) throws(KVError) -> Selection {
    guard sinks >= 0, recent >= 0, sinks <= 1_048_576, recent <= 1_048_576 else {
      throw KVError(
        .invalidOption, "\(name) protects 0...1048576 sinks and recent tokens; got \(sinks) and \(recent)")
    }
    try BudgetSplit.validate(sinks: sinks, window: recent, budget: budget)
    if let every, every < 1 {
      throw KVError(.invalidOption, "selecting every \(every) tokens does not exist; at least 1, or never")
    }
    return Selection(
      spec: StageSpec(
        name: name,
        options: [
          SpecOption("budget", budget.specValue), SpecOption("sinks", .integer(sinks)),
          SpecOption("recent", .integer(recent)), SpecOption("every", .integer(every ?? 0)),
        ] + more),
      scorer: scorer, budget: budget, router: TopKRouter(Protection(sinks: sinks, window: recent)),
      schedule: Schedule(decodeInterval: every))
  }
}
