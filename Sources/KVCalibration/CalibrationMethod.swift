public import KVCore

/// What a calibration finds out about a model.
public struct CalibrationMethod: Hashable, Sendable {
  package enum Kind: Hashable, Sendable {
    case principal(centred: Bool)
    case order(statistic: ChannelStatistic, rotatedHeads: Int, perHead: Bool)
    case shrunk(start: FactorStart, keys: Double, values: Double, refit: Bool)
  }

  package let kind: Kind

  /// Bases for each KV head from the covariance of its keys, as cached, and of its values: MatryoshkaKV's, without
  /// training. Tensors `basis`, `variance`, with `centred` also `mean`, and `weight` for keys where queries were given.
  public static func principalComponents(centred: Bool = true) -> CalibrationMethod {
    CalibrationMethod(kind: .principal(centred: centred))
  }

  /// Channels of keys before their rotary embedding, by size, the smallest first: what RotateKV reorders them by.
  /// Tensors `order` and `magnitude`, [1, heads · dim], or [heads, dim] with `perHead`.
  ///
  /// - Parameters:
  ///   - statistic: what is compared.
  ///   - rotatedHeads: a Walsh-Hadamard transform over the channels of so many neighbouring KV heads stands before;
  ///     0 for none. The largest power of two up to this one that divides the heads is taken.
  /// - Throws: `invalidOption` for a negative count.
  public static func channelOrder(
    by statistic: ChannelStatistic = .magnitude, rotatedHeads: Int = 4, perHead: Bool = false
  ) throws(KVError) -> CalibrationMethod {
    guard (0...4096).contains(rotatedHeads) else {
      throw KVError(.invalidOption, "a rotation over 0...4096 heads expected; got \(rotatedHeads)")
    }
    return CalibrationMethod(kind: .order(statistic: statistic, rotatedHeads: rotatedHeads, perHead: perHead))
  }

  /// CSKV's factors: for all heads of a layer together, of keys before their rotary embedding and of values. Tensors
  /// `basis` and, with `refit`, `encoder`; `mean` where the projection has a bias.
  ///
  /// - Parameters:
  ///   - start: what the factors begin with.
  ///   - keys: latent channels of keys as a share of all, for `refit`.
  ///   - values: likewise of values.
  ///   - refit: the rows that restore are fitted to the samples by least squares. Such factors are used whole; without,
  ///     any number of their first rows.
  /// - Throws: `invalidOption` for shares outside 0...1.
  public static func shrunkChannels(
    start: FactorStart = .samples, keys: Double = 0.25, values: Double = 0.75, refit: Bool = false
  ) throws(KVError) -> CalibrationMethod {
    guard keys > 0, keys <= 1, values > 0, values <= 1 else {
      throw KVError(.invalidOption, "shares of the channels above 0 and up to 1 expected; got \(keys) and \(values)")
    }
    return CalibrationMethod(kind: .shrunk(start: start, keys: keys, values: values, refit: refit))
  }

  /// Whether keys are looked at before their rotary embedding.
  public var keysBeforeRotation: Bool {
    if case .principal = kind { return false }
    return true
  }

  /// Whether ``Calibrator/setProjection(layer:_:weight:bias:)`` is needed.
  public var wantsProjections: Bool {
    if case .shrunk(let start, _, _, _) = kind { return start != .samples }
    return false
  }

  /// Whether ``Calibrator/add(layer:inputs:)`` is needed.
  public var wantsInputs: Bool {
    if case .shrunk(let start, _, _, _) = kind { return start == .scaledWeights }
    return false
  }

  var name: String {
    switch kind {
    case .principal: "pca"
    case .order: "channel-order"
    case .shrunk: "cskv"
    }
  }
}

/// What channels are ordered by.
public enum ChannelStatistic: String, Hashable, Sendable, CaseIterable {
  /// The mean absolute value.
  case magnitude
  /// The sum with signs, as RotateKV's code takes it: large channels of both signs end at opposite ends, and a channel
  /// whose sign changes counts as small.
  case sum
}

/// What CSKV's factors begin with. All three keep the rows of V in U·S·Vᵀ, so that latents are a product with cached
/// rows; they differ in the matrix that is decomposed.
public enum FactorStart: String, Hashable, Sendable, CaseIterable {
  /// The keys and values themselves: the best for these samples. The same as whitened weights.
  case samples
  /// The projection weights.
  case weights
  /// The projection weights times the square root of each input's mean size (ASVD).
  case scaledWeights = "asvd"
}
