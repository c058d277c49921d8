/// Collects sections and writes them as a ``Container``.
package struct ContainerWriter: Sendable {
  private var entries: [Container.Entry] = []
  private var payloads: [[UInt8]] = []
  private var flags: UInt32

  package init(flags: UInt32 = 0) { self.flags = flags }

  /// Adds a section. The bytes are shared, not copied.
  ///
  /// - Precondition: no section of that tag and index was added before.
  /// - Complexity: O(bytes) for the checksum, O(sections) to look for a duplicate.
  package mutating func add(_ tag: Container.Tag, index: Int = 0, _ bytes: [UInt8]) {
    precondition(
      !entries.contains { $0.tag == tag && $0.index == index }, "section \(tag) \(index) was added twice")
    precondition(entries.count < Container.maximumSections, "too many sections")
    entries.append(
      Container.Entry(
        tag: tag, index: UInt32(index), offset: 0, length: bytes.count, checksum: XXHash64.hash(bytes)))
    payloads.append(bytes)
  }

  package mutating func add(_ tag: Container.Tag, index: Int = 0, _ section: ByteWriter) {
    add(tag, index: index, section.bytes)
  }

  /// Size of the file.
  package var byteCount: Int { layout().size }

  /// The whole file in memory.
  package func bytes() -> [UInt8] {
    var result: [UInt8] = []
    result.reserveCapacity(byteCount)
    forEachPiece { result.append(contentsOf: $0) }
    return result
  }

  /// Writes the file so that `path` holds the old content or the new, never a part: a file beside it is written and
  /// synced, then renamed over it, then the folder is synced.
  ///
  /// - Throws: `inputOutput` with the system's text; the file beside it is gone then and `path` as it was.
  package func write(to path: String) throws(KVError) {
    let file = try AtomicFile(replacing: path)
    do {
      try forEachPiece { (piece) throws(KVError) in try file.write(piece) }
      try file.commit()
    } catch {
      file.abandon()
      throw error
    }
  }

  private func layout() -> (entries: [Container.Entry], size: Int) {
    var placed = entries
    var end = Container.headerSize(sections: entries.count)
    for index in placed.indices {
      placed[index].offset = Container.aligned(end)
      end = placed[index].offset + placed[index].length
    }
    return (placed, end)
  }

  private func forEachPiece<Failure: Error>(_ body: ([UInt8]) throws(Failure) -> Void) throws(Failure) {
    let (placed, size) = layout()
    var header = ByteWriter()
    header.raw(Container.magic)
    header.u32(Container.version)
    header.u32(flags)
    header.count(size)
    header.u32(UInt32(placed.count))
    header.u32(0)
    for entry in placed {
      header.u32(entry.tag.rawValue)
      header.u32(entry.index)
      header.count(entry.offset)
      header.count(entry.length)
      header.u64(entry.checksum)
    }
    header.u64(XXHash64.hash(header.bytes))
    try body(header.bytes)
    var end = header.count
    for (entry, payload) in zip(placed, payloads) {
      if entry.offset > end { try body([UInt8](repeating: 0, count: entry.offset - end)) }
      try body(payload)
      end = entry.offset + entry.length
    }
  }
}
