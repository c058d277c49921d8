/// The same budget for every head of every layer.
public struct UniformAllocator: Allocator {
  public init() {}
  public var readsScoresWhileDecoding: Bool { false }

  public func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    requests.map { request in zip(request.rows, request.budget).map { min($0, $1) } }
  }
}
