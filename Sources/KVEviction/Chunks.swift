public import KVCore

/// Whole chunks of neighbours stay or go, behind any selection: `h2o(budget=0.25)+chunks`. arXiv 2502.00299 (ChunkKV).
///
/// Needs: what the selection it stands behind needs. Runs: when that selection does.
extension Selection {
  /// - Parameters:
  ///   - length: rows of a chunk.
  ///   - shared: the heads of a layer keep the same chunks; otherwise each its own.
  ///   - whole: keep whole chunks only, as kvpress does; otherwise the last chunk is cut so that the budget is met.
  /// - Throws: `invalidOption` for chunks of no row; `unsupported` behind a selection without scores.
  public func chunks(length: Int = 20, shared: Bool = true, whole: Bool = false) throws(KVError) -> Selection {
    let rule = try ChunkRule(length: length, shared: shared)
    guard scorer != nil else { throw Selection.nothingToScore("chunks", self) }
    var result = try ruled(by: rule, StageSpec(name: "chunks", options: rule.options(whole: whole)))
    if whole { result.allocator = WholeChunks(rule: rule, budgets: allocator) }
    return result
  }

  /// `chunks(length=20)`, behind what scores.
  public static let chunksMethod = MethodDescription(
    name: "chunks", role: .modifier, summary: "whole chunks of neighbours stay or go", paper: "arXiv 2502.00299",
    options: ChunkRule.descriptions
  ) { (reader) throws(KVError) in
    let (length, shared, whole) = try ChunkRule.read(&reader)
    return .modifier { (selection) throws(KVError) in
      try selection.chunks(length: length, shared: shared, whole: whole)
    }
  }

  /// The same share of every stretch of the text: kvpress's Chunk wrapper.
  ///
  /// - Parameter length: rows of a stretch.
  /// - Throws: `invalidOption` for stretches of no row; `unsupported` behind a selection without scores.
  public func even(length: Int = 1024) throws(KVError) -> Selection {
    let rule = try EvenRule(length: length)
    guard scorer != nil else { throw Selection.nothingToScore("even", self) }
    return try ruled(by: rule, StageSpec(name: "even", options: [SpecOption("length", .integer(length))]))
  }

  /// `even(length=1024)`, behind what scores.
  public static let evenMethod = MethodDescription(
    name: "even", role: .modifier, summary: "the same share of every stretch of the text",
    options: [.init("length", "rows of a stretch")]
  ) { (reader) throws(KVError) in
    let length = try reader.int("length", default: 1024, in: 1...1_048_576)
    return .modifier { (selection) throws(KVError) in try selection.even(length: length) }
  }
}

/// The best chunks of neighbouring rows. A chunk's score is the mean of its rows; chunks with protected rows come first.
/// Equal scores: the earlier chunk.
public struct ChunkRule: SelectionRule {
  public let length: Int
  public let shared: Bool

  public init(length: Int = 20, shared: Bool = true) throws(KVError) {
    guard (1...1_048_576).contains(length) else {
      throw KVError(.invalidOption, "chunks hold 1...1048576 rows; got \(length)")
    }
    self.length = length
    self.shared = shared
  }

  public func choose(_ layer: LayerView, scores: ScoreTable, splits: [BudgetSplit], into routing: inout Routing) {
    for heads in groups(splits.indices) {
      let ranking = ranking(of: heads, scores, splits)
      for head in heads {
        var left = splits[head].chosen
        for chunk in ranking where left > 0 {
          // What the budget does not hold of the last chunk is its end.
          let rows = rows(of: chunk, in: splits[head].candidates).prefix(left)
          routing.send(head: head, rows: rows.startIndex..<rows.endIndex, to: .tier(0))
          left -= rows.count
        }
      }
    }
  }

  fileprivate func groups(_ heads: Range<Int>) -> [Range<Int>] {
    shared ? (heads.isEmpty ? [] : [heads]) : heads.map { $0..<$0 + 1 }
  }

  fileprivate func rows(of chunk: Int, in candidates: Range<Int>) -> Range<Int> {
    (chunk * length..<(chunk + 1) * length).clamped(to: candidates)
  }

  /// Chunks of some heads, best first.
  fileprivate func ranking(of heads: Range<Int>, _ scores: ScoreTable, _ splits: [BudgetSplit]) -> [Int] {
    let chunks = (heads.map { scores.rowCount(head: $0) }.max() ?? 0).quotient(roundedUp: length)
    var sums = [Double](repeating: 0, count: chunks)
    var counts = [Int](repeating: 0, count: chunks)
    var protected = [Bool](repeating: false, count: chunks)
    for head in heads {
      for row in 0..<scores.rowCount(head: head) {
        sums[row / length] += Double(scores[head, row])
        counts[row / length] += 1
      }
      for row in [splits[head].sinkRange, splits[head].windowRange].joined() { protected[row / length] = true }
    }
    let means = zip(sums, counts).map { $1 == 0 ? 0 : $0 / Double($1) }
    return means.indices.sorted { a, b in
      if protected[a] != protected[b] { return protected[a] }
      return means[a] != means[b] ? means[a] > means[b] : a < b
    }
  }
}

/// Budgets of whole chunks: as many chunks as the budget is of the rows, at least one.
public struct WholeChunks: Allocator {
  public let rule: ChunkRule
  /// Where the budgets come from.
  public let budgets: any Allocator

  public init(rule: ChunkRule, budgets: any Allocator = UniformAllocator()) {
    self.rule = rule
    self.budgets = budgets
  }

  public var spansLayers: Bool { budgets.spansLayers }
  public func needsScores(_ request: AllocationRequest) -> Bool { budgets.needsScores(request) }
  public func validate(_ shape: ModelShape) throws(KVError) { try budgets.validate(shape) }

  public func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    zip(requests, try budgets.allocate(requests)).map { request, kept in
      let splits = request.rows.indices.map { request.protection.split(kept: kept[$0], of: request.rows[$0]) }
      var result = kept
      for heads in rule.groups(request.rows.indices) {
        let ranking = rule.ranking(of: heads, request.scores, splits)
        for head in heads where kept[head] < request.rows[head] {
          let rows = request.rows[head]
          let wanted = max(1, rows.quotient(roundedUp: rule.length) * kept[head] / rows)
          let held = ranking.filter { !rule.rows(of: $0, in: 0..<rows).isEmpty }.prefix(wanted)
            .reduce(0) { $0 + rule.rows(of: $1, in: 0..<rows).count }
          // Protected rows stay even where the chunks they lie in are too many.
          result[head] = max(held, splits[head].sinks + splits[head].window)
        }
      }
      return result
    }
  }
}

/// The same share of every stretch of rows, the best of each: kvpress's Chunk.
public struct EvenRule: SelectionRule {
  public let length: Int

  public init(length: Int = 1024) throws(KVError) {
    guard (1...1_048_576).contains(length) else {
      throw KVError(.invalidOption, "stretches hold 1...1048576 rows; got \(length)")
    }
    self.length = length
  }

  public func choose(_ layer: LayerView, scores: ScoreTable, splits: [BudgetSplit], into routing: inout Routing) {
    for (head, split) in splits.enumerated() where split.chosen > 0 {
      let candidates = split.candidates
      let stretches = (0..<split.tokens.quotient(roundedUp: length)).map {
        ($0 * length..<($0 + 1) * length).clamped(to: candidates)
      }.filter { !$0.isEmpty }
      // Shares rounded down; what is left goes to the largest remainders, of equal ones to the earlier stretch.
      var shares = stretches.map { $0.count * split.chosen / candidates.count }
      let remainders = stretches.map { $0.count * split.chosen % candidates.count }
      var left = split.chosen - shares.reduce(0, +)
      let order = stretches.indices.sorted {
        remainders[$0] != remainders[$1] ? remainders[$0] > remainders[$1] : $0 < $1
      }
      for index in order where left > 0 && shares[index] < stretches[index].count {
        shares[index] += 1
        left -= 1
      }
      for (rows, share) in zip(stretches, shares) {
        scores.forEachLargest(share, head: head, in: rows) { routing[head, $0] = .tier(0) }
      }
    }
  }
}

extension Int {
  fileprivate func quotient(roundedUp divisor: Int) -> Int { (self + divisor - 1) / divisor }
}

extension ChunkRule {
  func options(whole: Bool) -> [SpecOption] {
    [
      SpecOption("length", .integer(length)), SpecOption("shared", .bool(shared)), SpecOption("whole", .bool(whole)),
    ]
  }

  static let descriptions: [MethodDescription.Option] = [
    .init("length", "rows of a chunk"), .init("shared", "the heads of a layer keep the same chunks"),
    .init("whole", "keep whole chunks only; otherwise the last one is cut to the budget"),
  ]

  static func read(
    _ reader: inout OptionReader, length: Int = 20
  ) throws(KVError) -> (length: Int, shared: Bool, whole: Bool) {
    (
      try reader.int("length", default: length, in: 1...1_048_576), try reader.bool("shared", default: true),
      try reader.bool("whole", default: false)
    )
  }
}
