extension CompressionPolicy {
  /// The bytes a cache of this policy will hold after a prompt and some decoded tokens, without computing anything.
  ///
  /// Equals `KVCache.bytes` to the byte for every policy whose row counts do not depend on the data, and for those that
  /// drop rows inside quantized groups it is what equal scores would give. O((prompt + decoded) · layers · heads).
  ///
  /// - Parameters:
  ///   - prompt: tokens of the prompt, appended in chunks of `chunk` (nil: at once).
  ///   - decoded: tokens appended one by one afterwards.
  public func estimate(
    shape: ModelShape, prompt: Int, decoded: Int = 0, chunk: Int? = nil
  ) throws(KVError) -> ByteCount {
    guard prompt >= 0, decoded >= 0, chunk ?? 1 >= 1 else {
      throw KVError(
        .invalidOption,
        "a prompt and decoded tokens of 0 or more, in chunks of at least 1, expected; got \(prompt), \(decoded) and "
          + "\(chunk ?? 0)")
    }
    let cache = try KVCache(shape: shape, policy: self, backend: Backend(DryRunBackend()))
    var left = prompt
    while left > 0 {
      let taken = min(left, chunk ?? left)
      try cache.pretend(tokens: taken)
      left -= taken
    }
    try cache.finishPrefill()
    for _ in 0..<decoded { try cache.pretend(tokens: 1) }
    return cache.bytes
  }
}

extension KVCache {
  /// Appends and attends tokens of a dry run, whose memory nobody reads.
  fileprivate func pretend(tokens: Int) throws(KVError) {
    let base = UnsafeMutableRawPointer.allocate(byteCount: 4, alignment: 4)
    defer { base.deallocate() }
    for state in layers where state.shape.cached {
      let shape = state.shape
      let keys = TensorView(
        unsafeBase: base, type: .f32, heads: shape.kvHeads, tokens: tokens, dim: shape.keyDim, headStride: 0,
        tokenStride: 0)
      let values = TensorView(
        unsafeBase: base, type: .f32, heads: shape.kvHeads, tokens: tokens, dim: shape.valueDim, headStride: 0,
        tokenStride: 0)
      let queries = TensorView(
        unsafeBase: base, type: .f32, heads: shape.queryHeads, tokens: tokens, dim: shape.keyDim, headStride: 0,
        tokenStride: 0)
      try append(layer: state.layer, keys: keys, values: values)
      if observesAttention(state) { state.observedTokens = state.seen }
      if capturesQueries(state) || capturesProbes(state) { try capture(queries, state) }
      try notePeaks(of: queries, state)
      try maintain(state)
    }
  }
}
