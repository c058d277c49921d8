/// A value of an option in a policy text.
///
/// Opaque, so that new kinds break no `switch` in an engine. Make one with a factory or a literal.
public struct SpecValue: Hashable, Sendable {
  package enum Kind: Hashable, Sendable {
    case integer(Int)
    case decimal(Double)
    /// 25 for `25%`.
    case percent(Double)
    case bytes(Int)
    case bool(Bool)
    case text(String)
    case list([SpecValue])
  }

  package let kind: Kind
  package init(_ kind: Kind) { self.kind = kind }

  public static func integer(_ value: Int) -> SpecValue { SpecValue(.integer(value)) }
  /// A number with a fraction. Only finite ones can be printed and parsed again.
  public static func decimal(_ value: Double) -> SpecValue { SpecValue(.decimal(value)) }
  /// `percent(25)` prints as `25%` and means 0.25.
  public static func percent(_ value: Double) -> SpecValue { SpecValue(.percent(value)) }
  /// A size in bytes, at least 0.
  public static func bytes(_ value: Int) -> SpecValue { SpecValue(.bytes(value)) }
  public static func bool(_ value: Bool) -> SpecValue { SpecValue(.bool(value)) }
  /// A name or any other text; printed bare where it is a name, quoted elsewhere. A text that reads as a percentage or
  /// a byte size is that value.
  public static func text(_ value: String) -> SpecValue { SpecParser.measured(value) ?? SpecValue(.text(value)) }
  public static func list(_ values: [SpecValue]) -> SpecValue { SpecValue(.list(values)) }

  /// What kind of value this is, with the value, for error messages.
  package var found: String {
    switch kind {
    case .integer: "the integer \(self)"
    case .decimal: "the number \(self)"
    case .percent: "the percentage \(self)"
    case .bytes: "the byte size \(self)"
    case .bool: "the boolean \(self)"
    case .text: "the text \(self)"
    case .list: "the list \(self)"
    }
  }
}

extension SpecValue: ExpressibleByIntegerLiteral, ExpressibleByFloatLiteral, ExpressibleByBooleanLiteral,
  ExpressibleByStringLiteral, ExpressibleByArrayLiteral
{
  public init(integerLiteral value: Int) { self = .integer(value) }
  public init(floatLiteral value: Double) { self = .decimal(value) }
  public init(booleanLiteral value: Bool) { self = .bool(value) }
  public init(stringLiteral value: String) { self = .text(value) }
  public init(arrayLiteral elements: SpecValue...) { self = .list(elements) }
}

extension SpecValue: CustomStringConvertible {
  /// The canonical text, as ``PolicySpec`` prints it.
  public var description: String {
    switch kind {
    case .integer(let value): String(value)
    case .decimal(let value): "\(value)"
    case .percent(let value): SpecValue.shortest(value) + "%"
    case .bytes(let value): ByteUnit.text(of: value)
    case .bool(let value): value ? "true" : "false"
    case .text(let value): SpecParser.isBareText(value) ? value : TextScanner.quoted(value)
    case .list(let values): "[" + values.map(\.description).joined(separator: ",") + "]"
    }
  }

  /// `25` for 25.0, the shortest exact text elsewhere.
  private static func shortest(_ value: Double) -> String {
    if value == 0 && value.sign == .minus { return "-0.0" }
    if let whole = Int(exactly: value), whole.magnitude < 1 << 53 { return String(whole) }
    return "\(value)"
  }
}

/// Units of byte sizes: powers of 1000 (kB, MB, GB, TB) and of 1024 (KiB, MiB, GiB, TiB).
enum ByteUnit {
  /// Larger before smaller, binary before decimal: the order in which printing tries them.
  static let all: [(name: String, bytes: Int)] = [
    ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1000), ("B", 1),
  ]

  static let names = "B, KB, MB, GB, TB, KiB, MiB, GiB or TiB"

  /// The size of a unit, in any case of letters.
  static func bytes(named name: String) -> Int? {
    let lower = name.lowercased()
    return all.first { $0.name.lowercased() == lower }?.bytes
  }

  /// The largest unit that gives a whole number; `0B` for none.
  static func text(of bytes: Int) -> String {
    let unit = all.first { bytes != 0 && bytes % $0.bytes == 0 } ?? ("B", 1)
    return "\(bytes / unit.bytes)\(unit.name)"
  }
}
