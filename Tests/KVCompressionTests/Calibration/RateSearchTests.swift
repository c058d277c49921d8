import KVCompression
import Testing

@testable import KVCore

/// Ranks found by trying, on losses that are known.
@Suite struct RateSearchTests {
  /// Two layers of two heads of 8 channels; bases are the identity.
  private func bases(layers: Int = 2, heads: Int = 2, dim: Int = 8) throws -> Calibration {
    var tensors: [Calibration.Name: Calibration.Tensor] = [:]
    let identity = (0..<dim * dim).map { Float($0 / dim == $0 % dim ? 1 : 0) }
    for layer in 0..<layers {
      for side in Calibration.Side.allCases {
        tensors[.init(layer: layer, side: side, quantity: "basis")] = .init(
          shape: [heads, dim, dim], numbers: (0..<heads).flatMap { _ in identity })
      }
    }
    return try Calibration(tensors, metadata: ["rope": "post", "method": "pca"])
  }

  private func ranks(_ made: Calibration) throws -> [Int] {
    try (0..<2).flatMap { layer in
      try Calibration.Side.allCases.flatMap {
        try made.integers("ranks", of: $0, layer: layer, shape: [2], in: 1...8)
      }
    }
  }

  /// Losses that add up: head i loses i + 1 for each channel it lacks.
  private func loss(_ made: Calibration) throws(KVError) -> Double {
    var sum = 0.0
    var head = 0
    for layer in 0..<2 {
      for side in Calibration.Side.allCases {
        for rank in try made.integers("ranks", of: side, layer: layer, shape: [2], in: 1...8) {
          sum += Double((head + 1) * (8 - rank))
          head += 1
        }
      }
    }
    return sum
  }

  @Test func cheapestHeadsGiveWayFirst() throws {
    let made = try bases()
    var trials = 0
    var shares: [Double] = []
    let found = try RateSearch(made, share: 0.75, step: 2, floor: 2).run {
      shares.append($0)
    } divergence: { (trial) throws(KVError) in
      trials += 1
      return try self.loss(trial)
    }
    // 16 of 64 channels go: head 0 down to 2 (6), head 1 (6), then 4 of head 2.
    #expect(try ranks(found) == [2, 2, 4, 8, 8, 8, 8, 8])
    // Three rounds of eight heads, three of seven, two of six.
    #expect(trials == 3 * 8 + 3 * 7 + 2 * 6)
    #expect(zip(shares, shares.dropFirst()).allSatisfy { $0 < $1 } && abs((shares.last ?? 0) - 1) < 1e-9)
    #expect(found.metadata["rates"] == "divergence" && found.metadata["rope"] == "post")
    #expect(found.tensor("basis", of: .keys, layer: 1) == made.tensor("basis", of: .keys, layer: 1))
    // Losses that depend on each other: a head whose first step is free is dear afterwards, so the others follow.
    let bent = try RateSearch(made, share: 0.875, step: 4, floor: 4).run { (trial) throws(KVError) in
      let loss = try self.loss(trial)
      let first = try trial.integers("ranks", of: .values, layer: 1, shape: [2], in: 1...8)
      return first[1] == 4 ? loss - 32 : loss
    }
    #expect(try ranks(bent) == [4, 8, 8, 8, 8, 8, 8, 4])
  }

  @Test func severalInARound() throws {
    var trials = 0
    let search = try RateSearch(bases(), share: 0.75, step: 2, floor: 2, together: 3)
    let found = try search.run { (trial) throws(KVError) in
      trials += 1
      return try self.loss(trial)
    }
    // Heads 0, 1 and 2 in two rounds, the first two of them in the last, which ends where the share is reached.
    #expect(try ranks(found) == [2, 2, 4, 8, 8, 8, 8, 8])
    #expect(trials == 8 * 3)
    // What was found is what a store takes.
    let store = try Store.matryoshka(calibration: NamedCalibration(found), rates: .file)
    let format = try #require(store.factory as? LowRankFormat)
    #expect(format.calibrated?[0]?.keys?.decoders.map { $0.count / 8 } == Array(try ranks(found)[..<2]))
    let all = try RateSearch(bases(), share: 1).run { (_) throws(KVError) in .nan }
    #expect(try ranks(all) == Array(repeating: 8, count: 8))
  }

  @Test func refusals() throws {
    let made = try bases()
    for (share, step, floor, together) in [
      (0.0, 1, 1, 1), (1.5, 1, 1, 1), (.nan, 1, 1, 1), (0.5, 0, 1, 1), (0.5, 1, 0, 1), (0.5, 1, 1, 0),
    ] {
      expectError(.invalidOption, "a share above 0") {
        _ = try RateSearch(made, share: share, step: step, floor: floor, together: together)
      }
    }
    expectError(.invalidOption, "cannot be reached") { _ = try RateSearch(made, share: 0.5, step: 2, floor: 5) }
    expectError(.nonFinite, "is NaN", layer: 0, head: 0) {
      _ = try RateSearch(made, share: 0.5, step: 2, floor: 2).run { (_) throws(KVError) in .nan }
    }
    expectError(.outOfMemory, "no more") {
      _ = try RateSearch(made, share: 0.5, step: 2, floor: 2).run { (_) throws(KVError) in
        throw KVError(.outOfMemory, "no more")
      }
    }
    let name = Calibration.Name(layer: 0, side: .keys, quantity: "order")
    let order = try Calibration([name: .init(shape: [1, 2], integers: [0, 1])])
    expectError(.missingInput, "this has none") { _ = try RateSearch(order, share: 0.5) }
  }
}
