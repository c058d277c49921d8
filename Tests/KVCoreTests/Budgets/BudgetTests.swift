import KVCore
import Testing

@Suite struct BudgetTests {
  private func rows(
    _ budget: Budget, _ tokens: Int, layer: Int = 0, head: Int = 0, layers: Int = 2, kvHeads: Int = 4,
    bytesPerRow: Int = 256
  ) -> Int {
    budget.resolveTokens(
      tokens: tokens, layer: layer, head: head, layers: layers, kvHeads: kvHeads, bytesPerRow: bytesPerRow)
  }

  @Test func fractionsRoundDownButNotByRounding() {
    #expect(rows(.fraction(0.1), 30) == 3)
    #expect(rows(.fraction(0.29), 100) == 29)
    #expect(rows(.fraction(0.57), 100) == 57)
    #expect(rows(.fraction(0.25), 7) == 1)
    #expect(rows(.fraction(0.25), 3) == 1)
    #expect(rows(.fraction(0.5), 5) == 2)
    #expect(rows(.fraction(1), 12345) == 12345)
    #expect(rows(.fraction(1e-9), 5) == 1)
    // Every percentage of every count: exactly floor(p n / 100).
    for percent in 1...100 {
      for tokens in 1...300 {
        #expect(rows(.fraction(Double(percent) / 100), tokens) == max(percent * tokens / 100, 1))
      }
    }
  }

  @Test func everyKindHasAnAnswer() {
    let budgets: [Budget] = [
      .tokens(5), .tokens(0), .tokens(-3), .fraction(0.5), .fraction(0), .fraction(-1), .fraction(.nan),
      .fraction(.infinity), .fraction(7), .bytes(0), .bytes(-9), .bytes(4096), .bytes(Int.max), .unlimited,
      .tokens(Int.max),
    ]
    for budget in budgets {
      #expect(rows(budget, 0) == 0)
      #expect(rows(budget, -1) == 0)
      for tokens in [1, 2, 3, 1000, 1 << 40] {
        #expect((1...tokens).contains(rows(budget, tokens)), "\(budget) of \(tokens)")
      }
    }
    #expect(rows(.unlimited, 9) == 9)
    #expect(rows(.tokens(5), 9) == 5)
    #expect(rows(.tokens(5), 3) == 3)
  }

  @Test func bytesAreDividedAndNeverExceeded() {
    // 8 heads in all, 256 bytes a row: 16 KiB is 8 rows a head.
    #expect(rows(.bytes(16_384), 100) == 8)
    #expect(rows(.bytes(16_383), 100) == 7)
    #expect(rows(.bytes(16_384), 100, layers: Int.max) == 1)
    #expect(rows(.bytes(16_384), 100, bytesPerRow: 0) == 100)
    for bytes in stride(from: 2048, to: 40_000, by: 777) {
      #expect(rows(.bytes(bytes), 1000) * 8 * 256 <= bytes)
    }
  }

  @Test func tables() throws {
    let layers = Budget.perLayer([.tokens(4), .fraction(0.5)])
    #expect(rows(layers, 20, layer: 0) == 4)
    #expect(rows(layers, 20, layer: 1) == 10)
    #expect(rows(.perLayer([.bytes(4096)]), 20) == 4)
    let heads = Budget.perHead([[.tokens(1), .tokens(2)], [.unlimited, .bytes(768)]])
    #expect(rows(heads, 20, layer: 0, head: 1) == 2)
    #expect(rows(heads, 20, layer: 1, head: 0) == 20)
    #expect(rows(heads, 20, layer: 1, head: 1) == 3)
    try heads.validate()
    try heads.validate(kvHeads: [2, 2])
    try layers.validate(kvHeads: [8, 8])
    for wrong in [[2], [2, 3], [2, 2, 2]] {
      let error = #expect(throws: KVError.self) { try heads.validate(kvHeads: wrong) }
      #expect(error?.code == .shapeMismatch)
    }
  }

  @Test func meaninglessBudgetsAreRefused() {
    let bad: [Budget] = [
      .tokens(0), .tokens(-1), .fraction(0), .fraction(1.01), .fraction(-0.5), .fraction(.nan), .bytes(0),
      .perLayer([]), .perHead([]), .perHead([[]]), .perLayer([.tokens(1), .tokens(0)]),
      .perLayer([.perLayer([.tokens(1)])]), .perHead([[.perLayer([.tokens(1)])]]),
    ]
    for budget in bad {
      let error = #expect(throws: KVError.self, "\(budget)") { try budget.validate() }
      #expect(error?.code == .invalidOption)
    }
  }

  @Test func textsRoundTrip() throws {
    let texts: [(String, Budget, String)] = [
      ("1024", .tokens(1024), "1024"), ("0.25", .fraction(0.25), "0.25"), ("25%", .fraction(0.25), "0.25"),
      ("7%", .fraction(0.07), "0.07"), ("100%", .fraction(1), "1.0"), ("1.0", .fraction(1), "1.0"),
      ("1e-05", .fraction(1e-5), "1e-05"), (" 64MiB ", .bytes(67_108_864), "64MiB"),
      ("64MB", .bytes(64_000_000), "62500KiB"), ("512KiB", .bytes(524_288), "512KiB"),
      ("1GiB", .bytes(1 << 30), "1GiB"), ("1.5gib", .bytes(3 << 29), "1536MiB"), ("7b", .bytes(7), "7B"),
      ("1MB", .bytes(1_000_000), "1MB"), ("Unlimited", .unlimited, "unlimited"),
      ("[1, 50%,64KiB]", .perLayer([.tokens(1), .fraction(0.5), .bytes(65536)]), "[1,0.5,64KiB]"),
      ("[[1,2],[3]]", .perHead([[.tokens(1), .tokens(2)], [.tokens(3)]]), "[[1,2],[3]]"),
    ]
    for (text, budget, canonical) in texts {
      #expect(try Budget(parsing: text) == budget, "\(text)")
      #expect(budget.description == canonical)
      #expect(try Budget(parsing: budget.description) == budget)
    }
    for bad in [
      "", "0", "-1", "1.5", "0%", "101%", "0B", "abc", "true", "12 34", "64XB", "1.3B", "[]", "[1,[2]]", "[[1],2]",
      "[[]]", "[[[1]]]", "1e400", "99999999999999999999", "9999999999GiB", "[1,]", "\"x\"",
    ] {
      #expect(throws: KVError.self, "\(bad)") { try Budget(parsing: bad) }
    }
  }
}
