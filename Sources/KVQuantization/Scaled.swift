public import KVCore

/// Which values share a scale.
public enum ScaleSharing: Hashable, Sendable {
  /// The channels of one token and head, `group` at a time; nil: all of them.
  case token(group: Int? = nil)
  /// All channels of a head over that many consecutive tokens, a multiple of 32.
  case head(tokens: Int = 128)
  /// All: the scale was found beforehand. Values beyond the largest code saturate.
  case tensor(Float)
}

/// One side of a store of scaled codes: what the codes are and what shares a scale.
public struct ScaledSide: Hashable, Sendable {
  public var code: ScaledCode
  public var sharing: ScaleSharing

  public init(_ code: ScaledCode, sharing: ScaleSharing = .token()) {
    self.code = code
    self.sharing = sharing
  }

  func encoding(metadata: ElementType) throws(KVError) -> RowEncoding {
    switch sharing {
    case .token(let group): try .scaledPerToken(code, group: group, metadata: metadata)
    case .head(let tokens): try .scaledPerBlock(code, tokens: tokens, metadata: metadata)
    case .tensor(let factor): try .scaled(code, by: factor)
    }
  }

  /// The options that make this side, their names behind `prefix`.
  func options(_ prefix: String) -> [SpecOption] {
    var options = [SpecOption("\(prefix)format", .text(code.name))]
    switch sharing {
    case .token(let group):
      options.append(SpecOption("\(prefix)scale", "token"))
      if let group { options.append(SpecOption("\(prefix)group", .integer(group))) }
    case .head(let tokens):
      options += [SpecOption("\(prefix)scale", "head"), SpecOption("\(prefix)group", .integer(tokens))]
    case .tensor(let factor):
      options += [SpecOption("\(prefix)scale", "tensor"), SpecOption("\(prefix)factor", .decimal(Double(factor)))]
    }
    return options
  }
}

extension SideFormat {
  /// An encoded body behind a dense window of the newest `residual` rows. Encodings of whole blocks of tokens wait for a
  /// multiple of their block.
  static func body(_ body: RowEncoding?, residual: Int, window: ElementType) throws(KVError) -> SideFormat {
    guard let body else { return .dense(window) }
    if body.tokensPerUnit == 1 { return try .newest(residual, window: window, body: body) }
    return try .blocks(of: max(residual, body.tokensPerUnit), window: window, body: body)
  }
}

extension Store {
  static func scaled(
    name: String, keys: ScaledSide, values: ScaledSide, residual: Int, window: ElementType, metadata: ElementType
  ) throws(KVError) -> Store {
    let same = keys == values
    return Store(
      spec: StageSpec(
        name: name,
        options: (same ? keys.options("") : keys.options("key_") + values.options("value_")) + [
          SpecOption("residual", .integer(residual)), SpecOption("window", .text(window.name)),
          SpecOption("metadata", .text(metadata.name)),
        ]),
      keys: try .body(keys.encoding(metadata: metadata), residual: residual, window: window),
      values: try .body(values.encoding(metadata: metadata), residual: residual, window: window))
  }

  /// The options that `int8` and `fp8` share, read for one side: its own where it has one.
  static func readScaledSide(
    _ prefix: String, _ reader: inout OptionReader, format: ScaledCode, scale: String, factor: Float?
  ) throws(KVError) -> ScaledSide {
    try ScaledSide(format, sharing: readSharing(prefix, &reader, scale: scale, factor: factor, common: true))
  }

  /// A side's `scale`, `group` and `factor`; with `common`, those of both sides where it has none.
  static func readSharing(
    _ prefix: String, _ reader: inout OptionReader, scale standard: String, factor standardFactor: Float?,
    common: Bool
  ) throws(KVError) -> ScaleSharing {
    var scale = standard
    var group: Int?
    var factor: Double?
    for prefix in common ? ["", prefix] : [prefix] {
      if reader.has(prefix + "scale") {
        scale = try reader.name(prefix + "scale", among: ["token", "head", "tensor"])
      }
      group = try reader.optionalInt(prefix + "group", in: 8...4096) ?? group
      factor =
        try reader.optionalDouble(
          prefix + "factor", in: Double(Float.leastNormalMagnitude)...Double(Float.greatestFiniteMagnitude)) ?? factor
    }
    guard factor == nil || scale == "tensor" else {
      throw KVError(
        .invalidOption,
        "\(reader.stage.name) finds the scales of scale=\(scale) itself; factor belongs to scale=tensor",
        offset: reader.stage.offset)
    }
    switch scale {
    case "token": return .token(group: group)
    case "head": return .head(tokens: group ?? 128)
    default:
      guard group == nil else {
        throw KVError(
          .invalidOption, "\(reader.stage.name) has one scale with scale=tensor; group belongs to token and head",
          offset: reader.stage.offset)
      }
      guard let value = factor.map({ Float($0) }) ?? standardFactor else {
        throw KVError(
          .invalidOption, "\(reader.stage.name) with scale=tensor needs the scale: factor=0.05, say",
          offset: reader.stage.offset)
      }
      return .tensor(value)
    }
  }

  static func scaledMethod(
    name: String, summary: String, formats: [ScaledCode], scale: String, factor: Float?, metadata: ElementType
  ) -> MethodDescription {
    let names = formats.map(\.name).joined(separator: " or ")
    return MethodDescription(
      name: name, role: .store, summary: summary,
      options: [
        .init("format", "what a code is: \(names)"), .init("key_format", "of keys; default: format"),
        .init("value_format", "of values; default: format"),
        .init("scale", "what shares a scale: the channels of a token, a head over some tokens, or the whole tensor"),
        .init("key_scale", "of keys; default: scale"), .init("value_scale", "of values; default: scale"),
        .init("group", "channels (token; default: all) or tokens (head; default: 128) of a scale"),
        .init("key_group", "of keys; default: group"), .init("value_group", "of values; default: group"),
        .init(
          "factor",
          "the scale with scale=tensor"
            + (factor.map { "; default: \(SpecValue.decimal(Double($0)))" } ?? ", required there")),
        .init("key_factor", "of keys; default: factor"), .init("value_factor", "of values; default: factor"),
        .init("residual", "newest tokens kept dense"),
        .init("window", "element type of the dense window: f32, f16 or bf16"),
        .init("metadata", "element type of scales: f32, f16 or bf16"),
      ]
    ) { (reader) throws(KVError) in
      func read(_ reader: inout OptionReader, _ option: String, _ standard: ScaledCode?) throws(KVError) -> ScaledCode?
      {
        guard standard != nil || reader.has(option) else {
          reader.offer(option)
          return nil
        }
        let text = try reader.name(option, default: standard?.name, among: formats.map(\.name))
        return formats.first { $0.name == text }
      }
      let format = try read(&reader, "format", formats[0]) ?? formats[0]
      let keyFormat = try read(&reader, "key_format", nil) ?? format
      let valueFormat = try read(&reader, "value_format", nil) ?? format
      _ = try reader.name("scale", default: scale, among: ["token", "head", "tensor"])
      for option in ["key_scale", "value_scale"] { reader.offer(option) }
      let keys = try readScaledSide("key_", &reader, format: keyFormat, scale: scale, factor: factor)
      let values = try readScaledSide("value_", &reader, format: valueFormat, scale: scale, factor: factor)
      return .store(
        try .scaled(
          name: name, keys: keys, values: values, residual: reader.int("residual", default: 0, in: 0...1_048_576),
          window: reader.elementType("window", default: .f16),
          metadata: reader.elementType("metadata", default: metadata)))
    }
  }
}
