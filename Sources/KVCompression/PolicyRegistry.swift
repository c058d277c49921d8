/// Methods by name, and policies made from their names.
///
/// ```
/// let policy = try PolicyRegistry.standard.policy("snapkv(budget=0.25,window=32)+kivi(bits=2)")
/// ```
/// First stands what chooses tokens, then what modifies that choice, then what stores them: one store, or the tiers a
/// modifier routes to, each with what modifies it behind it. Each may be missing. Every option has its documented name and default.
public struct PolicyRegistry: Sendable {
  public private(set) var methods: [MethodDescription]

  /// Every method of this library.
  public static let standard = PolicyRegistry(
    methods: [Store.denseMethod, LayerChoice.method] + EvictionMethods.all + MergingMethods.all + LowRankMethods.all
      + QuantizationMethods.all)

  public init(methods: [MethodDescription]) { self.methods = methods }

  /// Adds a method of your own, or replaces the one of that name.
  public mutating func register(_ method: MethodDescription) {
    methods.removeAll { $0.name == method.name }
    methods.append(method)
  }

  /// The method of that name or alias, in any case of letters.
  public func method(named name: String) -> MethodDescription? {
    let wanted = name.lowercased()
    return methods.first { $0.name == wanted || $0.aliases.contains(wanted) }
  }

  /// The policy a text, or its JSON twin, describes.
  ///
  /// - Throws: `syntax`, `unknownName` (with the nearest name there is), `invalidOption`; each with the byte offset.
  public func policy(_ text: String) throws(KVError) -> Policy {
    try policy(PolicySpec(configuration: text))
  }

  /// The policy a parsed text describes.
  public func policy(_ spec: PolicySpec) throws(KVError) -> Policy {
    var selection: Selection?
    var stores: [Store] = []
    // A stage of layers that waits for the store to its right.
    var choice: (layers: LayerChoice, offset: Int?)?
    for stage in spec.stages {
      let part = try part(for: stage)
      if !stores.isEmpty, part.choosesTokens {
        throw KVError(
          .invalidOption, "what chooses tokens stands left of what stores them; \(stage.name) stands right",
          offset: stage.offset)
      }
      switch part {
      case .selection(let chosen):
        guard selection == nil else {
          throw KVError(
            .invalidOption, "one method chooses tokens; \(stage.name) would be the second", offset: stage.offset)
        }
        selection = chosen
      case .modifier(let change):
        do throws(KVError) {
          selection = try change(selection ?? .everything)
        } catch {
          throw error.at(offset: stage.offset)
        }
      case .store(let store):
        if let taken = choice {
          stores[stores.count - 1] = try stores[stores.count - 1].except(in: taken.layers, store)
          choice = nil
        } else {
          stores.append(store)
        }
      case .storeModifier(let change):
        do throws(KVError) {
          guard choice == nil else {
            throw KVError(
              .invalidOption, "\(stage.name) changes a store; the one that some layers have is missing to its left")
          }
          let last = stores.popLast() ?? .dense(.f16)
          stores.append(try last.changingLast(change))
        } catch {
          throw error.at(offset: stage.offset)
        }
      case .layers(let layers):
        guard !stores.isEmpty, choice == nil else {
          throw KVError(
            .invalidOption, "\(stage.name) stands right of the store that some layers do not have", offset: stage.offset
          )
        }
        choice = (layers, stage.offset)
      }
    }
    if let choice {
      throw KVError(
        .invalidOption, "the store that \(choice.layers.spec) gives to some layers is missing to its right",
        offset: choice.offset)
    }
    let chosen = selection ?? .everything
    if stores.isEmpty { stores = chosen.stores.isEmpty ? [.dense(.f16)] : chosen.stores }
    guard stores.count == chosen.router.tierCount else {
      let advice =
        stores.count > chosen.router.tierCount ? "a modifier that routes to more tiers is missing" : "name them all"
      throw KVError(
        .invalidOption,
        "the rows go to \(chosen.router.tierCount) stores, \(stores.count) are named; \(advice)",
        offset: spec.stages.last?.offset)
    }
    return Policy(chosen, tiers: stores)
  }

  private func part(for stage: StageSpec) throws(KVError) -> MethodDescription.Part {
    if stage.options.isEmpty, let type = ElementType(name: stage.name) { return .store(.dense(type)) }
    guard let method = method(named: stage.name) else {
      let names = methods.map(\.name)
      let hint = nearestName(to: stage.name, among: names).map { "; did you mean \"\($0)\"?" } ?? ""
      throw KVError(
        .unknownName,
        "no method is called \"\(stage.name)\"\(hint); there are \(names.joined(separator: ", ")), f32, f16 and bf16",
        offset: stage.offset)
    }
    return try method.part(for: stage)
  }
}

extension MethodDescription.Part {
  fileprivate var choosesTokens: Bool {
    switch self {
    case .selection, .modifier: true
    case .store, .storeModifier, .layers: false
    }
  }
}
