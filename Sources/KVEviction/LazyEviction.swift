public import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// LazyEviction: in long reasoning a token may sleep and be read again; what has been silent for longer than its own
/// rhythm leaves. arXiv 2506.15969.
///
/// Needs: the attention weights of every decoded token; the prompt's are not looked at. Runs: after every `window` decoded
/// tokens, when there are more rows than the budget. The prompt is not compressed: rows come down to the budget at the
/// first eviction, and swing between it and `window - 1` rows more from then on.
///
/// Every row remembers the step it was last active in (its weight reached `alpha`) and the longest gap between two
/// activations, its recurrence interval. The score is high for rows silent for less than that interval, and for short
/// intervals.
///
/// Differs from the authors' code: state is per KV head, a row being active when any query head of the group reads it
/// (theirs keeps caches per query head); equal scores keep the lower position.
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept by an eviction, the window included.
  ///   - window: decoded tokens between evictions, and newest tokens that always stay. The authors take the 80th
  ///     percentile of recurrence intervals of a calibration set: 27, 52 or 95 in their scripts, 256 in their class.
  ///   - alpha: attention from which a row counts as active; 5e-4 for DeepSeek-R1-Distill-Llama-8B, 1e-4 for the Qwen
  ///     models. Absolute: it must fall as the context grows.
  ///   - form: the score as in the authors' code, or as in the paper.
  public static func lazyEviction(
    budget: Budget = .tokens(1334), window: Int = 256, alpha: Double = 1e-4, form: RecurrenceForm = .code
  ) throws(KVError) -> Selection {
    guard (1...1_048_576).contains(window) else {
      throw KVError(.invalidOption, "lazy's window must lie in 1...1048576; got \(window)")
    }
    guard alpha > 0, alpha <= 1 else {
      throw KVError(.invalidOption, "lazy's alpha must lie above 0 and at most at 1; got \(alpha)")
    }
    try BudgetSplit.validate(sinks: 0, window: window, budget: budget)
    return Selection(
      spec: StageSpec(
        name: "lazy",
        options: [
          SpecOption("budget", budget.specValue), SpecOption("window", .integer(window)),
          SpecOption("alpha", .decimal(alpha)), SpecOption("form", .text(form.rawValue)),
        ]),
      scorer: Recurrence(threshold: Float(alpha), form: form), budget: budget,
      router: TopKRouter(Protection(window: window)),
      schedule: Schedule(afterPrefill: false, decodeInterval: window))
  }

  /// `lazy(budget=1334,window=256,alpha=1e-4)`.
  public static let lazyEvictionMethod = MethodDescription(
    name: "lazy", aliases: ["lazyeviction"], role: .selection,
    summary: "tokens silent for less than their own recurrence interval", paper: "arXiv 2506.15969",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept by an eviction, the window included"),
      .init("window", "decoded tokens between evictions, and newest tokens that always stay"),
      .init("alpha", "attention from which a token counts as active"),
      .init("form", "the score of the authors' code or of the paper"),
    ]
  ) { (reader) throws(KVError) in
    let budget = try reader.budget("budget", default: .tokens(1334))
    let window = try reader.int("window", default: 256, in: 1...1_048_576)
    let alpha = try reader.double("alpha", default: 1e-4, in: 0...1)
    let form = try reader.name("form", default: "code", among: RecurrenceForm.allCases.map(\.rawValue))
    return .selection(
      try .lazyEviction(budget: budget, window: window, alpha: alpha, form: RecurrenceForm(rawValue: form) ?? .code))
  }
}

/// How LazyEviction turns a row's silence and its recurrence interval into a score.
public enum RecurrenceForm: String, Sendable, Hashable, CaseIterable {
  /// 2 / (1 + exp(1 + silence / (interval + 1e-5))), and 2 / (1 + exp(interval - 1)) more for rows read twice.
  case code
  /// 2 sigmoid(-silence / interval), and 2 sigmoid(-(interval - 1)) more for rows read twice.
  case paper
}

/// When a row was last active, and the longest gap between two activations, both counted in decoded tokens.
public struct ActivationGaps: AttentionObserver {
  /// Attention from which a row counts as active.
  public let threshold: Float

  public init(threshold: Float) { self.threshold = threshold }

  /// 0: the last active step; 1: the longest interval.
  public var columns: Int { 2 }
  public var reduction: AttentionReduction { .max }
  public func observedQueries(prompt: Bool) -> Int { prompt ? 0 : .max }
  public func initial(column: Int, decodedTokens: Int) -> Float { column == 0 ? Float(decodedTokens) : 0 }

  public func merged(column: Int, _ own: Float, _ taken: Float) -> Float { max(own, taken) }

  public func fold(_ rows: ObservedRows) {
    guard let last = rows.column(0).baseAddress, let longest = rows.column(1).baseAddress,
      let weights = rows.weights.baseAddress
    else { return }
    let now = Float(rows.decodedTokens)
    for slot in 0..<rows.count {
      let active = weights[slot] >= threshold
      let gap = active ? now - last[slot] : 0
      longest[slot] = gap > longest[slot] ? gap : longest[slot]
      last[slot] = active ? now : last[slot]
    }
  }
}

/// LazyEviction's score of ``ActivationGaps``.
public struct Recurrence: RowScorer {
  public let threshold: Float
  public let form: RecurrenceForm

  public init(threshold: Float, form: RecurrenceForm = .code) {
    self.threshold = threshold
    self.form = form
  }

  public var inputs: RequiredInputs { RequiredInputs(observer: ActivationGaps(threshold: threshold)) }

  public func score(_ rows: ObservedRows, into scores: UnsafeMutableBufferPointer<Float>) {
    let last = rows.column(0)
    let longest = rows.column(1)
    if last.baseAddress == nil { return scores.update(repeating: 0) }
    let now = Float(rows.decodedTokens)
    for slot in 0..<rows.count { scores[slot] = score(silence: now - last[slot], interval: longest[slot]) }
  }

  /// Exponents beyond 88 give 0 instead of an overflow.
  func score(silence: Float, interval: Float) -> Float {
    let silent: Float
    switch form {
    case .code: silent = 2 / (1 + expf(min(88, 1 + silence / (interval + 1e-5))))
    case .paper: silent = silence == 0 ? 1 : 2 / (1 + expf(min(88, silence / interval)))
    }
    return interval > 0 ? silent + 2 / (1 + expf(min(88, interval - 1))) : silent
  }
}
