import KVCompression
import Testing

@testable import KVCore

/// Two names for one representation.
@Suite struct PerTokenTests {
  /// The same formats as `quant` makes, for every option.
  @Test func isAPresetOfQuant() throws {
    withEvery("bits", in: [2, 3, 4, 8]) { bits in
      withEvery("group", in: [8, 32, 64, 4096]) { group in
        withEvery("window", in: [0, 7]) { window in
          withEvery("types", in: [("f16", "f16"), ("f32", "bf16")]) { types in
            let (type, metadata) = types
            let one = try PolicyRegistry.standard.policy(
              "pertoken(key_bits=\(bits),value_bits=4,group=\(group),window=\(window),type=\(type),metadata=\(metadata))"
            )
            let sides = [("key", bits), ("value", 4)].map { side, bits in
              "\(side)s=token,\(side)_bits=\(bits),\(side)_group=\(group),\(side)_residual=\(window),"
                + "\(side)_window=\(type),\(side)_metadata=\(metadata)"
            }
            let other = try PolicyRegistry.standard.policy("quant(\(sides.joined(separator: ",")))")
            check(
              one.tiers[0].factory as? RowFormat == other.tiers[0].factory as? RowFormat, "different representations")
            check(one.spec != other.spec, "each keeps its name")
          }
        }
      }
    }
  }
}
