/// Codes around an integer zero point: `value = scale * (code - z)`, `z = round(-min / scale)` (primitive P2 of RotateKV,
/// KVTuner and KVQuant). Zero is represented exactly where the range of a group holds it.
///
/// z is held as the minimum `-scale * z` in the metadata's type, so that rows are read as all affine rows are. It is not
/// clamped, as in the published codes, but for CSKV's, ``clamped``.
public struct ZeroPoint: Hashable, Sendable {
  /// Hundredths of the range that codes span.
  let percent: Int
  /// Whether the scale is the range over bits² - 1, as in RotateKV's code: 8 instead of 7 for three bits.
  let squared: Bool
  /// Whether z is one of the codes, which loses range where all values have one sign.
  package let isClamped: Bool

  private init(percent: Int, squared: Bool, isClamped: Bool = false) {
    self.percent = percent
    self.squared = squared
    self.isClamped = isClamped
  }

  /// z is one of the codes, and the scale at least 1e-5 / (2^bits - 1): CSKV's. A group whose values all have one sign
  /// saturates.
  public static let clamped = ZeroPoint(percent: 100, squared: false, isClamped: true)

  /// - Parameters:
  ///   - clip: what minimum and maximum are multiplied by first, in hundredths; values beyond saturate.
  ///   - squaredLevels: the scale is the range over bits² - 1 instead of 2^bits - 1. RotateKV's code, for 2, 3 and 4 bits.
  /// - Throws: `invalidOption` for a clip that is not a hundredth of 0.01...1.
  public init(clip: Double = 1, squaredLevels: Bool = false) throws(KVError) {
    let percent = (clip * 100).rounded()
    guard clip.isFinite, (1...100).contains(percent), abs(clip * 100 - percent) < 1e-6 else {
      throw KVError(.invalidOption, "a clip is a hundredth of 0.01...1; got \(clip)")
    }
    self.init(percent: Int(percent), squared: squaredLevels)
  }

  /// What minimum and maximum are multiplied by.
  public var clip: Double { Double(percent) / 100 }

  /// The field of a saved cache; 0 is none.
  package var code: UInt8 { isClamped ? 201 : UInt8(percent + (squared ? 100 : 0)) }

  package init?(code: UInt8) {
    if code == ZeroPoint.clamped.code {
      self = .clamped
      return
    }
    guard (1...200).contains(code) else { return nil }
    self.init(percent: code > 100 ? Int(code) - 100 : Int(code), squared: code > 100)
  }

  /// What the range is divided by.
  package func steps(bits: Int) -> Float { squared ? Float(bits * bits - 1) : Float(1 << bits - 1) }
}

extension ZeroPoint: CustomStringConvertible {
  public var description: String {
    if isClamped { return "clamped integer zero point" }
    return "integer zero point" + (percent < 100 ? " over \(percent)% of the range" : "")
      + (squared ? ", squared levels" : "")
  }
}
