/// A read-only view of heads x tokens rows that somebody else has encoded: an engine's own quantized cache. Nothing is
/// copied or converted.
///
/// ```
/// row (h, t) = base[h * headStride + t * tokenStride ..< + rowBytes]
/// ```
///
/// Rows carry all that is needed to read them: ggml's blocks, codes with a scale that was given, dense elements. The view
/// cannot outlive the memory: it depends on the `Span` it was made from.
public struct EncodedRows: ~Escapable {
  public let encoding: RowEncoding
  public let heads: Int
  public let tokens: Int
  public let dim: Int
  /// Bytes from one head to the next.
  public let headStride: Int
  /// Bytes from one token to the next.
  public let tokenStride: Int
  let base: UnsafeRawPointer

  /// A contiguous block in one of the two usual layouts.
  ///
  /// - Throws: `shapeMismatch` when the span does not hold exactly these rows, `unsupported` for an encoding whose scales
  ///   lie apart from the rows, or that does not have rows of `dim` channels.
  @_lifetime(copy bytes)
  public init(
    _ bytes: Span<UInt8>, _ encoding: RowEncoding, heads: Int, tokens: Int, dim: Int, layout: TensorLayout = .headMajor
  ) throws(KVError) {
    let row = try EncodedRows.rowBytes(encoding, heads: heads, tokens: tokens, dim: dim)
    let (rows, overflow) = heads.multipliedReportingOverflow(by: tokens)
    let (wanted, overflow2) = rows.multipliedReportingOverflow(by: row)
    guard !overflow, !overflow2, wanted == bytes.count else {
      throw KVError(
        .shapeMismatch,
        "\(heads) heads x \(tokens) tokens x \(row) bytes (\(dim) channels as \(encoding)) expected; the span holds "
          + "\(bytes.count)")
    }
    let strides = layout == .headMajor ? (tokens * row, row) : (row, heads * row)
    try self.init(
      bytes, encoding, heads: heads, tokens: tokens, dim: dim, headStride: strides.0, tokenStride: strides.1)
  }

  /// A strided block, its strides in bytes.
  ///
  /// - Throws: as above, and `shapeMismatch` when a stride is negative or the last row lies outside the span.
  @_lifetime(copy bytes)
  public init(
    _ bytes: Span<UInt8>, _ encoding: RowEncoding, heads: Int, tokens: Int, dim: Int, headStride: Int,
    tokenStride: Int
  ) throws(KVError) {
    let row = try EncodedRows.rowBytes(encoding, heads: heads, tokens: tokens, dim: dim)
    if heads > 0, tokens > 0 {
      let (h, o1) = (heads - 1).multipliedReportingOverflow(by: headStride)
      let (t, o2) = (tokens - 1).multipliedReportingOverflow(by: tokenStride)
      let (sum, o3) = h.addingReportingOverflow(t)
      let (end, o4) = sum.addingReportingOverflow(row)
      guard headStride >= 0, tokenStride >= 0, !o1, !o2, !o3, !o4, end <= bytes.count else {
        throw KVError(
          .shapeMismatch,
          "strides of \(headStride) and \(tokenStride) bytes reach beyond the \(bytes.count) of the span "
            + "(\(heads) heads x \(tokens) tokens x \(row) bytes)")
      }
    }
    let base = bytes.withUnsafeBytes { $0.baseAddress } ?? EncodedRows.nowhere
    let view = EncodedRows(
      unsafeBase: base, encoding, heads: heads, tokens: tokens, dim: dim, headStride: headStride,
      tokenStride: tokenStride)
    self = _overrideLifetime(view, copying: bytes)
  }

  @_lifetime(immortal)
  private init(
    unsafeBase base: UnsafeRawPointer, _ encoding: RowEncoding, heads: Int, tokens: Int, dim: Int, headStride: Int,
    tokenStride: Int
  ) {
    self.base = base
    self.encoding = encoding
    self.heads = heads
    self.tokens = tokens
    self.dim = dim
    self.headStride = headStride
    self.tokenStride = tokenStride
  }

  /// A never-read address for views of nothing.
  nonisolated(unsafe) private static let nowhere = UnsafeRawPointer(
    UnsafeMutableRawPointer.allocate(byteCount: 1, alignment: 1))

  private static func rowBytes(
    _ encoding: RowEncoding, heads: Int, tokens: Int, dim: Int
  ) throws(KVError) -> Int {
    guard heads >= 0, tokens >= 0, (1...4096).contains(dim) else {
      throw KVError(.shapeMismatch, "rows of \(heads) heads x \(tokens) tokens x \(dim) channels do not exist")
    }
    guard encoding.carriesScales else {
      throw KVError(
        .unsupported,
        "the scales of \(encoding) lie apart from its rows; only ggml's blocks, codes with a scale that was given and "
          + "dense rows can be taken over")
    }
    try encoding.validate(dim: dim, of: "encoded rows")
    return encoding.payloadBytes(rows: 1, dim: dim)
  }

  package var rowBytes: Int { encoding.payloadBytes(rows: 1, dim: dim) }

  package func row(head: Int, token: Int) -> UnsafeRawPointer { base + head * headStride + token * tokenStride }

  /// The first row that holds something that is not finite.
  func firstNonfinite() -> (head: Int, token: Int, byte: Int)? {
    for head in 0..<heads {
      for token in 0..<tokens {
        let bytes = UnsafeRawBufferPointer(start: row(head: head, token: token), count: rowBytes)
        if let byte = encoding.firstNonfinite(bytes) { return (head, token, byte) }
      }
    }
    return nil
  }
}

/// The rows of one KV head, as they are stored.
public struct EncodedContents: Hashable, Sendable {
  /// Absolute token positions, ascending.
  public var positions: [Int]
  public var keyEncoding: RowEncoding
  public var valueEncoding: RowEncoding
  /// One row after the other.
  public var keys: [UInt8]
  public var values: [UInt8]
}
