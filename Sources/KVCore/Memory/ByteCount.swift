/// Bytes of a cache by what they are for. Their sum is what was allocated, to the byte.
public struct ByteCount: Hashable, Sendable {
  /// Rows of keys and values: elements or codes.
  public var payload = 0
  /// What the rows need to be read: scales, minima, log biases, bases.
  public var metadata = 0
  /// Which token a row is: positions.
  public var index = 0
  /// What the policy remembers between steps: accumulated attention, captured queries.
  public var state = 0

  public init(payload: Int = 0, metadata: Int = 0, index: Int = 0, state: Int = 0) {
    self.payload = payload
    self.metadata = metadata
    self.index = index
    self.state = state
  }

  public var total: Int { payload + metadata + index + state }

  public static func + (a: ByteCount, b: ByteCount) -> ByteCount {
    ByteCount(
      payload: a.payload + b.payload, metadata: a.metadata + b.metadata, index: a.index + b.index,
      state: a.state + b.state)
  }

  public static func += (a: inout ByteCount, b: ByteCount) { a = a + b }
}

/// Collects the bytes of several objects that may share buffers, counting each buffer once.
package struct ByteTally {
  package var bytes = ByteCount()
  private var visited: Set<ObjectIdentifier> = []

  package init() {}

  /// Adds a buffer unless it was seen before. `metadata` of its bytes are metadata, the rest is `kind`.
  package mutating func add(_ buffer: Buffer, kind: WritableKeyPath<ByteCount, Int>, metadata: Int = 0) {
    guard visited.insert(ObjectIdentifier(buffer)).inserted else { return }
    bytes[keyPath: kind] += buffer.byteCount - metadata
    bytes.metadata += metadata
  }
}
