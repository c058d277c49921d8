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
    /// All rows of a prompt, or that a policy leaves at once; of those that arrive later whole blocks of this many.
    case batches(Int)
  }

  package let window: ElementType
  package let body: RowEncoding?
  package let flush: Flush
  /// What is done to rows before they are encoded.
  package private(set) var map = MapFormat.none
  /// The largest magnitude of an element, where what rows become later holds less than they do now.
  package private(set) var limit: Float?

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

  /// The same rows rotated before they are encoded, and before they are scaled. The window stays as it is.
  ///
  /// - Throws: `invalidOption` for a side that is not encoded.
  public func rotated(_ rotation: Rotation) throws(KVError) -> SideFormat {
    guard body != nil else {
      throw KVError(.invalidOption, "only rows that are encoded can be rotated; these stay \(window.name)")
    }
    guard map.scaling != .balanced else {
      throw KVError(.invalidOption, "rows balanced against unrotated queries cannot be rotated")
    }
    var result = self
    result.map.rotation = rotation
    return result
  }

  /// The same rows with their channels in another order, behind a rotation: channel `order[c]` becomes channel c.
  ///
  /// - Throws: `invalidOption` for a side that is not encoded, and for what is no permutation.
  package func reordered(_ order: [Int]) throws(KVError) -> SideFormat {
    guard body != nil else {
      throw KVError(.invalidOption, "only rows that are encoded can be reordered; these stay \(window.name)")
    }
    var seen = [Bool](repeating: false, count: order.count)
    for channel in order {
      guard order.indices.contains(channel), !seen[channel] else {
        throw KVError(
          .invalidOption,
          "an order of \(order.count) channels names each of them once; \(channel) is not among them or twice")
      }
      seen[channel] = true
    }
    var result = self
    result.map.order = order.map { UInt32($0) }
    return result
  }

  /// The same rows divided by a factor per channel before they are encoded.
  ///
  /// - Throws: `invalidOption` for a side that is not encoded, and for a balanced side that is rotated.
  public func scaled(_ scaling: ChannelScaling) throws(KVError) -> SideFormat {
    guard body != nil else {
      throw KVError(.invalidOption, "only rows that are encoded can be scaled; these stay \(window.name)")
    }
    guard map.scaling == .none || map.scaling == scaling else {
      throw KVError(.invalidOption, "these rows are scaled per channel already")
    }
    guard scaling != .balanced || map.rotation == nil else {
      throw KVError(.invalidOption, "rows balanced against unrotated queries cannot be rotated")
    }
    var result = self
    result.map.scaling = scaling
    return result
  }

  /// The same rows, no element of which is larger than what they will be held in later.
  package func limited(to range: ElementRange) -> SideFormat {
    var result = self
    result.limit = min(limit ?? .greatestFiniteMagnitude, range.largest)
    return result
  }

  /// What rows of `dim` channels must be for this format.
  package func validate(dim: Int, of what: String) throws(KVError) {
    try map.rotation?.validate(dim: dim)
    if let order = map.order, order.count != dim {
      throw KVError(.shapeMismatch, "an order of \(order.count) channels was given for \(what) of \(dim)")
    }
    try body?.validate(dim: dim, of: what)
  }

  /// All rows of a prompt encoded at once; later ones dense until `count` are complete, or until the policy chooses.
  ///
  /// A batch that would take more memory encoded than dense waits for more rows.
  ///
  /// - Throws: `invalidOption` when the encoding needs a number of rows of its own, or `count` is not positive.
  public static func batches(
    of count: Int, window: ElementType, body: RowEncoding
  ) throws(KVError) -> SideFormat {
    guard count > 0, body.rowsPerUnit == 1, body.kind != .dense else {
      throw KVError(
        .invalidOption, "batches need a positive count and an encoding of single rows; got \(count) and \(body)")
    }
    return SideFormat(window: window, body: body, flush: .batches(count))
  }

  /// Batches with one scale and minimum per channel over all rows of the batch.
  ///
  /// - Throws: `invalidOption` unless bits is 2, 3, 4 or 8 and `batch` positive.
  public static func channelCodes(
    bits: Int, batch: Int, window: ElementType, metadata: ElementType = .f16
  ) throws(KVError) -> SideFormat {
    try .batches(of: batch, window: window, body: .codes(bits: bits, metadata: metadata)).scaled(.range)
  }

  /// The smallest range among everything that will hold a row: f16 minima overflow as f16 rows do, and a rotation can
  /// gather a row in one channel.
  package func range(dim: Int) -> ElementRange {
    if let limit { return .magnitude(min(limit, ownRange(dim: dim).largest)) }
    return ownRange(dim: dim)
  }

  /// The largest magnitude of an element that rows may come with.
  package func largest(dim: Int) -> Float { min(range(dim: dim).largest, window.largestFinite) }

  private func ownRange(dim: Int) -> ElementRange {
    guard let body, body.kind != .scaledFixed else { return .window }
    guard let rotation = map.rotation else { return body.type == .f16 || window == .f16 ? .half : .halfOfFloat }
    let growth = Float(rotation.block(dim: dim)).squareRoot()
    let largest = body.type == .f16 ? body.type.largestFinite : Float.greatestFiniteMagnitude / 2
    return .magnitude(min(largest / growth, window.largestFinite))
  }

  /// Rows of room a new tail extent has at least, so that single appends do not allocate each time.
  package var growth: Int {
    switch flush {
    case .blocks(let count), .batches(let count): count
    default: 64
    }
  }

  /// Rows whose numbers per channel are found together.
  package var batch: Int {
    if case .batches(let count) = flush { count } else { Int.max }
  }

  /// Tail rows to encode when `tail` rows are dense.
  ///
  /// - Parameter batchEnds: no more rows belong together with those there are.
  package func rowsToFlush(tail: Int, dim: Int, batchEnds: Bool) -> Int {
    switch flush {
    case .never: 0
    case .batches(let count):
      batchEnds && encodedBatchBytes(rows: tail, dim: dim) < tail * dim * window.byteCount
        ? tail : tail / count * count
    case .blocks(let count): tail / count * count
    case .keepingNewest(let count): max(0, tail - count)
    }
  }

  /// Bytes of the numbers per channel that one map has.
  private func numberBytes(dim: Int) -> Int { map.scaling.numbers * dim * (body?.type.byteCount ?? 0) }

  private func encodedBatchBytes(rows: Int, dim: Int) -> Int {
    (body?.bytes(rows: rows, dim: dim) ?? 0) + numberBytes(dim: dim)
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
    case .blocks, .batches: rows + growth
    case .keepingNewest: max(2 * rows, rows + 2 * growth)
    }
  }

  /// The most bytes that many settled rows of one head take, with the room a growing window is given.
  package func bytes(rows: Int, dim: Int) -> Int {
    let tail: Int
    switch flush {
    case .never: tail = rows
    case .blocks(let count), .batches(let count): tail = min(rows, count)
    case .keepingNewest(let count): tail = min(rows, count + 1)
    }
    let dense = RowEncoding.dense(window).bytes(rows: tailCapacity(rows: tail), dim: dim)
    guard let body else { return dense }
    let unit = body.rowsPerUnit
    var maps = 1
    if case .batches(let count) = flush, !map.scaling.isShared { maps = rows / count + 1 }
    return dense + body.bytes(rows: (rows - tail + unit - 1) / unit * unit + (unit == 1 ? growth : 0), dim: dim)
      + maps * numberBytes(dim: dim)
  }
}
