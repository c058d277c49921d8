import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// The oracles of the specification for budgets over layers and heads.
@Suite struct WorkedExampleAllocationTests {
  /// A request of one layer with these scores per head; nothing protected unless said.
  static func request(
    _ scores: [[Float]], budget: Int, index: Int = 0, layers: Int = 1, protection: Protection = Protection(),
    earlier: EarlierAllocation? = nil, tokensSeen: Int? = nil
  ) -> AllocationRequest {
    var table = ScoreTable(counts: scores.map(\.count))
    for (head, row) in scores.enumerated() { for (i, score) in row.enumerated() { table[head, i] = score } }
    return AllocationRequest(
      layer: index, index: index, layers: layers, tokensSeen: tokensSeen ?? scores[0].count, rows: scores.map(\.count),
      budget: scores.map { _ in budget }, scores: table, protection: protection, earlier: earlier)
  }

  // MARK: Ada-KV (A7, B2)

  static let twoHeads: [[Float]] = [[0.40, 0.30, 0.10, 0.05, 0.03, 0.02], [0.20, 0.15, 0.12, 0.11, 0.10, 0.09]]

  static let twoHeadCases: [(AdaKVAllocator.Form, Double, [Int])] = [
    (.official, 0, [2, 4]), (.official, 0.2, [2, 3]), (.official, 0.5, [2, 3]), (.kvpress, 0, [2, 4]),
    (.kvpress, 0.2, [2, 4]), (.kvpress, 0.4, [2, 4]), (.kvpress, 1, [3, 3]),
  ]

  @Test(arguments: twoHeadCases)
  func twoHeads(form: AdaKVAllocator.Form, floor: Double, kept: [Int]) throws {
    let allocator = try AdaKVAllocator(floor: floor, form: form)
    #expect(try allocator.allocate([Self.request(Self.twoHeads, budget: 3)]) == [kept])
  }

  /// Without a floor the mass kept is at least that of equal budgets, and the count is the same.
  @Test func jointBudgetsKeepMoreMass() throws {
    var random = SeededGenerator(seed: 5)
    for heads in 1...4 {
      for tokens in 1...12 {
        for budget in 1...tokens {
          let scores = (0..<heads).map { _ in (0..<tokens).map { _ in Float(random.uniform()) } }
          for form in AdaKVAllocator.Form.allCases {
            let kept = try AdaKVAllocator(floor: 0, form: form).allocate([Self.request(scores, budget: budget)])[0]
            // The official form raises heads that won nothing to one row.
            let missing = form == .official ? kept.reduce(0) { $0 + ($1 == 1 ? 1 : 0) } : 0
            #expect((heads * budget...heads * budget + missing).contains(kept.reduce(0, +)))
            func mass(_ counts: [Int]) -> Float {
              zip(scores, counts).reduce(0) { $0 + $1.0.sorted(by: >).prefix($1.1).reduce(0, +) }
            }
            #expect(mass(kept) >= mass(scores.map { _ in budget }) - 1e-5)
          }
        }
      }
    }
  }

  /// Equal scores everywhere: every head gets the same, the first heads what is left.
  @Test func equalScoresShareEqually() throws {
    let flat = [[Float]](repeating: [Float](repeating: 1, count: 7), count: 3)
    for form in AdaKVAllocator.Form.allCases {
      #expect(try AdaKVAllocator(floor: 0, form: form).allocate([Self.request(flat, budget: 4)]) == [[4, 4, 4]])
    }
  }

  // MARK: PyramidKV (A6)

  static let pyramids: [(Int, [Int])] = [
    (1000, [234, 158, 82, 6]), (241, [233, 158, 83, 8]), (200, [120, 120, 120, 120]), (239, [120, 120, 120, 120]),
    (240, [232, 158, 84, 10]),
  ]

  @Test(arguments: pyramids)
  func pyramid(tokens: Int, past: [Int]) throws {
    let allocator = try PyramidAllocator()
    let kept = (0..<4).map { allocator.rows(budget: 128, tokens: tokens, protected: 8, index: $0, layers: 4) }
    #expect(kept == past.map { $0 + 8 })
  }

  @Test func pyramidOfThirtyTwoLayers() throws {
    let allocator = try PyramidAllocator()
    let kept = (0..<32).map { allocator.rows(budget: 2048, tokens: 100_000, protected: 8, index: $0, layers: 32) }
    #expect(Array(kept[..<3]) == [3978 + 8, 3853 + 8, 3728 + 8])
    #expect(kept.last == 103 + 8)
    #expect(kept.reduce(0) { $0 + $1 - 8 } == 65296)
  }

  /// Ada-KV's pyramid mode has no uniform branch.
  @Test func clippedPyramid() throws {
    let allocator = try PyramidAllocator(short: .clip)
    let kept = (0..<4).map { allocator.rows(budget: 128, tokens: 200, protected: 8, index: $0, layers: 4) }
    #expect(kept == [192, 144, 96, 48].map { $0 + 8 })
    #expect((0..<4).allSatisfy { allocator.rows(budget: 128, tokens: 127, protected: 8, index: $0, layers: 4) == 127 })
  }

  /// Every form, every size: at least what is protected, never more than there is; `exact` adds up to the budget.
  @Test func everyPyramid() throws {
    withEvery("form", in: PyramidAllocator.Form.allCases) { form in
      withEvery("short", in: PyramidAllocator.Short.allCases) { short in
        withEvery("beta", in: [1.0, 2, 20]) { beta in
          let allocator = try PyramidAllocator(beta: beta, form: form, short: short)
          withEvery("layers", in: 1...5) { layers in
            withEvery("window", in: 0...3) { window in
              withEvery("budget", in: max(1, window)...12) { budget in
                withEvery("tokens", in: 0...30) { tokens in
                  let kept = (0..<layers).map {
                    allocator.rows(budget: budget, tokens: tokens, protected: window, index: $0, layers: layers)
                  }
                  check(kept.allSatisfy { (min(tokens, window)...max(tokens, 0)).contains($0) }, "\(kept)")
                  let wanted = layers * min(budget, tokens)
                  if form == .exact { check(kept.reduce(0, +) == wanted, "\(kept) should add up to \(wanted)") }
                  check(zip(kept, kept.dropFirst()).allSatisfy { $0 >= $1 }, "\(kept) rises")
                  if tokens <= budget { check(kept.allSatisfy { $0 == tokens }, "\(kept)") }
                }
              }
            }
          }
        }
      }
    }
  }

  /// Layers without a cache and layers that forget by themselves are no steps of the pyramid.
  @Test func pyramidsCountTheLayersThatChoose() throws {
    let layer = Geometry(2, 1, 8).layer()
    let shape = ModelShape(layers: [
      layer, .uncached, layer, Geometry(2, 1, 8).layer(slidingWindow: 16), layer, layer,
    ])
    let traffic = Traffic(shape, tokens: 300)
    let cache = try makeCache("pyramidkv(budget=40,window=8,kernel=1)+f32", shape)
    try traffic.run(cache, prompt: 300)
    let allocator = try PyramidAllocator()
    let wanted = (0..<4).map { allocator.rows(budget: 40, tokens: 300, protected: 8, index: $0, layers: 4) }
    #expect([0, 2, 4, 5].map { cache.rowsHeld(layer: $0, head: 0) } == wanted)
  }
}
