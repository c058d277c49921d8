import KVCore
import Testing

@Suite struct BudgetSplitTests {
  @Test func everySmallCase() {
    for tokens in 0...12 {
      for sinks in 0...4 {
        for window in 0...5 {
          var before: BudgetSplit?
          for budget in 0...13 {
            let label = "tokens \(tokens), sinks \(sinks), window \(window), budget \(budget)"
            let split = BudgetSplit.resolve(budgetTokens: budget, tokens: tokens, sinks: sinks, window: window)
            check(split, tokens: tokens, sinks: sinks, window: window, budget: budget, label)
            if let before {
              #expect(split.sinks >= before.sinks && split.window >= before.window, "\(label)")
              #expect(split.chosen >= before.chosen && split.kept - before.kept <= 1, "\(label)")
            }
            before = split
          }
        }
      }
    }
  }

  private func check(
    _ split: BudgetSplit, tokens: Int, sinks: Int, window: Int, budget: Int, _ label: String
  ) {
    #expect(split.sinks + split.window + split.chosen == min(tokens, budget), "\(label)")
    #expect(split.sinks >= 0 && split.window >= 0 && split.chosen >= 0, "\(label)")
    #expect(split.sinks <= sinks && split.window <= window, "\(label)")
    #expect(split.sinkRange.upperBound <= split.windowRange.lowerBound, "\(label)")
    #expect(split.chosen <= split.candidates.count, "\(label)")
    #expect(split.keepsEverything == (budget >= tokens), "\(label)")
    let fullSinks = min(sinks, tokens)
    let fullWindow = min(window, tokens - fullSinks)
    if budget >= fullSinks + fullWindow {
      #expect(split.sinks == fullSinks && split.window == fullWindow, "\(label)")
    } else {
      // The documented order of cutting.
      #expect(split.chosen == 0, "\(label)")
      #expect(split.window >= min(fullWindow, budget, 1), "\(label)")
      #expect(split.window <= 1 || split.sinks == fullSinks, "\(label)")
    }
  }

  @Test func orderOfCutting() {
    func parts(_ budget: Int) -> [Int] {
      let split = BudgetSplit.resolve(budgetTokens: budget, tokens: 100, sinks: 3, window: 4)
      return [split.sinks, split.window, split.chosen]
    }
    #expect(parts(0) == [0, 0, 0])
    #expect(parts(1) == [0, 1, 0])
    #expect(parts(2) == [1, 1, 0])
    #expect(parts(4) == [3, 1, 0])
    #expect(parts(6) == [3, 3, 0])
    #expect(parts(7) == [3, 4, 0])
    #expect(parts(20) == [3, 4, 13])
  }

  @Test func absurdArgumentsHaveAnAnswer() {
    for (budget, tokens, sinks, window) in [
      (-1, 5, 1, 1), (5, -1, 1, 1), (5, 5, -1, -1), (Int.max, Int.max, Int.max, Int.max), (Int.max, 3, Int.max, 0),
      (2, Int.max, Int.max, Int.max),
    ] {
      let split = BudgetSplit.resolve(budgetTokens: budget, tokens: tokens, sinks: sinks, window: window)
      #expect(split.kept == max(min(budget, tokens), 0))
    }
  }

  @Test func tooSmallBudgetsAreRefusedAtConstruction() throws {
    try BudgetSplit.validate(sinks: 4, window: 4, budget: .tokens(8))
    try BudgetSplit.validate(sinks: 4, window: 4, budget: .fraction(0.001))
    try BudgetSplit.validate(sinks: 4, window: 4, budget: .bytes(1))
    try BudgetSplit.validate(sinks: 4, window: 4, budget: .unlimited)
    for budget in [Budget.tokens(7), .perLayer([.tokens(8), .tokens(7)]), .perHead([[.tokens(7)]])] {
      let error = #expect(throws: KVError.self) { try BudgetSplit.validate(sinks: 3, window: 5, budget: budget) }
      #expect(error?.code == .invalidOption)
      for number in ["7", "3", "5"] { #expect(error?.message.contains(number) == true) }
    }
    #expect(throws: KVError.self) { try BudgetSplit.validate(sinks: -1, window: 5, budget: .unlimited) }
    #expect(throws: KVError.self) { try BudgetSplit.validate(sinks: 1, window: -5, budget: .unlimited) }
    #expect(throws: KVError.self) { try BudgetSplit.validate(sinks: 0, window: 0, budget: .tokens(0)) }
    #expect(throws: KVError.self) {
      try BudgetSplit.validate(sinks: Int.max, window: Int.max, budget: .tokens(Int.max))
    }
  }
}
