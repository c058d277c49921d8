/// What the splitting patterns ask of a character: `\p{L}`, `\p{N}`, `\s`, or none of them.
enum CharacterClass: UInt8 {
  case letter, number, space, other

  init(_ scalar: Unicode.Scalar) {
    if scalar.value < 128 {
      self = Self.ascii[Int(scalar.value)]
      return
    }
    switch scalar.properties.generalCategory {
    case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: self = .letter
    case .decimalNumber, .letterNumber, .otherNumber: self = .number
    default: self = scalar.properties.isWhitespace ? .space : .other
    }
  }

  private static let ascii: [CharacterClass] = (0..<128).map { (value: UInt8) -> CharacterClass in
    switch value {
    case 65...90, 97...122: .letter
    case 48...57: .number
    case 9...13, 32: .space
    default: .other
    }
  }
}

/// A text as scalars with their classes and the UTF-8 offset of each, so that a splitter can walk back and forth.
struct ClassifiedText {
  private(set) var scalars: [Unicode.Scalar] = []
  private(set) var classes: [CharacterClass] = []
  /// Offset of each scalar in `utf8`, and of the end.
  private(set) var offsets: [Int] = []
  let utf8: [UInt8]

  init(_ text: String) {
    utf8 = Array(text.utf8)
    scalars.reserveCapacity(utf8.count)
    classes.reserveCapacity(utf8.count)
    offsets.reserveCapacity(utf8.count + 1)
    var offset = 0
    for scalar in text.unicodeScalars {
      scalars.append(scalar)
      classes.append(CharacterClass(scalar))
      offsets.append(offset)
      offset += UTF8.width(scalar)
    }
    offsets.append(offset)
  }

  var count: Int { scalars.count }
}
