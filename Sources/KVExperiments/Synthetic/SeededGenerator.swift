/// xoshiro256** seeded through splitmix64: small, fast, the same numbers on every platform.
///
/// Not for secrets. A generator is a value: a copy continues on its own.
public struct SeededGenerator: RandomNumberGenerator, Sendable {
  private var state: (UInt64, UInt64, UInt64, UInt64)
  private var spareNormal: Double?

  /// - Parameter streams: numbers that pick an independent sequence of the same seed; layer, head and purpose say, so
  ///   that more tokens in one place do not shift the numbers of another.
  public init(seed: UInt64, streams: Int...) {
    var mixer = seed
    for stream in streams {
      mixer = SeededGenerator.splitmix(&mixer) ^ UInt64(truncatingIfNeeded: stream) &* 0xD129_0424_81B5_53C3
    }
    state = (
      SeededGenerator.splitmix(&mixer), SeededGenerator.splitmix(&mixer), SeededGenerator.splitmix(&mixer),
      SeededGenerator.splitmix(&mixer)
    )
  }

  public mutating func next() -> UInt64 {
    let multiplied = state.1 &* 5
    let result = (multiplied << 7 | multiplied >> 57) &* 9
    let shifted = state.1 << 17
    state.2 ^= state.0
    state.3 ^= state.1
    state.1 ^= state.2
    state.0 ^= state.3
    state.2 ^= shifted
    state.3 = state.3 << 45 | state.3 >> 19
    return result
  }

  /// Uniform in [0, 1), a multiple of 2⁻⁵³.
  public mutating func uniform() -> Double {
    Double(next() >> 11) * 0x1p-53
  }

  /// Uniform in `0..<bound`; `bound` must be at least 1. The bias is below bound · 2⁻⁵³.
  public mutating func integer(below bound: Int) -> Int {
    precondition(bound >= 1, "a range of \(bound) integers is empty")
    return min(Int(uniform() * Double(bound)), bound - 1)
  }

  /// Standard normal, by Box and Muller with logarithm and sine from exactly rounded operations only.
  public mutating func normal() -> Double {
    if let spare = spareNormal {
      spareNormal = nil
      return spare
    }
    let radius = (-2 * PortableMath.log(1 - uniform())).squareRoot()
    let angle = PortableMath.sinCos(2 * Double.pi * uniform())
    spareNormal = radius * angle.sin
    return radius * angle.cos
  }

  private static func splitmix(_ state: inout UInt64) -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
    return mixed ^ mixed >> 31
  }
}
