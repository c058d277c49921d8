import KVCore
import Testing

/// Frequencies against numbers computed with numpy in f32, from the formulas of HuggingFace transformers.
@Suite struct RotaryScalingTests {
  private func expectFrequencies(
    _ got: [Float], _ want: [Float], sourceLocation: SourceLocation = #_sourceLocation
  ) {
    #expect(got.count == want.count, sourceLocation: sourceLocation)
    for (index, (a, b)) in zip(got, want).enumerated() {
      // Two f32 steps: powers of different libraries differ in the last place.
      #expect(abs(a - b) <= b * 3e-7, "pair \(index): got \(a), expected \(b)", sourceLocation: sourceLocation)
    }
  }

  private func every(_ step: Int, _ values: [Float]) -> [Float] {
    stride(from: 0, to: values.count, by: step).map { values[$0] }
  }

  @Test func plainAndLinear() throws {
    expectFrequencies(
      try RotaryEmbedding(headDim: 8).inverseFrequencies, [1, 0.1, 0.01, 0.001])
    expectFrequencies(
      try RotaryEmbedding(headDim: 8, scaling: .linear(factor: 4)).inverseFrequencies,
      [0.25, 0.025, 0.0025, 0.00025])
  }

  @Test func ntk() throws {
    expectFrequencies(
      try RotaryEmbedding(headDim: 16, scaling: .ntk(factor: 4)).inverseFrequencies,
      [
        1.0, 0.25941282510757446, 0.06729500740766525, 0.01745718903839588, 0.0045286184176802635,
        0.0011747815879061818, 0.0003047533973585814, 7.905694656074047e-05,
      ])
  }

  @Test func dynamicNTK() throws {
    let rope = try RotaryEmbedding(headDim: 16, scaling: .dynamicNTK(factor: 2, originalContext: 4096))
    #expect(!rope.isStatic)
    let plain = try RotaryEmbedding(headDim: 16)
    #expect(rope.inverseFrequencies == plain.inverseFrequencies)
    #expect(try rope.resolved(contextLength: 4096).inverseFrequencies == plain.inverseFrequencies)
    let long = try rope.resolved(contextLength: 8192)
    #expect(long.isStatic)
    expectFrequencies(
      long.inverseFrequencies,
      [
        1.0, 0.2702961266040802, 0.07305999100208282, 0.019747832790017128, 0.005337762646377087,
        0.0014427765272557735, 0.000389976950827986, 0.00010540925723034889,
      ])
    var row = [Float](repeating: 1, count: 16)
    let error = #expect(throws: KVError.self) {
      try withRotaryRow(&row) { (span) throws(KVError) in try rope.move(&span, from: 1, to: 2) }
    }
    #expect(error?.code == .unsupported)
    #expect(row == [Float](repeating: 1, count: 16))
    _ = try rotatedRow(long, row, 5)
    #expect(try plain.resolved(contextLength: 9) == plain)
  }

  @Test func yarn() throws {
    let small = try RotaryEmbedding(headDim: 16, scaling: .yarn(factor: 4, originalContext: 4096))
    #expect(abs(small.attentionFactor - 1.138629436111989) < 1e-7)
    expectFrequencies(
      small.inverseFrequencies,
      [
        1.0, 0.3162277638912201, 0.10000000149011612, 0.025693506002426147, 0.00624999962747097,
        0.0013834965648129582, 0.0002500000118743628, 7.905694656074047e-05,
      ])
    let qwen = try RotaryEmbedding(headDim: 128, theta: 1e6, scaling: .yarn(factor: 4, originalContext: 32768))
    expectFrequencies(
      every(8, qwen.inverseFrequencies),
      [
        1.0, 0.17782793939113617, 0.03162277862429619, 0.005375321488827467, 0.0006029411451891065,
        4.4456985051510856e-05, 7.905693564680405e-06, 1.405853367941745e-06,
      ])
    let untruncated = try RotaryEmbedding(
      headDim: 64, theta: 150_000, scaling: .yarn(factor: 32, originalContext: 4096, truncate: false))
    #expect(abs(untruncated.attentionFactor - 1.3465735902799727) < 2e-7)
    expectFrequencies(
      every(4, untruncated.inverseFrequencies),
      [
        1.0, 0.22541800141334534, 0.050813280045986176, 0.006794959306716919, 0.0004564839182421565,
        1.818833698053912e-05, 4.099978468730114e-06, 9.242089618055616e-07,
      ])
    let given = try RotaryEmbedding(
      headDim: 16, scaling: .yarn(factor: 4, originalContext: 4096, attentionFactor: 0.75))
    #expect(given.attentionFactor == 0.75)
  }

  @Test func llama3() throws {
    let rope = try RotaryEmbedding(
      headDim: 128, theta: 500_000,
      scaling: .llama3(factor: 8, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalContext: 8192))
    #expect(rope.attentionFactor == 1)
    expectFrequencies(
      every(8, rope.inverseFrequencies),
      [
        1.0, 0.193922758102417, 0.03760603070259094, 0.00729266507551074, 0.0005248460220173001,
        3.428102354519069e-05, 6.647870577580761e-06, 1.289173155782919e-06,
      ])
    // The band where the two ends are blended, and one pair on each side of it.
    expectFrequencies(
      Array(rope.inverseFrequencies[28..<36]),
      [
        0.0032114461064338684, 0.0021665706299245358, 0.0013718936825171113, 0.0008567514596506953,
        0.0005248460220173001, 0.0003126936499029398, 0.0001785077911335975, 9.556212899042293e-05,
      ])
  }

  @Test func explicit() throws {
    let rope = try RotaryEmbedding(
      headDim: 4, scaling: .explicit(inverseFrequencies: [1, 0.01], attentionFactor: 2))
    let x = try rotatedRow(rope, [1, 2, 3, 4], 7)
    expectRotaryClose(x, [-1.21706 * 2, 1.71533 * 2, 2.91869 * 2, 4.13009 * 2], within: 2e-5)
  }

  /// An engine in f32 that takes its frequencies from a table sees the same key, far out too.
  @Test func anglesOfAFloatEngine() throws {
    let rope = try RotaryEmbedding(headDim: 64, theta: 500_000)
    let position = 987_654
    let table = try rope.table(positions: [Int32(position)].span, scaled: false)
    for (pair, frequency) in rope.inverseFrequencies.enumerated() {
      let angle = Float(position) * frequency
      let precise = try RotaryEmbedding(
        headDim: 2, scaling: .explicit(inverseFrequencies: [angle])
      ).table(positions: [1].span, scaled: false)
      #expect(table.cosines[pair] == precise.cosines[0] && table.sines[pair] == precise.sines[0])
      let length = table.cosines[pair] * table.cosines[pair] + table.sines[pair] * table.sines[pair]
      #expect(abs(length - 1) < 2e-7)
    }
  }
}
