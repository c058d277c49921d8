/// Rows that an engine has encoded itself.
extension KVCache {
  /// Appends tokens whose keys and values are encoded already, as they are: an engine's own cache becomes part of this
  /// one without conversion.
  ///
  /// The rows join the encoded body at once, without passing through the dense window. So the window must be empty:
  /// every token appended before has been attended, and none is held back by the store.
  ///
  /// - Parameters:
  ///   - keys: [kvHeads, tokens] rows of the encoding that the store gives keys; at least one token.
  ///   - values: likewise, of values.
  ///   - firstPosition: the position of the first token, to be checked against what the layer has seen; nil: unchecked.
  /// - Throws: `shapeMismatch` (heads, channels, tokens, or a position that is not the next), `invalidOption` for another
  ///   encoding than the store's, `nonFinite` for a scale or element that is NaN or infinite, with head and position,
  ///   `wrongPhase` while tokens are dense, `unsupported` for stores without such rows, `outOfMemory`. The cache is
  ///   unchanged then.
  /// - Complexity: O(bytes).
  public func append(
    layer: Int, keys: borrowing EncodedRows, values: borrowing EncodedRows, firstPosition: Int? = nil
  ) throws(KVError) {
    let state = try state(layer)
    let shape = state.shape
    try checkEncoded(keys, "keys", dim: shape.keyDim, state)
    try checkEncoded(values, "values", dim: shape.valueDim, state)
    try checkTokens(keys: keys.tokens, values: values.tokens, state)
    guard firstPosition ?? state.seen == state.seen else {
      throw KVError(
        .shapeMismatch, "the next token of this layer has the position \(state.seen); got \(firstPosition ?? 0)",
        layer: layer, position: firstPosition)
    }
    guard let segment = state.segments[0] as? RowSegment else {
      throw KVError(.unsupported, "\(policy.spec) does not hold rows one by one", layer: layer)
    }
    try checkFinite(keys, "key", state)
    try checkFinite(values, "value", state)
    fillSeed(state)
    do throws(KVError) {
      try segment.append(keys: keys, values: values, firstPosition: state.seen, observed: seed)
    } catch {
      throw error.at(layer: layer)
    }
    count(keys.tokens, state)
  }

  /// The live rows of a head as they are stored, with the encodings that read them.
  ///
  /// - Throws: `wrongPhase` while some of them are dense and will be encoded, `unsupported` for stores whose rows do not
  ///   carry their scales.
  public func encodedRows(layer: Int, head: Int) throws(KVError) -> EncodedContents {
    let state = try state(layer)
    guard head >= 0, head < state.shape.kvHeads else {
      throw KVError(.shapeMismatch, "head \(head) of a layer of \(state.shape.kvHeads) KV heads", layer: layer)
    }
    guard state.segments.count == 1, let segment = state.segments[0] as? RowSegment else {
      throw KVError(.unsupported, "\(policy.spec) does not hold all rows in one encoding", layer: layer)
    }
    do throws(KVError) {
      return try segment.encodedContents(head: head)
    } catch {
      throw error.at(layer: layer, head: head)
    }
  }

  private func checkEncoded(
    _ rows: borrowing EncodedRows, _ what: String, dim: Int, _ state: LayerState
  ) throws(KVError) {
    guard rows.heads == state.shape.kvHeads, rows.dim == dim else {
      throw KVError(
        .shapeMismatch,
        "\(what) of \(state.shape.kvHeads) heads x \(dim) channels expected; got \(rows.heads) x \(rows.dim)",
        layer: state.layer)
    }
  }

  private func checkFinite(_ rows: borrowing EncodedRows, _ what: String, _ state: LayerState) throws(KVError) {
    if let place = rows.firstNonfinite() {
      throw KVError(
        .nonFinite, "byte \(place.byte) of an encoded \(what) (\(rows.encoding)) is NaN or infinite",
        layer: state.layer,
        head: place.head, position: state.seen + place.token)
    }
  }
}
