/// Stage one: how much does each cached token matter to each KV head?
///
/// A scorer is an immutable value; whatever accumulates between steps lives in the cache and is declared by `inputs`.
/// Scores are per KV head, never per query head: keys are not expanded.
public protocol Scorer: Sendable {
  /// What the scores are made from.
  var inputs: RequiredInputs { get }
  /// Refuses models it cannot score: numbers or a rotary embedding that are not there. Called once, by the cache.
  func validate(_ shape: ModelShape) throws(KVError)
  /// Fills `scores`, already sized to the live rows of `layer`, larger meaning keep. Throws `missingInput` when what it
  /// declared has not arrived.
  func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError)
}

extension Scorer {
  public func validate(_ shape: ModelShape) throws(KVError) {}
}

/// Stage two: how many rows may each layer and head keep?
public protocol Allocator: Sendable {
  /// True when budgets of one layer depend on the others: all layers are then scored before any is compressed. While
  /// decoding, layers still come one by one, with what they got when all were compared in ``AllocationRequest/earlier``.
  var spansLayers: Bool { get }
  /// Whether layers may finish their prompts one by one: those before then give rows up as later ones come, so that no
  /// more than the budget of all and one whole layer are ever held. See ``KVCache/finishPrefill(layer:)``.
  var cascades: Bool { get }
  /// Rows to keep for the layers whose prompt is finished, in order; the last has just come. What is said of a layer
  /// later can only be less.
  func cascade(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]]
  /// Whether rows of this layer may have to go, so that scores are wanted; those of `request` are not made yet.
  func needsScores(_ request: AllocationRequest) -> Bool
  /// Whether it looks at scores after the prompt. Where neither it nor the router does, nothing is observed or scored
  /// while decoding.
  var readsScoresWhileDecoding: Bool { get }
  /// Refuses models it has no numbers for.
  func validate(_ shape: ModelShape) throws(KVError)
  /// Rows to keep, everything included, for each request and KV head. At most the rows there are.
  func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]]
}

extension Allocator {
  public var spansLayers: Bool { false }
  public func needsScores(_ request: AllocationRequest) -> Bool {
    spansLayers || zip(request.rows, request.budget).contains { $0 > $1 }
  }
  public var readsScoresWhileDecoding: Bool { true }
  public var cascades: Bool { false }
  public func cascade(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] { try allocate(requests) }
  public func validate(_ shape: ModelShape) throws(KVError) {}
}

/// Divides budgets between layers and leaves their heads to another allocator, so that the two combine.
public protocol LayerAllocator: Allocator {
  var heads: any Allocator { get set }
}

/// One layer that wants rows.
public struct AllocationRequest: Sendable {
  public let layer: Int
  /// Its place among the ``layers`` the policy chooses in: layers without a cache or with a sliding window do not count.
  public let index: Int
  public let layers: Int
  /// Tokens the layer has ever seen.
  public let tokensSeen: Int
  /// Live rows per KV head.
  public let rows: [Int]
  /// What the policy's budget resolves to, per KV head.
  public var budget: [Int]
  public package(set) var scores: ScoreTable
  /// Whether scores were made: not while decoding where nobody reads them.
  public package(set) var isScored = true
  /// Rows that must stay whatever their score.
  public let protection: Protection
  /// What was allocated when the prompt was finished. Nil until then.
  public let earlier: EarlierAllocation?

  package init(
    layer: Int, index: Int, layers: Int, tokensSeen: Int, rows: [Int], budget: [Int], scores: ScoreTable,
    protection: Protection, earlier: EarlierAllocation?
  ) {
    self.layer = layer
    self.index = index
    self.layers = layers
    self.tokensSeen = tokensSeen
    self.rows = rows
    self.budget = budget
    self.scores = scores
    self.protection = protection
    self.earlier = earlier
  }

  /// The rows of a head that no score can remove, within its budget.
  public func protectedRows(head: Int) -> Int {
    let split = protection.split(kept: min(budget[head], rows[head]), of: rows[head])
    return split.sinks + split.window
  }
}

/// What a layer was allocated at the end of its prompt, for choices made while decoding.
public struct EarlierAllocation: Hashable, Sendable {
  /// Rows kept, per KV head.
  public let kept: [Int]
  /// What the policy's budget was then, per KV head.
  public let budget: [Int]
  public let tokensSeen: Int

  package init(kept: [Int], budget: [Int], tokensSeen: Int) {
    self.kept = kept
    self.budget = budget
    self.tokensSeen = tokensSeen
  }
}

/// Stage three: where does each row go?
public protocol Router: Sendable {
  var protection: Protection { get }
  /// Tiers that rows can be sent to: the stores a policy text must name.
  var tierCount: Int { get }
  /// Refuses models it has no numbers for. Called once, by the cache.
  func validate(_ shape: ModelShape) throws(KVError)
  /// What it looks at beyond keys, values and scores.
  var inputs: RequiredInputs { get }
  /// Whether it looks at scores after the prompt; see ``Allocator/readsScoresWhileDecoding``.
  var readsScoresWhileDecoding: Bool { get }
  /// Whether it is asked even when every row fits the budget.
  var routesAlways: Bool { get }
  /// Whether it sends rows into other rows: the stores must be able to hold the result.
  var merges: Bool { get }
  /// About how many rows of a head each tier will hold when `kept` of `tokens` are kept: what a budget in bytes buys.
  func tierRows(kept: Int, of tokens: Int, layer: Int, head: Int) -> [Int]
  /// Refuses what does not fit a model of these KV heads, layer by layer; 0 where a layer keeps none.
  func validate(kvHeads: [Int]) throws(KVError)
  /// Sends every row of `layer` to a tier or drops it; `kept[h]` rows of head h survive, fewer where rows merge by
  /// likeness. Nothing has changed yet when it throws.
  func route(_ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing) throws(KVError)
}

extension Router {
  public func validate(_ shape: ModelShape) throws(KVError) {}
  public var tierCount: Int { 1 }
  public var inputs: RequiredInputs { .none }
  public var readsScoresWhileDecoding: Bool { true }
  public var routesAlways: Bool { false }
  public var merges: Bool { false }
  public func tierRows(kept: Int, of tokens: Int, layer: Int, head: Int) -> [Int] { [kept] }
  public func validate(kvHeads: [Int]) throws(KVError) {}
}

/// Rows that no score can remove.
public struct Protection: Hashable, Sendable {
  /// The first rows of the sequence.
  public var sinks: Int
  /// The newest rows.
  public var window: Int
  /// The newest rows as a share of what is kept, on top of `window`; 0 for none.
  public var windowShare: Double

  public init(sinks: Int = 0, window: Int = 0, windowShare: Double = 0) {
    self.sinks = sinks
    self.window = window
    self.windowShare = windowShare
  }

  /// Divides `kept` rows of `rows` between sinks, window and the scorer's choice.
  public func split(kept: Int, of rows: Int) -> BudgetSplit {
    let share = Int((windowShare * Double(kept)).rounded(.down))
    return BudgetSplit.resolve(budgetTokens: kept, tokens: rows, sinks: sinks, window: max(window, share))
  }
}

/// The outcome of routing: a tier for every live row, in the order of a `ScoreTable`.
public struct Routing: Sendable {
  /// Where a row goes: a tier of the policy, or nowhere.
  public struct Outcome: Hashable, Sendable {
    package let rawValue: UInt8
    /// The row's bytes are freed.
    public static let dropped = Outcome(rawValue: .max)
    /// The policy's tier `index`. New tokens always arrive in tier 0.
    public static func tier(_ index: Int) -> Outcome { Outcome(rawValue: UInt8(index)) }
    private init(rawValue: UInt8) { self.rawValue = rawValue }
  }

  package private(set) var outcomes: [Outcome] = []
  package private(set) var starts: [Int] = [0]
  /// Rows that take dropped rows in.
  package internal(set) var merges: [Merge] = []
  package internal(set) var terms: [Term] = []
  /// What the router wants to find in ``LayerView/routerMemory`` the next time; nil: what is there.
  public var memory: [Float]?

  public init() {}

  /// Every row dropped. Keeps its memory.
  package mutating func reset(like scores: ScoreTable) {
    starts.removeAll(keepingCapacity: true)
    outcomes.removeAll(keepingCapacity: true)
    merges.removeAll(keepingCapacity: true)
    terms.removeAll(keepingCapacity: true)
    memory = nil
    starts.append(0)
    for head in 0..<scores.headCount {
      starts.append(starts[head] + scores.rowCount(head: head))
    }
    outcomes.append(contentsOf: repeatElement(.dropped, count: starts[scores.headCount]))
  }

  public subscript(head: Int, row: Int) -> Outcome {
    get { outcomes[starts[head] + row] }
    set { outcomes[starts[head] + row] = newValue }
  }

  /// Sends several rows of a head to one place.
  public mutating func send(head: Int, rows: Range<Int>, to outcome: Outcome) {
    let start = starts[head]
    precondition(
      rows.lowerBound >= 0 && start + rows.upperBound <= starts[head + 1], "rows \(rows) of head \(head)")
    outcomes.withUnsafeMutableBufferPointer { buffer in
      for row in rows { buffer[start + row] = outcome }
    }
  }

  /// Exactly `kept[h]` rows of every head survive: what a router promises.
  package func checkCounts(_ kept: [Int]) {
    for head in kept.indices {
      let survivors = outcomes[starts[head]..<starts[head + 1]].reduce(0) { $0 + ($1 == .dropped ? 0 : 1) }
      precondition(survivors == kept[head], "\(survivors) rows of head \(head) routed, \(kept[head]) allocated")
    }
  }

  /// Calls `body` with every row of a head that does not go to `tier`; with nil, with every row.
  package func forEach(head: Int, notIn tier: Outcome?, _ body: (Int, Outcome) -> Void) {
    let start = starts[head]
    outcomes.withUnsafeBufferPointer { buffer in
      for row in 0..<starts[head + 1] - start where buffer[start + row] != tier {
        body(row, buffer[start + row])
      }
    }
  }
}
