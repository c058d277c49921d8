/// Mean and covariance of a model's queries before their rotation, from calibration texts: what scorers that expect future
/// queries start from.
public struct QueryStatistics: Sendable, Hashable {
  public struct Layer: Sendable, Hashable {
    /// [queryHeads][keyDim].
    public let mean: [Float]
    /// [queryHeads][keyDim][keyDim], symmetric and without negative eigenvalues. Empty: none.
    public let covariance: [Float]

    public init(mean: [Float], covariance: [Float] = []) {
      self.mean = mean
      self.covariance = covariance
    }
  }

  /// By layer number. Layers that are not there cannot be scored.
  public let layers: [Int: Layer]

  public init(layers: [Int: Layer]) { self.layers = layers }

  /// - Throws: `missingInput` for a layer without numbers, `shapeMismatch` and `nonFinite` for numbers that do not fit.
  package func validate(_ shape: ModelShape) throws(KVError) {
    for (index, layer) in shape.layers.enumerated() where layer.cached && layer.slidingWindow == nil {
      guard let own = layers[index] else {
        throw KVError(.missingInput, "query statistics for every layer expected; this one has none", layer: index)
      }
      let (mean, square) = (layer.queryHeads * layer.keyDim, layer.queryHeads * layer.keyDim * layer.keyDim)
      guard own.mean.count == mean, own.covariance.isEmpty || own.covariance.count == square else {
        throw KVError(
          .shapeMismatch,
          "a mean of \(mean) numbers and a covariance of \(square) or none expected; got \(own.mean.count) and "
            + "\(own.covariance.count)", layer: index)
      }
      guard own.mean.allSatisfy(\.isFinite), own.covariance.allSatisfy(\.isFinite) else {
        throw KVError(.nonFinite, "query statistics hold NaN or infinity", layer: index)
      }
    }
  }
}

/// The projections a model applies to the outputs of its attention heads, for scorers that ask what a value does to the
/// residual stream.
public struct OutputProjections: Sendable {
  /// By layer number: [hidden][queryHeads · valueDim], as checkpoints hold `o_proj.weight`.
  public let layers: [Int: [Float]]

  public init(layers: [Int: [Float]]) { self.layers = layers }

  /// - Throws: as ``QueryStatistics``.
  package func validate(_ shape: ModelShape) throws(KVError) {
    for (index, layer) in shape.layers.enumerated() where layer.cached && layer.slidingWindow == nil {
      guard let own = layers[index] else {
        throw KVError(.missingInput, "an output projection for every layer expected; this one has none", layer: index)
      }
      let columns = layer.queryHeads * layer.valueDim
      guard !own.isEmpty, own.count % columns == 0 else {
        throw KVError(
          .shapeMismatch, "an output projection of rows of \(columns) numbers expected; got \(own.count) numbers",
          layer: index)
      }
      guard own.allSatisfy(\.isFinite) else {
        throw KVError(.nonFinite, "an output projection holds NaN or infinity", layer: index)
      }
    }
  }
}
