import KVCore
import Testing

@Suite struct XXHash64Tests {
  @Test func publishedVectors() {
    #expect(XXHash64.hash([]) == 0xEF46_DB37_51D8_E999)
    #expect(XXHash64.hash(Array("a".utf8)) == 0xD24E_C4F1_A98C_6E5B)
    #expect(XXHash64.hash(Array("abc".utf8)) == 0x44BC_2CF5_AD77_0999)
    #expect(XXHash64.hash(Array("Nobody inspects the spammish repetition".utf8)) == 0xFBCE_A83C_8A37_8BF1)
    #expect(XXHash64.hash(Array("abc".utf8), seed: 2_654_435_761) == 0x1318_DF30_094A_85FD)
  }

  /// Lengths around every step of the algorithm, against the reference library (python xxhash).
  @Test(
    arguments: [
      (1, 0x1F25_C8D0_BC1F_4BB6), (3, 0x31D2_363F_52E5_64C9), (4, 0x9BB6_4B7D_66EE_9FDA), (7, 0x9A7B_1499_59CE_60D8),
      (8, 0xDAB9_9D95_C6F9_0092), (31, 0xA2AA_5F33_CC4A_6119), (32, 0x23C3_C17E_F790_FD97),
      (33, 0x50A7_CFC7_BA58_8784), (63, 0x5E3E_54B4_31C7_493C), (100, 0xA61F_8D4C_170F_E531),
    ] as [(Int, UInt64)])
  func lengths(count: Int, expected: UInt64) {
    let bytes = (0..<count).map { UInt8(truncatingIfNeeded: $0 * 7 + 3) }
    #expect(XXHash64.hash(bytes) == expected)
  }
}
