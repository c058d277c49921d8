/// binary16 and bfloat16 by their bits: `Float16` is not there on every platform this library compiles for.
enum HalfCoding {
  static func widen(bfloat bits: UInt16) -> Float { Float(bitPattern: UInt32(bits) << 16) }

  static func widen(half bits: UInt16) -> Float {
    let sign = UInt32(bits & 0x8000) << 16
    let exponent = UInt32(bits >> 10) & 0x1F
    let fraction = UInt32(bits) & 0x3FF
    if exponent == 0 {
      // Zero and subnormals: fraction · 2⁻²⁴, exact in f32.
      let magnitude = Float(fraction) * Float(sign: .plus, exponent: -24, significand: 1)
      return sign == 0 ? magnitude : -magnitude
    }
    if exponent == 0x1F { return Float(bitPattern: sign | 0x7F80_0000 | fraction << 13) }
    return Float(bitPattern: sign | (exponent + 112) << 23 | fraction << 13)
  }

  /// Rounded to nearest even; nil for a finite value that would become infinite. NaN stays NaN.
  static func narrow(toBfloat value: Float) -> UInt16? {
    let bits = value.bitPattern
    if value.isNaN { return UInt16(bits >> 16) | 0x40 }
    let rounded = UInt16(truncatingIfNeeded: (bits + 0x7FFF + (bits >> 16) & 1) >> 16)
    return value.isFinite && rounded & 0x7FFF == 0x7F80 ? nil : rounded
  }

  /// Rounded to nearest even; nil for a finite value beyond binary16. NaN stays NaN.
  static func narrow(toHalf value: Float) -> UInt16? {
    let sign = UInt16(truncatingIfNeeded: value.bitPattern >> 16) & 0x8000
    if value.isNaN { return sign | 0x7E00 }
    if value.isInfinite { return sign | 0x7C00 }
    let magnitude = value.magnitude
    if magnitude >= 65520 { return nil }
    if magnitude < Float(bitPattern: 0x3880_0000) {
      // Below 2⁻¹⁴ the grid is 2⁻²⁴ wide.
      let steps = (magnitude * Float(sign: .plus, exponent: 24, significand: 1)).rounded(.toNearestOrEven)
      return sign | UInt16(steps)
    }
    let bits = magnitude.bitPattern
    let rounded = bits + 0xFFF + (bits >> 13) & 1
    return sign | UInt16(truncatingIfNeeded: (rounded - 112 << 23) >> 13)
  }
}
