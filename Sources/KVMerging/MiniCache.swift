public import KVCore

/// MiniCache: pairs of neighbouring layers share the directions of their keys and values. arXiv 2405.14366 (NeurIPS 2024).
///
/// Needs: keys and values. Runs: when the prompt of a pair's second layer is complete, then for every token that both have
/// attended.
///
/// In the deeper half of a model the keys of a token point almost the same way in two neighbouring layers, and so do its
/// values. One direction is held for both, between theirs by spherical interpolation, and a length for each layer. Tokens in
/// which the layers differ most stay as they are. The store left of it holds the directions, and the layers that are in no
/// pair: `kivi(bits=4)+minicache` is the paper's fivefold.
///
/// There is no code of the authors'. Their set of retained tokens, read literally, holds those that differ least
/// (`retain=literal`); text and figure say the opposite, which is the default. Directions are per KV head, thresholds too;
/// the threshold of the prompt holds for every later token. A token that one layer of a pair has dropped keeps its own
/// direction. Angles come from differences and sums of unit rows, not from the cosine, which loses small ones.
///
/// ```
/// one KV head of a pair   ┌ directions [tokens, d] in the store's format ┬ dense: a token that waits for the second layer ┐
///                         │ lengths [2, tokens]                          │
///                         │ exact rows [2, retained, d], their slots     │
/// ```
/// Bytes for two layers, a token and a head, K or V: those of one row, 4 for lengths in f16, and 4·d + 4 for each retained.
extension Store {
  /// - Parameters:
  ///   - weight: where the shared direction lies: 0 the lower layer's, 1 the upper's.
  ///   - retained: which tokens stay exact.
  ///   - perHead: thresholds for each KV head; otherwise one for all heads of a pair.
  ///   - lengths: element type of lengths.
  ///   - from: the first layer that may be one of a pair; the paper has the deeper half.
  /// - Throws: `invalidOption` for numbers out of range, `unsupported` for stores that do not hold rows one by one, or
  ///   balance them against the queries of one layer.
  public func miniCache(
    weight: Double = 0.6, retained: RetainedRows = .distant(0.05), perHead: Bool = true, lengths: ElementType = .f16,
    from: LayerStart = .share(0.5)
  ) throws(KVError) -> Store {
    guard let base = factory as? RowFormat else {
      throw KVError(.unsupported, "minicache shares directions of rows; \(spec.name) does not hold rows")
    }
    guard !factory.wantsQueries else {
      throw KVError(.unsupported, "directions are read by the queries of two layers and cannot be balanced against one")
    }
    guard (0...1).contains(weight) else {
      throw KVError(.invalidOption, "a direction lies between those of two layers, at 0...1; got \(weight)")
    }
    switch from {
    case .index(let layer) where !(0...4096).contains(layer):
      throw KVError(.invalidOption, "the first layer lies in 0...4096; got \(layer)")
    case .share(let share) where !(0...1).contains(share):
      throw KVError(.invalidOption, "a share of the layers lies in 0...1; got \(share)")
    default: break
    }
    var rule = try retained.rule()
    rule.acrossHeads = !perHead
    let options = [
      SpecOption("t", .decimal(weight)), SpecOption("retain", .text(retained.name)),
      SpecOption("gamma", .decimal(retained.gamma)), SpecOption("share", .decimal(retained.share)),
      SpecOption("scope", .text(perHead ? "head" : "layer")), SpecOption("lengths", .text(lengths.name)),
      SpecOption("from", from.specValue),
    ]
    return modified(
      by: StageSpec(name: "minicache", options: options),
      factory: DirectionFormat(
        base: base, weight: weight, retention: rule, lengths: lengths, firstLayer: from))
  }

  /// `kivi(bits=4)+minicache(t=0.6,gamma=0.05)`.
  public static let miniCacheMethod = MethodDescription(
    name: "minicache", role: .storeModifier,
    summary: "pairs of layers share directions, with a length for each; tokens in which they differ most stay",
    paper: "arXiv 2405.14366",
    options: [
      .init("t", "where the shared direction lies: 0 the lower layer's, 1 the upper's"),
      .init("retain", "tokens that stay exact: distant, literal (the paper's formula as it stands) or share"),
      .init("gamma", "part of the range of angles beyond which tokens stay (distant), or up to which (literal)"),
      .init("share", "share of the prompt's tokens that stay (share)"),
      .init("scope", "one threshold for each head, or one for all heads of a pair (layer)"),
      .init("lengths", "element type of lengths: f32, f16 or bf16"),
      .init("from", "first layer that may be one of a pair: a share of the layers, or an index"),
    ]
  ) { (reader) throws(KVError) in
    let weight = try reader.double("t", default: 0.6, in: 0...1)
    let retain = try reader.name("retain", default: "distant", among: ["distant", "literal", "share"])
    let gamma = try reader.double("gamma", default: 0.05, in: 0...1)
    let share = try reader.double("share", default: 0.05, in: 0...1)
    let scope = try reader.name("scope", default: "head", among: ["head", "layer"])
    let lengths = try reader.elementType("lengths", default: .f16)
    let from = try reader.layerStart("from", default: .share(0.5))
    let retained: RetainedRows =
      switch retain {
      case "literal": .literal(gamma)
      case "share": .share(share)
      default: .distant(gamma)
      }
    return .storeModifier { (store) throws(KVError) in
      try store.miniCache(
        weight: weight, retained: retained, perHead: scope == "head", lengths: lengths, from: from)
    }
  }
}

/// Which tokens of a pair of layers ``Store/miniCache(weight:retained:perHead:lengths:from:)`` keeps exact.
public struct RetainedRows: Hashable, Sendable {
  let name: String
  var gamma = 0.05
  var share = 0.05

  /// Those farther apart than the largest angle of the prompt less this part of the range of angles. 1: all.
  public static func distant(_ gamma: Double) -> RetainedRows { RetainedRows(name: "distant", gamma: gamma) }
  /// Those closer than the smallest angle of the prompt and this part of the range of angles. 1: all.
  public static func literal(_ gamma: Double) -> RetainedRows { RetainedRows(name: "literal", gamma: gamma) }
  /// That share of the prompt's tokens, those farthest apart; later ones by the angle of the last of these.
  public static func share(_ share: Double) -> RetainedRows { RetainedRows(name: "share", share: share) }

  func rule() throws(KVError) -> RetentionRule {
    guard (0...1).contains(gamma), (0...1).contains(share) else {
      throw KVError(
        .invalidOption, "a part of the angles or tokens lies in 0...1; got \(name == "share" ? share : gamma)")
    }
    switch name {
    case "literal": return RetentionRule(.close(Float(gamma)))
    case "share": return RetentionRule(.share(share))
    default: return RetentionRule(.distant(Float(gamma)))
    }
  }
}

extension LayerStart {
  var specValue: SpecValue {
    switch self {
    case .index(let layer): .integer(layer)
    case .share(let share): .decimal(share)
    }
  }
}

extension OptionReader {
  mutating func layerStart(_ name: String, default standard: LayerStart) throws(KVError) -> LayerStart {
    let expected = "a layer (16), or a share of the layers (0.5 or 50%)"
    let value = try read(name, default: standard, expected: expected, spec: \.specValue) {
      (value) throws(KVError) -> LayerStart? in
      switch value.kind {
      case .integer(let layer) where (0...4096).contains(layer): return .index(layer)
      case .decimal(let share) where (0...1).contains(share): return .share(share)
      case .percent(let share) where (0...100).contains(share): return .share(share / 100)
      default: return nil
      }
    }
    return value ?? standard
  }
}
