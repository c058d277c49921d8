public import KVCore

/// A cache that is fed with the numbers of a seed, the same on every backend: what two backends are compared by.
public final class FedCache {
  public let cache: KVCache
  /// What keys and values, and queries, are multiplied by.
  public var size: Float = 1
  public var querySize: Float = 1

  public init(_ policy: Policy, _ shape: ModelShape, _ backend: Backend) throws(KVError) {
    cache = try KVCache(shape: shape, policy: policy, backend: backend)
  }

  /// Numbers in -0.9 ... 1.1: not symmetric.
  public struct Numbers {
    private var state: UInt64

    public init(seed: UInt64) { state = seed }

    public mutating func next() -> Float {
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return Float(Int32(truncatingIfNeeded: state >> 33)) / 1_073_741_824 - 0.9
    }
  }

  /// Appends rows that nobody attends; returns the numbers of their queries, [queryHeads][tokens][keyDim].
  @discardableResult public func append(_ tokens: Int, seed: UInt64, layer: Int = 0) throws(KVError) -> [Float] {
    let shape = cache.shape.layers[layer]
    var numbers = Numbers(seed: seed)
    let keys = (0..<shape.kvHeads * tokens * shape.keyDim).map { _ in size * numbers.next() }
    let values = (0..<shape.kvHeads * tokens * shape.valueDim).map { _ in size * numbers.next() }
    try cache.append(
      layer: layer, keys: TensorView(keys.span, heads: shape.kvHeads, tokens: tokens, dim: shape.keyDim),
      values: TensorView(values.span, heads: shape.kvHeads, tokens: tokens, dim: shape.valueDim))
    return (0..<shape.queryHeads * tokens * shape.keyDim).map { _ in querySize * numbers.next() }
  }

  /// Appends rows and attends with their queries; returns the outputs, [queryHeads][tokens][valueDim].
  public func step(_ tokens: Int, seed: UInt64, layer: Int = 0) throws(KVError) -> [Float] {
    let queries = try append(tokens, seed: seed, layer: layer)
    let shape = cache.shape.layers[layer]
    var output = [Float](repeating: .nan, count: shape.queryHeads * tokens * shape.valueDim)
    var span = output.mutableSpan
    var view = try MutableTensorView(&span, heads: shape.queryHeads, tokens: tokens, dim: shape.valueDim)
    try cache.attend(
      layer: layer, queries: TensorView(queries.span, heads: shape.queryHeads, tokens: tokens, dim: shape.keyDim),
      into: &view)
    return output
  }

  /// The largest difference of two lists; NaN where a number is NaN, infinity where their lengths differ.
  public static func distance(_ a: [Float], _ b: [Float]) -> Float {
    if a.count != b.count { return .infinity }
    var worst: Float = 0
    for (x, y) in zip(a, b) { worst = abs(x - y) <= worst ? worst : abs(x - y) }
    return worst
  }
}
