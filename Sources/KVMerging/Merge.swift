public import KVCore

/// What a selection drops goes into rows that stay, behind any method that drops tokens.
///
/// Needs: keys and values; with `weights=prominence` attention weights or the newest queries; with `keys=rotate` the rotary
/// embedding. Runs: whenever the selection drops rows.
///
/// The default keeps the keys of the rows that take others in, averages values by the tokens each row stands for, adds the
/// logarithm of their number to the logit, and merges only rows whose keys have a cosine of 0.8: the choice that third
/// parties measured as least harmful. Published rules are other values of the options.
extension Selection {
  /// The same selection, with what it drops merged as `rule` says.
  ///
  /// - Throws: `invalidOption` for a selection that keeps everything, and numbers out of range.
  public func merging(_ rule: MergeRule = MergeRule()) throws(KVError) -> Selection {
    guard schedule != .never else {
      throw KVError(.invalidOption, "merge takes in what a selection drops; the selection left of it keeps everything")
    }
    try rule.validate()
    // Rows carry the numbers of one observer.
    if let own = rule.inputs.observer, let other = scorer?.inputs.observer, AnyHashable(own) != AnyHashable(other) {
      throw KVError(
        .invalidOption,
        "weights=prominence sums all attention, and the selection remembers it in another way; pass attention=1 or more, "
          + "which looks at the newest queries")
    }
    return modified(by: rule.spec(name: "merge")) { $0.router = MergingRouter($0.router, rule: rule) }
  }

  /// `merge(to=nearest_key,threshold=0.8)`.
  public static let mergeMethod = MethodDescription(
    name: "merge", role: .modifier, summary: "what a selection drops goes into rows that stay",
    options: [
      .init("to", "nearest_key: largest cosine; nearest_position; next: the rows behind it"),
      .init("width", "rows that to=next goes into"),
      .init("threshold", "smallest cosine of keys that merge; -1 for all"),
      .init("fraction", "part of the dropped rows, by cosine, that may merge"),
      .init("update", "counts, mean, damped, weighted, add or pivot"),
      .init("weights", "one, cosine, exponential, shifted, length or prominence"),
      .init("keys", "keep, average or rotate"),
      .init("bias", "log_count or none"),
      .init("which", "of the rows dropped at one time: all, the newest, or the best by score"),
      .init("number", "how many of them, for newest and best"),
      .init("attention", "prominence: newest queries whose attention counts, 0 for all so far"),
      .init("reference", "prominence: followers, later or largest"),
      .init("mode", "prominence: expectation or random"),
      .init("seed", "prominence: seed of the random draw"),
    ]
  ) { (reader) throws(KVError) in
    let to = try reader.name("to", default: "nearest_key", among: ["nearest_key", "nearest_position", "next"])
    let width = try reader.int("width", default: 32, in: 1...65_536)
    let threshold = try reader.double("threshold", default: 0.8, in: -1...2)
    let fraction = try reader.double("fraction", default: 1, in: 0...1)
    let update = try reader.name("update", default: "counts", among: MergeRule.Update.allCases.map(\.rawValue))
    let weights = try reader.name(
      "weights", default: "one", among: ["one", "cosine", "exponential", "shifted", "length", "prominence"])
    let keys = try reader.name("keys", default: "keep", among: MergedKey.allCases.map(\.rawValue))
    let bias = try reader.name("bias", default: "log_count", among: ["log_count", "none"])
    let candidates = try MergeRule.Candidates(from: &reader, which: "all")
    let prominence = try Prominence(from: &reader, attention: 0, mode: "expectation")
    let rule = MergeRule(
      targets: to == "next" ? .next(width) : to == "nearest_key" ? .nearestKey : .nearestPosition,
      gate: threshold <= -1 ? .open : .cosine(threshold), fraction: fraction,
      update: MergeRule.Update(rawValue: update) ?? .counts, weights: .named(weights, prominence),
      key: MergedKey(rawValue: keys) ?? .keep, logCount: bias == "log_count", candidates: candidates)
    return .modifier { (selection) throws(KVError) in try selection.merging(rule) }
  }
}

extension MergeRule.Weights {
  fileprivate static func named(_ name: String, _ prominence: Prominence) -> MergeRule.Weights {
    switch name {
    case "cosine": .cosine
    case "exponential": .exponential
    case "shifted": .shifted
    case "length": .length
    case "prominence": .prominence(prominence)
    default: .one
    }
  }

  fileprivate var name: String {
    switch self {
    case .one: "one"
    case .cosine: "cosine"
    case .exponential: "exponential"
    case .shifted: "shifted"
    case .length: "length"
    case .prominence: "prominence"
    }
  }
}

extension MergeRule {
  func validate() throws(KVError) {
    switch candidates {
    case .newest(let count) where count < 1, .best(let count) where count < 1:
      throw KVError(.invalidOption, "1 or more of the dropped rows merge; got \(count)")
    default: break
    }
    if case .next(let width) = targets, !(1...65_536).contains(width) {
      throw KVError(.invalidOption, "a dropped row goes into the next 1...65536 rows; got \(width)")
    }
    guard (0...1).contains(fraction) else {
      throw KVError(.invalidOption, "the part of dropped rows that may merge lies in 0...1; got \(fraction)")
    }
    switch gate {
    case .cosine(let threshold) where !(-1...2).contains(threshold):
      throw KVError(.invalidOption, "a threshold of cosines lies in -1...2; got \(threshold)")
    case .movingAverage(let old, let new, _) where !((0...1).contains(old) && (0...1).contains(new)):
      throw KVError(.invalidOption, "the weights of a moving threshold lie in 0...1; got \(old) and \(new)")
    default: break
    }
    if case .prominence(let prominence) = weights { try prominence.validate() }
  }

  fileprivate func spec(name: String) -> StageSpec {
    var options: [SpecOption] = []
    switch targets {
    case .nearestKey: options.append(SpecOption("to", .text("nearest_key")))
    case .nearestPosition: options.append(SpecOption("to", .text("nearest_position")))
    case .next(let width): options += [SpecOption("to", .text("next")), SpecOption("width", .integer(width))]
    }
    if case .cosine(let threshold) = gate {
      options.append(SpecOption("threshold", .decimal(threshold)))
    } else {
      options.append(SpecOption("threshold", .decimal(-1)))
    }
    options +=
      [
        SpecOption("fraction", .decimal(fraction)), SpecOption("update", .text(update.rawValue)),
        SpecOption("weights", .text(weights.name)), SpecOption("keys", .text(key.rawValue)),
        SpecOption("bias", .text(logCount ? "log_count" : "none")),
      ] + candidates.options
    if case .prominence(let prominence) = weights { options += prominence.options }
    return StageSpec(name: name, options: options)
  }
}

extension MergeRule.Candidates {
  init(from reader: inout OptionReader, which: String) throws(KVError) {
    let which = try reader.name("which", default: which, among: ["all", "newest", "best"])
    let number = try reader.int("number", default: 1, in: 1...1_073_741_823)
    self = which == "all" ? .all : which == "newest" ? .newest(number) : .best(number)
  }

  var options: [SpecOption] {
    switch self {
    case .all: [SpecOption("which", .text("all"))]
    case .newest(let number): [SpecOption("which", .text("newest")), SpecOption("number", .integer(number))]
    case .best(let number): [SpecOption("which", .text("best")), SpecOption("number", .integer(number))]
    }
  }
}

extension Prominence {
  init(from reader: inout OptionReader, attention: Int, mode: String) throws(KVError) {
    let queries = try reader.int("attention", default: attention, in: 0...65_536)
    let reference = try reader.name("reference", default: "followers", among: Reference.allCases.map(\.rawValue))
    let mode = try reader.name("mode", default: mode, among: ["random", "expectation"])
    let seed = try reader.int("seed", default: 0, in: 0...Int.max)
    self.init(
      attention: queries == 0 ? .accumulated : .newest(queries),
      reference: Reference(rawValue: reference) ?? .followers,
      mode: mode == "random" ? .random(seed: UInt64(seed)) : .expectation)
  }

  func validate() throws(KVError) {
    if case .newest(let count) = attention, !(1...65_536).contains(count) {
      throw KVError(.invalidOption, "the attention of the newest 1...65536 queries counts; got \(count)")
    }
    if case .random(let seed) = mode, seed > UInt64(Int.max) {
      throw KVError(.invalidOption, "a seed lies in 0...\(Int.max); got \(seed)")
    }
  }

  var options: [SpecOption] {
    var options: [SpecOption] = []
    switch attention {
    case .accumulated: options.append(SpecOption("attention", .integer(0)))
    case .newest(let count): options.append(SpecOption("attention", .integer(count)))
    }
    options.append(SpecOption("reference", .text(reference.rawValue)))
    switch mode {
    case .expectation: options.append(SpecOption("mode", .text("expectation")))
    case .random(let seed):
      options += [SpecOption("mode", .text("random")), SpecOption("seed", .integer(Int(seed)))]
    }
    return options
  }
}

/// The attention rows have received, as scores for routers that look at it.
struct ReceivedAttention: Scorer {
  var attention: Prominence.Attention

  var inputs: RequiredInputs { Prominence(attention: attention).inputs }

  func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    switch attention {
    case .accumulated: layer.accumulatedAttention(into: &scores)
    case .newest(let count): try layer.windowAttention(window: count, reduction: .sum, into: &scores)
    }
  }
}
