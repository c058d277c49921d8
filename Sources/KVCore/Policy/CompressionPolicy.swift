/// How a cache is compressed: score tokens, allocate budgets, route every token to a tier, store each tier in a
/// representation; and when.
///
/// Policies are immutable values shared by any number of caches. Conform to it to write your own, or compose a
/// ``Policy`` from stages.
public protocol CompressionPolicy: Sendable {
  /// The policy as text that makes it again: every option by name, with its value.
  var spec: PolicySpec { get }
  /// Nil: no token is ever chosen over another.
  var scorer: (any Scorer)? { get }
  var budget: Budget { get }
  var allocator: any Allocator { get }
  var router: any Router { get }
  /// New tokens arrive in the first.
  var tiers: [Store] { get }
  var schedule: Schedule { get }
  var positions: PositionPolicy { get }
  /// Everything the stages need. The engine is asked for it before the first token.
  var inputs: RequiredInputs { get }
}

extension CompressionPolicy {
  public var inputs: RequiredInputs { (scorer?.inputs ?? .none).union(router.inputs) }
}

/// Stage four: the representation of a tier, with the text that names it.
public struct Store: Sendable {
  public let spec: StageSpec
  /// The modifiers applied to it, in order.
  public private(set) var modifiers: [StageSpec] = []
  package private(set) var factory: any SegmentFactory

  package init(spec: StageSpec, factory: any SegmentFactory) {
    self.spec = spec
    self.factory = factory
  }

  /// A tier whose keys and values are held in the given formats. `spec` names it in texts and saved caches.
  public init(spec: StageSpec, keys: SideFormat, values: SideFormat) {
    self.init(spec: spec, factory: RowFormat(keys: keys, values: values))
  }

  /// The same store on another representation; `modifier` joins its text.
  package func modified(by modifier: StageSpec, factory: any SegmentFactory) -> Store {
    var result = self
    result.factory = factory
    result.modifiers.append(modifier)
    return result
  }
}

/// The choosing half of a policy: everything but the representation.
public struct Selection: Sendable {
  public let spec: StageSpec?
  /// The modifiers applied to it, in order.
  public private(set) var modifiers: [StageSpec] = []
  public var scorer: (any Scorer)?
  public var budget: Budget
  public var allocator: any Allocator
  public var router: any Router
  public var schedule: Schedule
  public var positions: PositionPolicy
  /// What a policy text that names no store gets: none for dense f16.
  public var stores: [Store] = []

  public init(
    spec: StageSpec?, scorer: (any Scorer)?, budget: Budget, allocator: any Allocator = UniformAllocator(),
    router: any Router, schedule: Schedule, positions: PositionPolicy = .keep
  ) {
    self.spec = spec
    self.scorer = scorer
    self.budget = budget
    self.allocator = allocator
    self.router = router
    self.schedule = schedule
    self.positions = positions
  }

  /// The same selection with stages replaced by `change`; `modifier` joins its text.
  public func modified(by modifier: StageSpec, _ change: (inout Selection) -> Void) -> Selection {
    var result = self
    change(&result)
    result.modifiers.append(modifier)
    return result
  }

  /// Every token stays.
  public static let everything = Selection(
    spec: nil, scorer: nil, budget: .unlimited, router: TopKRouter(), schedule: .never)
}

/// A policy put together from a selection and the tiers it routes to: a row of choices.
public struct Policy: CompressionPolicy {
  public let selection: Selection
  public let tiers: [Store]

  /// Tokens chosen by `selection`, stored in `store`.
  public init(_ selection: Selection = .everything, store: Store) {
    self.init(selection, tiers: [store])
  }

  /// Tokens routed to several tiers. `tiers` is not empty.
  public init(_ selection: Selection, tiers: [Store]) {
    precondition(!tiers.isEmpty, "a policy stores its tokens somewhere")
    self.selection = selection
    self.tiers = tiers
  }

  public var spec: PolicySpec {
    PolicySpec(stages: (selection.spec.map { [$0] } ?? []) + selection.modifiers + tiers.flatMap { [$0.spec] + $0.modifiers })
  }
  public var scorer: (any Scorer)? { selection.scorer }
  public var budget: Budget { selection.budget }
  public var allocator: any Allocator { selection.allocator }
  public var router: any Router { selection.router }
  public var schedule: Schedule { selection.schedule }
  public var positions: PositionPolicy { selection.positions }
}
