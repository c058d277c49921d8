/// What is remembered, with every row, of the attention it receives: some numbers a row, folded once per KV head and
/// step. Running sums (H2O), the last row (TOVA) and recurrence intervals (LazyEviction) are folds of this kind.
///
/// An observer is an immutable value; its numbers live in the cache beside the rows, follow them when rows are dropped,
/// moved, forked, trimmed and saved, and count as state bytes. A scorer declares it in ``RequiredInputs``.
public protocol AttentionObserver: Hashable, Sendable {
  /// Numbers kept with every row of every KV head, f32, 1...16.
  var columns: Int { get }
  /// How the weights of the query heads of a group, and of the queries of one attention call, become one per row.
  var reduction: AttentionReduction { get }
  /// How many of the newest queries of an attention call are observed: `Int.max` for all, 0 for none.
  ///
  /// - Parameter prompt: whether the call belongs to a prompt or to decoding.
  func observedQueries(prompt: Bool) -> Int
  /// Whether the weights a token received in all KV heads of its layer are reduced to one before they are folded. Heads
  /// that hold other rows than the first, for budgets of their own, are then all folded each for itself.
  var sharedByHeads: Bool { get }
  /// What a column holds when a row arrives.
  ///
  /// - Parameter decodedTokens: tokens decoded before this one, since the cache was made.
  func initial(column: Int, decodedTokens: Int) -> Float
  /// What a row that takes another in has in a column.
  func merged(column: Int, _ own: Float, _ taken: Float) -> Float
  /// Takes in the weights of one attention call for the rows of one KV head in one tier.
  func fold(_ rows: ObservedRows)
}

extension AttentionObserver {
  public var reduction: AttentionReduction { .sum }
  public var sharedByHeads: Bool { false }
  public func observedQueries(prompt: Bool) -> Int { .max }
  public func initial(column: Int, decodedTokens: Int) -> Float { 0 }
  public func merged(column: Int, _ own: Float, _ taken: Float) -> Float { own + taken }
}

/// How the weights a row received in one attention call become one number.
public enum AttentionReduction: String, Sendable, Hashable, CaseIterable {
  /// Added, over the observed queries and the query heads of the group.
  case sum
  /// The largest of them.
  case max
}

/// The running sum of the attention a row received, over all queries and the query heads of its group (H2O). The sums
/// come out of the attention kernel itself.
public struct AttentionSum: AttentionObserver {
  public init() {}
  public var columns: Int { 1 }

  public func fold(_ rows: ObservedRows) {
    let sums = rows.column(0)
    for slot in 0..<rows.count { sums[slot] += rows.weights[slot] }
  }
}

/// The attention a row received from the newest observed queries alone, summed over them and the query heads of its
/// group; earlier weights are forgotten (TOVA's last row).
public struct LatestAttention: AttentionObserver {
  /// Newest queries of a prompt chunk that count; 0: prompts are not observed.
  public let promptQueries: Int
  /// Newest queries of a decode step that count.
  public let decodeQueries: Int

  public init(promptQueries: Int = 1, decodeQueries: Int = 1) {
    self.promptQueries = promptQueries
    self.decodeQueries = decodeQueries
  }

  public var columns: Int { 1 }
  public func observedQueries(prompt: Bool) -> Int { prompt ? promptQueries : decodeQueries }

  public func fold(_ rows: ObservedRows) {
    let latest = rows.column(0)
    for slot in 0..<rows.count { latest[slot] = rows.weights[slot] }
  }
}

/// Rows of one KV head in one tier, as an observer folds and a scorer reads them: slots in position order, some of which
/// may be dead (they received no weight and count for nothing).
///
/// Valid during the call it is passed to.
@frozen public struct ObservedRows {
  /// Slots, dead ones included.
  public let count: Int
  /// What each slot received in this attention call. Empty for a scorer.
  public let weights: UnsafeBufferPointer<Float>
  /// Queries the weights are made of.
  public let queries: Int
  /// Query heads of a KV head.
  public let group: Int
  /// Tokens the layer has seen, those of this call included.
  public let tokensSeen: Int
  /// Tokens decoded since the cache was made, those of this call included.
  public let decodedTokens: Int
  /// Whether the call belongs to a prompt.
  public let prompt: Bool
  @usableFromInline let planes: UnsafeMutablePointer<Float>?
  @usableFromInline let stride: Int
  @usableFromInline let bias: UnsafePointer<Float>?
  @usableFromInline let positions: UnsafePointer<Int32>?
  @usableFromInline let firstPosition: Int

  package init(
    _ columns: ObservedColumns, weights: UnsafeBufferPointer<Float>, queries: Int, group: Int, tokensSeen: Int,
    decodedTokens: Int, prompt: Bool
  ) {
    count = columns.count
    self.weights = weights
    self.queries = queries
    self.group = group
    self.tokensSeen = tokensSeen
    self.decodedTokens = decodedTokens
    self.prompt = prompt
    planes = columns.base
    stride = columns.stride
    bias = columns.bias
    positions = columns.positions
    firstPosition = columns.firstPosition
  }

  /// One column, a number per slot.
  @inlinable public func column(_ index: Int) -> UnsafeMutableBufferPointer<Float> {
    UnsafeMutableBufferPointer(start: planes.map { $0 + index * stride }, count: count)
  }

  @inlinable public func isLive(_ slot: Int) -> Bool { bias.map { $0[slot] != -.infinity } ?? true }

  /// Absolute position of the token in a slot.
  @inlinable public func position(_ slot: Int) -> Int { positions.map { Int($0[slot]) } ?? firstPosition + slot }
}

/// Where a segment keeps the columns of one head: `base[column * stride + slot]`.
package struct ObservedColumns: BitwiseCopyable {
  package var base: UnsafeMutablePointer<Float>?
  package var stride: Int
  package var width: Int
  package var count: Int
  package var live: Int
  package var bias: UnsafePointer<Float>?
  /// No slot from this one on is dead.
  package var deadEnd = Int.max
  /// Nil: `firstPosition + slot`.
  package var positions: UnsafePointer<Int32>?
  package var firstPosition: Int

  package func isLive(_ slot: Int) -> Bool { bias.map { $0[slot] != -.infinity } ?? true }
  package func position(_ slot: Int) -> Int { positions.map { Int($0[slot]) } ?? firstPosition + slot }

  package func value(column: Int, slot: Int) -> Float {
    guard let base, column < width else { return 0 }
    return base[column * stride + slot]
  }

  /// One column of the live slots, in order.
  package func copyLive(column: Int, into target: UnsafeMutablePointer<Float>) {
    guard let base, column < width else {
      target.update(repeating: 0, count: live)
      return
    }
    let values = base + column * stride
    guard live < count else {
      target.update(from: values, count: count)
      return
    }
    var next = 0
    for slot in 0..<count where isLive(slot) {
      target[next] = values[slot]
      next += 1
    }
  }
}

/// Bounds that keep sizes computed from a file or a policy small.
package enum AttentionLimits {
  package static let columns = 16
}
