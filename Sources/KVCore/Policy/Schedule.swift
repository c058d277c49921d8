/// When a policy chooses tokens.
public struct Schedule: Hashable, Sendable {
  /// Once per layer, when the prompt is complete.
  public var afterPrefill: Bool
  /// After every chunk of a prompt, which bounds the cache while it fills.
  public var afterPrefillChunks: Bool
  /// After every this many decoded tokens. Nil: never again after the prompt.
  public var decodeInterval: Int?
  /// Only when some head holds more rows than this; then down to the policy's budget. Nil: the budget itself. A trigger
  /// above the budget makes evictions rare and large (Scissorhands drops half a buffer at once).
  public var trigger: Budget?

  public init(
    afterPrefill: Bool = true, afterPrefillChunks: Bool = false, decodeInterval: Int? = nil, trigger: Budget? = nil
  ) {
    self.trigger = trigger
    self.afterPrefill = afterPrefill
    self.afterPrefillChunks = afterPrefillChunks
    self.decodeInterval = decodeInterval
  }

  /// Nothing is ever chosen: every token stays.
  public static let never = Schedule(afterPrefill: false)
}

/// The position a surviving token has for the tokens that come after.
public enum PositionPolicy: String, Hashable, Sendable, CaseIterable {
  /// Survivors keep their original rotary phase; distances stay true.
  case keep
  /// Survivors count as neighbours: distances are counted in cached rows (StreamingLLM). Stored keys are not touched;
  /// queries are turned back over every gap, which is exact and works for any store.
  case slot
  /// Survivors' keys are turned in the cache so that they are neighbours: a row moves later by as many positions as rows
  /// behind it were dropped. The next token keeps the position ``KVCache/tokensSeen(layer:)``, and distances are those
  /// of rows numbered from 0. Needs keys that are dense whenever rows are dropped.
  case rerotate
}
