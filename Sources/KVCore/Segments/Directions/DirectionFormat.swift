/// Which rows of a pair of layers stay as they are instead of sharing a direction, by the angle between them.
package struct RetentionRule: Hashable, Sendable {
  package enum Kind: Hashable, Sendable {
    /// Farther apart than the largest angle less a part of the range of angles.
    case distant(Float)
    /// Closer than the smallest angle and a part of the range of angles.
    case close(Float)
    /// That share of the rows: those farthest apart.
    case share(Double)
  }

  package var kind: Kind
  /// One threshold for all heads instead of one for each.
  package var acrossHeads = false

  package init(_ kind: Kind) { self.kind = kind }

  /// The threshold that these angles set for them and for all to come; nil: there are none.
  package func threshold(_ angles: [Float]) -> Float? {
    guard let low = angles.min(), let high = angles.max() else { return nil }
    switch kind {
    case .distant(let part): return part >= 1 ? -.infinity : high - part * (high - low)
    case .close(let part): return part >= 1 ? .infinity : low + part * (high - low)
    case .share(let share):
      let count = Int((share * Double(angles.count)).rounded(.up))
      return count == 0 ? .infinity : angles.sorted(by: >)[count - 1]
    }
  }

  /// Whether a row at this angle stays, of rows that come later than those that set the threshold.
  package func retains(_ angle: Float, _ threshold: Float) -> Bool {
    switch kind {
    case .distant: angle > threshold
    case .close: angle < threshold
    case .share: angle >= threshold
    }
  }
}

/// Keys and values of pairs of layers as directions that both share, a length for each layer, and the rows of tokens in
/// which the layers differ most.
///
/// ```
/// tier     ┌ shared by the pair: directions, in the formats of `base`  ┬ dense: tokens that one layer alone has ┐
///          │ of each layer: a length per row; rows that stay exact     │                                        │
/// ```
/// Layers hold dense rows until the prompt of the pair's second layer is complete; layers of no pair are held as `base`
/// says.
package struct DirectionFormat: JointFactory {
  package var base: RowFormat
  /// Where the shared direction lies between those of the two layers: 0 the lower layer's, 1 the upper's.
  package var weight: Double
  package var retention: RetentionRule
  /// Element type of lengths.
  package var lengths: ElementType
  /// The first layer that may be one of a pair: a share of all layers, or an index.
  package var firstLayer: LayerStart

  package init(
    base: RowFormat, weight: Double, retention: RetentionRule, lengths: ElementType, firstLayer: LayerStart
  ) {
    self.base = base
    self.weight = weight
    self.retention = retention
    self.lengths = lengths
    self.firstLayer = firstLayer
  }

  package func waiting(_ layer: LayerShape) -> RowFormat {
    RowFormat(keys: .dense(base.keys.window), values: .dense(base.values.window))
  }

  package func makeSegment(layer: LayerShape, backend: any ComputeBackend) -> any Segment {
    base.makeSegment(layer: layer, backend: backend)
  }

  package func validate(layer: LayerShape) throws(KVError) { try base.validate(layer: layer) }

  package func validate(backend: any ComputeBackend) throws(KVError) {
    guard backend.holdsDirections else {
      throw KVError(.unsupported, "\(backend.name) holds no directions; use the CPU backend for minicache")
    }
    try base.validate(backend: backend)
  }

  package func rotated(keys: Rotation?, values: Rotation?) throws(KVError) -> any SegmentFactory {
    guard let turned = try base.rotated(keys: keys, values: values) as? RowFormat else { return self }
    var result = self
    result.base = turned
    return result
  }

  /// What a layer of no pair takes, and lengths: a pair takes less while fewer than half of its rows stay exact.
  package func bytes(rows: Int, layer: LayerShape, observed: Int) -> Int {
    base.bytes(rows: rows, layer: layer, observed: observed) + 2 * (rows + 64) * lengths.byteCount
  }

  package func groups(of shape: ModelShape) throws(KVError) -> [[Int]] {
    let first = firstLayer.index(of: shape.layers.count)
    // A sliding window forgets rows one by one, and has few.
    let layers = shape.layers.indices.filter {
      $0 >= first && shape.layers[$0].cached && shape.layers[$0].slidingWindow == nil
    }
    var groups: [[Int]] = []
    var index = 0
    while index + 1 < layers.count {
      let isPair = shape.layers[layers[index]] == shape.layers[layers[index + 1]]
      if isPair { groups.append([layers[index], layers[index + 1]]) }
      index += isPair ? 2 : 1
    }
    return groups
  }

  package func join(
    _ members: [any Segment], layers: [Int], shape: ModelShape, decoding: Bool, backend: any ComputeBackend
  ) throws(KVError) -> [any Segment]? {
    if let joint = members as? [DirectionSegment] {
      try joint[0].shared.extend(joint)
      return nil
    }
    guard let plain = members as? [RowSegment] else {
      throw KVError(.unsupported, "a tier of shared directions joins dense segments of its own", layer: layers.first)
    }
    let storage = DirectionStorage(
      format: self, layers: layers, shape: shape.layers[layers[0]], backend: backend)
    var segments: [any Segment] = []
    for rows in plain { segments.append(try DirectionSegment(storage: storage, member: segments.count, plain: rows)) }
    return segments
  }
}

/// The first of some layers: by index, or behind a share of all layers.
public enum LayerStart: Hashable, Sendable {
  case index(Int)
  case share(Double)

  func index(of count: Int) -> Int {
    switch self {
    case .index(let index): index
    case .share(let share): Int(share * Double(count))
    }
  }
}
