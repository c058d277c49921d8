/// Shares the kept rows of a head between tiers by rank: the best to the first, the next to the second, and so on. What
/// the budget does not keep is dropped.
///
/// Sinks and window lie in the first tier, whatever its share. Rows only ever move to later tiers: a row that went
/// through a coarse codec gains nothing from a finer one. So a tier may hold fewer rows than its share, and then the
/// next one holds more.
///
/// Counts round in favour of the earlier tier: all tiers behind one together hold at most `floor(their shares · rows)`.
/// Equal scores: the lower position is better. O(rows) per head.
public struct ShareRouter: Router {
  /// Decides which rows survive where the budget is smaller than what there is.
  public let base: any Router
  public let shares: TierShares
  /// Rows that lie in the first tier whatever their score, a share of the window being of the rows there.
  public let first: Protection
  /// Whether a row stays in the tier it was sent to first. The rows that came since share the tiers among themselves.
  public let settles: Bool

  /// - Parameters:
  ///   - base: a router to a single tier.
  ///   - first: nil for what `base` protects.
  ///   - settles: false as a rule: rows move on to later tiers as their rank falls.
  public init(_ base: any Router = TopKRouter(), shares: TierShares, first: Protection? = nil, settles: Bool = false) {
    self.base = base
    self.shares = shares
    self.first = first ?? base.protection
    self.settles = settles
  }

  public var protection: Protection { base.protection }
  public var inputs: RequiredInputs { base.inputs }
  public var routesAlways: Bool { base.routesAlways }
  public var tierCount: Int { shares.tierCount }

  public func validate(kvHeads: [Int]) throws(KVError) {
    guard base.tierCount == 1 else {
      throw KVError(
        .invalidOption, "rows are shared between tiers once; the router below sends them to several already")
    }
    // A row that is merged into another and one that moves are copies of the same moment.
    guard !base.merges else {
      throw KVError(.unsupported, "rows are either merged or shared between tiers; the router below merges them")
    }
    guard first.sinks >= 0, first.window >= 0 else {
      throw KVError(
        .invalidOption, "sinks and window must not be negative; got \(first.sinks) sinks, window \(first.window)")
    }
    try shares.validate(kvHeads: kvHeads)
    try base.validate(kvHeads: kvHeads)
  }

  public func tierRows(kept: Int, of tokens: Int, layer: Int, head: Int) -> [Int] {
    let limits = shares.limits(rows: kept, layer: layer, head: head)
    return limits.indices.map { limits[$0] - ($0 == 0 ? 0 : limits[$0 - 1]) }
  }

  public func route(_ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing) throws(KVError) {
    var members: [Int] = []
    var own: [Float] = []
    if routesAlways || (0..<scores.headCount).contains(where: { kept[$0] < scores.rowCount(head: $0) }) {
      try base.route(layer, scores: scores, kept: kept, into: &routing)
    } else {
      for head in 0..<scores.headCount {
        routing.send(head: head, rows: 0..<scores.rowCount(head: head), to: .tier(0))
      }
    }
    for head in 0..<scores.headCount {
      let rows = scores.rowCount(head: head)
      // Rows that stay where they are do not count.
      let start = settles ? firstNewcomer(layer, head: head) : 0
      var present = 0
      for row in 0..<rows where routing[head, row] != .dropped {
        routing[head, row] = .tier(layer.tier(head: head, row: row))
        if row >= start { present += 1 }
      }
      let limits = shares.limits(rows: present, layer: layer.layer, head: head)
      let window = max(first.window, first.split(kept: limits[0], of: rows).window)
      let free = first.sinks..<max(first.sinks, rows - window)
      var held = 0
      for tier in 0..<tierCount - 1 {
        members.removeAll(keepingCapacity: true)
        own.removeAll(keepingCapacity: true)
        var fixed = 0
        for row in start..<max(rows, start) where routing[head, row] == .tier(tier) {
          if tier == 0, !free.contains(row) {
            fixed += 1
          } else {
            members.append(row)
            own.append(scores[head, row])
          }
        }
        let staying = max(0, min(members.count, limits[tier] - held - fixed))
        forEachSmallest(members.count - staying, of: own) { routing[head, members[$0]] = .tier(tier + 1) }
        held += fixed + staying
      }
    }
  }

  /// The first row that came after the last choice.
  private func firstNewcomer(_ layer: LayerView, head: Int) -> Int {
    var low = 0
    var high = layer.rowCount(head: head)
    while low < high {
      let middle = (low + high) / 2
      if layer.position(head: head, row: middle) < layer.tokensChosen { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// Offsets of the `count` smallest values; of equal ones the latest.
  private func forEachSmallest(_ count: Int, of values: [Float], _ body: (Int) -> Void) {
    if count <= 0 { return }
    if count == 1, let lowest = lastOfSmallest(values[...]) {
      body(lowest)
      return
    }
    var next = 0
    selectLargest(values.count - count, of: values[...]) { kept in
      for offset in next..<kept { body(offset) }
      next = kept + 1
    }
    for offset in next..<values.count { body(offset) }
  }
}

/// Which part of the rows of a head each tier holds: the same everywhere, or by layer, or by layer and head.
public struct TierShares: Hashable, Sendable {
  /// [layer][head][tier]; a single layer or head stands for all.
  private let table: [[[Double]]]
  private let depth: Int

  /// One share per tier, the best rows first.
  ///
  /// - Throws: `invalidOption` unless there are 1 to 64 shares of 0...1 that add up to 1 within 0.001.
  public init(_ shares: [Double]) throws(KVError) { try self.init([[shares]], depth: 1) }

  /// `shares[layer][tier]`.
  public init(perLayer shares: [[Double]]) throws(KVError) { try self.init(shares.map { [$0] }, depth: 2) }

  /// `shares[layer][head][tier]`.
  public init(perHead shares: [[[Double]]]) throws(KVError) { try self.init(shares, depth: 3) }

  private init(_ table: [[[Double]]], depth: Int) throws(KVError) {
    let all = table.flatMap(\.self)
    let tiers = all.first?.count ?? 0
    guard !table.isEmpty, table.allSatisfy({ !$0.isEmpty }), (1...64).contains(tiers) else {
      throw KVError(.invalidOption, "shares of 1 to 64 tiers expected; got \(table)")
    }
    for shares in all {
      guard shares.count == tiers, shares.allSatisfy({ (0...1).contains($0) }),
        abs(shares.reduce(0, +) - 1) <= 0.001
      else {
        throw KVError(
          .invalidOption, "\(tiers) shares of 0...1 that add up to 1 expected; got \(shares)")
      }
    }
    self.table = table
    self.depth = depth
  }

  public var tierCount: Int { table[0][0].count }

  /// The shares of one head.
  public func shares(layer: Int, head: Int) -> [Double] {
    let heads = table[depth == 1 ? 0 : layer]
    return heads[depth < 3 ? 0 : head]
  }

  /// Rows that each tier and those before it hold at most, of `rows`. The last is `rows`.
  func limits(rows: Int, layer: Int, head: Int) -> [Int] {
    let own = shares(layer: layer, head: head)
    return own.indices.map { tier in
      let behind = tier == own.count - 1 ? 0 : own[(tier + 1)...].reduce(0, +)
      return rows - min(rows, Int((behind * Double(rows) + 1e-9 * Double(max(rows, 1))).rounded(.down)))
    }
  }

  /// A table must have a row for every layer and head that will ask.
  func validate(kvHeads: [Int]) throws(KVError) {
    guard depth == 1 || table.count == kvHeads.count else {
      throw KVError(.invalidOption, "shares for \(kvHeads.count) layers expected; got \(table.count)")
    }
    if depth < 3 { return }
    for (layer, heads) in kvHeads.enumerated() where heads > 0 && table[layer].count != heads {
      throw KVError(
        .invalidOption, "shares for \(heads) KV heads expected; got \(table[layer].count)", layer: layer)
    }
  }

  /// The value that reads as these shares.
  public var specValue: SpecValue {
    let lists = table.map { layer in
      layer.map { SpecValue.list($0.map { SpecValue.decimal($0) }) }
    }
    return switch depth {
    case 1: lists[0][0]
    case 2: .list(lists.map { $0[0] })
    default: .list(lists.map { .list($0) })
    }
  }
}

extension OptionReader {
  /// Shares of tiers: `[0.2,0.8]`, a list of these for every layer, or lists of lists for every layer and head.
  public mutating func tierShares(_ name: String, default standard: TierShares? = nil) throws(KVError) -> TierShares {
    let expected = "a share for every store, such as [0.1,0.3,0.6], or a list of these for every layer"
    let value = try read(name, default: standard, expected: expected, spec: \.specValue) {
      (value) throws(KVError) -> TierShares? in
      func items(_ value: SpecValue) -> [SpecValue]? {
        if case .list(let items) = value.kind { items } else { nil }
      }
      func numbers(_ value: SpecValue) -> [Double]? {
        guard let items = items(value) else { return nil }
        let numbers = items.compactMap(\.number)
        return numbers.count == items.count && !numbers.isEmpty ? numbers : nil
      }
      if let shares = numbers(value) { return try TierShares(shares) }
      guard let layers = items(value), !layers.isEmpty else { return nil }
      let perLayer = layers.compactMap(numbers)
      if perLayer.count == layers.count { return try TierShares(perLayer: perLayer) }
      let perHead = layers.compactMap { items($0)?.compactMap(numbers) }
      guard perHead.count == layers.count, zip(perHead, layers).allSatisfy({ $0.count == items($1)?.count }) else {
        return nil
      }
      return try TierShares(perHead: perHead)
    }
    guard let value else {
      throw KVError(
        .invalidOption, "option \"\(name)\" of \(stage.name) is required: expected \(expected), found nothing",
        offset: stage.offset)
    }
    return value
  }
}
