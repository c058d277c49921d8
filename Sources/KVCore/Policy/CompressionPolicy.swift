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
  /// Stores that take the place of this one in some layers. The first that names a layer counts.
  package private(set) var exceptions: [(layers: LayerChoice, store: Store)] = []

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

  /// The same store, but for some layers, which `store` holds.
  ///
  /// `kivi(bits=2)+layers(first=2,last=2)+kivi(bits=8)` in a policy text. Layers named more than once belong to the
  /// first exception that names them.
  ///
  /// - Throws: `invalidOption` when `store` has exceptions of its own, for which there is no text.
  public func except(in layers: LayerChoice, _ store: Store) throws(KVError) -> Store {
    guard store.exceptions.isEmpty else {
      throw KVError(.invalidOption, "a store for some layers has no exceptions of its own; add them to the other store")
    }
    var result = self
    result.exceptions.append((layers, store))
    return result
  }

  /// The store with a change to what stands last in its text: itself, or its last exception.
  package func changingLast(_ change: (Store) throws(KVError) -> Store) throws(KVError) -> Store {
    guard let last = exceptions.last else { return try change(self) }
    var result = self
    result.exceptions[exceptions.count - 1].store = try last.store.changingLast(change)
    return result
  }

  /// The text of the store and its modifiers, its exceptions behind it.
  public var stages: [StageSpec] {
    [spec] + modifiers + exceptions.flatMap { [$0.layers.spec] + $0.store.stages }
  }

  /// What holds the rows of any layer.
  package var factories: [any SegmentFactory] { [factory] + exceptions.flatMap(\.store.factories) }

  /// What holds the rows of one layer.
  package func factory(layer: Int, of count: Int) -> any SegmentFactory {
    if exceptions.isEmpty { return factory }
    let exception = exceptions.first { $0.layers.contains(layer, of: count) }
    return exception?.store.factory(layer: layer, of: count) ?? factory
  }
}

extension CompressionPolicy {
  /// Empty segments of every tier for one layer.
  package func makeSegments(
    layer: Int, shape: ModelShape, groups: [LayerGroup], backend: any ComputeBackend
  ) -> [any Segment] {
    if !shape.layers[layer].cached { return [] }
    return tiers.enumerated().map { tier, store in
      let factory: any SegmentFactory =
        groups.waiting(layer: layer, tier: tier, shape: shape.layers[layer])
        ?? store.factory(layer: layer, of: shape.layers.count)
      return factory.makeSegment(layer: shape.layers[layer], backend: backend)
    }
  }
}

/// The choosing half of a policy: everything but the representation.
public struct Selection: Sendable {
  public package(set) var spec: StageSpec?
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
    PolicySpec(stages: (selection.spec.map { [$0] } ?? []) + selection.modifiers + tiers.flatMap(\.stages))
  }
  public var scorer: (any Scorer)? { selection.scorer }
  public var budget: Budget { selection.budget }
  public var allocator: any Allocator { selection.allocator }
  public var router: any Router { selection.router }
  public var schedule: Schedule { selection.schedule }
  public var positions: PositionPolicy { selection.positions }
}
