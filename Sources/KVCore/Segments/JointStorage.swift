/// Rows or bases that the segments of several layers hold together: a shared direction, a basis over layers.
///
/// One object per group of layers and tier, referred to by the segments of its layers. Its buffers are tallied by each
/// of them and counted once.
package protocol JointStorage: AnyObject {
  /// Storage with the same contents for a forked cache; frozen buffers are shared.
  func fork() -> any JointStorage
  /// Writes what belongs to the group, so that `JointFactory.decodeStorage` makes it again.
  func encode(to writer: inout ByteWriter)
}

/// A segment of one layer of a group, on storage that it shares with the others.
package protocol JointSegment: Segment {
  var storage: any JointStorage { get }
  /// The same segment over the storage of a forked cache.
  func fork(onto storage: any JointStorage) -> any Segment
}

/// Makes segments for groups of layers. Layers of a group hold ordinary segments of `waiting(_:)` until the last of them has
/// its rows; `join` then replaces them. Layers of no group have what `makeSegment` made.
package protocol JointFactory: SegmentFactory {
  /// What a layer of a group holds until it is joined: dense rows.
  func waiting(_ layer: LayerShape) -> RowFormat

  /// The groups, disjoint, layers ascending; layers of no group stay as `makeSegment` made them. Decided by the shape
  /// alone. Throws `invalidOption` or `unsupported` for models that cannot be grouped as asked.
  func groups(of shape: ModelShape) throws(KVError) -> [[Int]]

  /// Brings the rows that every layer of a group holds into the form they share, and returns the segments that replace
  /// `members`, in their order; nil when nothing is due. `members` are ordinary segments the first time and joint ones
  /// afterwards. Called when the prompt of the group's last layer is complete (`decoding` false) and after every step
  /// that all its layers have decoded; at once again while it returns segments, so that those replaced have given their
  /// memory back before rows of the new ones are brought together.
  ///
  /// Rows are brought together one piece after the other (a head, a side); none changes before everything that can fail
  /// for it has succeeded.
  func join(
    _ members: [any Segment], layers: [Int], shape: ModelShape, decoding: Bool, backend: any ComputeBackend
  ) throws(KVError) -> [any Segment]?

  /// Storage from what `JointStorage.encode` wrote. Nothing in the bytes is trusted.
  func decodeStorage(
    from reader: inout ByteReader, layers: [Int], shape: ModelShape, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) -> any JointStorage

  /// The segment of one layer of a group, from what its `encode` wrote, on decoded storage.
  func decodeSegment(
    from reader: inout ByteReader, on storage: any JointStorage, layer: Int, shape: ModelShape, tokensSeen: Int,
    backend: any ComputeBackend
  ) throws(KVError) -> any Segment
}

/// Forks the storage of a group once, whichever of its layers comes first.
package struct ForkedStorage {
  private var forks: [ObjectIdentifier: any JointStorage] = [:]

  package init() {}

  package mutating func fork(_ segment: any Segment) -> any Segment {
    guard let joint = segment as? any JointSegment else { return segment.fork() }
    let key = ObjectIdentifier(joint.storage)
    let storage = forks[key] ?? joint.storage.fork()
    forks[key] = storage
    return joint.fork(onto: storage)
  }
}

/// Some layers whose rows one tier of a policy holds together.
package struct LayerGroup {
  package let layers: [Int]
  package let tier: Int
  package let factory: any JointFactory
}

extension LayerGroup {
  /// The groups of a policy's tiers. Refuses groups that overlap, or name layers there are none of.
  package static func all(_ policy: any CompressionPolicy, shape: ModelShape) throws(KVError) -> [LayerGroup] {
    var groups: [LayerGroup] = []
    for (tier, store) in policy.tiers.enumerated() {
      if !store.exceptions.isEmpty, store.holdsLayersTogether {
        throw KVError(
          .unsupported, "\(store.spec) holds layers together; none of them can have another store, nor be one")
      }
      guard let factory = store.factory as? any JointFactory else { continue }
      var taken = Set<Int>()
      for layers in try factory.groups(of: shape) {
        var last = -1
        for layer in layers {
          guard layer > last, shape.layers.indices.contains(layer), shape.layers[layer].cached,
            taken.insert(layer).inserted
          else {
            throw KVError(
              .invalidOption,
              "a group holds cached layers of 0..<\(shape.layers.count), each once, ascending; got \(layers)",
              layer: layer)
          }
          last = layer
        }
        if !layers.isEmpty { groups.append(LayerGroup(layers: layers, tier: tier, factory: factory)) }
      }
    }
    return groups
  }
}

extension [LayerGroup] {
  /// What a layer holds in a tier until its group is joined; nil where it is in none.
  func waiting(layer: Int, tier: Int, shape: LayerShape) -> RowFormat? {
    first { $0.tier == tier && $0.layers.contains(layer) }?.factory.waiting(shape)
  }
}

extension Store {
  /// Whether rows of several layers lie together, here or in an exception.
  fileprivate var holdsLayersTogether: Bool {
    factory is any JointFactory || exceptions.contains { $0.store.holdsLayersTogether }
  }
}
