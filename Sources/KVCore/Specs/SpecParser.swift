/// The parser of policy texts; ``PolicySpec`` documents the grammar.
struct SpecParser {
  private var scanner: TextScanner

  init(_ text: String) throws(KVError) {
    let count = text.utf8.count
    guard count <= PolicySpec.maximumLength else {
      throw KVError(
        .syntax, "a policy text has at most \(PolicySpec.maximumLength) bytes; got \(count)",
        offset: PolicySpec.maximumLength)
    }
    scanner = TextScanner(Array(text.utf8))
  }

  mutating func policy() throws(KVError) -> PolicySpec {
    var stages: [StageSpec] = []
    repeat {
      scanner.skipSpace()
      stages.append(try stage())
      scanner.skipSpace()
    } while scanner.take("+")
    if scanner.current != nil { throw scanner.fail("'+' or the end of the text after a stage") }
    return PolicySpec(stages: stages)
  }

  /// One value and nothing else: the text form of a budget.
  mutating func lonelyValue() throws(KVError) -> SpecValue {
    scanner.skipSpace()
    let value = try value(depth: 0)
    scanner.skipSpace()
    if scanner.current != nil { throw scanner.fail("the end of the text after a value") }
    return value
  }

  private mutating func stage() throws(KVError) -> StageSpec {
    let start = scanner.at
    var stage = StageSpec(name: try name("a stage name"), offset: start)
    scanner.skipSpace()
    guard scanner.take("(") else { return stage }
    scanner.skipSpace()
    if scanner.take(")") { return stage }
    var names: Set<String> = []
    while true {
      scanner.skipSpace()
      let offset = scanner.at
      let option = try option()
      guard names.insert(option.name).inserted else {
        throw KVError(.syntax, "the option \"\(option.name)\" of \(stage.name) is given twice", offset: offset)
      }
      stage.options.append(option)
      scanner.skipSpace()
      if scanner.take(")") { return stage }
      guard scanner.take(",") else { throw scanner.fail("',' or ')' after an option of \(stage.name)") }
    }
  }

  private mutating func option() throws(KVError) -> SpecOption {
    let name = try name("an option name")
    scanner.skipSpace()
    guard scanner.take("=") else { throw scanner.fail("'=' after the option name \"\(name)\"") }
    scanner.skipSpace()
    let offset = scanner.at
    return SpecOption(name, try value(depth: 0), offset: offset)
  }

  private mutating func name(_ expected: String) throws(KVError) -> String {
    let start = scanner.at
    guard let first = scanner.current, SpecParser.isLetter(first) else {
      throw scanner.fail("\(expected) (a letter, then letters, digits, '_' and '-')")
    }
    while let byte = scanner.current, SpecParser.isNameByte(byte) { scanner.at += 1 }
    return String(decoding: scanner.bytes[start..<scanner.at], as: UTF8.self).lowercased()
  }

  private mutating func value(depth: Int) throws(KVError) -> SpecValue {
    guard let byte = scanner.current else { throw scanner.fail("a value") }
    switch byte {
    case 0x22: return .text(try scanner.quotedString())
    case 0x5B: return try list(depth: depth)
    case 0x2D: return try measure()
    case _ where TextScanner.isDigit(byte): return try measure()
    case _ where SpecParser.isLetter(byte):
      let text = try name("a name")
      return text == "true" ? true : text == "false" ? false : SpecValue(.text(text))
    default: throw scanner.fail("a value (a number, 25%, 64MiB, true, false, a name, a \"string\" or a [list])")
    }
  }

  private mutating func list(depth: Int) throws(KVError) -> SpecValue {
    if depth == 3 {
      throw KVError(.syntax, "lists nest twice, as in [[[1,2],[3]]]; this one is deeper", offset: scanner.at)
    }
    scanner.at += 1
    scanner.skipSpace()
    var values: [SpecValue] = []
    if scanner.take("]") { return .list(values) }
    while true {
      scanner.skipSpace()
      values.append(try value(depth: depth + 1))
      scanner.skipSpace()
      if scanner.take("]") { return .list(values) }
      guard scanner.take(",") else { throw scanner.fail("',' or ']' in a list") }
    }
  }

  /// A number, with `%` or a unit behind it where there is one.
  private mutating func measure() throws(KVError) -> SpecValue {
    let number = try scanner.number()
    let unitStart = scanner.at
    if scanner.take("%") { return .percent(try double(number)) }
    while let byte = scanner.current, SpecParser.isNameByte(byte) || byte == 0x2E { scanner.at += 1 }
    if scanner.at > unitStart {
      let unit = String(decoding: scanner.bytes[unitStart..<scanner.at], as: UTF8.self)
      guard let size = ByteUnit.bytes(named: unit) else {
        throw KVError(.syntax, "expected '%', \(ByteUnit.names) after a number, found \"\(unit)\"", offset: unitStart)
      }
      return .bytes(try bytes(number, unit: size))
    }
    if !number.isInteger { return .decimal(try double(number)) }
    guard let value = Int(number.text) else {
      throw KVError(.syntax, "the integer \(number.text) does not fit 64 bits", offset: number.offset)
    }
    return .integer(value)
  }

  private func double(_ number: TextScanner.Number) throws(KVError) -> Double {
    guard let value = Double(number.text), value.isFinite else {
      throw KVError(.syntax, "the number \(number.text) does not fit a double", offset: number.offset)
    }
    return value
  }

  private func bytes(_ number: TextScanner.Number, unit: Int) throws(KVError) -> Int {
    if number.isInteger, let value = Int(number.text) {
      let (product, overflow) = value.multipliedReportingOverflow(by: unit)
      if value >= 0, !overflow { return product }
    } else if let value = Double(number.text), value >= 0, value * Double(unit) < 0x1p53 {
      // 4.35KB is 4350 bytes although the product of the two doubles is not.
      let product = value * Double(unit)
      if abs(product - product.rounded()) <= product * 0x1p-51 { return Int(product.rounded()) }
    }
    throw KVError(
      .syntax, "expected a whole number of bytes that fits 64 bits, found \(number.text) times \(unit)",
      offset: number.offset)
  }

  // MARK: - Texts

  /// The percentage or byte size that `text` spells, nil for any other text.
  static func measured(_ text: String) -> SpecValue? {
    guard let first = text.utf8.first, first == 0x2D || TextScanner.isDigit(first),
      text.utf8.count <= 64, var parser = try? SpecParser(text), let value = try? parser.measure(),
      parser.scanner.current == nil
    else { return nil }
    switch value.kind {
    case .percent, .bytes: return value
    default: return nil
    }
  }

  /// Whether a text prints without quotes and parses to itself.
  static func isBareText(_ text: String) -> Bool {
    guard let first = text.utf8.first, isLetter(first) else { return false }
    return text != "true" && text != "false"
      && text.utf8.allSatisfy { isNameByte($0) && !(0x41...0x5A).contains($0) }
  }

  static func isLetter(_ byte: UInt8) -> Bool { (0x61...0x7A).contains(byte | 0x20) }

  static func isNameByte(_ byte: UInt8) -> Bool {
    isLetter(byte) || TextScanner.isDigit(byte) || byte == 0x5F || byte == 0x2D
  }
}
