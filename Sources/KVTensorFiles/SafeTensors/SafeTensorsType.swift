/// An element type of the safetensors format.
///
/// A struct and not an enum, so that a type the format gains later breaks no `switch`.
public struct SafeTensorsType: Hashable, Sendable {
  /// The name in the file's header, `F32` for example.
  public let name: String
  /// Bits of one element. Elements below a byte lie packed; such a tensor must still fill whole bytes.
  public let bits: Int

  private init(_ name: String, _ bits: Int) {
    self.name = name
    self.bits = bits
  }

  public static let f64 = SafeTensorsType("F64", 64)
  public static let f32 = SafeTensorsType("F32", 32)
  public static let f16 = SafeTensorsType("F16", 16)
  public static let bf16 = SafeTensorsType("BF16", 16)
  public static let f8e5m2 = SafeTensorsType("F8_E5M2", 8)
  public static let f8e4m3 = SafeTensorsType("F8_E4M3", 8)
  public static let f8e8m0 = SafeTensorsType("F8_E8M0", 8)
  public static let f6e2m3 = SafeTensorsType("F6_E2M3", 6)
  public static let f6e3m2 = SafeTensorsType("F6_E3M2", 6)
  public static let f4 = SafeTensorsType("F4", 4)
  public static let c64 = SafeTensorsType("C64", 64)
  public static let i64 = SafeTensorsType("I64", 64)
  public static let u64 = SafeTensorsType("U64", 64)
  public static let i32 = SafeTensorsType("I32", 32)
  public static let u32 = SafeTensorsType("U32", 32)
  public static let i16 = SafeTensorsType("I16", 16)
  public static let u16 = SafeTensorsType("U16", 16)
  public static let i8 = SafeTensorsType("I8", 8)
  public static let u8 = SafeTensorsType("U8", 8)
  public static let bool = SafeTensorsType("BOOL", 8)

  /// Every type this reader knows, widest first.
  public static let all: [SafeTensorsType] = [
    .f64, .c64, .i64, .u64, .f32, .i32, .u32, .f16, .bf16, .i16, .u16, .f8e5m2, .f8e4m3, .f8e8m0, .i8, .u8, .bool,
    .f6e2m3, .f6e3m2, .f4,
  ]

  /// The type the header calls `name`; nil for a name the format does not have.
  public init?(name: String) {
    guard let match = SafeTensorsType.all.first(where: { $0.name == name }) else { return nil }
    self = match
  }

  /// Bytes that a tensor of `shape` occupies; nil where the product overflows, a dimension is negative, or packed
  /// elements do not fill whole bytes. A shape of no dimensions is one element.
  public func byteCount(shape: [Int]) -> Int? {
    guard let count = elementCount(of: shape) else { return nil }
    let (total, overflow) = count.multipliedReportingOverflow(by: bits)
    guard !overflow, total % 8 == 0 else { return nil }
    return total / 8
  }
}

extension SafeTensorsType: CustomStringConvertible {
  public var description: String { name }
}

/// Nil where a dimension is negative or the product overflows.
package func elementCount(of shape: [Int]) -> Int? {
  // A zero anywhere makes the product zero, whatever the other dimensions; still refuse negative ones.
  guard shape.allSatisfy({ $0 >= 0 }) else { return nil }
  var count = 1
  for dimension in shape {
    let (product, overflow) = count.multipliedReportingOverflow(by: dimension)
    if overflow { return nil }
    count = product
  }
  return count
}

/// One tensor of a safetensors file.
public struct SafeTensorsEntry: Hashable, Sendable {
  public let type: SafeTensorsType
  /// Row-major dimensions, outermost first. Empty for a scalar.
  public let shape: [Int]
  /// Where the tensor's bytes lie, counted from the start of the file.
  public let byteRange: Range<Int>

  /// The product of the dimensions.
  public var elementCount: Int { byteRange.count * 8 / type.bits }
}
