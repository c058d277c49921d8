/// What the codes of scaled rows are: `value = code * scale`.
public enum ScaledCode: UInt8, Hashable, Sendable, CaseIterable {
  /// Signed bytes, -127 ... 127.
  case int8 = 1
  /// Signed nibbles, -7 ... 7; two channels a byte.
  case int4 = 2
  /// FP8 with 4 bits of exponent and 3 of mantissa: largest 448, smallest normal 2^-6, subnormal steps of 2^-9, no
  /// infinity.
  case e4m3 = 3
  /// FP8 with 5 bits of exponent and 2 of mantissa: largest 57344, smallest normal 2^-14, subnormal steps of 2^-16.
  case e5m2 = 4

  public var name: String { "\(self)" }
  public var bits: Int { self == .int4 ? 4 : 8 }

  /// The largest code: what a group's largest magnitude is mapped to.
  public var largest: Float {
    switch self {
    case .int8: 127
    case .int4: 7
    case .e4m3: 448
    case .e5m2: 57344
    }
  }
}

/// ggml's blocks of 32 channels: an f16 scale (and minimum), and codes.
public enum GGMLBlock: UInt8, Hashable, Sendable, CaseIterable {
  // By ggml's own numbers, which are part of the saved-cache format.
  case q4_0 = 2
  case q4_1 = 3
  case q5_0 = 6
  case q5_1 = 7
  case q8_0 = 8
  case iq4_nl = 20

  /// Channels of a block.
  public static let channels = 32

  public var name: String { "\(self)" }

  /// Bytes of a block: ggml's struct, little endian.
  public var byteCount: Int {
    switch self {
    case .q8_0: 34
    case .q5_0: 22
    case .q5_1: 24
    case .q4_1: 20
    case .q4_0, .iq4_nl: 18
    }
  }

  /// f16 numbers a block begins with: a scale, and with `_1` a minimum.
  package var halves: Int { self == .q4_1 || self == .q5_1 ? 2 : 1 }
  package var metadataBytes: Int { 2 * halves }

  public var bits: Int {
    switch self {
    case .q8_0: 8
    case .q5_0, .q5_1: 5
    case .q4_0, .q4_1, .iq4_nl: 4
    }
  }
}

extension RowEncoding {
  /// The group of a scale that all channels of a row share.
  package static let wholeRow = 4096

  /// One scale per token, head and `group` channels (nil: all of the head's): `max|value| / code.largest`, rounded to
  /// `metadata`; codes of `value / scale`, to nearest even. A group of zeros has scale 0.
  ///
  /// - Throws: `invalidOption` unless group is a multiple of 8 in 8...4096.
  public static func scaledPerToken(
    _ code: ScaledCode, group: Int? = nil, metadata: ElementType = .f32
  ) throws(KVError) -> RowEncoding {
    let group = group ?? wholeRow
    guard group % 8 == 0, (8...wholeRow).contains(group) else {
      throw KVError(
        .invalidOption, "a scale is shared by a multiple of 8 channels from 8 to \(wholeRow); got \(group)")
    }
    return RowEncoding(
      kind: .scaledPerToken, type: metadata, bits: code.bits, group: group, code: code.rawValue)
  }

  /// One scale for all channels of a head over `tokens` consecutive tokens.
  ///
  /// - Throws: `invalidOption` unless tokens is a multiple of 32 up to 1024.
  public static func scaledPerBlock(
    _ code: ScaledCode, tokens: Int, metadata: ElementType = .f32
  ) throws(KVError) -> RowEncoding {
    guard tokens % 32 == 0, (32...1024).contains(tokens) else {
      throw KVError(
        .invalidOption, "a scale is shared by a multiple of 32 tokens from 32 to 1024; got \(tokens)")
    }
    return RowEncoding(
      kind: .scaledPerBlock, type: metadata, bits: code.bits, group: tokens, code: code.rawValue)
  }

  /// A scale that was found beforehand. Values beyond `code.largest * factor` saturate.
  ///
  /// - Throws: `invalidOption` unless factor is positive, finite and not subnormal, and the largest value it gives finite.
  public static func scaled(_ code: ScaledCode, by factor: Float = 1) throws(KVError) -> RowEncoding {
    guard factor.isNormal, factor > 0, (factor * code.largest).isFinite else {
      throw KVError(
        .invalidOption, "a scale is a positive normal number, and \(code.largest) times it finite; got \(factor)")
    }
    return RowEncoding(
      kind: .scaledFixed, type: .f32, bits: code.bits, group: 1, code: code.rawValue, factor: factor)
  }

  /// ggml's blocks: 32 channels of one token and head, bit for bit as ggml's reference C makes them.
  public static func ggml(_ block: GGMLBlock) -> RowEncoding {
    RowEncoding(kind: .ggml, type: .f16, bits: block.bits, group: GGMLBlock.channels, code: block.rawValue)
  }

  /// The type of ggml's blocks. Nil: these are none.
  package var block: GGMLBlock? { kind == .ggml ? GGMLBlock(rawValue: code) : nil }

  package var scaledCode: ScaledCode? {
    switch kind {
    case .scaledPerToken, .scaledPerBlock, .scaledFixed: ScaledCode(rawValue: code)
    default: nil
    }
  }

  /// The name of what the codes are.
  package var codeName: String { block?.name ?? scaledCode?.name ?? "" }
}
