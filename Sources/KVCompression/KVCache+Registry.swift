public import KVCore

extension KVCache {
  /// A cache from a file that `save(to:)` wrote, with the policy its text names and the model shape it tells.
  ///
  /// For a policy that no registry can make (stages of your own), use `load(from:policy:shape:backend:)`.
  ///
  /// - Parameters:
  ///   - registry: makes the policy from its text.
  ///   - inputs: what the engine supplies from now on; nil: as saved.
  /// - Throws: as `load(from:policy:shape:backend:)`, and `unknownName` or `invalidOption` when the registry cannot
  ///   make the policy.
  public static func load(
    from path: String, backend: Backend, registry: PolicyRegistry = .standard, inputs: EngineInputs? = nil
  ) throws(KVError) -> KVCache {
    let description = try savedDescription(path: path)
    return try load(
      from: path, policy: registry.policy(description.policy), shape: description.shape, backend: backend,
      inputs: inputs)
  }

  /// The same from the bytes that `saved()` returned.
  public static func load(
    saved bytes: [UInt8], backend: Backend, registry: PolicyRegistry = .standard, inputs: EngineInputs? = nil
  ) throws(KVError) -> KVCache {
    let description = try savedDescription(of: bytes)
    return try load(
      saved: bytes, policy: registry.policy(description.policy), shape: description.shape, backend: backend,
      inputs: inputs)
  }
}
