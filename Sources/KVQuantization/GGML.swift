public import KVCore

/// The cache types of llama.cpp: ggml's blocks of 32 channels, bit for bit, keys and values apart.
///
/// Needs: nothing but keys and values; head sizes that are multiples of 32. Runs: after the prompt, then as tokens
/// arrive; without a window every token is encoded once it was attended. An engine's own blocks become part of the cache
/// without conversion (`KVCache.append(layer:keys:values:firstPosition:)`).
///
/// Differs from ggml's code: attention reads f32 queries in more than the 8 bits that ggml gives them; numbers of which
/// ggml's codes are undefined (scales below 2^-126, values of iq4_nl below 1e-15) get the codes of zero.
///
/// ```
/// a token of one head   ┌ block: f16 scale (f16 minimum) (fifth bits) codes of 32 channels ┬ next block ┐
/// ```
/// Bytes per token and head, for K or V: d/32 · 34 (q8_0), 24 (q5_1), 22 (q5_0), 20 (q4_1), 18 (q4_0, iq4_nl).
extension Store {
  /// - Parameters:
  ///   - keys: block type of keys; nil: dense in `window`.
  ///   - values: likewise.
  ///   - residual: newest tokens kept dense.
  ///   - window: element type of dense rows.
  /// - Throws: `invalidOption` when residual is negative.
  public static func ggml(
    keys: GGMLBlock? = .q8_0, values: GGMLBlock? = .q8_0, residual: Int = 0, window: ElementType = .f16
  ) throws(KVError) -> Store {
    Store(
      spec: StageSpec(
        name: "ggml",
        options: [
          SpecOption("keys", .text(keys?.name ?? "dense")), SpecOption("values", .text(values?.name ?? "dense")),
          SpecOption("residual", .integer(residual)), SpecOption("window", .text(window.name)),
        ]),
      keys: try .body(keys.map { .ggml($0) }, residual: residual, window: window),
      values: try .body(values.map { .ggml($0) }, residual: residual, window: window))
  }

  /// `ggml(keys=q8_0,values=q4_0)`.
  public static let ggmlMethod = MethodDescription(
    name: "ggml", aliases: ["llama.cpp"], role: .store,
    summary: "llama.cpp's cache types: blocks of 32 channels, bit for bit as ggml's",
    options: [
      .init("keys", "block type of keys: q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, or dense"),
      .init("values", "block type of values, likewise"),
      .init("residual", "newest tokens kept dense"),
      .init("window", "element type of dense rows: f32, f16 or bf16"),
    ]
  ) { (reader) throws(KVError) in
    let names = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "dense"]
    let keys = try reader.name("keys", default: "q8_0", among: names)
    let values = try reader.name("values", default: "q8_0", among: names)
    return .store(
      try .ggml(
        keys: GGMLBlock(name: keys), values: GGMLBlock(name: values),
        residual: reader.int("residual", default: 0, in: 0...1_048_576),
        window: reader.elementType("window", default: .f16)))
  }
}

extension GGMLBlock {
  /// The block type ggml calls `name`.
  public init?(name: String) {
    guard let match = GGMLBlock.allCases.first(where: { $0.name == name }) else { return nil }
    self = match
  }
}
