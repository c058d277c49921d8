import KVCompression

/// Reads `rope_theta`, `rope_scaling` (older files) or `rope_parameters` (newer ones) into the library's rotary
/// embedding.
enum RotaryConfig {
  private static let factors = 1.0...1e6
  private static let supported = "default, linear, dynamic, ntk, yarn and llama3"

  static func read(
    _ json: JSONObject, headDim: Int, maxPositions: Int, contextLength: Int?
  ) throws(KVError) -> RotaryEmbedding {
    // `??` would widen the error type: spelled out.
    var parameters = try json.optionalObject("rope_parameters")
    if parameters == nil { parameters = try json.optionalObject("rope_scaling") }
    let theta = try number("rope_theta", parameters, json, in: 1e-3...1e30) ?? 10_000
    let fraction = try number("partial_rotary_factor", parameters, json, in: 1e-4...1) ?? 1
    let scaling = try parameters.map { parameters throws(KVError) in
      try Self.scaling(parameters, maxPositions: maxPositions)
    }
    do throws(KVError) {
      let rotary = try RotaryEmbedding(
        headDim: headDim, rotaryDim: Int(Double(headDim) * fraction), theta: theta, layout: .halfSplit,
        scaling: scaling ?? .none)
      // Keys are cached turned, so the base must not change while a context grows: a dynamic scaling is resolved once.
      return try rotary.resolved(contextLength: contextLength ?? maxPositions)
    } catch {
      throw KVError(.corruptFile, "\(json.file): rotary embedding: \(error.message)")
    }
  }

  /// A number that newer files keep with the other rotary parameters and older ones at the top.
  private static func number(
    _ key: String, _ inner: JSONObject?, _ outer: JSONObject, in range: ClosedRange<Double>
  ) throws(KVError) -> Double? {
    if let inner, let value = try inner.optionalNumber(key, in: range) { return value }
    return try outer.optionalNumber(key, in: range)
  }

  private static func scaling(
    _ parameters: JSONObject, maxPositions: Int
  ) throws(KVError) -> RotaryEmbedding.Scaling {
    var type = try parameters.optionalString("rope_type")
    if type == nil { type = try parameters.optionalString("type") }
    switch type ?? "default" {
    case "default": return .none
    case "linear": return .linear(factor: try parameters.number("factor", in: factors))
    case "ntk": return .ntk(factor: try parameters.number("factor", in: factors))
    case "dynamic":
      return .dynamicNTK(
        factor: try parameters.number("factor", in: factors),
        originalContext: try originalContext(parameters) ?? maxPositions)
    case "yarn": return try yarn(parameters, maxPositions: maxPositions)
    case "llama3":
      return .llama3(
        factor: try parameters.number("factor", in: factors),
        lowFrequencyFactor: try parameters.number("low_freq_factor", in: 1e-6...1e6),
        highFrequencyFactor: try parameters.number("high_freq_factor", in: 1e-6...1e6),
        originalContext: try parameters.integer("original_max_position_embeddings", in: SizeLimit.positions))
    case let other: throw parameters.unsupported("rope_type", "\"\(other)\"", supported: supported)
    }
  }

  private static func originalContext(_ parameters: JSONObject) throws(KVError) -> Int? {
    try parameters.optionalInteger("original_max_position_embeddings", in: SizeLimit.positions)
  }

  private static func yarn(
    _ parameters: JSONObject, maxPositions: Int
  ) throws(KVError) -> RotaryEmbedding.Scaling {
    let factor = try parameters.number("factor", in: factors)
    let betas = 1e-6...1e6
    return .yarn(
      factor: factor,
      originalContext: try originalContext(parameters) ?? maxPositions,
      betaFast: try parameters.optionalNumber("beta_fast", in: betas) ?? 32,
      betaSlow: try parameters.optionalNumber("beta_slow", in: betas) ?? 1,
      attentionFactor: try yarnAttentionFactor(parameters, factor: factor),
      truncate: try parameters.bool("truncate", default: true))
  }

  /// As transformers computes it: given, or the quotient of two temperatures, or nil for the library's default.
  private static func yarnAttentionFactor(_ parameters: JSONObject, factor: Double) throws(KVError) -> Double? {
    if let given = try parameters.optionalNumber("attention_factor", in: 1e-6...1e6) { return given }
    let scales = 0.0...1e6
    guard let scale = try parameters.optionalNumber("mscale", in: scales),
      let scaleAll = try parameters.optionalNumber("mscale_all_dim", in: scales), scale > 0, scaleAll > 0
    else { return nil }
    func temperature(_ scale: Double) -> Double { factor <= 1 ? 1 : 0.1 * scale * naturalLogarithm(factor) + 1 }
    return temperature(scale) / temperature(scaleAll)
  }
}
