/// The order of the two outer axes of a contiguous [head, token, dim] or [token, head, dim] block.
public enum TensorLayout: Sendable, Hashable {
  /// `[head, token, dim]`: the tokens of one head lie together.
  case headMajor
  /// `[token, head, dim]`: the heads of one token lie together, as a projection's output does.
  case tokenMajor
}

/// A read-only view of heads x tokens x dim elements in somebody else's memory. Nothing is copied.
///
/// The channel axis is contiguous; the head and token axes have any stride, so that both usual layouts and slices of
/// a larger buffer (an engine's ring of KV pages, a fused QKV projection) are views.
///
/// ```
/// element (h, t, c) = base[h * headStride + t * tokenStride + c]
/// ```
///
/// The view cannot outlive the memory: it depends on the `Span` it was made from.
public struct TensorView: ~Escapable {
  public let type: ElementType
  public let heads: Int
  public let tokens: Int
  public let dim: Int
  /// Elements from one head to the next.
  public let headStride: Int
  /// Elements from one token to the next.
  public let tokenStride: Int
  package let base: UnsafeRawPointer

  @_lifetime(immortal)
  package init(
    unsafeBase base: UnsafeRawPointer, type: ElementType, heads: Int, tokens: Int, dim: Int, headStride: Int,
    tokenStride: Int
  ) {
    self.base = base
    self.type = type
    self.heads = heads
    self.tokens = tokens
    self.dim = dim
    self.headStride = headStride
    self.tokenStride = tokenStride
  }

  /// Memory that the cache's backend reads in place: device, managed or pinned memory of the context it was made for.
  ///
  /// - Parameters:
  ///   - address: of element (0, 0, 0). Valid, and not written, while the view is used.
  ///   - headStride: elements from one head to the next; nil: heads lie one behind the other.
  ///   - tokenStride: elements from one token to the next; nil: `dim`.
  /// - Throws: `shapeMismatch` for sizes or strides that are negative.
  @_lifetime(immortal)
  public init(
    unsafeDeviceAddress address: UnsafeRawPointer, type: ElementType, heads: Int, tokens: Int, dim: Int,
    headStride: Int? = nil, tokenStride: Int? = nil
  ) throws(KVError) {
    let strides = try checkStrides(heads: heads, tokens: tokens, dim: dim, headStride, tokenStride)
    self.init(
      unsafeBase: address, type: type, heads: heads, tokens: tokens, dim: dim, headStride: strides.0,
      tokenStride: strides.1)
  }

  /// A contiguous block in one of the two usual layouts.
  ///
  /// - Throws: `shapeMismatch` when the span does not hold exactly `heads * tokens * dim` elements.
  @_lifetime(copy elements)
  public init<Scalar: CacheScalar>(
    _ elements: Span<Scalar>, heads: Int, tokens: Int, dim: Int, layout: TensorLayout = .headMajor
  ) throws(KVError) {
    let strides = try contiguousStrides(
      count: elements.count, heads: heads, tokens: tokens, dim: dim, layout: layout)
    self.init(elements, heads: heads, tokens: tokens, dim: dim, checked: strides)
  }

  /// A strided block: element (h, t, c) is `elements[h * headStride + t * tokenStride + c]`.
  ///
  /// - Throws: `shapeMismatch` when a stride is negative or the last element lies outside the span.
  @_lifetime(copy elements)
  public init<Scalar: CacheScalar>(
    _ elements: Span<Scalar>, heads: Int, tokens: Int, dim: Int, headStride: Int, tokenStride: Int
  ) throws(KVError) {
    try checkStrides(
      count: elements.count, heads: heads, tokens: tokens, dim: dim, headStride: headStride,
      tokenStride: tokenStride)
    self.init(elements, heads: heads, tokens: tokens, dim: dim, checked: (headStride, tokenStride))
  }

  /// bfloat16 bit patterns in one of the two usual layouts.
  @_lifetime(copy bits)
  public init(
    bfloat16 bits: Span<UInt16>, heads: Int, tokens: Int, dim: Int, layout: TensorLayout = .headMajor
  ) throws(KVError) {
    let strides = try contiguousStrides(count: bits.count, heads: heads, tokens: tokens, dim: dim, layout: layout)
    let base = bits.withUnsafeBytes { $0.baseAddress ?? emptyBase }
    let view = TensorView(
      unsafeBase: base, type: .bf16, heads: heads, tokens: tokens, dim: dim, headStride: strides.0,
      tokenStride: strides.1)
    self = _overrideLifetime(view, copying: bits)
  }

  @_lifetime(copy elements)
  private init<Scalar: CacheScalar>(
    _ elements: Span<Scalar>, heads: Int, tokens: Int, dim: Int, checked: (Int, Int)
  ) {
    let base = elements.withUnsafeBytes { $0.baseAddress ?? emptyBase }
    let view = TensorView(
      unsafeBase: base, type: Scalar.elementType, heads: heads, tokens: tokens, dim: dim, headStride: checked.0,
      tokenStride: checked.1)
    self = _overrideLifetime(view, copying: elements)
  }

  /// Bytes between the rows of one head.
  package var tokenStrideBytes: Int { tokenStride * type.byteCount }

  /// Address of row (head, token).
  package func row(head: Int, token: Int) -> UnsafeRawPointer {
    base + (head * headStride + token * tokenStride) * type.byteCount
  }

  /// The tokens of `range` only.
  @_lifetime(copy self)
  package func slice(tokens range: Range<Int>) -> TensorView {
    let view = TensorView(
      unsafeBase: row(head: 0, token: range.lowerBound), type: type, heads: heads, tokens: range.count, dim: dim,
      headStride: headStride, tokenStride: tokenStride)
    return _overrideLifetime(view, copying: self)
  }
}

/// A writable f32 view of heads x tokens x dim elements in somebody else's memory: where attention puts its output.
public struct MutableTensorView: ~Copyable, ~Escapable {
  public let heads: Int
  public let tokens: Int
  public let dim: Int
  public let headStride: Int
  public let tokenStride: Int
  package let base: UnsafeMutablePointer<Float>

  /// Memory that the cache's backend writes in place; as ``TensorView``'s form of the same name.
  ///
  /// - Parameters:
  ///   - address: of element (0, 0, 0).
  ///   - headStride: elements from one head to the next; nil: heads lie one behind the other.
  ///   - tokenStride: elements from one token to the next; nil: `dim`.
  /// - Throws: `shapeMismatch` for sizes or strides that are negative.
  @_lifetime(immortal)
  public init(
    unsafeDeviceAddress address: UnsafeMutablePointer<Float>, heads: Int, tokens: Int, dim: Int,
    headStride: Int? = nil, tokenStride: Int? = nil
  ) throws(KVError) {
    (self.headStride, self.tokenStride) = try checkStrides(
      heads: heads, tokens: tokens, dim: dim, headStride, tokenStride)
    base = address
    self.heads = heads
    self.tokens = tokens
    self.dim = dim
  }

  /// A contiguous block in one of the two usual layouts.
  ///
  /// - Throws: `shapeMismatch` when the span does not hold exactly `heads * tokens * dim` elements.
  @_lifetime(&elements)
  public init(
    _ elements: inout MutableSpan<Float>, heads: Int, tokens: Int, dim: Int, layout: TensorLayout = .headMajor
  ) throws(KVError) {
    let strides = try contiguousStrides(
      count: elements.count, heads: heads, tokens: tokens, dim: dim, layout: layout)
    let base = elements.withUnsafeMutableBufferPointer { $0.baseAddress ?? emptyMutableBase }
    self.base = base
    self.heads = heads
    self.tokens = tokens
    self.dim = dim
    (self.headStride, self.tokenStride) = strides
  }
}

/// A never-read address for views of zero elements.
nonisolated(unsafe) private let emptyMutableBase = UnsafeMutablePointer<Float>.allocate(capacity: 1)
nonisolated(unsafe) private let emptyBase = UnsafeRawPointer(emptyMutableBase)

private func contiguousStrides(
  count: Int, heads: Int, tokens: Int, dim: Int, layout: TensorLayout
) throws(KVError) -> (Int, Int) {
  guard heads >= 0, tokens >= 0, dim > 0 else {
    throw KVError(.shapeMismatch, "a tensor of \(heads) heads x \(tokens) tokens x \(dim) channels does not exist")
  }
  let (rows, overflow1) = heads.multipliedReportingOverflow(by: tokens)
  let (total, overflow2) = rows.multipliedReportingOverflow(by: dim)
  guard !overflow1, !overflow2, total == count else {
    throw KVError(
      .shapeMismatch,
      "\(heads) heads x \(tokens) tokens x \(dim) channels need that many elements; the span holds \(count)")
  }
  return layout == .headMajor ? (tokens * dim, dim) : (dim, heads * dim)
}

private func checkStrides(
  heads: Int, tokens: Int, dim: Int, _ headStride: Int?, _ tokenStride: Int?
) throws(KVError) -> (Int, Int) {
  let own = tokenStride ?? dim
  let strides = (headStride ?? tokens * own, own)
  guard heads >= 0, tokens >= 0, dim > 0, strides.0 >= 0, strides.1 >= 0 else {
    throw KVError(
      .shapeMismatch,
      "heads \(heads), tokens \(tokens), dim \(dim), strides \(strides.0) and \(strides.1) must not be negative")
  }
  return strides
}

private func checkStrides(
  count: Int, heads: Int, tokens: Int, dim: Int, headStride: Int, tokenStride: Int
) throws(KVError) {
  guard heads >= 0, tokens >= 0, dim > 0, headStride >= 0, tokenStride >= 0 else {
    throw KVError(
      .shapeMismatch,
      "heads \(heads), tokens \(tokens), dim \(dim), strides \(headStride) and \(tokenStride) must not be negative")
  }
  if heads == 0 || tokens == 0 { return }
  let (h, o1) = (heads - 1).multipliedReportingOverflow(by: headStride)
  let (t, o2) = (tokens - 1).multipliedReportingOverflow(by: tokenStride)
  let (sum, o3) = h.addingReportingOverflow(t)
  let (end, o4) = sum.addingReportingOverflow(dim)
  guard !o1, !o2, !o3, !o4, end <= count else {
    throw KVError(
      .shapeMismatch,
      "strides \(headStride) and \(tokenStride) reach beyond the \(count) elements of the span "
        + "(\(heads) heads x \(tokens) tokens x \(dim) channels)")
  }
}
