public import KVCore
public import KVTensorFiles

/// RotateKV: keys before their rotary embedding, rotated over several heads, channels sorted by calibration so that alike
/// ones share a group, in as few as two bits; values rotated within a head. arXiv 2501.16383 (IJCAI 2025).
///
/// Needs: keys and values; the `ModelShape`'s rotary, because cached keys are turned back by their position; for the order
/// of the channels a calibration of the model. Runs: after the prompt, then as tokens arrive.
///
/// Tokens with massive activations stay dense where a selection sends them to a second store: see `sinks`.
///
/// Differs from the authors' code: that code is a simulation, here codes are stored; weights of the model are left alone,
/// so that keys are rotated on their way in and turned back tile by tile in attention; a group of equal values is
/// reproduced, theirs divides by zero; the scale is the range over 2^bits - 1, theirs over bits² - 1 (`levels=squared`);
/// new tokens are encoded `gap` at a time, theirs one by one (`gap=1`); heads are rotated together as far as their number
/// has a power of two, theirs must be a multiple of four.
///
/// ```
/// one layer   keys     ┌ tokens: codes of all heads, scale and minimum per group ┬ 0 … gap-1 dense ┐
/// one head    values   ┌ tokens: codes, scale[d/group], min[d/group]             ┬ 0 … gap-1 dense ┐
/// ```
/// Bytes per token and head, for K or V: d·(bits/8 + 2·m/group) with m bytes of `metadata` (2 for f16). The zero point is
/// held as a minimum of m bytes, not packed in the bits of a code.
///
/// Heads of a layer share the rows of keys: a row is freed when every head let it go.
extension Store {
  /// How the range of a group becomes the scale.
  public enum RangeLevels: String, Sendable, Hashable, CaseIterable {
    /// Over 2^bits - 1.
    case exact
    /// Over bits² - 1, as the authors' code has it: 3, 8 and 15 for 2, 3 and 4 bits.
    case squared
  }

  /// - Parameters:
  ///   - keyBits: 2, 3, 4 or 8.
  ///   - valueBits: likewise; nil for the same.
  ///   - group: channels that share a scale and minimum; a group of keys may hold channels of several heads.
  ///   - heads: KV heads whose keys are rotated together, a power of two.
  ///   - clip: what minimum and maximum of a group are multiplied by; nil: 0.8 for two bits, 1 for more.
  ///   - calibration: the keys' `order` of every layer, one of the rotated channels of all heads; nil: as they are.
  ///   - gap: new tokens that wait dense and are encoded together.
  ///   - window: element type of these.
  ///   - metadata: element type of scales and minima.
  /// - Throws: `invalidOption` for numbers outside these and for what is no permutation; `missingInput`, `shapeMismatch` for
  ///   a calibration without orders.
  public static func rotateKV(
    keyBits: Int = 2, valueBits: Int? = nil, group: Int = 128, heads: Int = 4, clip: Double? = nil,
    levels: RangeLevels = .exact, calibration: NamedCalibration? = nil, gap: Int = 32, window: ElementType = .f16,
    metadata: ElementType = .f16
  ) throws(KVError) -> Store {
    guard (1...64).contains(heads), heads & (heads - 1) == 0, (1...1 << 20).contains(gap) else {
      throw KVError(
        .invalidOption,
        "rotatekv rotates 1, 2, 4 … 64 heads together and encodes 1...1048576 tokens at a time; got \(heads) and \(gap)"
      )
    }
    let valueBits = valueBits ?? keyBits
    func side(_ bits: Int) throws(KVError) -> SideFormat {
      let zero = try ZeroPoint(clip: clip ?? (bits == 2 ? 0.8 : 1), squaredLevels: levels == .squared)
      return try .newest(
        0, window: window, body: .affinePerToken(bits: bits, group: group, zero: zero, metadata: metadata))
    }
    let keys = try side(keyBits)
    let orders = try calibration.map { (named) throws(KVError) in try channelOrders(named.calibration, keys) }
    var format = LowRankFormat(
      keys: .full, values: .full, keyLatents: keys, valueLatents: keys, basis: .f32, window: window)
    format.joinedKeys = JoinedKeys(rows: keys, headGroup: heads, orders: orders)
    format.valueRows = try side(valueBits)
    format.rotatesValues = true
    format.continuation = .project(keeping: 0)
    format.together = gap
    var options = CodeBits(keys: keyBits, values: valueBits).specOptions
    options += [SpecOption("group", .integer(group)), SpecOption("heads", .integer(heads))]
    if let clip { options.append(SpecOption("clip", .decimal(clip))) }
    options += [
      SpecOption("levels", .text(levels.rawValue)), SpecOption("gap", .integer(gap)),
      SpecOption("window", .text(window.name)), SpecOption("metadata", .text(metadata.name)),
    ]
    options += NamedCalibration.options(calibration)
    return Store(spec: StageSpec(name: "rotatekv", options: options), factory: format)
  }

  /// By layer, the order that a calibration has of the keys of all heads.
  private static func channelOrders(
    _ calibration: Calibration, _ keys: SideFormat
  ) throws(KVError) -> [Int: [Int]] {
    try calibration.require(keysBeforeRotation: true)
    let layers = calibration.layers(with: "order", of: .keys)
    guard !layers.isEmpty else {
      throw KVError(.missingInput, "a calibration with an order of the keys' channels expected; this one has none")
    }
    var orders: [Int: [Int]] = [:]
    for layer in layers {
      let order = try calibration.integers("order", of: .keys, layer: layer, shape: [1, nil], in: 0...4095)
      do throws(KVError) { _ = try keys.reordered(order) } catch { throw error.at(layer: layer) }
      orders[layer] = order
    }
    return orders
  }

  /// `rotatekv(bits=2,group=128,heads=4)`.
  public static let rotateKVMethod = MethodDescription(
    name: "rotatekv", role: .store,
    summary: "keys before their rotary embedding, rotated over heads and reordered, codes of 2, 3, 4 or 8 bits",
    paper: "arXiv 2501.16383",
    options: CodeBits.options + [
      .init("group", "channels that share a scale and minimum; of keys, also of several heads"),
      .init("heads", "KV heads whose keys are rotated together, a power of two"),
      .init("clip", "what minimum and maximum of a group are multiplied by; default: 0.8 for 2 bits, 1 for more"),
      .init("levels", "scale: the range over 2^bits - 1 (exact) or over bits² - 1 (squared, the authors' code)"),
      .init("gap", "new tokens that wait dense and are encoded together"),
      .init("window", "element type of the tokens that wait: f32, f16 or bf16"),
      .init("metadata", "element type of scales and minima: f32, f16 or bf16"),
    ] + NamedCalibration.descriptions
  ) { (reader) throws(KVError) in
    let bits = try CodeBits(from: &reader, default: 2)
    let group = try reader.int("group", default: 128, in: 8...4096)
    let heads = try reader.int("heads", default: 4, in: 1...64)
    let clip = try reader.optionalDouble("clip", in: 0.01...1)
    let levels = try reader.name("levels", default: "exact", among: RangeLevels.allCases.map(\.rawValue))
    let calibration = try reader.calibration()
    return .store(
      try .rotateKV(
        keyBits: bits.keys, valueBits: bits.values, group: group, heads: heads, clip: clip,
        levels: RangeLevels(rawValue: levels) ?? .exact, calibration: calibration,
        gap: reader.int("gap", default: 32, in: 1...1_048_576),
        window: reader.elementType("window", default: .f16), metadata: reader.elementType("metadata", default: .f16)))
  }
}
