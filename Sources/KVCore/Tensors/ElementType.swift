/// The element type of keys, values and queries in memory.
public struct ElementType: Hashable, Sendable {
  /// The number used in saved caches and by the kernels.
  public let rawValue: UInt8
  package init(_ rawValue: UInt8) { self.rawValue = rawValue }

  /// IEEE binary32.
  public static let f32 = ElementType(0)
  /// IEEE binary16: 11 significant bits, largest finite value 65504.
  public static let f16 = ElementType(1)
  /// bfloat16: 8 significant bits, the range of binary32.
  public static let bf16 = ElementType(2)

  public static let all: [ElementType] = [.f32, .f16, .bf16]

  /// Nil for a number no version of this library has written.
  public init?(rawValue: UInt8) {
    guard rawValue < 3 else { return nil }
    self.rawValue = rawValue
  }

  /// The type called `name` in policy texts: `f32`, `f16` or `bf16`.
  public init?(name: String) {
    guard let match = ElementType.all.first(where: { $0.name == name }) else { return nil }
    self = match
  }

  public var byteCount: Int { self == .f32 ? 4 : 2 }

  public var name: String {
    switch self {
    case .f32: "f32"
    case .f16: "f16"
    default: "bf16"
    }
  }

  /// Largest finite magnitude, as a `Float`.
  public var largestFinite: Float {
    switch self {
    case .f16: 65504
    case .bf16: Float(bitPattern: 0x7F7F_0000)
    default: .greatestFiniteMagnitude
    }
  }
}

extension ElementType: CustomStringConvertible {
  public var description: String { name }
}

/// Swift types that can be viewed as cache tensors without conversion.
///
/// bfloat16 has no Swift type; it is passed as its bit patterns in `UInt16` with
/// ``TensorView/init(bfloat16:heads:tokens:dim:layout:)``.
public protocol CacheScalar: BitwiseCopyable, Sendable {
  static var elementType: ElementType { get }
}

extension Float: CacheScalar {
  public static var elementType: ElementType { .f32 }
}

#if arch(arm64) || os(Linux)
  extension Float16: CacheScalar {
    public static var elementType: ElementType { .f16 }
  }
#endif
