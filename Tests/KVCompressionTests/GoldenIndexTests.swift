import KVCompression
import KVExperiments
import Testing

/// The index can be read, every rule in it is known, and the prefixes that tests are driven by find their entries.
@Suite struct GoldenIndexTests {
  @Test func everyRuleIsKnown() throws {
    let entries = try Goldens.index.get().entries
    #expect(entries.count == 193)
    for entry in entries {
      for (name, output) in entry.outputs {
        #expect(GoldenRules.known.contains(output.rule), "\(entry.name) · \(name): \(output.rule)")
      }
    }
  }

  @Test(arguments: [
    ("dense.", 4), ("h2o.kvHeadsSum.", 6), ("h2o.queryHeads.", 6), ("streaming.", 1), ("snapkv.grouped.mean.", 14),
    ("snapkv.grouped.max.", 14), ("snapkv.official.", 14), ("kivi.", 8), ("adakv.", 12), ("pyramidkv.", 1),
    ("kvpress.adakv.", 2), ("kvpress.knorm.", 2), ("kvpress.streaming.", 2),
    ("kvpress.keydiff.", 2), ("kvpress.lagkv.", 4), ("kvpress.expected.", 4), ("kvpress.critical.", 2),
    ("kvpress.criticaladakv.", 2), ("kvpress.chunkkv", 4), ("kvpress.block.", 2), ("prefixkv.", 2),
    ("kvpress.snapkv.", 2), ("kvcrush.", 3), ("kvpress.rerotation.", 2),
  ])
  func entriesAreFound(prefix: String, count: Int) {
    #expect(Goldens.names(prefix).count == count)
  }

  /// A harness that passes everything proves nothing: small disturbances must be seen by each rule in use.
  @Test func rulesRefuseWhatIsWrong() throws {
    func output(_ rule: String) throws -> GoldenEntry.Output {
      let outputs = try Goldens.index.get().entries.flatMap(\.outputs.values)
      return try #require(outputs.first { $0.rule == rule && $0.compare["rowStride"] == nil })
    }
    let reference = GoldenTensor(shape: [2, 2], numbers: [1, 2, 3, 4])
    for rule in ["allclose", "relative-frobenius", "row-relative", "exact", "codes", "integers"] {
      #expect(GoldenRules.compare(try output(rule), [1, 2, 3, 4], reference).passed, "\(rule)")
      #expect(!GoldenRules.compare(try output(rule), [1, 2, 3.5, 4], reference).passed, "\(rule)")
      #expect(!GoldenRules.compare(try output(rule), [1, 2, .nan, 4], reference).passed, "\(rule)")
      #expect(!GoldenRules.compare(try output(rule), [1, 2, 3], reference).passed, "\(rule)")
    }

    let scores = GoldenTensor(shape: [1, 5], numbers: [5, 3, 3, 1, 0])
    func sets(_ ours: [Int], _ theirs: [Int]) -> Bool {
      GoldenRules.positionSets([ours], [theirs], scores: scores, tie: 1e-5, threshold: nil, sequential: nil).passed
    }
    #expect(sets([1, 0], [0, 1]) && sets([0, 2], [0, 1]))
    #expect(!sets([0, 3], [0, 1]) && !sets([0], [0, 1]) && !sets([0, 1, 2], [0, 1]) && !sets([0, 1, 1], [0, 1]))
    #expect(!sets([0, 7], [0, 1]), "beyond the scores nothing ties")

    // Two-bit words packed along the last axis; the second group has scale 0.
    let words = GoldenTensor(shape: [1, 2], numbers: [0x1B, 0x55])
    let scale = GoldenTensor(shape: [1, 4], numbers: [1, 1, 0, 0])
    func same(_ actual: [Double]) -> Bool { GoldenRules.words(actual, words, scales: scale, bits: 2, 0).passed }
    #expect(same([0x1B, 0x55]) && same([0x1B, 0xAA]))
    #expect(!same([0x1A, 0x55]))
  }
}
