/// An orthonormal rotation of the channels of a row, in front of a quantizer: a fast Walsh-Hadamard transform, with or
/// without random signs before it. It spreads a channel's outliers over all channels of a block.
///
/// Head sizes that are no power of two are rotated in blocks of their largest power-of-two divisor.
public struct Rotation: Hashable, Sendable {
  /// Nil: no signs.
  package let seed: UInt64?
  /// Channels rotated together; nil: the largest power of two that divides the head size.
  package let block: Int?

  /// Without signs, as llama.cpp and SGLang rotate: a row that is constant becomes one spike.
  ///
  /// - Throws: `invalidOption` unless `block` is a power of two in 2...4096.
  public static func hadamard(block: Int? = nil) throws(KVError) -> Rotation {
    try Rotation(seed: nil, block: block)
  }

  /// Signs drawn from `seed`, one per channel, then the transform.
  ///
  /// - Throws: `invalidOption` unless `block` is a power of two in 2...4096.
  public static func signs(seed: UInt64 = 0, block: Int? = nil) throws(KVError) -> Rotation {
    try Rotation(seed: seed, block: block)
  }

  private init(seed: UInt64?, block: Int?) throws(KVError) {
    if let block {
      guard (2...4096).contains(block), block & (block - 1) == 0 else {
        throw KVError(.invalidOption, "a rotation's block must be a power of two in 2...4096; got \(block)")
      }
    }
    self.seed = seed
    self.block = block
  }

  /// The seed of the signs; nil: none.
  public var signSeed: UInt64? { seed }
  /// Channels rotated together, where that was fixed.
  public var fixedBlock: Int? { block }

  /// Channels rotated together in rows of `dim`.
  package func block(dim: Int) -> Int { block ?? (dim & -dim) }

  package func validate(dim: Int) throws(KVError) {
    let block = block(dim: dim)
    guard block > 1, dim % block == 0 else {
      throw KVError(
        .unsupported,
        block > 1
          ? "heads of \(dim) channels cannot be rotated in blocks of \(block)"
          : "a rotation needs heads of an even number of channels; these have \(dim)")
    }
  }

  /// 1 or -1 per channel, the same for every head and layer.
  package func signs(dim: Int) -> [Float]? {
    guard let seed else { return nil }
    return (0..<dim).map { channel in
      // SplitMix64 of the channel: any channel without those before it.
      var z = seed &+ UInt64(channel + 1) &* 0x9E37_79B9_7F4A_7C15
      z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
      z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
      return (z ^ z >> 31) >> 63 == 0 ? 1 : -1
    }
  }
}

/// A factor, and for some an offset, per channel that rows are divided by before they are encoded. Made from data: at the
/// end of the prompt, or when the first rows are encoded.
public struct ChannelScaling: Hashable, Sendable {
  package enum Kind: Hashable, Sendable {
    case none
    /// The square root of the largest magnitude.
    case separable
    /// The square root of the largest key magnitude over the largest query magnitude.
    case balanced
    /// The least value and the step of codes between it and the largest.
    case range
  }

  package let kind: Kind

  /// Rows as they are.
  public static let none = ChannelScaling(kind: .none)
  /// ZipCache's channel-separable quantization: `factor = sqrt(max |x|)`, from the rows of the prompt. Later rows use the
  /// same factors.
  public static let separable = ChannelScaling(kind: .separable)
  /// MiKV's balancer for keys: `factor = sqrt(max |k| / max |q|)` over the prompt, within 1e-4 and 1e4. Needs queries.
  public static let balanced = ChannelScaling(kind: .balanced)
  /// The channel's own scale and minimum over all rows encoded together; the body then holds codes alone.
  package static let range = ChannelScaling(kind: .range)

  /// Numbers per channel.
  package var numbers: Int {
    switch kind {
    case .none: 0
    case .separable, .balanced: 1
    case .range: 2
    }
  }

  /// Whether the numbers come from the whole prompt rather than from the rows encoded together.
  package var isShared: Bool { kind == .separable || kind == .balanced }

  /// Factors, then offsets, from the smallest and largest value of every channel. `queries`: the largest magnitude of
  /// every channel of the queries.
  package func numbers(low: [Float], high: [Float], queries: [Float]?, levels: Float) -> [Float] {
    let largest = zip(low, high).map { max(abs($0), abs($1)) }
    switch kind {
    case .none: return []
    case .separable: return largest.map { $0 > 0 && $0.isFinite ? $0.squareRoot() : 1 }
    case .balanced:
      return largest.enumerated().map { channel, key in
        guard key > 0, key.isFinite else { return 1 }
        let query = queries?[channel] ?? 1
        return min(max((key / max(query, .leastNormalMagnitude)).squareRoot(), 1e-4), 1e4)
      }
    case .range:
      let finite = zip(low, high).map { $0.isFinite && $1.isFinite }
      return low.indices.map { finite[$0] ? (high[$0] - low[$0]) / levels : 0 }
        + low.indices.map { finite[$0] ? low[$0] + 0 : 0 }
    }
  }
}

/// What is done to the rows of a side before they are encoded; see ``RowMap``.
package struct MapFormat: Hashable, Sendable {
  package var rotation: Rotation?
  /// Channel `order[c]` of a rotated row becomes channel c, so that alike channels share a group.
  package var order: [UInt32]?
  package var scaling = ChannelScaling.none

  package static let none = MapFormat()
  package var isNone: Bool { self == .none }
}
