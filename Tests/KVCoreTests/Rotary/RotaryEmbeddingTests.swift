import KVCore
import Testing

/// Applies `body` to the row as a mutable span.
func withRotaryRow(_ row: inout [Float], _ body: (inout MutableSpan<Float>) throws(KVError) -> Void) throws(KVError) {
  var span = row.mutableSpan
  try body(&span)
}

func rotatedRow(_ rope: RotaryEmbedding, _ row: [Float], _ position: Int) throws -> [Float] {
  var copy = row
  try withRotaryRow(&copy) { (span) throws(KVError) in try rope.rotate(&span, position: position) }
  return copy
}

func expectRotaryClose(
  _ got: [Float], _ want: [Float], within bound: Float, sourceLocation: SourceLocation = #_sourceLocation
) {
  #expect(got.count == want.count, sourceLocation: sourceLocation)
  for (index, (a, b)) in zip(got, want).enumerated() {
    #expect(abs(a - b) <= bound, "element \(index): got \(a), expected \(b)", sourceLocation: sourceLocation)
  }
}

@Suite struct RotaryEmbeddingTests {
  @Test func publishedVectorHalfSplit() throws {
    let rope = try RotaryEmbedding(headDim: 4)
    let x: [Float] = [1, 2, 3, 4]
    let at7 = try rotatedRow(rope, x, 7)
    expectRotaryClose(at7, [-1.21706, 1.71533, 2.91869, 4.13009], within: 6e-6)
    let chained = try rotatedRow(rope, at7, 3)
    expectRotaryClose(chained, [0.79299, 1.59067, -3.06124, 4.17968], within: 6e-6)
    expectRotaryClose(chained, try rotatedRow(rope, x, 10), within: 2e-6)
    var moved = at7
    try withRotaryRow(&moved) { (span) throws(KVError) in try rope.move(&span, from: 7, to: 10) }
    expectRotaryClose(moved, try rotatedRow(rope, x, 10), within: 2e-6)
  }

  @Test func publishedVectorInterleaved() throws {
    let rope = try RotaryEmbedding(headDim: 4, theta: 100, layout: .interleaved)
    let k: [Float] = [1, 0.5, -0.3, 0.7]
    let at10 = try rotatedRow(rope, k, 10)
    let at13 = try rotatedRow(rope, k, 13)
    expectRotaryClose(at10, [-0.56706097, -0.96355688, -0.75112038, 0.12577032], within: 1e-6)
    expectRotaryClose(
      zip(at10, at13).map { ($0 + $1) / 2 }, [0.065151, -0.044833, -0.752930, 0.011976], within: 1.5e-6)
  }

  @Test func partialRotaryLeavesTheRest() throws {
    let rope = try RotaryEmbedding(headDim: 10, rotaryDim: 4)
    let x = (1...10).map(Float.init)
    let y = try rotatedRow(rope, x, 7)
    #expect(Array(y[4...]) == Array(x[4...]))
    expectRotaryClose(Array(y[..<4]), [-1.21706, 1.71533, 2.91869, 4.13009], within: 6e-6)
  }

  @Test(arguments: [
    RotaryEmbedding.Scaling.none, .linear(factor: 4), .ntk(factor: 2), .yarn(factor: 4, originalContext: 4096),
    .llama3(factor: 8, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalContext: 8192),
  ])
  func algebra(scaling: RotaryEmbedding.Scaling) throws {
    for layout in [RotaryEmbedding.Layout.halfSplit, .interleaved] {
      for product in [RotaryEmbedding.AngleProduct.f32, .f64] {
        let rope = try RotaryEmbedding(
          headDim: 16, rotaryDim: 12, layout: layout, scaling: scaling, angleProduct: product)
        let x = (0..<16).map { Float(($0 * 7 + 3) % 11) - 5 }
        let q = (0..<16).map { Float(($0 * 5 + 1) % 13) - 6 }
        let size = x.reduce(0) { $0 + $1 * $1 }.squareRoot()
        for position in [0, 1, 7, 4095, 131_071, 1_000_000] {
          let turned = try rotatedRow(rope, x, position)
          var back = turned
          try withRotaryRow(&back) { (span) throws(KVError) in try rope.unrotate(&span, position: position) }
          expectRotaryClose(back, x, within: size * 4e-7)
          // The norm of the turning part is kept, but for the attention factor.
          let factor = rope.attentionFactor
          let norm = turned[..<12].reduce(0) { $0 + $1 * $1 }
          let was = x[..<12].reduce(0) { $0 + $1 * $1 } * factor * factor
          #expect(abs(norm - was) <= was * 1e-6)
          for target in [0, 3, 200_000, 999_999] {
            var moved = turned
            try withRotaryRow(&moved) { (span) throws(KVError) in try rope.move(&span, from: position, to: target) }
            expectRotaryClose(moved, try rotatedRow(rope, x, target), within: size * 5e-7 * factor)
          }
        }
        // The product of query and key depends on the difference of their positions.
        let near = try dot(rotatedRow(rope, q, 40), rotatedRow(rope, x, 25))
        let far = try dot(rotatedRow(rope, q, 1040), rotatedRow(rope, x, 1025))
        #expect(abs(near - far) <= 2e-3 * size * size)
        if product == .f64 { #expect(abs(near - far) <= 2e-6 * size * size) }
      }
    }
  }

  private func dot(_ a: [Float], _ b: [Float]) -> Float { zip(a, b).reduce(0) { $0 + $1.0 * $1.1 } }

  @Test func movingNowhereChangesNoBit() throws {
    let rope = try RotaryEmbedding(headDim: 8)
    let x = (0..<8).map { Float($0) * 0.123456 }
    var copy = x
    try withRotaryRow(&copy) { (span) throws(KVError) in try rope.move(&span, from: 12_345, to: 12_345) }
    #expect(copy.map(\.bitPattern) == x.map(\.bitPattern))
  }

  @Test func rowsAgreeWithSingleRowsAndTables() throws {
    let rope = try RotaryEmbedding(headDim: 6, rotaryDim: 4, scaling: .yarn(factor: 2, originalContext: 64))
    let positions: [Int32] = [3, 0, 900_000]
    let targets: [Int32] = [3, 17, 5]
    let stride = 8
    let start = (0..<(2 * stride + 6)).map { Float($0 % 9) - 4 }
    var rows = start
    try withRotaryRow(&rows) { (span) throws(KVError) in
      try rope.rotate(&span, stride: stride, positions: positions.span)
    }
    let table = try rope.table(positions: positions.span, scaled: true)
    for (index, position) in positions.enumerated() {
      let piece = Array(start[index * stride..<index * stride + 6])
      #expect(Array(rows[index * stride..<index * stride + 6]) == (try rotatedRow(rope, piece, Int(position))))
      let c = table.cosines[index * 2]
      let s = table.sines[index * 2]
      #expect(rows[index * stride] == piece[0] * c - piece[2] * s)
    }
    // The gaps between rows belong to somebody else.
    #expect(rows[6] == start[6] && rows[7] == start[7])
    var moved = rows
    try withRotaryRow(&moved) { (span) throws(KVError) in
      try rope.move(&span, stride: stride, from: positions.span, to: targets.span)
    }
    let moves = try rope.moveTable(from: positions.span, to: targets.span)
    #expect(moves.cosines[0] == 1 && moves.sines[0] == 0)
    #expect(moved[8] == rows[8] * moves.cosines[2] - rows[10] * moves.sines[2])
    try withRotaryRow(&moved) { (span) throws(KVError) in
      try rope.unrotate(&span, stride: stride, positions: targets.span)
    }
    expectRotaryClose(moved, start, within: 4e-6)
  }

  @Test func wrongShapesAreRefusedAndChangeNothing() throws {
    let rope = try RotaryEmbedding(headDim: 4)
    var row: [Float] = [1, 2, 3]
    #expect(throws: KVError.self) { _ = try rotatedRow(rope, row, 1) }
    row = Array(repeating: 1, count: 11)
    let positions: [Int32] = [1, 2, 3]
    for stride in [3, 4, 5, Int.max] {
      #expect(throws: KVError.self) {
        try withRotaryRow(&row) { (span) throws(KVError) in
          try rope.rotate(&span, stride: stride, positions: positions.span)
        }
      }
    }
    #expect(row == Array(repeating: 1, count: 11))
  }

  @Test func constructionRefuses() {
    func refused(_ make: () throws -> RotaryEmbedding, sourceLocation: SourceLocation = #_sourceLocation) {
      let error = #expect(throws: KVError.self, sourceLocation: sourceLocation) { _ = try make() }
      #expect(error?.code == .invalidOption, sourceLocation: sourceLocation)
    }
    refused { try RotaryEmbedding(headDim: 0) }
    refused { try RotaryEmbedding(headDim: 8, rotaryDim: 3) }
    refused { try RotaryEmbedding(headDim: 8, rotaryDim: 10) }
    refused { try RotaryEmbedding(headDim: 8, rotaryDim: 0) }
    for theta in [0, -1, Double.infinity, Double.nan, 1e300, 1e-300] {
      refused { try RotaryEmbedding(headDim: 8, theta: theta) }
    }
    for factor in [0.5, 0, -2, Double.nan, Double.infinity] {
      refused { try RotaryEmbedding(headDim: 8, scaling: .linear(factor: factor)) }
      refused { try RotaryEmbedding(headDim: 8, scaling: .yarn(factor: factor, originalContext: 64)) }
    }
    refused { try RotaryEmbedding(headDim: 2, scaling: .ntk(factor: 2)) }
    refused { try RotaryEmbedding(headDim: 8, scaling: .dynamicNTK(factor: 2, originalContext: 0)) }
    refused { try RotaryEmbedding(headDim: 8, theta: 1, scaling: .yarn(factor: 2, originalContext: 64)) }
    refused { try RotaryEmbedding(headDim: 8, scaling: .yarn(factor: 2, originalContext: 64, betaFast: 1)) }
    refused { try RotaryEmbedding(headDim: 8, scaling: .yarn(factor: 2, originalContext: 64, attentionFactor: 0)) }
    refused {
      try RotaryEmbedding(
        headDim: 8,
        scaling: .llama3(factor: 8, lowFrequencyFactor: 4, highFrequencyFactor: 4, originalContext: 64))
    }
    refused { try RotaryEmbedding(headDim: 8, scaling: .explicit(inverseFrequencies: [1, 2])) }
  }
}
