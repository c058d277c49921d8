/// How one side (keys or values) of a tier is held: a dense window of the newest rows, and an encoded body for the
/// rest.
public struct SideFormat: Hashable, Sendable {
  /// When dense rows move into the body.
  package enum Flush: Hashable, Sendable {
    /// Everything stays dense.
    case never
    /// Whole blocks of this many rows as soon as they are complete (KIVI keys).
    case blocks(Int)
    /// Everything but the newest rows, row by row (KIVI values).
    case keepingNewest(Int)
  }

  package let window: ElementType
  package let body: RowEncoding?
  package let flush: Flush

  private init(window: ElementType, body: RowEncoding?, flush: Flush) {
    self.window = window
    self.body = body
    self.flush = flush
  }

  /// All rows dense.
  public static func dense(_ type: ElementType) -> SideFormat {
    SideFormat(window: type, body: nil, flush: .never)
  }

  /// Dense until `count` rows are complete, then all of them are encoded at once.
  ///
  /// - Throws: `invalidOption` unless `count` is a positive multiple of the rows that the encoding needs together.
  public static func blocks(
    of count: Int, window: ElementType, body: RowEncoding
  ) throws(KVError) -> SideFormat {
    guard count > 0, count % body.rowsPerUnit == 0, body.kind != .dense else {
      throw KVError(
        .invalidOption,
        "blocks must be a positive multiple of the group of \(body.rowsPerUnit) tokens; got \(count)")
    }
    return SideFormat(window: window, body: body, flush: .blocks(count))
  }

  /// The newest `count` rows dense, older ones encoded one by one.
  ///
  /// - Throws: `invalidOption` when the encoding needs more than one row at a time, or `count` is negative.
  public static func newest(
    _ count: Int, window: ElementType, body: RowEncoding
  ) throws(KVError) -> SideFormat {
    guard count >= 0, body.rowsPerUnit == 1, body.kind != .dense else {
      throw KVError(
        .invalidOption,
        "a sliding window of \(count) rows needs an encoding of single rows, not \(body)")
    }
    return SideFormat(window: window, body: body, flush: .keepingNewest(count))
  }

  /// The smallest range among everything that will hold a row: f16 minima overflow as f16 rows do.
  package var range: ElementRange {
    guard let body else { return .window }
    return body.type == .f16 || window == .f16 ? .half : .halfOfFloat
  }

  /// Rows of room a new tail extent has at least, so that single appends do not allocate each time.
  package var growth: Int {
    switch flush {
    case .blocks(let count): count
    default: 64
    }
  }

  /// Tail rows to encode when `tail` rows are dense.
  package func rowsToFlush(tail: Int) -> Int {
    switch flush {
    case .never: 0
    case .blocks(let count): tail / count * count
    case .keepingNewest(let count): max(0, tail - count)
    }
  }

  /// Dense rows that take no more memory than one unit of the body: a unit with fewer live rows is not worth keeping.
  package func thawThreshold(dim: Int) -> Int {
    guard let body, body.rowsPerUnit > 1 else { return 0 }
    return body.bytes(rows: body.rowsPerUnit, dim: dim) / (dim * window.byteCount)
  }

  /// The most rows of memory a settled tail is left with: blocks fill one extent after the other, a sliding window
  /// lies across the ends of two.
  package func tailCapacity(rows: Int) -> Int {
    switch flush {
    case .never: max(rows, growth) + growth
    case .blocks: rows + growth
    case .keepingNewest: max(2 * rows, rows + 2 * growth)
    }
  }

  /// The most bytes that many settled rows of one head take, with the room a growing window is given.
  package func bytes(rows: Int, dim: Int) -> Int {
    let tail: Int
    switch flush {
    case .never: tail = rows
    case .blocks(let count): tail = min(rows, count)
    case .keepingNewest(let count): tail = min(rows, count + 1)
    }
    let dense = RowEncoding.dense(window).bytes(rows: tailCapacity(rows: tail), dim: dim)
    guard let body else { return dense }
    let unit = body.rowsPerUnit
    return dense + body.bytes(rows: (rows - tail + unit - 1) / unit * unit + (unit == 1 ? growth : 0), dim: dim)
  }
}
