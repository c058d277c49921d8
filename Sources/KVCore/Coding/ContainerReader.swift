/// Reads a ``Container``. Opening checks header and table; a section is read and checked when it is asked for, so a
/// caller needs memory for one section at a time.
///
/// Errors are `corruptFile` and name the place: the header field or the section, and the offset in the file.
package struct ContainerReader: Sendable {
  package let flags: UInt32
  package let entries: [Container.Entry]
  private let source: any ByteSource
  private let places: [Key: Int]

  private struct Key: Hashable, Sendable {
    var tag: Container.Tag
    var index: UInt32
  }

  /// - Throws: `inputOutput` when the file cannot be read, `corruptFile` when it is no intact container.
  package init(path: String) throws(KVError) { try self.init(source: try FileSource(path: path)) }

  package init(bytes: [UInt8]) throws(KVError) { try self.init(source: MemorySource(bytes: bytes)) }

  private init(source: any ByteSource) throws(KVError) {
    self.source = source
    let fixed = try ContainerReader.take(
      source, 0..<Container.fixedHeaderSize + Container.checksumSize, "the header of a saved cache")
    var header = ByteReader(fixed, place: "header")
    guard try header.raw(8, "the magic") == Container.magic else {
      throw KVError(.corruptFile, "header: expected the magic of a saved cache; this is some other file", offset: 0)
    }
    let version = try header.u32("the version")
    guard version == Container.version else {
      throw KVError(
        .corruptFile,
        "header: expected format version \(Container.version); found \(version), written by another "
          + "version of this library or altered", offset: 8)
    }
    flags = try header.u32("the flags")
    let size = try header.u64("the file size")
    guard size == UInt64(source.count) else {
      throw KVError(
        .corruptFile, "header: expected a file of \(size) bytes; found \(source.count), so it is truncated or altered",
        offset: 16)
    }
    let sections = try header.u32("the section count")
    guard sections <= Container.maximumSections, Container.headerSize(sections: Int(sections)) <= source.count else {
      throw KVError(
        .corruptFile, "header: expected a table of sections within the file; found \(sections) sections", offset: 24)
    }
    let whole = try ContainerReader.take(source, 0..<Container.headerSize(sections: Int(sections)), "the table")
    let covered = whole.count - Container.checksumSize
    var tail = ByteReader(Array(whole[covered...]), baseOffset: covered, place: "header")
    let stored = try tail.u64("the header checksum")
    guard stored == XXHash64.hash(Array(whole[..<covered])) else {
      throw KVError(
        .corruptFile, "header: the checksum of header and table (bytes 0..<\(covered)) does not match", offset: covered)
    }
    var table = ByteReader(Array(whole[28..<covered]), baseOffset: 28, place: "table")
    guard try table.u32() == 0 else {
      throw KVError(.corruptFile, "header: expected 0 in the reserved field", offset: 28)
    }
    (entries, places) = try ContainerReader.entries(&table, count: Int(sections), fileSize: source.count)
  }

  /// Entries with the offsets that their lengths give, and no others.
  private static func entries(
    _ table: inout ByteReader, count: Int, fileSize: Int
  ) throws(KVError) -> ([Container.Entry], [Key: Int]) {
    var entries: [Container.Entry] = []
    var places: [Key: Int] = [:]
    var end = Container.headerSize(sections: count)
    for index in 0..<count {
      let key = Key(tag: Container.Tag(rawValue: try table.u32()), index: try table.u32())
      let start = Container.aligned(end)
      let place = table
      guard try table.u64() == UInt64(start) else { throw place.corrupt("expected section \(index) at byte \(start)") }
      // The end stays within the file, so no sum of what follows can overflow.
      guard start <= fileSize else { throw place.corrupt("section \(index) starts behind the end of the file") }
      let length = try table.count("the length of section \(index)", in: 0...(fileSize - start))
      guard places.updateValue(index, forKey: key) == nil else {
        throw place.corrupt("section \(key.tag) \(key.index) occurs twice")
      }
      end = start + length
      entries.append(
        Container.Entry(
          tag: key.tag, index: key.index, offset: start, length: length, checksum: try table.u64()))
    }
    guard end == fileSize else {
      throw KVError(.corruptFile, "expected the file to end after its last section; it goes on", offset: end)
    }
    return (entries, places)
  }

  private static func take(_ source: any ByteSource, _ range: Range<Int>, _ what: String) throws(KVError) -> [UInt8] {
    guard range.upperBound <= source.count else {
      throw KVError(
        .corruptFile, "expected \(what) (\(range.count) bytes); the file has \(source.count)", offset: source.count)
    }
    return try source.read(range)
  }

  /// The entry of a section; nil when the file has none.
  package func entry(_ tag: Container.Tag, index: Int = 0) -> Container.Entry? {
    guard let index = UInt32(exactly: index) else { return nil }
    return places[Key(tag: tag, index: index)].map { entries[$0] }
  }

  /// A reader over a section whose checksum holds.
  ///
  /// - Throws: `corruptFile` when there is no such section or its bytes, or the padding before them, were altered.
  /// - Complexity: O(bytes of the section).
  package func section(_ tag: Container.Tag, index: Int = 0) throws(KVError) -> ByteReader {
    guard let entry = entry(tag, index: index), let position = places[Key(tag: tag, index: entry.index)] else {
      throw KVError(.corruptFile, "expected a section \(tag) \(index); the file has none")
    }
    let before =
      position == 0
      ? Container.headerSize(sections: entries.count)
      : entries[position - 1].offset + entries[position - 1].length
    let padding = try source.read(before..<entry.offset)
    if let dirty = padding.firstIndex(where: { $0 != 0 }) {
      throw KVError(
        .corruptFile, "\(entry.place): expected zeros before it; found \(padding[dirty])", offset: before + dirty)
    }
    let bytes = try source.read(entry.offset..<entry.offset + entry.length)
    guard XXHash64.hash(bytes) == entry.checksum else {
      throw KVError(
        .corruptFile, "\(entry.place): the checksum of its \(entry.length) bytes does not match", offset: entry.offset)
    }
    return ByteReader(bytes, baseOffset: entry.offset, place: entry.place)
  }

  /// Reads and checks every section.
  package func verify() throws(KVError) {
    for entry in entries { _ = try section(entry.tag, index: Int(entry.index)) }
  }
}

/// Bytes at offsets: a file or memory.
protocol ByteSource: Sendable {
  var count: Int { get }
  /// - Precondition: `range` lies within `0..<count`.
  func read(_ range: Range<Int>) throws(KVError) -> [UInt8]
}

struct MemorySource: ByteSource {
  let bytes: [UInt8]
  var count: Int { bytes.count }
  func read(_ range: Range<Int>) throws(KVError) -> [UInt8] { Array(bytes[range]) }
}
