/// How much of a cache may be kept.
///
/// A budget counts rows per KV head and includes everything: sinks, recent window and the tokens a scorer chose. It
/// is a wish until ``resolveTokens(tokens:layer:head:layers:kvHeads:bytesPerRow:)`` turns it into a number of rows for
/// one layer and head; that is the one place that handles edge cases, and every policy calls it.
///
/// Text forms, which parse and print back:
///
/// ```
/// 1024            tokens            64MiB 64MB 512KiB 1GiB   bytes of the whole cache
/// 0.25 or 25%     fraction          unlimited                everything
/// [512,256,128]   one a layer       [[512,256],[128,64]]     one a layer and KV head
/// ```
public struct Budget: Hashable, Sendable {
  package enum Kind: Hashable, Sendable {
    case tokens(Int)
    case fraction(Double)
    case bytes(Int)
    case unlimited
    case perLayer([Budget])
    case perHead([[Budget]])
  }

  package let kind: Kind
  private init(kind: Kind) { self.kind = kind }

  /// `count` rows per KV head, at least 1.
  public static func tokens(_ count: Int) -> Budget { Budget(kind: .tokens(count)) }

  /// A share of the tokens present when the cache is compressed, above 0 and at most 1. Rounds down, but never below
  /// one row.
  public static func fraction(_ share: Double) -> Budget { Budget(kind: .fraction(share)) }

  /// Bytes of the whole cache, or of one layer or head where it stands in a table. Divided evenly.
  public static func bytes(_ count: Int) -> Budget { Budget(kind: .bytes(count)) }

  /// Every token.
  public static let unlimited = Budget(kind: .unlimited)

  /// One plain budget a layer.
  public static func perLayer(_ budgets: [Budget]) -> Budget { Budget(kind: .perLayer(budgets)) }

  /// One plain budget a layer and KV head: `budgets[layer][head]`.
  public static func perHead(_ budgets: [[Budget]]) -> Budget { Budget(kind: .perHead(budgets)) }

  /// Every plain budget in it, itself if it is no table.
  package var leaves: [Budget] {
    switch kind {
    case .perLayer(let table): table
    case .perHead(let table): table.flatMap(\.self)
    default: [self]
    }
  }

  var isTable: Bool {
    switch kind {
    case .perLayer, .perHead: true
    default: false
    }
  }
}

// MARK: - Checks

extension Budget {
  /// Whether the numbers mean something. A policy calls this when it is made.
  ///
  /// - Throws: `invalidOption` for fewer than 1 token or byte, a fraction outside (0, 1], an empty table and a table
  ///   within a table.
  public func validate() throws(KVError) {
    switch kind {
    case .tokens(let count):
      if count < 1 { throw KVError(.invalidOption, "a budget must be at least 1 token; got \(count)") }
    case .fraction(let share):
      if !(share > 0 && share <= 1) {
        throw KVError(.invalidOption, "a budget fraction must lie above 0 and at most at 1; got \(share)")
      }
    case .bytes(let count):
      if count < 1 { throw KVError(.invalidOption, "a budget must be at least 1 byte; got \(count)") }
    case .unlimited: break
    case .perLayer(let table):
      if table.isEmpty { throw KVError(.invalidOption, "a budget table needs at least one layer; got none") }
      for (layer, budget) in table.enumerated() { try budget.validateLeaf(layer: layer, head: nil) }
    case .perHead(let table):
      if table.isEmpty { throw KVError(.invalidOption, "a budget table needs at least one layer; got none") }
      for (layer, heads) in table.enumerated() {
        if heads.isEmpty {
          throw KVError(.invalidOption, "a budget table needs at least one head; got none", layer: layer)
        }
        for (head, budget) in heads.enumerated() { try budget.validateLeaf(layer: layer, head: head) }
      }
    }
  }

  private func validateLeaf(layer: Int, head: Int?) throws(KVError) {
    if isTable {
      throw KVError(.invalidOption, "a budget table holds plain budgets; got a table", layer: layer, head: head)
    }
    do {
      try validate()
    } catch {
      throw error.at(layer: layer, head: head)
    }
  }

  /// Whether tables have a row for each layer and KV head of a model. A policy calls this once it knows the model.
  ///
  /// - Parameter kvHeads: KV heads of each layer.
  /// - Throws: `shapeMismatch`.
  public func validate(kvHeads: [Int]) throws(KVError) {
    switch kind {
    case .perLayer(let table):
      try Budget.check(layers: table.count, against: kvHeads.count)
    case .perHead(let table):
      try Budget.check(layers: table.count, against: kvHeads.count)
      // A layer without a cache has no heads: whatever stands there is not read.
      for (layer, heads) in table.enumerated() where kvHeads[layer] > 0 && heads.count != kvHeads[layer] {
        throw KVError(
          .shapeMismatch, "a budget table needs \(kvHeads[layer]) KV heads here; got \(heads.count)", layer: layer)
      }
    default: break
    }
  }

  private static func check(layers: Int, against expected: Int) throws(KVError) {
    if layers != expected {
      throw KVError(.shapeMismatch, "a budget table needs \(expected) layers, one for each of the model; got \(layers)")
    }
  }
}

// MARK: - Resolving

extension Budget {
  /// Rows that one KV head of one layer keeps.
  ///
  /// Total: every input has an answer. 0 for no tokens, else 1...tokens: even a budget too small for a single row (a
  /// few bytes) keeps one, because attention over nothing has no value.
  ///
  /// - `tokens(b)`: min(b, n).
  /// - `fraction(f)`: floor(f n), where a product within rounding of an integer counts as that integer (0.29 * 100 is
  ///   29).
  /// - `bytes(b)`: floor(floor(b / (layers * kvHeads)) / bytesPerRow): the same for every head, never above b in sum
  ///   unless the one-row rule says so. In a `perLayer` table b is divided by `kvHeads` only, in `perHead` not at all.
  ///
  /// - Parameters:
  ///   - tokens: rows present, n.
  ///   - layers: layers that share a byte budget.
  ///   - kvHeads: KV heads of this layer.
  ///   - bytesPerRow: bytes of key and value of one token in one KV head.
  /// - Precondition: a table has a row for `layer` and `head`; ``validate(kvHeads:)`` checks that at construction.
  /// - Complexity: O(1).
  public func resolveTokens(
    tokens: Int, layer: Int, head: Int, layers: Int, kvHeads: Int, bytesPerRow: Int
  ) -> Int {
    if tokens <= 0 { return 0 }
    let rows: Int
    switch kind {
    case .tokens(let count): rows = count
    case .fraction(let share): rows = Budget.rows(of: share, tokens: tokens)
    case .bytes(let count):
      let (shares, overflow) = max(layers, 1).multipliedReportingOverflow(by: max(kvHeads, 1))
      rows = overflow ? 0 : count / shares / max(bytesPerRow, 1)
    case .unlimited: rows = tokens
    case .perLayer(let table):
      precondition(table.indices.contains(layer), "budget table of \(table.count) layers asked for layer \(layer)")
      rows = table[layer].resolveTokens(
        tokens: tokens, layer: layer, head: head, layers: 1, kvHeads: kvHeads, bytesPerRow: bytesPerRow)
    case .perHead(let table):
      precondition(table.indices.contains(layer), "budget table of \(table.count) layers asked for layer \(layer)")
      precondition(
        table[layer].indices.contains(head), "budget table of \(table[layer].count) heads asked for head \(head)")
      rows = table[layer][head].resolveTokens(
        tokens: tokens, layer: layer, head: head, layers: 1, kvHeads: 1, bytesPerRow: bytesPerRow)
    }
    return min(max(rows, 1), tokens)
  }

  private static func rows(of share: Double, tokens: Int) -> Int {
    guard share < 1 else { return tokens }
    let product = share * Double(tokens)
    guard product > 1 else { return 1 }  // NaN and negative shares as well
    let nearest = product.rounded()
    return Int(abs(product - nearest) <= product * 0x1p-51 ? nearest : product.rounded(.down))
  }
}

extension Budget {
  /// The same budget, a share of it: tokens and bytes rounded down, at least 1.
  ///
  /// - Throws: `invalidOption` for a share outside (0, 1].
  public func scaled(by share: Double) throws(KVError) -> Budget {
    guard share > 0, share <= 1 else {
      throw KVError(.invalidOption, "a budget is scaled by a share above 0 and at most 1; got \(share)")
    }
    switch kind {
    case .tokens(let count): return .tokens(Budget.scale(count, share))
    case .fraction(let part): return .fraction(part * share)
    case .bytes(let count): return .bytes(Budget.scale(count, share))
    case .unlimited: return .unlimited
    case .perLayer(let table):
      var scaled: [Budget] = []
      for budget in table { scaled.append(try budget.scaled(by: share)) }
      return .perLayer(scaled)
    case .perHead(let table):
      var scaled: [[Budget]] = []
      for heads in table {
        var own: [Budget] = []
        for budget in heads { own.append(try budget.scaled(by: share)) }
        scaled.append(own)
      }
      return .perHead(scaled)
    }
  }

  /// A product within rounding of an integer counts as that integer.
  private static func scale(_ count: Int, _ share: Double) -> Int {
    let product = Double(count) * share
    let nearest = product.rounded()
    return max(1, Int(abs(product - nearest) <= product * 0x1p-51 ? nearest : product.rounded(.down)))
  }
}
