#if canImport(Darwin)
  internal import Darwin
#elseif canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#endif

extension RotaryEmbedding {
  /// How the frequencies were stretched for contexts longer than the model was first trained on.
  ///
  /// Parameters are checked when a ``RotaryEmbedding`` is made.
  public struct Scaling: Hashable, Sendable {
    package enum Kind: Hashable, Sendable {
      case none
      case linear(factor: Double)
      case ntk(factor: Double)
      case dynamicNTK(factor: Double, originalContext: Int)
      case yarn(Yarn)
      case llama3(Llama3)
      case explicit(inverseFrequencies: [Float], attentionFactor: Float)
    }

    package struct Yarn: Hashable, Sendable {
      var factor: Double
      var originalContext: Int
      var betaFast: Double
      var betaSlow: Double
      var attentionFactor: Double?
      var truncate: Bool
    }

    package struct Llama3: Hashable, Sendable {
      var factor: Double
      var lowFrequencyFactor: Double
      var highFrequencyFactor: Double
      var originalContext: Int
    }

    package let kind: Kind

    public static let none = Scaling(kind: .none)

    /// Positions divided by `factor`.
    public static func linear(factor: Double) -> Scaling { Scaling(kind: .linear(factor: factor)) }

    /// Static NTK-aware scaling: the base becomes `theta * factor^(r / (r - 2))`, r the rotary size.
    public static func ntk(factor: Double) -> Scaling { Scaling(kind: .ntk(factor: factor)) }

    /// The base grows with the context once it is longer than `originalContext`.
    public static func dynamicNTK(factor: Double, originalContext: Int) -> Scaling {
      Scaling(kind: .dynamicNTK(factor: factor, originalContext: originalContext))
    }

    /// YaRN. `attentionFactor` nil: `0.1 ln(factor) + 1`.
    public static func yarn(
      factor: Double, originalContext: Int, betaFast: Double = 32, betaSlow: Double = 1,
      attentionFactor: Double? = nil, truncate: Bool = true
    ) -> Scaling {
      Scaling(
        kind: .yarn(
          Yarn(
            factor: factor, originalContext: originalContext, betaFast: betaFast, betaSlow: betaSlow,
            attentionFactor: attentionFactor, truncate: truncate)))
    }

    /// The frequency bands of Llama 3.1 and later.
    public static func llama3(
      factor: Double, lowFrequencyFactor: Double, highFrequencyFactor: Double, originalContext: Int
    ) -> Scaling {
      Scaling(
        kind: .llama3(
          Llama3(
            factor: factor, lowFrequencyFactor: lowFrequencyFactor, highFrequencyFactor: highFrequencyFactor,
            originalContext: originalContext)))
    }

    /// Frequencies the engine computed itself: one per pair, in radians per token. For schemes not named here.
    public static func explicit(inverseFrequencies: [Float], attentionFactor: Float = 1) -> Scaling {
      Scaling(kind: .explicit(inverseFrequencies: inverseFrequencies, attentionFactor: attentionFactor))
    }

    var attentionFactor: Float {
      switch kind {
      case .yarn(let yarn):
        Float(yarn.attentionFactor ?? (yarn.factor <= 1 ? 1 : 0.1 * log(yarn.factor) + 1))
      case .explicit(_, let factor): factor
      default: 1
      }
    }
  }
}

// MARK: - Frequencies

extension RotaryEmbedding.Scaling {
  /// Inverse frequencies with every f32 rounding in the place where PyTorch has it.
  func inverseFrequencies(rotaryDim: Int, theta: Double, contextLength: Int?) -> [Float] {
    let r = Double(rotaryDim)
    switch kind {
    case .none:
      return plain(rotaryDim: rotaryDim, theta: theta)
    case .linear(let factor):
      return plain(rotaryDim: rotaryDim, theta: theta).map { $0 / Float(factor) }
    case .ntk(let factor):
      return plain(rotaryDim: rotaryDim, theta: theta * pow(factor, r / (r - 2)))
    case .dynamicNTK(let factor, let original):
      let length = max(contextLength ?? original, original)
      let growth = factor * Double(length) / Double(original) - (factor - 1)
      return plain(rotaryDim: rotaryDim, theta: theta * pow(growth, r / (r - 2)))
    case .yarn(let yarn):
      return yarn.inverseFrequencies(powers(rotaryDim: rotaryDim, theta: theta), theta: theta)
    case .llama3(let llama):
      return plain(rotaryDim: rotaryDim, theta: theta).map(llama.scaled)
    case .explicit(let frequencies, _):
      return frequencies
    }
  }

  /// `theta^(2i / rotaryDim)`, i from 0: exponent and base rounded to f32 as a tensor holds them.
  private func powers(rotaryDim: Int, theta: Double) -> [Float] {
    (0..<rotaryDim / 2).map { index in
      let exponent = Float(2 * index) / Float(rotaryDim)
      return Float(pow(Double(Float(theta)), Double(exponent)))
    }
  }

  private func plain(rotaryDim: Int, theta: Double) -> [Float] {
    powers(rotaryDim: rotaryDim, theta: theta).map { 1 / $0 }
  }
}

extension RotaryEmbedding.Scaling.Yarn {
  /// Fast pairs keep their frequency, slow pairs are divided by the factor, a linear ramp lies between.
  func inverseFrequencies(_ powers: [Float], theta: Double) -> [Float] {
    let rotaryDim = Double(2 * powers.count)
    func pair(turning rotations: Double) -> Double {
      rotaryDim * log(Double(originalContext) / (rotations * 2 * Double.pi)) / (2 * log(theta))
    }
    var low = pair(turning: betaFast)
    var high = pair(turning: betaSlow)
    if truncate {
      low = low.rounded(.down)
      high = high.rounded(.up)
    }
    low = max(low, 0)
    high = min(high, rotaryDim - 1)
    // The same step that transformers takes to keep the ramp from dividing by zero.
    if low == high { high += 0.001 }
    return powers.enumerated().map { index, power in
      let ramp = min(max((Float(index) - Float(low)) / Float(high - low), 0), 1)
      let keep = 1 - ramp
      return 1 / (Float(factor) * power) * (1 - keep) + 1 / power * keep
    }
  }
}

extension RotaryEmbedding.Scaling.Llama3 {
  /// Long waves are divided by the factor, short ones stay, the band between is blended.
  func scaled(_ frequency: Float) -> Float {
    let wavelength = Float(2 * Double.pi) / frequency
    let longest = Float(Double(originalContext) / lowFrequencyFactor)
    let shortest = Float(Double(originalContext) / highFrequencyFactor)
    if wavelength > longest { return frequency / Float(factor) }
    if wavelength < shortest { return frequency }
    let blend =
      (Float(originalContext) / wavelength - Float(lowFrequencyFactor))
      / Float(highFrequencyFactor - lowFrequencyFactor)
    return (1 - blend) * frequency / Float(factor) + blend * frequency
  }
}

// MARK: - Checks

extension RotaryEmbedding.Scaling {
  func validate(rotaryDim: Int, theta: Double) throws(KVError) {
    switch kind {
    case .none: break
    case .linear(let factor): try check(factor: factor)
    case .ntk(let factor):
      try check(factor: factor)
      try check(ntkRotaryDim: rotaryDim)
    case .dynamicNTK(let factor, let original):
      try check(factor: factor)
      try check(ntkRotaryDim: rotaryDim)
      try check(originalContext: original)
    case .yarn(let yarn):
      try check(factor: yarn.factor)
      try check(originalContext: yarn.originalContext)
      // Equal or crossed bounds would turn the ramp around; a base of 1 has no frequency to look for.
      guard yarn.betaSlow > 0, yarn.betaFast > yarn.betaSlow, yarn.betaFast.isFinite else {
        throw KVError(
          .invalidOption,
          "YaRN needs 0 < betaSlow < betaFast; got betaSlow \(yarn.betaSlow) and betaFast \(yarn.betaFast)")
      }
      guard theta > 1 else {
        throw KVError(.invalidOption, "YaRN needs a rotary base above 1; got \(theta)")
      }
      try check(attentionFactor: yarn.attentionFactor ?? 1)
    case .llama3(let llama):
      try check(factor: llama.factor)
      try check(originalContext: llama.originalContext)
      guard llama.lowFrequencyFactor > 0, llama.highFrequencyFactor > llama.lowFrequencyFactor,
        llama.highFrequencyFactor.isFinite
      else {
        throw KVError(
          .invalidOption,
          "llama3 scaling needs 0 < lowFrequencyFactor < highFrequencyFactor; got \(llama.lowFrequencyFactor) and "
            + "\(llama.highFrequencyFactor)")
      }
    case .explicit(let frequencies, let factor):
      guard frequencies.count == rotaryDim / 2, frequencies.allSatisfy({ $0.isFinite }) else {
        throw KVError(
          .invalidOption,
          "explicit scaling needs \(rotaryDim / 2) finite inverse frequencies, one a pair; got \(frequencies.count)")
      }
      try check(attentionFactor: Double(factor))
    }
  }

  private func check(factor: Double) throws(KVError) {
    guard factor >= 1, factor.isFinite else {
      throw KVError(.invalidOption, "a rotary scaling factor must be finite and at least 1; got \(factor)")
    }
  }

  private func check(ntkRotaryDim rotaryDim: Int) throws(KVError) {
    guard rotaryDim > 2 else {
      throw KVError(.invalidOption, "NTK scaling needs a rotary size above 2; got \(rotaryDim)")
    }
  }

  private func check(originalContext: Int) throws(KVError) {
    guard originalContext >= 1 else {
      throw KVError(.invalidOption, "the original context must be at least 1 token; got \(originalContext)")
    }
  }

  private func check(attentionFactor: Double) throws(KVError) {
    guard attentionFactor > 0, attentionFactor.isFinite, Float(attentionFactor) > 0 else {
      throw KVError(.invalidOption, "the attention factor must be positive and finite; got \(attentionFactor)")
    }
  }
}
