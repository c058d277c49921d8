extension Store {
  /// Rows as they are, in one element type for keys and values.
  public static func dense(_ type: ElementType = .f16) -> Store {
    Store(
      spec: StageSpec(name: "dense", options: [SpecOption("type", .text(type.name))]),
      keys: .dense(type), values: .dense(type))
  }

  /// `dense(type=f16)`, also written `f32`, `f16` or `bf16`.
  public static let denseMethod = MethodDescription(
    name: "dense", role: .store, summary: "rows as they are, in f32, f16 or bf16",
    options: [.init("type", "element type of keys and values: f32, f16 or bf16")]
  ) { (reader) throws(KVError) in
    .store(.dense(try reader.elementType("type", default: .f16)))
  }
}
