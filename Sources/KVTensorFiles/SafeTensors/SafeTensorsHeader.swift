internal import KVCore

/// The parsed and checked header of a safetensors file.
///
/// ```
/// ┌ header length n, u64 little end first ┬ JSON, n bytes ┬ tensor data, no gaps, no overlaps ┐
/// 0                                       8               8 + n                            file size
/// ```
struct SafeTensorsHeader: Sendable {
  /// The format's own limit on the JSON text.
  static let longestHeader = 100_000_000

  var tensors: [String: SafeTensorsEntry] = [:]
  var metadata: [String: String] = [:]

  /// One tensor as it stands in the header, before the tensors are held against each other.
  private struct Item {
    var name: String
    var entry: SafeTensorsEntry
    /// Where its key stands in the file.
    var keyOffset: Int
  }

  /// The header's length, from the file's first 8 bytes.
  static func length(prefix: [UInt8], fileSize: Int) throws(KVError) -> Int {
    guard fileSize >= 8, prefix.count >= 8 else {
      throw KVError(
        .corruptFile, "a safetensors file begins with 8 bytes of header length; this one ends after \(fileSize)",
        offset: 0)
    }
    let length = prefix[..<8].reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
    guard length <= UInt64(longestHeader) else {
      throw KVError(
        .corruptFile,
        "the header claims \(length) bytes; the format allows \(longestHeader). Is this a safetensors file?", offset: 0)
    }
    guard Int(length) <= fileSize - 8 else {
      throw KVError(
        .corruptFile, "the header claims \(length) bytes; only \(fileSize - 8) follow. The file is truncated",
        offset: 0)
    }
    return Int(length)
  }

  init(_ json: [UInt8], fileSize: Int) throws(KVError) {
    let dataStart = 8 + json.count
    guard json.first == UInt8(ascii: "{") else {
      throw KVError(.corruptFile, "a safetensors header begins with '{'; this one does not", offset: 8)
    }
    var scanner = HeaderScanner(json, base: 8)
    var items: [Item] = []
    var metadata: [String: String] = [:]
    try scanner.object("the header") { (scanner, key, keyOffset) throws(KVError) in
      if key == "__metadata__" {
        try scanner.object("__metadata__") { (scanner, key, _) throws(KVError) in
          metadata[key] = try scanner.string("__metadata__ value '\(HeaderScanner.excerpt(key))'")
        }
      } else {
        let entry = try SafeTensorsHeader.entry(key, &scanner, keyOffset, dataStart: dataStart, fileSize: fileSize)
        items.append(Item(name: key, entry: entry, keyOffset: keyOffset))
      }
    }
    try scanner.end()
    try SafeTensorsHeader.checkTiling(items, dataStart: dataStart, fileSize: fileSize)
    self.metadata = metadata
    for item in items {
      // String equality is by canonical equivalence, so names distinct in bytes can still meet here.
      guard tensors.updateValue(item.entry, forKey: item.name) == nil else {
        throw KVError(
          .corruptFile, "the header holds two tensors called '\(HeaderScanner.excerpt(item.name))'",
          offset: item.keyOffset)
      }
    }
  }

  private static func entry(
    _ name: String, _ scanner: inout HeaderScanner, _ keyOffset: Int, dataStart: Int, fileSize: Int
  ) throws(KVError) -> SafeTensorsEntry {
    let label = "tensor '\(HeaderScanner.excerpt(name))'"
    var type: SafeTensorsType?
    var shape: [Int]?
    var offsets: [Int]?
    try scanner.object(label) { (scanner, field, _) throws(KVError) in
      switch field {
      case "dtype":
        let offset = scanner.offset
        let text = try scanner.string("\(label): dtype")
        guard let known = SafeTensorsType(name: text) else {
          let names = SafeTensorsType.all.map(\.name).joined(separator: " ")
          throw KVError(
            .corruptFile, "\(label): dtype must be one of \(names), found '\(HeaderScanner.excerpt(text))'",
            offset: offset)
        }
        type = known
      case "shape": shape = try scanner.naturals("\(label): shape")
      case "data_offsets": offsets = try scanner.naturals("\(label): data_offsets")
      default: try scanner.skipValue()
      }
    }
    guard let type, let shape, let offsets else {
      let missing = [("dtype", type == nil), ("shape", shape == nil), ("data_offsets", offsets == nil)]
      let names = missing.filter(\.1).map(\.0).joined(separator: ", ")
      throw KVError(
        .corruptFile, "\(label) needs dtype, shape and data_offsets; missing: \(names)", offset: keyOffset)
    }
    guard offsets.count == 2, offsets[0] <= offsets[1] else {
      throw KVError(
        .corruptFile, "\(label): data_offsets must be [begin, end] with begin <= end, found \(excerpt(offsets))",
        offset: keyOffset)
    }
    guard offsets[1] <= fileSize - dataStart else {
      throw KVError(
        .corruptFile,
        "\(label): data_offsets \(offsets) reach beyond the \(fileSize - dataStart) bytes of data in the file",
        offset: keyOffset)
    }
    guard let expected = type.byteCount(shape: shape) else {
      throw KVError(
        .corruptFile, "\(label): \(type) elements of shape \(excerpt(shape)) do not make a countable number of bytes",
        offset: keyOffset)
    }
    guard expected == offsets[1] - offsets[0] else {
      throw KVError(
        .corruptFile,
        "\(label): \(type) elements of shape \(excerpt(shape)) take \(expected) bytes, "
          + "data_offsets \(offsets) give \(offsets[1] - offsets[0])",
        offset: keyOffset)
    }
    return SafeTensorsEntry(
      type: type, shape: shape, byteRange: dataStart + offsets[0]..<dataStart + offsets[1])
  }

  /// The tensors must cover the data once: no overlap, no gap, nothing after the last.
  private static func checkTiling(_ items: [Item], dataStart: Int, fileSize: Int) throws(KVError) {
    let ordered = items.sorted {
      ($0.entry.byteRange.lowerBound, $0.entry.byteRange.upperBound, $0.keyOffset)
        < ($1.entry.byteRange.lowerBound, $1.entry.byteRange.upperBound, $1.keyOffset)
    }
    var end = dataStart
    var previous = "the start of the data"
    for item in ordered {
      let name = HeaderScanner.excerpt(item.name)
      let begin = item.entry.byteRange.lowerBound
      guard begin == end else {
        let problem =
          begin < end ? "overlaps by \(end - begin) bytes with" : "leaves a gap of \(begin - end) bytes after"
        throw KVError(
          .corruptFile, "tensor '\(name)' begins at byte \(begin) of the file and \(problem) \(previous)",
          offset: item.keyOffset)
      }
      end = item.entry.byteRange.upperBound
      previous = "tensor '\(name)'"
    }
    guard end == fileSize else {
      throw KVError(
        .corruptFile, "expected the file to end at byte \(end), after \(previous); it has \(fileSize) bytes",
        offset: end)
    }
  }

  private static func excerpt(_ numbers: [Int]) -> String {
    numbers.count <= 8 ? "\(numbers)" : "[\(numbers.prefix(8).map(String.init).joined(separator: ", ")), …]"
  }
}
