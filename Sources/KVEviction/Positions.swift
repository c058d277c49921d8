public import KVCore

/// The position of what survives, for any selection: `snapkv(budget=0.25)+positions(policy=rerotate)`.
///
/// Needs: the rotary embedding in `ModelShape`, but for `keep`. Runs: when the selection does.
extension Selection {
  /// The same selection with another position policy.
  public func positioned(_ policy: PositionPolicy) -> Selection {
    modified(by: StageSpec(name: "positions", options: [SpecOption("policy", .text(policy.rawValue))])) {
      $0.positions = policy
    }
  }

  /// `positions(policy=rerotate)`, behind any selection.
  public static let positionsMethod = MethodDescription(
    name: "positions", role: .modifier, summary: "the position of what survives: true, counted in rows, or turned",
    options: [.init("policy", "keep: true distances; slot: queries are turned; rerotate: keys are turned")]
  ) { (reader) throws(KVError) in
    let name = try reader.name("policy", default: "rerotate", among: PositionPolicy.allCases.map(\.rawValue))
    return .modifier { selection in selection.positioned(PositionPolicy(rawValue: name) ?? .keep) }
  }
}
