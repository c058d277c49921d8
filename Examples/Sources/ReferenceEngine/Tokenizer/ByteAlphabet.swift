/// The printable alphabet that byte-level BPE files write bytes in: bytes that are visible in Latin-1 stand for
/// themselves, the other 68 follow from U+0100 on (a space is `Ġ`).
enum ByteAlphabet {
  /// The scalar of each byte.
  static let scalars: [Unicode.Scalar] = {
    var table = [Unicode.Scalar](repeating: "\0", count: 256)
    var next: UInt32 = 256
    for byte in 0..<256 {
      let visible = (33...126).contains(byte) || (161...172).contains(byte) || (174...255).contains(byte)
      table[byte] = Unicode.Scalar(visible ? UInt32(byte) : next) ?? "\0"
      if !visible { next += 1 }
    }
    return table
  }()

  /// The byte of each scalar below U+0144; -1: none.
  private static let bytes: [Int16] = {
    var table = [Int16](repeating: -1, count: 324)
    for (byte, scalar) in scalars.enumerated() { table[Int(scalar.value)] = Int16(byte) }
    return table
  }()

  /// The bytes a token of the vocabulary stands for; nil where a scalar is not of the alphabet.
  static func decode(_ token: String) -> [UInt8]? {
    var result: [UInt8] = []
    result.reserveCapacity(token.utf8.count)
    for scalar in token.unicodeScalars {
      guard scalar.value < 324, bytes[Int(scalar.value)] >= 0 else { return nil }
      result.append(UInt8(bytes[Int(scalar.value)]))
    }
    return result
  }
}
