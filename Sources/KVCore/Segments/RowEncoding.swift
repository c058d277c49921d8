/// How the rows of one side (keys or values) of a segment are represented.
///
/// Dense rows are elements of one type. Affine rows are integer codes with a scale and a minimum per group:
/// `value = code * scale + minimum`, `scale = (max - min) / (2^bits - 1)`, codes rounded to nearest even
/// (primitive P1 of KIVI, GEAR, ZipCache and MiKV). Scaled rows are signed integers or FP8 numbers times a scale,
/// `scale = max|value| / largest code`. ggml rows are the bytes of ggml's block structs.
public struct RowEncoding: Hashable, Sendable {
  /// Numbers shared with the kernels and the saved-cache format.
  package enum Kind: UInt8, Sendable {
    case dense = 0, affinePerChannel = 1, affinePerToken = 2
    /// Codes with a scale per token and group of channels, per block of tokens, or one that was given.
    case scaledPerToken = 3, scaledPerBlock = 4, scaledFixed = 5
    case ggml = 6
    /// Codes whose scale and minimum a map in front of them holds.
    case codes = 7
  }

  package let kind: Kind
  /// Dense: type of the elements. Affine: type of scales and minima.
  package let type: ElementType
  /// Bits of a code; for dense rows the bits of an element.
  public let bits: Int
  /// Rows or channels that share a scale (and minimum). Dense, or with a scale that was given: 1.
  public let group: Int
  /// What the codes of scaled rows are, or ggml's number of a block type; of affine rows how they are rounded,
  /// see ``ZeroPoint``. 0: none of these.
  package let code: UInt8
  /// The scale of scaled rows that was given. 1 elsewhere.
  package let factor: Float

  init(kind: Kind, type: ElementType, bits: Int, group: Int, code: UInt8 = 0, factor: Float = 1) {
    self.kind = kind
    self.type = type
    self.bits = bits
    self.group = group
    self.code = code
    self.factor = factor
  }

  /// Rows as they are, in `type`.
  public static func dense(_ type: ElementType) -> RowEncoding {
    RowEncoding(kind: .dense, type: type, bits: type.byteCount * 8, group: 1)
  }

  /// One scale and minimum per channel over `group` consecutive tokens.
  ///
  /// - Throws: `invalidOption` unless bits is 2, 3, 4 or 8 and group a multiple of 32 up to 1024.
  public static func affinePerChannel(
    bits: Int, group: Int, metadata: ElementType = .f16
  ) throws(KVError) -> RowEncoding {
    try check(bits: bits)
    guard group % 32 == 0, (32...1024).contains(group) else {
      throw KVError(
        .invalidOption, "a per-channel group must be a multiple of 32 tokens from 32 to 1024; got \(group)")
    }
    return RowEncoding(kind: .affinePerChannel, type: metadata, bits: bits, group: group)
  }

  /// The same around an integer zero point, which is a code.
  ///
  /// - Throws: `invalidOption` unless bits is 2, 3, 4 or 8 and group a multiple of 32 up to 1024; for zero points that are
  ///   not clamped.
  public static func affinePerChannel(
    bits: Int, group: Int, zero: ZeroPoint, metadata: ElementType = .f16
  ) throws(KVError) -> RowEncoding {
    let plain = try affinePerChannel(bits: bits, group: group, metadata: metadata)
    guard zero.isClamped else {
      throw KVError(.invalidOption, "codes per channel have a minimum or a clamped integer zero point, no other")
    }
    return RowEncoding(kind: .affinePerChannel, type: metadata, bits: bits, group: plain.group, code: zero.code)
  }

  /// One scale and minimum per token over `group` consecutive channels. The last group of a row may be short.
  ///
  /// - Throws: `invalidOption` unless bits is 2, 3, 4 or 8 and group lies in 8...4096.
  public static func affinePerToken(
    bits: Int, group: Int, metadata: ElementType = .f16
  ) throws(KVError) -> RowEncoding {
    try check(bits: bits)
    guard (8...4096).contains(group) else {
      throw KVError(.invalidOption, "a per-token group must be from 8 to 4096 channels; got \(group)")
    }
    return RowEncoding(kind: .affinePerToken, type: metadata, bits: bits, group: group)
  }

  /// The same around an integer zero point.
  ///
  /// - Throws: `invalidOption` unless bits is 2, 3, 4 or 8 and group lies in 8...4096.
  public static func affinePerToken(
    bits: Int, group: Int, zero: ZeroPoint, metadata: ElementType = .f16
  ) throws(KVError) -> RowEncoding {
    let plain = try affinePerToken(bits: bits, group: group, metadata: metadata)
    return RowEncoding(kind: .affinePerToken, type: metadata, bits: bits, group: plain.group, code: zero.code)
  }

  /// How affine rows are rounded, where it is not to the least value of a group.
  package var zeroPoint: ZeroPoint? {
    kind == .affinePerToken || kind == .affinePerChannel ? ZeroPoint(code: code) : nil
  }

  /// Codes alone: their scale and minimum, in `metadata`, belong to the channels and to all rows that were encoded
  /// together.
  package static func codes(bits: Int, metadata: ElementType) throws(KVError) -> RowEncoding {
    try check(bits: bits)
    return RowEncoding(kind: .codes, type: metadata, bits: bits, group: 1)
  }

  private static func check(bits: Int) throws(KVError) {
    guard [2, 3, 4, 8].contains(bits) else {
      throw KVError(.invalidOption, "affine codes have 2, 3, 4 or 8 bits; got \(bits)")
    }
  }

  /// The field of a saved cache that is the group, or the bits of the scale that was given.
  package var groupField: UInt32 { kind == .scaledFixed ? factor.bitPattern : UInt32(group) }

  /// Rebuilds an encoding from a saved cache. Nil when the numbers describe none.
  package init?(kind: UInt8, type: UInt8, bits: Int, code: UInt8, groupField: UInt32) {
    guard let kind = Kind(rawValue: kind), let type = ElementType(rawValue: type) else { return nil }
    let group = Int(groupField)
    let made: RowEncoding?
    switch kind {
    case .dense: made = group == 1 ? .dense(type) : nil
    case .affinePerChannel:
      made =
        code == 0
        ? try? .affinePerChannel(bits: bits, group: group, metadata: type)
        : ZeroPoint(code: code).flatMap { try? .affinePerChannel(bits: bits, group: group, zero: $0, metadata: type) }
    case .affinePerToken:
      made =
        code == 0
        ? try? .affinePerToken(bits: bits, group: group, metadata: type)
        : ZeroPoint(code: code).flatMap { try? .affinePerToken(bits: bits, group: group, zero: $0, metadata: type) }
    case .codes: made = group == 1 ? try? .codes(bits: bits, metadata: type) : nil
    case .scaledPerToken:
      made = ScaledCode(rawValue: code).flatMap { try? .scaledPerToken($0, group: group, metadata: type) }
    case .scaledPerBlock:
      made = ScaledCode(rawValue: code).flatMap { try? .scaledPerBlock($0, tokens: group, metadata: type) }
    case .scaledFixed:
      made = ScaledCode(rawValue: code).flatMap { try? .scaled($0, by: Float(bitPattern: groupField)) }
    case .ggml: made = GGMLBlock(rawValue: code).map { .ggml($0) }
    }
    // What the factories derive must be what was written.
    guard let made, made.type == type, made.bits == bits, made.code == code, made.groupField == groupField else {
      return nil
    }
    self = made
  }

  /// Tokens that can only be encoded together.
  public var tokensPerUnit: Int { rowsPerUnit }

  /// Element type of scales and minima; of dense rows that of the elements.
  public var metadataType: ElementType { type }

  /// Rows that can only be written, moved and removed together.
  package var rowsPerUnit: Int { kind == .affinePerChannel || kind == .scaledPerBlock ? group : 1 }

  /// Bytes of codes, elements or blocks of `rows` rows of `dim` channels.
  package func payloadBytes(rows: Int, dim: Int) -> Int {
    switch kind {
    case .dense: rows * dim * type.byteCount
    case .affinePerChannel: rows * dim * bits / 8
    case .affinePerToken, .codes: rows * RowEncoding.wordsPerRow(dim: dim, bits: bits) * 4
    case .scaledPerToken, .scaledPerBlock, .scaledFixed: rows * ((dim * bits + 7) / 8)
    case .ggml: rows * (dim / GGMLBlock.channels) * (block?.byteCount ?? 0)
    }
  }

  /// Bytes of the scales of `rows` rows that lie behind the payload.
  package func scaleBytes(rows: Int, dim: Int) -> Int {
    switch kind {
    case .dense, .codes, .scaledFixed, .ggml: 0
    case .affinePerChannel: rows / group * dim * type.byteCount
    case .affinePerToken, .scaledPerToken: rows * ((dim + group - 1) / group) * type.byteCount
    case .scaledPerBlock: rows / group * type.byteCount
    }
  }

  /// Bytes of the minima of `rows` rows, behind the scales.
  package func minimumBytes(rows: Int, dim: Int) -> Int {
    kind == .affinePerChannel || kind == .affinePerToken ? scaleBytes(rows: rows, dim: dim) : 0
  }

  /// Scales and minima, also those that lie inside the payload.
  package func metadataBytes(rows: Int, dim: Int) -> Int {
    if let block { return rows * (dim / GGMLBlock.channels) * block.metadataBytes }
    return scaleBytes(rows: rows, dim: dim) + minimumBytes(rows: rows, dim: dim)
  }

  package func bytes(rows: Int, dim: Int) -> Int {
    payloadBytes(rows: rows, dim: dim) + scaleBytes(rows: rows, dim: dim) + minimumBytes(rows: rows, dim: dim)
  }

  /// Refuses rows of a length that the encoding does not have.
  package func validate(dim: Int, of what: String) throws(KVError) {
    guard kind != .ggml || dim % GGMLBlock.channels == 0 else {
      throw KVError(
        .unsupported,
        "\(self) blocks hold \(GGMLBlock.channels) channels; a head of \(dim) channels (\(what)) is no multiple of that"
      )
    }
  }

  /// 32-bit words of one per-token row. Three-bit codes are a plane of two bits and a plane of one.
  package static func wordsPerRow(dim: Int, bits: Int) -> Int {
    bits == 3 ? (dim * 2 + 31) / 32 + (dim + 31) / 32 : (dim * bits + 31) / 32
  }
}

extension RowEncoding: CustomStringConvertible {
  public var description: String {
    switch kind {
    case .dense: type.name
    case .affinePerChannel:
      "affine \(bits)-bit per channel, \(group) tokens, \(type.name) scale and \(zeroPoint?.description ?? "min")"
    case .codes: "\(bits)-bit codes with a \(type.name) scale and min per channel"
    case .affinePerToken:
      "affine \(bits)-bit per token, \(group) channels, \(type.name) scale and \(zeroPoint?.description ?? "min")"
    case .scaledPerToken:
      group == RowEncoding.wholeRow
        ? "\(codeName) per token, \(type.name) scale" : "\(codeName) per token, \(group) channels, \(type.name) scale"
    case .scaledPerBlock: "\(codeName) per \(group) tokens, \(type.name) scale"
    case .scaledFixed: "\(codeName) times \(factor)"
    case .ggml: codeName
    }
  }
}
