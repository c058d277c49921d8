/// The map between rows of the model and the rows that are encoded, with the memory it needs. Extents, runs and forks
/// share it; nothing changes it once it is made.
///
/// ```
/// y = (P H S x - offset) / factor          x = S H P' (factor y + offset)
/// ```
/// S signs, H Walsh-Hadamard, P a permutation: fixed by the format, the same in every extent. Factor and offset per channel
/// come from the data and are what the cache pays bytes for.
package final class RowMap: @unchecked Sendable {
  /// The description backends work on; lives as long as the map.
  package let descriptor: UnsafePointer<MapDescriptor>
  package let fixed: FixedMap
  /// Factors, then offsets, in the type of the encoding's metadata.
  package let numbers: Buffer?

  package init(fixed: FixedMap, numbers: Buffer? = nil, count: Int = 0, type: ElementType = .f32) {
    self.fixed = fixed
    self.numbers = numbers
    let memory = UnsafeMutablePointer<MapDescriptor>.allocate(capacity: 1)
    memory.initialize(
      to: MapDescriptor(
        dim: fixed.dim, block: fixed.block, type: type, signs: fixed.signs, order: fixed.order,
        factors: numbers.map { UnsafeRawPointer($0.base) },
        offsets: count == 2 ? numbers.map { UnsafeRawPointer($0.base) + fixed.dim * type.byteCount } : nil))
    descriptor = UnsafePointer(memory)
  }

  deinit { UnsafeMutablePointer(mutating: descriptor).deallocate() }
}

/// The part of a map that the format alone decides: signs, block, permutation for rows of one size. Made once a segment.
package final class FixedMap: @unchecked Sendable {
  package let dim: Int
  package let block: Int
  package let signs: UnsafePointer<Float>?
  package let order: UnsafePointer<UInt32>?

  package init(_ format: MapFormat, dim: Int) {
    self.dim = dim
    block = format.rotation?.block(dim: dim) ?? 1
    signs = format.rotation?.signs(dim: dim).map(FixedMap.copy)
    order = format.order.map(FixedMap.copy)
  }

  private static func copy<Element: BitwiseCopyable>(_ values: [Element]) -> UnsafePointer<Element> {
    let memory = UnsafeMutablePointer<Element>.allocate(capacity: max(values.count, 1))
    memory.initialize(from: values, count: values.count)
    return UnsafePointer(memory)
  }

  deinit {
    signs.map { UnsafeMutablePointer(mutating: $0).deallocate() }
    order.map { UnsafeMutablePointer(mutating: $0).deallocate() }
  }
}

/// A map as backends see it.
package struct MapDescriptor {
  package let dim: Int
  /// Channels of one Walsh-Hadamard transform; 1: none.
  package let block: Int
  /// Of factors and offsets.
  package let type: ElementType
  package let signs: UnsafePointer<Float>?
  package let order: UnsafePointer<UInt32>?
  package let factors: UnsafeRawPointer?
  package let offsets: UnsafeRawPointer?
}
