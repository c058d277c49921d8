internal import KVCore

/// Bits of key and value codes, as the stores that take both say them: `bits` for the same, `key_bits` and `value_bits`
/// for different ones.
struct CodeBits {
  let keys: Int
  let values: Int

  init(keys: Int, values: Int) {
    self.keys = keys
    self.values = values
  }

  init(from reader: inout OptionReader, default bits: Int) throws(KVError) {
    let bits = try reader.int("bits", default: bits, in: 2...8)
    keys = try reader.optionalInt("key_bits", in: 2...8) ?? bits
    values = try reader.optionalInt("value_bits", in: 2...8) ?? bits
  }

  static let options: [MethodDescription.Option] = [
    .init("bits", "bits of a code: 2, 3, 4 or 8"),
    .init("key_bits", "bits of key codes; default: bits"),
    .init("value_bits", "bits of value codes; default: bits"),
  ]

  var specOptions: [SpecOption] {
    keys == values
      ? [SpecOption("bits", .integer(keys))]
      : [SpecOption("key_bits", .integer(keys)), SpecOption("value_bits", .integer(values))]
  }
}
