public import KVCore

/// KVCrush: most of the budget goes by score, a small part to representatives of what would be dropped, picked evenly along
/// an order by likeness. arXiv 2503.00022.
///
/// Needs: the attention weights of the last `queries` tokens of the prompt and of every decoded token. Runs: after the
/// prompt and after every `every` decoded tokens.
///
/// Differs from the authors' code: the budget is met exactly and holds the representatives (theirs come on top), so the last
/// block may be cut; the random anchor comes from a generator of ours; equal scores and distances keep the lower position.
/// The paper's form has no code: bits are those of the KV heads, each head keeps its own tokens.
extension Selection {
  /// - Parameters:
  ///   - budget: rows kept in all; the authors' 672 are 32 sinks, 512 chosen and 128 newest.
  ///   - sinks: first tokens that always stay.
  ///   - window: newest tokens that always stay.
  ///   - rule: what represents what; see ``RepresentativeRule``.
  ///   - normalised: divides each sum by the queries that could see the row.
  ///   - queries: newest tokens of a prompt, or of each of its chunks, whose attention counts.
  ///   - pool: following rows, its own included, of which a row takes the largest weight.
  ///   - every: decoded tokens between evictions; nil never after the prompt. The authors drop a block at a time.
  public static func kvCrush(
    budget: Budget = .tokens(672), sinks: Int = 32, window: Int = 128, rule: RepresentativeRule? = nil,
    normalised: Bool = true, queries: Int = 8, pool: Int = 7, every: Int? = 32
  ) throws(KVError) -> Selection {
    guard (1...1_048_576).contains(queries), (1...65_536).contains(pool) else {
      throw KVError(
        .invalidOption, "kvcrush looks at 1...1048576 queries and pools 1...65536 rows; got \(queries) and \(pool)")
    }
    try BudgetSplit.validate(sinks: sinks, window: window, budget: budget)
    if let every, every < 1 {
      throw KVError(.invalidOption, "evicting every \(every) tokens does not exist; at least 1, or never")
    }
    var rule = if let rule { rule } else { try RepresentativeRule(form: .code) }
    // Blocks may be ranked by means; bits are always of the sums.
    rule.bitsFromColumn = true
    let observer = PooledAttention(promptQueries: queries, pool: pool, sharedByHeads: rule.form == .code)
    return Selection(
      spec: StageSpec(
        name: "kvcrush",
        options: [
          SpecOption("budget", budget.specValue), SpecOption("sinks", .integer(sinks)),
          SpecOption("window", .integer(window)), SpecOption("normalised", .bool(normalised)),
          SpecOption("queries", .integer(queries)), SpecOption("pool", .integer(pool)),
          SpecOption("every", .integer(every ?? 0)),
        ] + rule.options),
      scorer: PooledSums(observer, normalised: normalised), budget: budget,
      router: TopKRouter(Protection(sinks: sinks, window: window), rule: rule),
      schedule: Schedule(decodeInterval: every))
  }

  /// `kvcrush(budget=672,share=0.25)`.
  public static let kvCrushMethod = MethodDescription(
    name: "kvcrush", role: .selection, summary: "the best blocks, and representatives of the others",
    paper: "arXiv 2503.00022",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes kept in all, representatives included"),
      .init("sinks", "first tokens that always stay"), .init("window", "newest tokens that always stay"),
      .init("normalised", "whether sums are divided by the queries that could see the row"),
      .init("queries", "newest tokens of the prompt whose attention counts"),
      .init("pool", "following rows of which a row takes the largest weight"),
      .init("every", "decoded tokens between evictions; 0 for never after the prompt"),
    ] + RepresentativeRule.descriptions
  ) { (reader) throws(KVError) in
    let budget = try reader.budget("budget", default: .tokens(672))
    let sinks = try reader.int("sinks", default: 32, in: 0...1_048_576)
    let window = try reader.int("window", default: 128, in: 0...1_048_576)
    let normalised = try reader.bool("normalised", default: true)
    let queries = try reader.int("queries", default: 8, in: 1...1_048_576)
    let pool = try reader.int("pool", default: 7, in: 1...65_536)
    let every = try reader.int("every", default: 32, in: 0...1_048_576)
    let rule = try RepresentativeRule.read(&reader, form: .code)
    return .selection(
      try .kvCrush(
        budget: budget, sinks: sinks, window: window, rule: rule, normalised: normalised, queries: queries, pool: pool,
        every: every == 0 ? nil : every))
  }

  /// Part of the budget for representatives, behind any selection whose heads score for themselves:
  /// `h2o(budget=0.25)+crush`.
  ///
  /// - Throws: `unsupported` behind a selection without scores.
  public func crush(_ rule: RepresentativeRule? = nil) throws(KVError) -> Selection {
    let rule = if let rule { rule } else { try RepresentativeRule(form: .paper) }
    guard scorer != nil else { throw Selection.nothingToScore("crush", self) }
    return try ruled(by: rule, StageSpec(name: "crush", options: rule.options))
  }

  /// `crush(share=0.25)`, behind what scores.
  public static let crushMethod = MethodDescription(
    name: "crush", role: .modifier, summary: "part of the budget for representatives of what would be dropped",
    paper: "arXiv 2503.00022", options: RepresentativeRule.descriptions
  ) { (reader) throws(KVError) in
    let rule = try RepresentativeRule.read(&reader, form: .paper)
    return .modifier { (selection) throws(KVError) in try selection.crush(rule) }
  }
}

/// Sums of the attention of some queries, each row taking the largest weight among itself and the rows after it; and the
/// number of queries that could see the row.
public struct PooledAttention: AttentionObserver {
  /// Newest queries of a prompt chunk that count.
  public let promptQueries: Int
  /// Rows of which the largest weight is taken, the row itself first; fewer at the end.
  public let pool: Int
  /// Whether the heads of a layer share one sum.
  public let sharedByHeads: Bool

  public init(promptQueries: Int = .max, pool: Int = 1, sharedByHeads: Bool = false) {
    self.promptQueries = promptQueries
    self.pool = pool
    self.sharedByHeads = sharedByHeads
  }

  /// 0: the sum; 1: the queries.
  public var columns: Int { 2 }
  public func observedQueries(prompt: Bool) -> Int { prompt ? promptQueries : .max }
  public func merged(column: Int, _ own: Float, _ taken: Float) -> Float {
    column == 0 ? own + taken : max(own, taken)
  }

  public func fold(_ rows: ObservedRows) {
    let sums = rows.column(0)
    let seen = rows.column(1)
    for slot in 0..<rows.count where rows.isLive(slot) {
      var largest = rows.weights[slot]
      var left = pool - 1
      var next = slot + 1
      while left > 0, next < rows.count {
        // Dead slots have no weight and do not count.
        if rows.isLive(next) {
          largest = max(largest, rows.weights[next])
          left -= 1
        }
        next += 1
      }
      sums[slot] += largest
      seen[slot] += Float(min(rows.queries, rows.tokensSeen - rows.position(slot)))
    }
  }
}

/// ``PooledAttention``'s sums, or their means over the queries that could see the row.
public struct PooledSums: RowScorer {
  public let observer: PooledAttention
  public let normalised: Bool

  public init(_ observer: PooledAttention, normalised: Bool = true) {
    self.observer = observer
    self.normalised = normalised
  }

  public var inputs: RequiredInputs { RequiredInputs(observer: observer) }

  public func score(_ rows: ObservedRows, into scores: UnsafeMutableBufferPointer<Float>) {
    let sums = rows.column(0)
    let seen = rows.column(1)
    if sums.baseAddress == nil { return scores.update(repeating: 0) }
    for slot in 0..<rows.count { scores[slot] = normalised ? sums[slot] / max(seen[slot], 1) : sums[slot] }
  }
}

/// KVCrush's rule: the best rows, and of the others some that lie evenly along their order by likeness to one anchor.
///
/// Rows, or blocks of them, are described by bits; likeness is the number of equal ones (Hamming distance). One distance
/// each takes the place of clustering.
public struct RepresentativeRule: SelectionRule {
  /// What the bits are.
  public enum Form: String, Sendable, Hashable, CaseIterable {
    /// Of blocks of neighbours: one bit a row, on in the better half of all rows.
    case code
    /// Of tokens: one bit a KV head, on where the head keeps the token for its score.
    case paper
  }

  /// What distances are counted from.
  public enum Anchor: String, Sendable, Hashable, CaseIterable {
    case random, zeros, ones, mean, alternating
  }

  public let form: Form
  /// Rows of a block, in the form of the code.
  public let block: Int
  /// Representatives as a share of the blocks, or of the tokens, that are chosen.
  public let share: Double
  /// Their number, instead of the share.
  public let representatives: Int?
  public let anchor: Anchor
  /// Of the random anchor.
  public let seed: Int
  /// Bits come from the observer's first column instead of the scores.
  var bitsFromColumn = false

  public init(
    form: Form = .code, block: Int = 32, share: Double = 0.25, representatives: Int? = nil, anchor: Anchor = .random,
    seed: Int = 0
  ) throws(KVError) {
    guard (1...65_536).contains(block), (0...1).contains(share), (0...1_048_576).contains(representatives ?? 0) else {
      throw KVError(
        .invalidOption,
        "blocks hold 1...65536 rows, representatives are a share in 0...1 or a number in 0...1048576; got \(block), "
          + "\(share) and \(representatives.map { "\($0)" } ?? "none")")
    }
    self.form = form
    self.block = block
    self.share = share
    self.representatives = representatives
    self.anchor = anchor
    self.seed = seed
  }

  public func choose(_ layer: LayerView, scores: ScoreTable, splits: [BudgetSplit], into routing: inout Routing) {
    switch form {
    case .code: for head in splits.indices { chooseBlocks(layer, scores, head, splits[head], into: &routing) }
    case .paper: chooseTokens(layer, scores, splits, into: &routing)
    }
  }

  /// How many of `count` chosen ones are representatives.
  func representatives(of count: Int) -> Int {
    min(count, representatives ?? Int((share * Double(count)).rounded(.down)))
  }

  // MARK: Blocks

  private func chooseBlocks(
    _ layer: LayerView, _ scores: ScoreTable, _ head: Int, _ split: BudgetSplit, into routing: inout Routing
  ) {
    let first = split.candidates.lowerBound
    let blocks = split.candidates.count / block
    // What is too new to fill a block stays, as if it were of the window.
    let whole = first..<first + blocks * block
    let newest = min(split.candidates.upperBound - whole.upperBound, split.chosen)
    routing.send(
      head: head, rows: split.candidates.upperBound - newest..<split.candidates.upperBound, to: .tier(0))
    let (count, rest) = (split.chosen - newest).quotientAndRemainder(dividingBy: block)
    if count == 0, rest == 0 { return }
    let own = whole.map { scores[head, $0] }
    let order = ranking(own)
    let representatives = representatives(of: count)
    let evicted = order[(count - representatives)...].sorted()
    let raw = bitsFromColumn ? whole.map { layer.observed(head: head, row: $0) } : own
    let distances = distances(bits: RepresentativeRule.bits(raw), block: block)
    var kept = Set(order[..<(count - representatives)])
    kept.formUnion(picks(evicted, count: representatives) { distances[$0] })
    for number in kept {
      routing.send(head: head, rows: first + number * block..<first + (number + 1) * block, to: .tier(0))
    }
    if rest > 0, let cut = order.first(where: { !kept.contains($0) }) {
      routing.send(head: head, rows: first + cut * block..<first + cut * block + rest, to: .tier(0))
    }
  }

  /// Blocks, the largest sum of scores first; of equal ones the earlier.
  func ranking(_ scores: [Float]) -> [Int] {
    let sums = (0..<scores.count / block).map { number in
      scores[number * block..<(number + 1) * block].reduce(0.0) { $0 + Double($1) }
    }
    return sums.indices.sorted { sums[$0] != sums[$1] ? sums[$0] > sums[$1] : $0 < $1 }
  }

  /// One bit a row: on in the better half, of equal rows the earlier.
  static func bits(_ scores: [Float]) -> [Bool] {
    var table = ScoreTable(counts: [scores.count])
    table.set(head: 0, scores)
    var bits = [Bool](repeating: false, count: scores.count)
    table.forEachLargest(scores.count / 2, head: 0, in: 0..<scores.count) { bits[$0] = true }
    return bits
  }

  /// Bits of every block that differ from the anchor's.
  func distances(bits: [Bool], block: Int) -> [Int] {
    let count = bits.count / block
    let anchor = anchorBits(block) { offset in
      2 * (0..<count).reduce(0) { $0 + (bits[$1 * block + offset] ? 1 : 0) } > count
    }
    return (0..<count).map { number in
      (0..<block).reduce(0) { $0 + (bits[number * block + $1] != anchor[$1] ? 1 : 0) }
    }
  }

  /// `count` of the evicted, evenly along their order by distance, of equal ones the earlier. The authors round the step
  /// down, so that the far end of the order may be left out; the paper's groups are equal.
  func picks(_ evicted: [Int], count: Int, distance: (Int) -> Int) -> [Int] {
    if count == 0 || evicted.count < count { return [] }
    let order = evicted.map { (distance: distance($0), item: $0) }
      .sorted { $0.distance != $1.distance ? $0.distance < $1.distance : $0.item < $1.item }
    return (0..<count).map { number in
      order[form == .code ? number * (order.count / count) : number * order.count / count].item
    }
  }

  private func anchorBits(_ count: Int, mean: (Int) -> Bool) -> [Bool] {
    switch anchor {
    case .zeros: return Array(repeating: false, count: count)
    case .ones: return Array(repeating: true, count: count)
    case .alternating: return (0..<count).map { $0 % 2 == 1 }
    case .mean: return (0..<count).map(mean)
    case .random:
      var state = UInt64(bitPattern: Int64(seed))
      return (0..<count).map { _ in
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = (state ^ state >> 30) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
        return (z ^ z >> 31) >> 63 == 1
      }
    }
  }

  // MARK: Tokens

  private func chooseTokens(
    _ layer: LayerView, _ scores: ScoreTable, _ splits: [BudgetSplit], into routing: inout Routing
  ) {
    let words = (splits.count + 63) / 64
    // Bit h of a token: head h keeps it for its score. Heads that no longer hold a token do not.
    var bits = [UInt64](repeating: 0, count: layer.tokensSeen * words)
    var isCandidate = [Bool](repeating: false, count: layer.tokensSeen)
    var top = [Int](repeating: 0, count: splits.count)
    for (head, split) in splits.enumerated() {
      for row in split.candidates { isCandidate[layer.position(head: head, row: row)] = true }
      top[head] = split.chosen - representatives(of: split.chosen)
      scores.forEachLargest(top[head], head: head, in: split.candidates) { row in
        routing[head, row] = .tier(0)
        bits[layer.position(head: head, row: row) * words + head / 64] |= 1 << UInt64(head % 64)
      }
    }
    let tokens = isCandidate.reduce(0) { $0 + ($1 ? 1 : 0) }
    let anchor = anchorBits(splits.count) { 2 * top[$0] > tokens }
    var anchorWords = [UInt64](repeating: 0, count: words)
    for (head, bit) in anchor.enumerated() where bit { anchorWords[head / 64] |= 1 << UInt64(head % 64) }
    for (head, split) in splits.enumerated() where split.chosen > top[head] {
      func position(_ row: Int) -> Int { layer.position(head: head, row: row) }
      let evicted = split.candidates.filter { bits[position($0) * words + head / 64] >> UInt64(head % 64) & 1 == 0 }
      let chosen = picks(evicted, count: split.chosen - top[head]) { row in
        (0..<words).reduce(0) { $0 + (bits[position(row) * words + $1] ^ anchorWords[$1]).nonzeroBitCount }
      }
      for row in chosen { routing[head, row] = .tier(0) }
    }
  }
}

extension RepresentativeRule {
  var options: [SpecOption] {
    [SpecOption("form", .text(form.rawValue)), SpecOption("block", .integer(block))]
      + (representatives.map { [SpecOption("representatives", .integer($0))] } ?? [SpecOption("share", .decimal(share))])
      + [SpecOption("anchor", .text(anchor.rawValue)), SpecOption("seed", .integer(seed))]
  }

  static let descriptions: [MethodDescription.Option] = [
    .init("form", "code: bits of the rows of a block; paper: bits of the heads of a token"),
    .init("block", "rows of a block"),
    .init("share", "representatives as a share of what is chosen"),
    .init("representatives", "their number, instead of share: blocks, or tokens in the paper's form"),
    .init("anchor", "what distances are counted from: random, zeros, ones, mean or alternating"),
    .init("seed", "of the random anchor"),
  ]

  static func read(_ reader: inout OptionReader, form: Form) throws(KVError) -> RepresentativeRule {
    let form = try reader.name("form", default: form.rawValue, among: Form.allCases.map(\.rawValue))
    let block = try reader.int("block", default: 32, in: 1...65_536)
    guard !(reader.has("share") && reader.has("representatives")) else {
      throw KVError(
        .invalidOption, "representatives are a share or a number, not both", offset: reader.stage.offset)
    }
    let count = reader.has("representatives") ? try reader.int("representatives", in: 0...1_048_576) : nil
    if count == nil { reader.offer("representatives") }
    let share = count == nil ? try reader.double("share", default: 0.25, in: 0...1) : 0
    if count != nil { reader.offer("share") }
    let anchor = try reader.name("anchor", default: "random", among: Anchor.allCases.map(\.rawValue))
    let seed = try reader.int("seed", default: 0)
    return try RepresentativeRule(
      form: Form(rawValue: form) ?? .code, block: block, share: share, representatives: count,
      anchor: Anchor(rawValue: anchor) ?? .random, seed: seed)
  }
}
