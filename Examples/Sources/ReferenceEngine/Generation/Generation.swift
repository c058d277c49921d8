public import KVCompression

/// When a generation ends, and how it draws.
public struct GenerationOptions: Sendable, Hashable {
  public var maximumTokens: Int
  public var sampling: SamplingOptions
  /// Tokens that end the text; they are returned as `stop` and not run through the model.
  public var stopIDs: Set<Int>

  public init(maximumTokens: Int = 128, sampling: SamplingOptions = .greedy, stopIDs: Set<Int> = []) {
    self.maximumTokens = maximumTokens
    self.sampling = sampling
    self.stopIDs = stopIDs
  }
}

/// What a generation gave.
public struct GenerationResult: Sendable, Hashable {
  public enum End: Sendable, Hashable {
    /// A stop token was drawn.
    case stop(Int)
    case maximumTokens
    /// The callback asked to end.
    case cancelled
  }
  /// Without the stop token.
  public var tokens: [Int]
  public var end: End
}

extension InferenceSession {
  /// Draws tokens one by one, each run through the model before the next is drawn.
  ///
  /// - Parameters:
  ///   - logits: those after the last token of the sequence so far, as ``prefill(_:chunk:finish:)`` returns them.
  ///   - onToken: called with each token as it is drawn; returning false ends the generation.
  public func generate(
    after logits: [Float], _ options: GenerationOptions, onToken: (Int) -> Bool = { _ in true }
  ) throws(KVError) -> GenerationResult {
    guard options.maximumTokens >= 0 else {
      throw KVError(.invalidOption, "the maximum of tokens must not be negative; got \(options.maximumTokens)")
    }
    var sampler = try Sampler(options.sampling)
    var logits = logits
    var tokens: [Int] = []
    while tokens.count < options.maximumTokens {
      let token = try sampler.next(logits)
      if options.stopIDs.contains(token) { return GenerationResult(tokens: tokens, end: .stop(token)) }
      tokens.append(token)
      guard onToken(token) else { return GenerationResult(tokens: tokens, end: .cancelled) }
      // The last token needs no logits after it.
      if tokens.count < options.maximumTokens { logits = try decode(token) }
    }
    return GenerationResult(tokens: tokens, end: .maximumTokens)
  }
}
