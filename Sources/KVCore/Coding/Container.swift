/// The file format of saved caches: named sections of bytes, each with its checksum. What the sections hold is not
/// this layer's business.
///
/// All numbers are little endian.
///
/// ```
/// offset       size  field
/// 0            8     magic 89 4B 56 43 0D 0A 1A 0A ("\x89KVC\r\n\x1A\n": damage by text-mode copies shows at once)
/// 8            4     version, 1
/// 12           4     flags, free for the layer above
/// 16           8     size of the whole file
/// 24           4     sections, n
/// 28           4     0
/// 32           32 n  the table, one entry a section, in the order of the payloads:
///                    ┌ tag u32 ┬ index u32 ┬ offset u64 ┬ length u64 ┬ XXH64 of the payload u64 ┐
///                    0         4           8            16           24                        32
/// 32 + 32 n    8     XXH64 of bytes 0 ..< 32 + 32 n
///              .     zeros up to a multiple of 64
/// offset[0]    .     payload 0
///              .     zeros up to a multiple of 64
/// offset[1]    .     payload 1
///              ...
///                    the file ends with the last payload, or with the header checksum when there are no sections
/// ```
///
/// A tag is four ASCII characters ("SHAP"); the index tells sections of one tag apart (the layer, say). The two
/// together occur once. Offsets follow from the lengths, and a reader refuses any others, so that no two payloads
/// overlap and no byte is outside of every check: header and table by the header checksum, payloads by theirs,
/// padding by being zero.
package enum Container {
  package static let magic: [UInt8] = [0x89, 0x4B, 0x56, 0x43, 0x0D, 0x0A, 0x1A, 0x0A]
  package static let version: UInt32 = 1
  package static let alignment = 64
  static let fixedHeaderSize = 32
  static let entrySize = 32
  static let checksumSize = 8
  /// More sections than any model has layers times things to save; bounds the table a reader takes in.
  package static let maximumSections = 1 << 20

  /// Four characters that name a kind of section.
  package struct Tag: Hashable, Sendable, CustomStringConvertible {
    package let rawValue: UInt32
    package init(rawValue: UInt32) { self.rawValue = rawValue }

    /// - Precondition: four ASCII characters.
    package init(_ name: StaticString) {
      precondition(name.utf8CodeUnitCount == 4 && name.isASCII, "a section tag has 4 ASCII characters; got \(name)")
      rawValue = name.withUTF8Buffer { units in
        (0..<4).reduce(0) { unsafe $0 | UInt32(units[$1]) << UInt32(8 * $1) }
      }
    }

    /// The characters, or the number in hexadecimal where they cannot be printed.
    package var description: String {
      let units = (0..<4).map { UInt8(truncatingIfNeeded: rawValue >> UInt32(8 * $0)) }
      return units.allSatisfy { (0x20..<0x7F).contains($0) }
        ? String(decoding: units, as: UTF8.self) : "0x" + String(rawValue, radix: 16)
    }
  }

  /// A row of the table.
  package struct Entry: Hashable, Sendable {
    package var tag: Tag
    package var index: UInt32
    package var offset: Int
    package var length: Int
    package var checksum: UInt64

    /// For messages: `section KEYS 3`.
    var place: String { "section \(tag) \(index)" }
  }

  static func headerSize(sections: Int) -> Int { fixedHeaderSize + sections * entrySize + checksumSize }

  static func aligned(_ offset: Int) -> Int { (offset + alignment - 1) & ~(alignment - 1) }
}
