extension Budget {
  /// The budget a text spells; ``Budget`` lists the forms.
  ///
  /// - Throws: `syntax` with the byte where it stopped; `invalidOption` for numbers that ``validate()`` refuses.
  public init(parsing text: String) throws(KVError) {
    var parser = try SpecParser(text)
    try self.init(try parser.lonelyValue())
    try validate()
  }

  /// The budget a value of a policy text stands for, its numbers unchecked.
  package init(_ value: SpecValue) throws(KVError) {
    switch value.kind {
    case .integer(let count): self = .tokens(count)
    case .decimal(let share): self = .fraction(share)
    case .percent(let share): self = .fraction(share / 100)
    case .bytes(let count): self = .bytes(count)
    case .text(let text) where text.lowercased() == "unlimited": self = .unlimited
    case .text, .bool:
      throw KVError(
        .syntax,
        "expected a budget (1024 tokens, 0.25, 25%, 64MiB, unlimited or a list of these), found \(value.found)")
    case .list(let items): self = try Budget.table(items)
    }
  }

  private static func table(_ items: [SpecValue]) throws(KVError) -> Budget {
    guard case .list? = items.first?.kind else {
      var table: [Budget] = []
      for item in items { table.append(try Budget.leaf(item)) }
      return .perLayer(table)
    }
    var table: [[Budget]] = []
    for item in items {
      guard case .list(let heads) = item.kind else {
        throw KVError(.syntax, "expected a list of budgets, one a head, as in the layers before; found \(item.found)")
      }
      var row: [Budget] = []
      for head in heads { row.append(try Budget.leaf(head)) }
      table.append(row)
    }
    return .perHead(table)
  }

  private static func leaf(_ item: SpecValue) throws(KVError) -> Budget {
    if case .list = item.kind {
      throw KVError(.syntax, "expected a plain budget as in the entries before, found \(item.found)")
    }
    return try Budget(item)
  }

  /// The value that parses to this budget.
  public var specValue: SpecValue {
    switch kind {
    case .tokens(let count): .integer(count)
    case .fraction(let share): .decimal(share)
    case .bytes(let count): .bytes(count)
    case .unlimited: .text("unlimited")
    case .perLayer(let table): .list(table.map(\.specValue))
    case .perHead(let table): .list(table.map { .list($0.map(\.specValue)) })
    }
  }
}

extension Budget: CustomStringConvertible {
  public var description: String { specValue.description }
}
