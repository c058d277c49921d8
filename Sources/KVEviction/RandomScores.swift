public import KVCore

/// Random: tokens drawn at random, the control every other score must beat.
///
/// Needs: keys and values only. Runs: after the prompt; with `every`, while decoding too.
///
/// The number of a token depends on the seed, its layer, head and position only, so a token that stays keeps its number
/// and two runs agree.
extension Selection {
  /// - Parameter seed: another seed, another draw.
  public static func random(
    budget: Budget = .fraction(0.5), sinks: Int = 0, recent: Int = 0, every: Int? = nil, seed: Int = 1
  ) throws(KVError) -> Selection {
    try RowOptions(budget: budget, sinks: sinks, recent: recent, every: every)
      .selection(
        named: "random", and: [SpecOption("seed", .integer(seed))],
        scorer: RandomScore(seed: UInt64(bitPattern: Int64(seed))))
  }

  /// `random(budget=0.5,seed=1)`.
  public static let randomMethod = MethodDescription(
    name: "random", role: .selection, summary: "tokens drawn at random: the control",
    options: RowOptions.descriptions + [.init("seed", "of the draw")]
  ) { (reader) throws(KVError) in
    let options = try RowOptions().read(&reader)
    let seed = try reader.int("seed", default: 1)
    return .selection(
      try .random(
        budget: options.budget, sinks: options.sinks, recent: options.recent, every: options.every, seed: seed))
  }
}

/// A number in 0..<1 that depends on seed, layer, head and position.
public struct RandomScore: Scorer {
  public let seed: UInt64

  public init(seed: UInt64 = 1) { self.seed = seed }

  public var inputs: RequiredInputs { .none }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    for head in 0..<layer.kvHeads {
      let stream = mix(mix(seed) ^ UInt64(layer.layer) << 32 ^ UInt64(head))
      for row in 0..<layer.rowCount(head: head) {
        let bits = mix(stream ^ UInt64(layer.position(head: head, row: row)))
        // 24 bits: every value is a Float.
        scores[head, row] = Float(bits >> 40) * 0x1p-24
      }
    }
  }

  /// The finaliser of SplitMix64.
  private func mix(_ x: UInt64) -> UInt64 {
    var z = x &+ 0x9E37_79B9_7F4A_7C15
    z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
    return z ^ z >> 31
  }
}

/// The position: the newest rows stay.
public struct PositionScore: Scorer {
  public init() {}

  public var inputs: RequiredInputs { .none }

  public func score(_ layer: LayerView, into scores: inout ScoreTable) throws(KVError) {
    for head in 0..<layer.kvHeads {
      for row in 0..<layer.rowCount(head: head) { scores[head, row] = Float(layer.position(head: head, row: row)) }
    }
  }
}
