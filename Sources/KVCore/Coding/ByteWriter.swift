/// Appends numbers, texts and raw bytes, little endian, to a growing block: one section of a ``Container``.
package struct ByteWriter: Sendable {
  package private(set) var bytes: [UInt8] = []

  package init() {}

  package var count: Int { bytes.count }
  package mutating func reserve(_ capacity: Int) { bytes.reserveCapacity(capacity) }

  package mutating func u8(_ value: UInt8) { bytes.append(value) }
  package mutating func u16(_ value: UInt16) { integer(value) }
  package mutating func u32(_ value: UInt32) { integer(value) }
  package mutating func u64(_ value: UInt64) { integer(value) }
  package mutating func i32(_ value: Int32) { integer(value) }
  package mutating func i64(_ value: Int64) { integer(value) }
  package mutating func f32(_ value: Float) { integer(value.bitPattern) }
  package mutating func f64(_ value: Double) { integer(value.bitPattern) }
  /// One byte, 0 or 1.
  package mutating func bool(_ value: Bool) { bytes.append(value ? 1 : 0) }
  /// A count or another number that is not negative, as u64.
  package mutating func count(_ value: Int) { integer(UInt64(value)) }

  /// LEB128: 7 bits a byte, low ones first, the top bit set on all but the last.
  package mutating func varuint(_ value: UInt64) {
    var rest = value
    while rest >= 0x80 {
      bytes.append(UInt8(truncatingIfNeeded: rest) | 0x80)
      rest >>= 7
    }
    bytes.append(UInt8(rest))
  }

  /// UTF-8 after its byte count as varuint.
  package mutating func string(_ text: String) {
    varuint(UInt64(text.utf8.count))
    bytes.append(contentsOf: text.utf8)
  }

  package mutating func raw(_ source: [UInt8]) { bytes.append(contentsOf: source) }

  package mutating func raw(_ source: Span<UInt8>) {
    unsafe source.withUnsafeBytes { unsafe bytes.append(contentsOf: $0) }
  }

  package mutating func raw(_ source: UnsafeRawBufferPointer) { unsafe bytes.append(contentsOf: source) }

  /// The elements alone, little endian; the reader must know their count.
  package mutating func array<Element: StoredNumber>(_ elements: Span<Element>) {
    let start = bytes.count
    unsafe elements.withUnsafeBytes { unsafe bytes.append(contentsOf: $0) }
    swapToLittleEndian(&bytes, from: start, width: MemoryLayout<Element>.stride)
  }

  package mutating func array<Element: StoredNumber>(_ elements: [Element]) { array(elements.span) }

  /// Zeros up to a multiple of `alignment`, counted from the start of this block.
  package mutating func align(_ alignment: Int) {
    let over = bytes.count % alignment
    if over > 0 { bytes.append(contentsOf: repeatElement(0, count: alignment - over)) }
  }

  private mutating func integer<Value: FixedWidthInteger>(_ value: Value) {
    unsafe withUnsafeBytes(of: value.littleEndian) { unsafe bytes.append(contentsOf: $0) }
  }
}

/// Numbers that are stored as their bits, little endian.
package protocol StoredNumber: BitwiseCopyable {}
extension UInt8: StoredNumber {}
extension Int8: StoredNumber {}
extension UInt16: StoredNumber {}
extension Int16: StoredNumber {}
extension UInt32: StoredNumber {}
extension Int32: StoredNumber {}
extension UInt64: StoredNumber {}
extension Int64: StoredNumber {}
extension Float: StoredNumber {}
extension Double: StoredNumber {}

/// Nothing on the machines we know; reverses each element elsewhere.
func swapToLittleEndian(_ bytes: inout [UInt8], from start: Int, width: Int) {
  #if _endian(big)
    for at in stride(from: start, to: bytes.count, by: width) { bytes[at..<at + width].reverse() }
  #endif
}
