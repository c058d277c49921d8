public import KVCore

/// One set of tokens for all heads of a layer, behind any selection: `snapkv(budget=0.25)+shared`.
///
/// Needs: what the selection it stands behind needs. Runs: when that selection does.
extension Selection {
  /// - Parameter reduction: how the scores a token has in the heads become one.
  /// - Throws: `unsupported` behind a selection without scores.
  public func shared(_ reduction: GroupReduction = .mean) throws(KVError) -> Selection {
    guard let scorer else { throw Selection.nothingToScore("shared", self) }
    let spec = StageSpec(name: "shared", options: [SpecOption("reduction", .text(reduction.rawValue))])
    return modified(by: spec) { $0.scorer = SharedScores(scorer, reduction: reduction) }
  }

  /// `shared(reduction=mean)`, behind what scores.
  public static let sharedMethod = MethodDescription(
    name: "shared", role: .modifier, summary: "one set of tokens for all heads of a layer",
    options: [.init("reduction", "the heads' scores of a token: mean, max or sum")]
  ) { (reader) throws(KVError) in
    let name = try reader.name("reduction", default: "mean", among: GroupReduction.allCases.map(\.rawValue))
    return .modifier { (selection) throws(KVError) in try selection.shared(GroupReduction(rawValue: name) ?? .mean) }
  }
}

/// The scores of another scorer, reduced over the heads that hold a token and given to all of them.
public struct SharedScores: Scorer {
  public let base: any Scorer
  public let reduction: GroupReduction

  public init(_ base: any Scorer, reduction: GroupReduction = .mean) {
    self.base = base
    self.reduction = reduction
  }

  public var inputs: RequiredInputs { base.inputs }
  public func validate(_ shape: ModelShape) throws(KVError) { try base.validate(shape) }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    try base.score(layer, into: &scores)
    if layer.kvHeads < 2 { return }
    var next = [Int](repeating: 0, count: layer.kvHeads)
    var holders: [Int] = []
    while true {
      // The earliest position that any head has not passed yet, and the heads that hold it.
      var position = Int.max
      holders.removeAll(keepingCapacity: true)
      for head in 0..<layer.kvHeads where next[head] < layer.rowCount(head: head) {
        let own = layer.position(head: head, row: next[head])
        if own < position {
          position = own
          holders.removeAll(keepingCapacity: true)
        }
        if own == position { holders.append(head) }
      }
      guard let first = holders.first else { return }
      var value = scores[first, next[first]]
      for head in holders.dropFirst() {
        let other = scores[head, next[head]]
        value = reduction == .max ? max(value, other) : value + other
      }
      if reduction == .mean { value /= Float(holders.count) }
      for head in holders {
        scores[head, next[head]] = value
        next[head] += 1
      }
    }
  }
}
