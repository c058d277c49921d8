import Foundation
public import KVCompression

/// How the next token is chosen.
public struct SamplingOptions: Sendable, Hashable {
  /// 0: the most likely token. Else logits are divided by it.
  public var temperature: Float
  /// Only the most likely tokens that together reach this probability are drawn from.
  public var topP: Float
  /// Equal seeds and logits give equal tokens.
  public var seed: UInt64

  public init(temperature: Float = 0, topP: Float = 1, seed: UInt64 = 0) {
    self.temperature = temperature
    self.topP = topP
    self.seed = seed
  }

  public static let greedy = SamplingOptions()
}

/// Draws tokens from logits with a generator of its own.
public struct Sampler: Sendable {
  private let options: SamplingOptions
  private var state: UInt64

  /// - Throws: `invalidOption` for a negative temperature or a top-p outside 0...1 (0 excluded).
  public init(_ options: SamplingOptions = .greedy) throws(KVError) {
    guard options.temperature >= 0, options.temperature.isFinite else {
      throw KVError(.invalidOption, "a temperature must be finite and at least 0; got \(options.temperature)")
    }
    guard options.topP > 0, options.topP <= 1 else {
      throw KVError(.invalidOption, "top-p must lie above 0 and at most at 1; got \(options.topP)")
    }
    self.options = options
    state = options.seed
  }

  /// The chosen token. Greedy ties go to the lower id.
  ///
  /// - Throws: `nonFinite` for logits that hold NaN or no finite number, `shapeMismatch` for none.
  /// - Complexity: O(vocabulary); with top-p O(vocabulary · log).
  public mutating func next(_ logits: [Float]) throws(KVError) -> Int {
    guard !logits.isEmpty else { throw KVError(.shapeMismatch, "logits of at least 1 token expected; got 0") }
    let best = try Self.argmax(logits)
    if options.temperature == 0 { return best }
    let top = logits[best]
    var weights = logits.map { Double(expf(($0 - top) / options.temperature)) }
    let total = weights.reduce(0, +)
    let drawn = uniform()
    guard options.topP < 1 else { return Self.pick(weights.enumerated().map { ($0, $1) }, drawn * total) }
    for index in weights.indices { weights[index] /= total }
    let ordered = weights.enumerated().filter { $0.element > 0 }
      .sorted { $0.element != $1.element ? $0.element > $1.element : $0.offset < $1.offset }
    var kept: [(Int, Double)] = []
    var reached = 0.0
    for candidate in ordered {
      kept.append((candidate.offset, candidate.element))
      reached += candidate.element
      if reached >= Double(options.topP) { break }
    }
    return Self.pick(kept, drawn * reached)
  }

  private static func pick(_ candidates: [(Int, Double)], _ target: Double) -> Int {
    var reached = 0.0
    var last = 0
    for (index, weight) in candidates where weight > 0 {
      reached += weight
      last = index
      if reached > target { break }
    }
    return last
  }

  /// The index of the largest logit, the first of equals.
  public static func argmax(_ logits: [Float]) throws(KVError) -> Int {
    var best = -1
    for (index, value) in logits.enumerated() {
      guard !value.isNaN, value != .infinity else {
        throw KVError(.nonFinite, "the logit of token \(index) is \(value)")
      }
      if value > -.infinity, best < 0 || value > logits[best] { best = index }
    }
    guard best >= 0 else { throw KVError(.nonFinite, "no logit is finite") }
    return best
  }

  /// SplitMix64, mapped to 0 ..< 1.
  private mutating func uniform() -> Double {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return Double((z ^ (z >> 31)) >> 11) * 0x1p-53
  }
}
