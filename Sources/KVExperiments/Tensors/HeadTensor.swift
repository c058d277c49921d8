public import KVCore
internal import KVTensorFiles

/// A contiguous f32 block of heads x tokens x channels that owns its memory.
///
/// ```
/// element (h, t, c) = elements[(h * tokens + t) * dim + c]
/// ```
///
/// What dumps and generators hand out and metrics take. An engine's tensors are viewed by the core without a copy; this
/// type is for experiments, where owning the numbers is simpler. `elements.span` is what a view is made from.
public struct HeadTensor: Hashable, Sendable {
  public let heads: Int
  public let tokens: Int
  /// Channels of one row.
  public let dim: Int
  /// Row-major [heads, tokens, dim].
  public private(set) var elements: [Float]

  /// - Throws: `shapeMismatch` when a size is negative, `dim` is 0, or there are not exactly
  ///   `heads * tokens * dim` elements.
  public init(heads: Int, tokens: Int, dim: Int, elements: [Float]) throws(KVError) {
    guard dim >= 1, elementCount(of: [heads, tokens, dim]) == elements.count else {
      throw KVError(
        .shapeMismatch,
        "a tensor of \(heads) heads x \(tokens) tokens x \(dim) channels cannot hold "
          + "\(elements.count) elements")
    }
    self.init(unchecked: elements, heads: heads, tokens: tokens, dim: dim)
  }

  init(unchecked elements: [Float], heads: Int, tokens: Int, dim: Int) {
    self.heads = heads
    self.tokens = tokens
    self.dim = dim
    self.elements = elements
  }

  init(zeros heads: Int, tokens: Int, dim: Int) {
    self.init(
      unchecked: [Float](repeating: 0, count: heads * tokens * dim), heads: heads, tokens: tokens, dim: dim)
  }

  /// [heads, tokens, dim].
  public var shape: [Int] { [heads, tokens, dim] }

  /// One element. The indices must lie in range.
  public subscript(head: Int, token: Int, channel: Int) -> Float {
    get { elements[place(head, token) + check(channel)] }
    set { elements[place(head, token) + check(channel)] = newValue }
  }

  /// The channels of one token of one head, without a copy. The indices must lie in range.
  public func row(head: Int, token: Int) -> ArraySlice<Float> {
    let start = place(head, token)
    return elements[start..<start + dim]
  }

  /// The tokens of `range` of every head.
  ///
  /// - Throws: `shapeMismatch` when the range reaches beyond the tokens.
  /// - Complexity: O(copied elements).
  public func slice(tokens range: Range<Int>) throws(KVError) -> HeadTensor {
    guard range.lowerBound >= 0, range.upperBound <= tokens else {
      throw KVError(.shapeMismatch, "tokens \(range) reach beyond the \(tokens) tokens of the tensor")
    }
    var copy: [Float] = []
    copy.reserveCapacity(heads * range.count * dim)
    for head in 0..<heads {
      let start = (head * tokens + range.lowerBound) * dim
      copy += elements[start..<start + range.count * dim]
    }
    return HeadTensor(unchecked: copy, heads: heads, tokens: range.count, dim: dim)
  }

  /// - Throws: `nonFinite` that names `what`, the head and the token of the first NaN or infinity.
  /// - Complexity: O(elements).
  public func checkFinite(_ what: String) throws(KVError) {
    guard let index = elements.firstIndex(where: { !$0.isFinite }) else { return }
    let row = index / dim
    throw KVError(
      .nonFinite,
      "\(what): expected finite numbers, found \(elements[index]) in channel \(index % dim) of row "
        + "\(row % tokens)", head: row / tokens, position: row % tokens)
  }

  private func place(_ head: Int, _ token: Int) -> Int {
    precondition(
      head >= 0 && head < heads && token >= 0 && token < tokens,
      "row (\(head), \(token)) of a tensor of \(heads) heads x \(tokens) tokens")
    return (head * tokens + token) * dim
  }

  private func check(_ channel: Int) -> Int {
    precondition(channel >= 0 && channel < dim, "channel \(channel) of \(dim)")
    return channel
  }

  /// Replaces one row, rounding to nearest.
  mutating func setRow(head: Int, token: Int, _ row: [Double]) {
    let start = place(head, token)
    for c in 0..<dim { elements[start + c] = Float(row[c]) }
  }
}
