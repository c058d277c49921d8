public import KVCore

/// How much each KV head of a model needs its whole context, as DuoAttention's training leaves it.
///
/// Text form: one line a layer, one number in 0...1 a KV head, separated by tabs, spaces or commas; `#` begins a comment.
public struct HeadTable: Sendable, Hashable {
  /// [layer][KV head].
  public let scores: [[Double]]

  /// - Throws: `invalidOption` for tables without a number, ragged ones, and numbers outside 0...1.
  public init(_ scores: [[Double]]) throws(KVError) {
    guard let first = scores.first, !first.isEmpty else {
      throw KVError(.invalidOption, "a table of heads holds at least one layer of one head; got none")
    }
    for (layer, row) in scores.enumerated() {
      guard row.count == first.count else {
        throw KVError(
          .invalidOption, "a table of heads has \(first.count) numbers a layer, as in its first; got \(row.count)",
          layer: layer)
      }
      if let head = row.firstIndex(where: { !($0 >= 0 && $0 <= 1) }) {
        throw KVError(
          .invalidOption, "numbers of a table of heads lie in 0...1; got \(row[head])", layer: layer, head: head)
      }
    }
    self.scores = scores
  }

  /// Most bytes of a text, and most numbers of a line and of lines.
  public static let maximumBytes = 1 << 20
  private static let maximumCount = 1 << 12

  /// A table from its text form. Numbers within 1e-3 outside 0...1 count as its ends, as the authors clip them.
  ///
  /// - Throws: `syntax` with the byte where it stopped; as ``init(_:)``.
  public init(parsing text: String) throws(KVError) {
    let bytes = Array(text.utf8)
    guard bytes.count <= HeadTable.maximumBytes else {
      throw KVError(
        .syntax, "a table of heads has at most \(HeadTable.maximumBytes) bytes; got \(bytes.count)",
        offset: HeadTable.maximumBytes)
    }
    var rows: [[Double]] = []
    var at = 0
    while at < bytes.count {
      var row: [Double] = []
      line: while at < bytes.count {
        switch bytes[at] {
        case 0x0A, 0x0D: break line
        case 0x20, 0x09, 0x2C: at += 1
        case 0x23: while at < bytes.count, bytes[at] != 0x0A { at += 1 }
        default:
          let start = at
          while at < bytes.count, !([0x20, 0x09, 0x2C, 0x0A, 0x0D, 0x23] as [UInt8]).contains(bytes[at]) { at += 1 }
          let word = String(decoding: bytes[start..<min(at, start + 64)], as: UTF8.self)
          guard at - start < 64, let number = Double(word), number >= -1e-3, number <= 1.001 else {
            throw KVError(
              .syntax, "expected a number in 0...1 of a table of heads, found \"\(word)\"", offset: start)
          }
          row.append(min(max(number, 0), 1))
          guard row.count <= HeadTable.maximumCount else {
            throw KVError(
              .syntax, "a line of a table of heads has at most \(HeadTable.maximumCount) numbers", offset: start)
          }
        }
      }
      at += 1
      if !row.isEmpty { rows.append(row) }
      guard rows.count <= HeadTable.maximumCount else {
        throw KVError(.syntax, "a table of heads has at most \(HeadTable.maximumCount) lines", offset: at - 1)
      }
    }
    try self.init(rows)
  }

  /// A table from a file.
  ///
  /// - Throws: `inputOutput`; as ``init(parsing:)``.
  public init(contentsOf path: String) throws(KVError) {
    do throws(KVError) {
      try self.init(parsing: readText(path, atMost: HeadTable.maximumBytes))
    } catch {
      var error = error
      if error.code != .inputOutput { error.message = "\(path): \(error.message)" }
      throw error
    }
  }

  /// Which heads need only sinks and the newest tokens: the lowest of all, `share` of them, rounded to the nearest. Of equal
  /// ones those of later layers and heads.
  public func streaming(share: Double) -> [[Bool]] {
    let columns = scores[0].count
    let flat = scores.flatMap(\.self)
    let count = min(flat.count, max(0, Int((share * Double(flat.count)).rounded(.toNearestOrEven))))
    let order = flat.indices.sorted { flat[$0] != flat[$1] ? flat[$0] < flat[$1] : $0 > $1 }
    var result = scores.map { $0.map { _ in false } }
    for index in order.prefix(count) { result[index / columns][index % columns] = true }
    return result
  }

  /// Which heads score below a threshold.
  public func streaming(below threshold: Double) -> [[Bool]] { scores.map { $0.map { $0 < threshold } } }
}
