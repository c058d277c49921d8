public import KVCore

/// Ranks of every head found by running the model: MatryoshkaKV's Algorithm 1. arXiv 2410.14731.
///
/// Every head begins with all rows of its basis. In each round every head of keys or values that can still give `step`
/// channels up does so on trial, and the one whose loss changes the model's output least gives them up for good, until
/// the wanted share is left.
///
/// ```swift
/// let search = try RateSearch(pca, share: 0.5, step: 8, floor: 8)
/// let found = try search.run { (trial) throws(KVError) in
///   // Keys and values of a prompt on `trial`'s bases, with its `ranks`: what does the model say now?
///   try divergence(.matryoshka(calibration: NamedCalibration(trial), rates: .file))
/// }
/// ```
///
/// Differs from the authors' code: that measures the relative change of the last hidden state and lets three quarters of
/// all heads give way in a round, as `together` can; heads are KV heads.
public struct RateSearch: Sendable {
  private struct Head: Sendable {
    var layer: Int
    var side: Calibration.Side
    var unit: Int
    var rank: Int
  }

  public let calibration: Calibration
  public let share: Double
  public let step: Int
  public let floor: Int
  /// Heads that give channels up in one round.
  public let together: Int
  private let heads: [Head]
  private let wanted: Int

  /// - Parameters:
  ///   - calibration: with a `basis` of keys and values for each KV head, [heads, rows, dim].
  ///   - share: of all channels that stay.
  ///   - step: channels a head gives up at a time.
  ///   - floor: channels that every head keeps.
  ///   - together: heads that give way in one round: 1 as published; more cost so much less, and may choose heads that are
  ///     bad to lose together.
  /// - Throws: `invalidOption` for numbers out of range and shares that cannot be reached, `missingInput` without bases.
  public init(
    _ calibration: Calibration, share: Double, step: Int = 32, floor: Int = 32, together: Int = 1
  ) throws(KVError) {
    guard share > 0, share <= 1, (1...4096).contains(step), (1...4096).contains(floor),
      (1...1_048_576).contains(together)
    else {
      throw KVError(
        .invalidOption,
        "a share above 0 and up to 1, steps and a floor of 1...4096 channels, and at least 1 head a round expected; got "
          + "\(share), \(step), \(floor) and \(together)")
    }
    self.calibration = calibration
    self.share = share
    self.step = step
    self.floor = floor
    self.together = together
    var heads: [Head] = []
    let layers = calibration.layers(with: "basis", of: .keys)
    guard !layers.isEmpty else {
      throw KVError(.missingInput, "a search of ranks needs a calibration with bases of keys and values; this has none")
    }
    for layer in layers {
      for side in Calibration.Side.allCases {
        let shape = try calibration.numbers("basis", of: side, layer: layer, shape: [nil, nil, nil]).shape
        heads += (0..<shape[0]).map { Head(layer: layer, side: side, unit: $0, rank: shape[1]) }
      }
    }
    self.heads = heads
    let all = heads.reduce(0) { $0 + $1.rank }
    wanted = Int((share * Double(all)).rounded())
    let least = heads.reduce(0) { $0 + $1.rank - Self.steps($1.rank, step, floor) * step }
    guard least <= wanted else {
      throw KVError(
        .invalidOption,
        "a share of \(share) cannot be reached: with \(floor) channels for every head and steps of \(step), \(least) stay "
          + "where \(wanted) should")
    }
  }

  /// Steps that a head can go down.
  private static func steps(_ rank: Int, _ step: Int, _ floor: Int) -> Int { max(0, rank - floor) / step }

  /// - Parameters:
  ///   - progress: told the share that is done, after each trial.
  ///   - divergence: how far the model is from itself when its keys and values keep the `ranks` of this calibration, in any
  ///     unit: 0 where nothing is lost.
  /// - Returns: the calibration with `ranks`, which `matryoshka(rates=file)` takes.
  /// - Throws: what `divergence` throws; `nonFinite` when it returns NaN.
  /// - Complexity: O(rounds · heads) calls of `divergence`.
  public func run(
    progress: ((Double) -> Void)? = nil, divergence: (Calibration) throws(KVError) -> Double
  ) throws(KVError) -> Calibration {
    var heads = heads
    var total = heads.reduce(0) { $0 + $1.rank }
    let first = total
    var last = 0.0
    while total > wanted {
      let candidates = heads.indices.filter { heads[$0].rank - step >= floor }
      let done = Double(first - total) / Double(first - wanted)
      let round = min(1 - done, Double(step * min(together, candidates.count)) / Double(first - wanted))
      var trials: [(loss: Double, head: Int)] = []
      for (index, head) in candidates.enumerated() {
        heads[head].rank -= step
        let loss = try divergence(with(heads))
        heads[head].rank += step
        guard !loss.isNaN else {
          throw KVError(
            .nonFinite,
            "the divergence with \(heads[head].rank - step) channels of \(heads[head].side.rawValue) is NaN",
            layer: heads[head].layer, head: heads[head].unit)
        }
        trials.append((loss, head))
        progress?(done + round * Double(index + 1) / Double(candidates.count))
      }
      trials.sort { ($0.loss, $0.head) < ($1.loss, $1.head) }
      for trial in trials.prefix(together) where total > wanted {
        heads[trial.head].rank -= step
        total -= step
        last = trial.loss
      }
    }
    return try with(heads, notes: ["rates": "divergence", "share": "\(share)", "divergence": "\(last)"])
  }

  private func with(_ heads: [Head], notes: [String: String] = [:]) throws(KVError) -> Calibration {
    var tensors = calibration.tensors
    var ranks: [Calibration.Name: [Int32]] = [:]
    for head in heads {
      let name = Calibration.Name(layer: head.layer, side: head.side, quantity: "ranks")
      ranks[name, default: []].append(Int32(head.rank))
    }
    for (name, own) in ranks { tensors[name] = .init(shape: [own.count], integers: own) }
    return try Calibration(tensors, metadata: calibration.metadata.merging(notes) { $1 })
  }
}
