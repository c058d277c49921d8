public import KVCore

/// Any format for keys, any for values: the general store of this family.
///
/// Needs: nothing but keys and values. Runs: after the prompt, then as tokens arrive.
///
/// One side's format:
///
/// - `f32`, `f16`, `bf16`: dense;
/// - `channel`: affine codes, a scale and minimum per channel over `group` tokens;
/// - `token`: affine codes, a scale and minimum per token over `group` channels;
/// - `int8`, `int4`, `e4m3`, `e5m2`: codes times a scale, shared as `scale` says;
/// - `q8_0`, `q5_1`, `q5_0`, `q4_1`, `q4_0`, `iq4_nl`: ggml's blocks.
extension Store {
  /// Keys and values in formats of their own.
  ///
  /// - Throws: `invalidOption` for a residual that the encoding cannot have.
  public static func quant(keys: QuantSide, values: QuantSide) throws(KVError) -> Store {
    Store(
      spec: StageSpec(name: "quant", options: keys.options("key") + values.options("value")),
      keys: try keys.sideFormat(), values: try values.sideFormat())
  }

  /// `quant(keys=channel,key_bits=4,values=token,value_bits=2)`.
  public static let quantMethod = MethodDescription(
    name: "quant", role: .store, summary: "any format, bits, group and window for keys, any for values",
    options: ["key", "value"].flatMap { side -> [MethodDescription.Option] in
      [
        .init("\(side)s", "format of \(side)s: \(QuantSide.formats.joined(separator: ", "))"),
        .init("\(side)_bits", "channel and token: bits of a code, 2, 3, 4 or 8; default: 4"),
        .init("\(side)_group", "tokens (channel, scale=head) or channels (token) that share a scale"),
        .init("\(side)_scale", "int8, int4, e4m3 and e5m2: what shares a scale, token, head or tensor; default: token"),
        .init("\(side)_factor", "the scale of scale=tensor"),
        .init("\(side)_residual", "newest tokens kept dense; default: 128 for channel, else 0"),
        .init("\(side)_window", "element type of the dense window: f32, f16 or bf16"),
        .init("\(side)_metadata", "element type of scales and minima: f32, f16 or bf16"),
      ]
    }
  ) { (reader) throws(KVError) in
    .store(try .quant(keys: QuantSide("key", "channel", &reader), values: QuantSide("value", "token", &reader)))
  }
}

/// The format of one side of ``Store/quant(keys:values:)``.
public struct QuantSide: Hashable, Sendable {
  let format: String
  let sharing: ScaleSharing?
  let body: RowEncoding?
  let residual: Int
  let window: ElementType

  private init(
    format: String, sharing: ScaleSharing? = nil, body: RowEncoding?, residual: Int, window: ElementType
  ) {
    self.format = format
    self.sharing = sharing
    self.body = body
    self.residual = residual
    self.window = window
  }

  /// Rows as they are.
  public static func dense(_ type: ElementType = .f16) -> QuantSide {
    QuantSide(format: type.name, body: nil, residual: 0, window: type)
  }

  /// Affine codes per channel over `group` tokens.
  public static func channel(
    bits: Int = 4, group: Int = 32, residual: Int = 128, window: ElementType = .f16, metadata: ElementType = .f16
  ) throws(KVError) -> QuantSide {
    QuantSide(
      format: "channel", body: try .affinePerChannel(bits: bits, group: group, metadata: metadata), residual: residual,
      window: window)
  }

  /// Affine codes per token over `group` channels.
  public static func token(
    bits: Int = 4, group: Int = 32, residual: Int = 0, window: ElementType = .f16, metadata: ElementType = .f16
  ) throws(KVError) -> QuantSide {
    QuantSide(
      format: "token", body: try .affinePerToken(bits: bits, group: group, metadata: metadata), residual: residual,
      window: window)
  }

  /// Signed integers or FP8 numbers times a scale.
  public static func scaled(
    _ side: ScaledSide, residual: Int = 0, window: ElementType = .f16, metadata: ElementType = .f32
  ) throws(KVError) -> QuantSide {
    QuantSide(
      format: side.code.name, sharing: side.sharing, body: try side.encoding(metadata: metadata), residual: residual,
      window: window)
  }

  /// ggml's blocks.
  public static func ggml(_ block: GGMLBlock, residual: Int = 0, window: ElementType = .f16) -> QuantSide {
    QuantSide(format: block.name, body: .ggml(block), residual: residual, window: window)
  }

  static let formats =
    ["channel", "token"] + ScaledCode.allCases.map(\.name) + ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
    + ElementType.all.map(\.name)

  func sideFormat() throws(KVError) -> SideFormat { try .body(body, residual: residual, window: window) }

  func options(_ side: String) -> [SpecOption] {
    var options = [SpecOption("\(side)s", .text(format))]
    guard let body else { return options }
    if format == "channel" || format == "token" {
      options += [SpecOption("\(side)_bits", .integer(body.bits)), SpecOption("\(side)_group", .integer(body.group))]
    }
    switch sharing {
    case .token(let group):
      options.append(SpecOption("\(side)_scale", "token"))
      if let group { options.append(SpecOption("\(side)_group", .integer(group))) }
    case .head(let tokens):
      options += [SpecOption("\(side)_scale", "head"), SpecOption("\(side)_group", .integer(tokens))]
    case .tensor(let factor):
      options += [SpecOption("\(side)_scale", "tensor"), SpecOption("\(side)_factor", .decimal(Double(factor)))]
    case nil: break
    }
    options += [SpecOption("\(side)_residual", .integer(residual)), SpecOption("\(side)_window", .text(window.name))]
    if GGMLBlock(name: format) == nil, sharing.map({ if case .tensor = $0 { false } else { true } }) ?? true {
      options.append(SpecOption("\(side)_metadata", .text(body.metadataType.name)))
    }
    return options
  }

  /// Reads the options of one side. Those that its format does not have are refused.
  init(_ side: String, _ standard: String, _ reader: inout OptionReader) throws(KVError) {
    let format = try reader.name("\(side)s", default: standard, among: QuantSide.formats)
    let affine = format == "channel" || format == "token"
    let code = ScaledCode.allCases.first { $0.name == format }
    let isDense = ElementType(name: format) != nil
    func refuse(_ option: String, unless applies: Bool) throws(KVError) {
      reader.offer("\(side)_\(option)")
      guard applies || !reader.has("\(side)_\(option)") else {
        throw KVError(
          .invalidOption, "\(side)s in the format \(format) have no \(side)_\(option)", offset: reader.stage.offset)
      }
    }
    try refuse("bits", unless: affine)
    try refuse("group", unless: affine || code != nil)
    try refuse("scale", unless: code != nil)
    try refuse("factor", unless: code != nil)
    try refuse("residual", unless: !isDense)
    try refuse("window", unless: !isDense)
    try refuse("metadata", unless: affine || code != nil)
    if let type = ElementType(name: format) {
      self = .dense(type)
      return
    }
    let residual = try reader.optionalInt("\(side)_residual", in: 0...1_048_576) ?? (format == "channel" ? 128 : 0)
    let window =
      reader.has("\(side)_window") ? try reader.elementType("\(side)_window") : ElementType.f16
    if let block = GGMLBlock(name: format) {
      self = .ggml(block, residual: residual, window: window)
      return
    }
    let metadata =
      reader.has("\(side)_metadata") ? try reader.elementType("\(side)_metadata") : code == nil ? ElementType.f16 : .f32
    if let code {
      let sharing = try Store.readSharing("\(side)_", &reader, scale: "token", factor: nil, common: false)
      self = try .scaled(ScaledSide(code, sharing: sharing), residual: residual, window: window, metadata: metadata)
      return
    }
    let bits = try reader.optionalInt("\(side)_bits", in: 2...8) ?? 4
    if format == "channel" {
      let group = try reader.optionalInt("\(side)_group", in: 32...1024) ?? 32
      self = try .channel(bits: bits, group: group, residual: residual, window: window, metadata: metadata)
    } else {
      let group = try reader.optionalInt("\(side)_group", in: 8...4096) ?? 32
      self = try .token(bits: bits, group: group, residual: residual, window: window, metadata: metadata)
    }
  }
}
