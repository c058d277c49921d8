public import KVCore

/// Rotation in front of any quantizer: a fast Walsh-Hadamard transform of every row before it is encoded, with or without
/// random signs. QuaRot's KV caches (arXiv 2404.00456), llama.cpp, SGLang.
///
/// Needs: nothing. Runs: whenever rows are encoded. The dense window is not rotated.
///
/// A rotation leaves products alone: attention rotates the query instead of turning keys back, and turns the weighted sum
/// of values back once. So it costs the same for one row and for a thousand. Outliers of one channel are spread over all
/// channels of a block, which helps codes that share a scale over channels (values, per-token keys). It does not help
/// KIVI's keys, whose scale is per channel: there each channel's range is what counts, and rotation makes all ranges alike.
///
/// Differs from the authors' code: keys are rotated after the rotary embedding, values on their way into the cache; no
/// weight is changed. llama.cpp's rule is `rotated(signs=false,value_block=64)`.
extension Store {
  /// - Parameters:
  ///   - keys: how keys are rotated; nil: not.
  ///   - values: likewise.
  /// - Throws: `invalidOption` when a side is rotated that is not encoded, or neither is to be rotated.
  public func rotated(keys: Rotation?, values: Rotation?) throws(KVError) -> Store {
    guard keys != nil || values != nil else {
      throw KVError(.invalidOption, "rotated needs keys, values or both")
    }
    let seed = (keys ?? values).flatMap(\.signSeed)
    if let keys, let values, keys.signSeed != values.signSeed {
      throw KVError(.invalidOption, "keys and values are rotated with the same signs; got two seeds")
    }
    guard Int(exactly: seed ?? 0) != nil else {
      throw KVError(.invalidOption, "a seed lies in 0...\(Int.max); got \(seed ?? 0)")
    }
    func block(_ rotation: Rotation?) -> SpecValue { .integer(rotation?.fixedBlock ?? 0) }
    let options = [
      SpecOption("signs", .bool(seed != nil)), SpecOption("seed", .integer(Int(truncatingIfNeeded: seed ?? 0))),
      SpecOption("keys", .bool(keys != nil)), SpecOption("values", .bool(values != nil)),
      SpecOption("key_block", block(keys)), SpecOption("value_block", block(values)),
    ]
    return modified(
      by: StageSpec(name: "rotated", options: options), factory: try factory.rotated(keys: keys, values: values))
  }

  /// `kivi(bits=2)+rotated(keys=false)`.
  public static let rotatedMethod = MethodDescription(
    name: "rotated", role: .storeModifier,
    summary: "rows are rotated by a Walsh-Hadamard transform before they are encoded", paper: "arXiv 2404.00456",
    options: [
      .init("signs", "random signs before the transform; without them a constant row becomes one spike"),
      .init("seed", "which signs, 0 or more"),
      .init("keys", "rotate keys"),
      .init("values", "rotate values"),
      .init("key_block", "channels rotated together, a power of two; 0: the largest that divides the head size"),
      .init("value_block", "the same for values"),
    ]
  ) { (reader) throws(KVError) in
    let signs = try reader.bool("signs", default: true)
    let seed = UInt64(try reader.int("seed", default: 0, in: 0...Int.max))
    let keys = try reader.bool("keys", default: true)
    let values = try reader.bool("values", default: true)
    let keyBlock = try reader.int("key_block", default: 0, in: 0...4096)
    let valueBlock = try reader.int("value_block", default: 0, in: 0...4096)
    func rotation(_ block: Int) throws(KVError) -> Rotation {
      let block = block == 0 ? nil : block
      return try signs ? .signs(seed: seed, block: block) : .hadamard(block: block)
    }
    let keyRotation = try keys ? rotation(keyBlock) : nil
    let valueRotation = try values ? rotation(valueBlock) : nil
    return .storeModifier { (store) throws(KVError) in
      try store.rotated(keys: keyRotation, values: valueRotation)
    }
  }
}
