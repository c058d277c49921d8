public import KVCore

/// How rows that a selection drops go into rows that stay: where to, how alike they must be, with which weights, and what
/// becomes of the row that takes them in. Published merging methods are values of this.
public struct MergeRule: Sendable, Hashable {
  /// Which rows a dropped row goes into.
  public enum Targets: Sendable, Hashable {
    /// The one whose key has the largest cosine.
    case nearestKey
    /// The one nearest in position; of two the earlier.
    case nearestPosition
    /// The next so many rows that stay, behind it.
    case next(Int)
  }

  /// What the row that takes others in becomes, from its own row x, weights w and n rows that come.
  public enum Update: String, Sendable, Hashable, CaseIterable {
    /// (c·x + Σ c·x) / Σ c with the tokens each row stands for: merging twice equals merging once.
    case counts
    /// (x + Σ x) / (1 + n).
    case mean
    /// (x + Σ w·x) / (1 + n): weights are not in the divisor (the authors of D2O).
    case damped
    /// (w₀·x + Σ w·x) / (w₀ + Σ w).
    case weighted
    /// x + Σ w·x.
    case add
    /// Each row is averaged with x first, then all are (LOOK-M's pivot).
    case pivot
  }

  /// The weight of a row that comes. The row that takes it in has weight 1, or e with `exponential`.
  public enum Weights: Sendable, Hashable {
    case one
    /// The cosine of the keys.
    case cosine
    /// e to the cosine.
    case exponential
    /// (cosine + 1) / 2.
    case shifted
    /// The cosine, at least 0, times the row's share of the lengths of both rows.
    case length
    /// How prominent the row's attention is beside that of the rows it goes into, divided by their number (CaM).
    case prominence(Prominence)
  }

  /// Which merges happen at all.
  public enum Gate: Sendable, Hashable {
    case open
    /// Cosine of the keys at least this.
    case cosine(Double)
    /// The threshold follows the mean cosine of what is dropped: `old · previous + new · mean`. With `averaged`, the test is
    /// on the mean over heads of the cosines of the rows that are n-th in their heads (the authors of D2O).
    case movingAverage(old: Double, new: Double, averaged: Bool)
  }

  /// Which of the rows that are dropped at one time may merge.
  public enum Candidates: Sendable, Hashable {
    case all
    /// The newest so many.
    case newest(Int)
    /// Those with the largest scores of the selection, of equal ones the newest.
    case best(Int)
  }

  public var targets: Targets
  public var gate: Gate
  /// The part of the dropped rows, by cosine, that may merge.
  public var fraction: Double
  public var update: Update
  public var weights: Weights
  public var key: MergedKey
  /// A row that stands for n tokens gets the log bias log n.
  public var logCount: Bool
  public var candidates: Candidates

  public init(
    targets: Targets = .nearestKey, gate: Gate = .cosine(0.8), fraction: Double = 1, update: Update = .counts,
    weights: Weights = .one, key: MergedKey = .keep, logCount: Bool = true, candidates: Candidates = .all
  ) {
    self.targets = targets
    self.gate = gate
    self.fraction = fraction
    self.update = update
    self.weights = weights
    self.key = key
    self.logCount = logCount
    self.candidates = candidates
  }

  var inputs: RequiredInputs {
    var inputs = RequiredInputs(rotary: key == .rotate)
    if case .prominence(let prominence) = weights { inputs = inputs.union(prominence.inputs) }
    return inputs
  }

  var needsCosines: Bool {
    if gate != .open || fraction < 1 { return true }
    switch weights {
    case .cosine, .exponential, .shifted, .length: return true
    case .one, .prominence: return false
    }
  }
}

/// The attention of a dropped row beside that of others, as a probability.
public struct Prominence: Sendable, Hashable {
  /// Whose attention counts.
  public enum Attention: Sendable, Hashable {
    /// All queries so far.
    case accumulated
    /// The newest so many queries.
    case newest(Int)
  }

  /// What it is divided by.
  public enum Reference: String, Sendable, Hashable, CaseIterable {
    /// The mean over the rows it goes into.
    case followers
    /// The mean over all rows behind it that stay.
    case later
    /// The largest of all rows that stay.
    case largest
  }

  /// What becomes of the probability.
  public enum Mode: Sendable, Hashable {
    /// It is the weight.
    case expectation
    /// The weight is 1 with that probability, else 0. The draw depends on the seed, the layer, the head and the position
    /// of the row alone, so runs, forks and loaded caches agree.
    case random(seed: UInt64)
  }

  public var attention: Attention
  public var reference: Reference
  public var mode: Mode

  public init(attention: Attention, reference: Reference = .followers, mode: Mode = .expectation) {
    self.attention = attention
    self.reference = reference
    self.mode = mode
  }

  var inputs: RequiredInputs {
    switch attention {
    case .accumulated: RequiredInputs(attentionWeights: true)
    case .newest(let count): RequiredInputs(windowQueries: count)
    }
  }

  /// Attention of every row of a layer.
  func attention(of layer: LayerView) throws(KVError) -> ScoreTable {
    var table = ScoreTable()
    table.reset(counts: layer.rowCounts)
    switch attention {
    case .accumulated: layer.accumulatedAttention(into: &table)
    case .newest(let count): try layer.windowAttention(window: count, reduction: .mean, into: &table)
    }
    return table
  }

  /// In 0...1; 0 / 0 is 0, and a row with attention beside rows without any has 1.
  func probability(_ own: Float, _ reference: Float) -> Float {
    if reference > 0 { return min(max(own / reference, 0), 1) }
    return own > 0 ? 1 : 0
  }

  /// The weight of a probability for one row.
  func draw(_ probability: Float, layer: Int, head: Int, position: Int) -> Float {
    guard case .random(let seed) = mode else { return probability }
    var state = seed &+ 0x9E37_79B9_7F4A_7C15
    for part in [layer, head, position] { state = Prominence.mixed(state ^ UInt64(truncatingIfNeeded: part)) }
    // 24 bits in 0..<1, exact in f32.
    return Float(state >> 40) * 0x1p-24 < probability ? 1 : 0
  }

  /// SplitMix64's finaliser: every bit of the result depends on every bit of the argument.
  private static func mixed(_ value: UInt64) -> UInt64 {
    var x = value &+ 0x9E37_79B9_7F4A_7C15
    x = (x ^ x >> 30) &* 0xBF58_476D_1CE4_E5B9
    x = (x ^ x >> 27) &* 0x94D0_49BB_1331_11EB
    return x ^ x >> 31
  }
}
