/// Reads what ``ByteWriter`` wrote. Every read is checked against the bytes that remain before anything is allocated;
/// nothing in a damaged file makes it trap.
///
/// Errors are `corruptFile`, with the section, the offset in the file and what was expected. A failed read moves
/// nothing.
package struct ByteReader: Sendable {
  private let bytes: [UInt8]
  private var at = 0
  /// Where `bytes` start in the file.
  private let baseOffset: Int
  /// What is being read, for messages: a section name.
  private let place: String

  package init(_ bytes: [UInt8], baseOffset: Int = 0, place: String = "data") {
    self.bytes = bytes
    self.baseOffset = baseOffset
    self.place = place
  }

  package init(_ bytes: Span<UInt8>, baseOffset: Int = 0, place: String = "data") {
    let copy = unsafe bytes.withUnsafeBytes { unsafe [UInt8]($0) }
    self.init(copy, baseOffset: baseOffset, place: place)
  }

  package var remaining: Int { bytes.count - at }
  /// Offset of the next byte in the file.
  package var fileOffset: Int { baseOffset + at }

  /// An error about the next byte, for checks that only the caller can make.
  package func corrupt(_ message: String) -> KVError {
    KVError(.corruptFile, "\(place): \(message)", offset: fileOffset)
  }

  // MARK: - Numbers

  package mutating func u8(_ what: String = "u8") throws(KVError) -> UInt8 { try integer(what) }
  package mutating func u16(_ what: String = "u16") throws(KVError) -> UInt16 { try integer(what) }
  package mutating func u32(_ what: String = "u32") throws(KVError) -> UInt32 { try integer(what) }
  package mutating func u64(_ what: String = "u64") throws(KVError) -> UInt64 { try integer(what) }
  package mutating func i32(_ what: String = "i32") throws(KVError) -> Int32 { try integer(what) }
  package mutating func i64(_ what: String = "i64") throws(KVError) -> Int64 { try integer(what) }
  package mutating func f32(_ what: String = "f32") throws(KVError) -> Float { Float(bitPattern: try integer(what)) }
  package mutating func f64(_ what: String = "f64") throws(KVError) -> Double { Double(bitPattern: try integer(what)) }

  package mutating func bool(_ what: String = "a boolean") throws(KVError) -> Bool {
    try need(1, what)
    let byte = bytes[at]
    guard byte < 2 else { throw corrupt("expected \(what), 0 or 1; found \(byte)") }
    at += 1
    return byte == 1
  }

  /// A u64 within `range`.
  package mutating func count(_ what: String, in range: ClosedRange<Int> = 0...Int.max) throws(KVError) -> Int {
    var ahead = self
    let value: UInt64 = try ahead.integer(what)
    guard let count = Int(exactly: value), range.contains(count) else {
      throw corrupt("expected \(what) in \(range.lowerBound)...\(range.upperBound); found \(value)")
    }
    self = ahead
    return count
  }

  /// A u64 count of things that take at least `bytesEach` bytes each, checked against the bytes behind it.
  package mutating func count(_ what: String, of bytesEach: Int) throws(KVError) -> Int {
    var ahead = self
    let value: UInt64 = try ahead.integer(what)
    guard let count = Int(exactly: value), ahead.fits(count, of: bytesEach) else {
      throw corrupt(
        "expected \(what) of \(bytesEach) bytes each within the \(ahead.remaining) bytes left; found \(value)")
    }
    self = ahead
    return count
  }

  package mutating func varuint(_ what: String = "a variable integer") throws(KVError) -> UInt64 {
    var value: UInt64 = 0
    var index = at
    for shift in stride(from: 0, through: 63, by: 7) {
      guard index < bytes.count else { throw corrupt("expected \(what); the data ends within it") }
      let byte = bytes[index]
      index += 1
      // The tenth byte has one bit left, and a last byte of 0 would be a second spelling of the same number.
      if shift == 63 && byte > 1 || shift > 0 && byte == 0 { break }
      value |= UInt64(byte & 0x7F) << UInt64(shift)
      if byte < 0x80 {
        at = index
        return value
      }
    }
    throw corrupt("expected \(what); found one that is too long")
  }

  // MARK: - Blocks

  /// UTF-8 after its byte count.
  package mutating func string(_ what: String = "a text", atMost limit: Int = Int.max) throws(KVError) -> String {
    var ahead = self
    let length = try ahead.varuint("the length of \(what)")
    guard length <= UInt64(min(limit, ahead.remaining)) else {
      throw corrupt("expected \(what) of at most \(min(limit, ahead.remaining)) bytes; found a length of \(length)")
    }
    let content = try ahead.raw(Int(length), what)
    if let bad = TextScanner.firstInvalidUTF8(in: content) {
      throw corrupt("expected \(what) in UTF-8; found byte \(content[bad])")
    }
    self = ahead
    return String(decoding: content, as: UTF8.self)
  }

  package mutating func raw(_ count: Int, _ what: String = "bytes") throws(KVError) -> [UInt8] {
    try need(count, what)
    defer { at += count }
    return Array(bytes[at..<at + count])
  }

  /// Fills a caller's memory.
  package mutating func raw(
    into destination: UnsafeMutableRawBufferPointer, _ what: String = "bytes"
  ) throws(KVError) {
    try need(destination.count, what)
    unsafe bytes.withUnsafeBytes { source in
      unsafe destination.copyMemory(from: UnsafeRawBufferPointer(rebasing: source[at..<at + destination.count]))
    }
    at += destination.count
  }

  /// `count` numbers. The count is checked against the remaining bytes before memory is taken.
  package mutating func array<Element: StoredNumber>(
    of type: Element.Type, count: Int, _ what: String = "numbers"
  ) throws(KVError) -> [Element] {
    let width = MemoryLayout<Element>.stride
    guard fits(count, of: width) else {
      throw corrupt("expected \(count) \(what) of \(width) bytes each; \(remaining) bytes are left")
    }
    let size = count * width
    #if _endian(big)
      var source = Array(bytes[at..<at + size])
      swapToLittleEndian(&source, from: 0, width: width)
      let from = 0
    #else
      let source = bytes
      let from = at
    #endif
    at += size
    return unsafe [Element](unsafeUninitializedCapacity: count) { elements, initialized in
      unsafe source.withUnsafeBytes { raw in
        unsafe UnsafeMutableRawBufferPointer(elements).copyMemory(
          from: UnsafeRawBufferPointer(rebasing: raw[from..<from + size]))
      }
      initialized = count
    }
  }

  /// Skips the zeros ``ByteWriter/align(_:)`` wrote, and checks that they are zeros.
  package mutating func align(_ alignment: Int) throws(KVError) {
    let over = at % alignment
    if over == 0 { return }
    try need(alignment - over, "padding")
    for index in at..<at + alignment - over where bytes[index] != 0 {
      throw KVError(
        .corruptFile, "\(place): expected padding of zeros; found \(bytes[index])", offset: baseOffset + index)
    }
    at += alignment - over
  }

  /// - Throws: `corruptFile` when bytes are left over.
  package func finish() throws(KVError) {
    if remaining > 0 { throw corrupt("expected the end of the data; \(remaining) bytes are left") }
  }

  // MARK: - Checks

  private func fits(_ count: Int, of width: Int) -> Bool {
    let (size, overflow) = count.multipliedReportingOverflow(by: width)
    return count >= 0 && !overflow && size <= remaining
  }

  private func need(_ count: Int, _ what: String) throws(KVError) {
    guard count >= 0, count <= remaining else {
      throw corrupt("expected \(what) (\(count) bytes); \(remaining) bytes are left")
    }
  }

  private mutating func integer<Value: FixedWidthInteger & BitwiseCopyable>(_ what: String) throws(KVError) -> Value {
    let width = MemoryLayout<Value>.size
    try need(width, what)
    defer { at += width }
    return unsafe bytes.withUnsafeBytes { raw in
      Value(littleEndian: unsafe raw.loadUnaligned(fromByteOffset: at, as: Value.self))
    }
  }
}
