public import KVCore

/// DuoAttention: heads that retrieve keep everything, the others their sinks and newest tokens. arXiv 2410.10819 (ICLR 2025).
///
/// Needs: a table with a number per layer and KV head, from the authors' training or your own. Runs: after the prompt and
/// after every decoded token.
///
/// Differs from the authors' code: the heads of a layer lie in one cache, ragged; the number of streaming heads is the share
/// of all, rounded, where theirs compares with a quantile and adds noise to tell equal ones apart.
extension Selection {
  /// - Parameters:
  ///   - table: nil refuses every model.
  ///   - share: of all heads that stream.
  ///   - threshold: heads below it stream, instead of `share`.
  public static func duoAttention(
    table: HeadTable?, from source: SpecValue? = nil, share: Double = 0.5, threshold: Double? = nil, sinks: Int = 128,
    recent: Int = 256, every: Int? = 1
  ) throws(KVError) -> Selection {
    let heads = try StreamingHeads(
      table: table, share: share, threshold: threshold, sinks: sinks, recent: recent, source: source)
    if let every, every < 1 {
      throw KVError(.invalidOption, "evicting every \(every) tokens does not exist; at least 1, or never")
    }
    return Selection(
      spec: StageSpec(name: "duoattention", options: heads.options + [SpecOption("every", .integer(every ?? 0))]),
      scorer: nil, budget: .unlimited, allocator: HeadAllocator(heads: heads, others: UniformAllocator()),
      router: TopKRouter(rule: HeadRule(heads: heads, others: nil)), schedule: Schedule(decodeInterval: every))
  }

  /// `duoattention(table="heads.tsv",share=0.5)`.
  public static let duoAttentionMethod = MethodDescription(
    name: "duoattention", role: .selection, summary: "retrieval heads whole, the others sinks and newest tokens",
    paper: "arXiv 2410.10819",
    options: StreamingHeads.descriptions + [
      .init("every", "decoded tokens between evictions; 0 for never after the prompt")
    ]
  ) { (reader) throws(KVError) in
    let heads = try StreamingHeads.read(&reader)
    let every = try reader.int("every", default: 1, in: 0...1_048_576)
    return .selection(
      try .duoAttention(
        table: heads.table, from: heads.source, share: heads.share, threshold: heads.threshold, sinks: heads.sinks,
        recent: heads.recent, every: every == 0 ? nil : every))
  }

  /// Some heads stream, the others keep what the selection keeps.
  ///
  /// - Throws: `invalidOption` for numbers out of range; `unsupported` behind a selection that routes by itself.
  public func heads(
    table: HeadTable?, from source: SpecValue? = nil, share: Double = 0.5, threshold: Double? = nil, sinks: Int = 128,
    recent: Int = 256
  ) throws(KVError) -> Selection {
    let heads = try StreamingHeads(
      table: table, share: share, threshold: threshold, sinks: sinks, recent: recent, source: source)
    var result = try ruled(
      by: HeadRule(heads: heads, others: (router as? TopKRouter)?.rule),
      StageSpec(name: "heads", options: heads.options))
    result.allocator = HeadAllocator(heads: heads, others: allocator)
    return result
  }

  /// `heads(table="heads.tsv",share=0.5)`, behind any selection.
  public static let headsMethod = MethodDescription(
    name: "heads", role: .modifier, summary: "heads of a table keep only sinks and newest tokens",
    paper: "arXiv 2410.10819", options: StreamingHeads.descriptions
  ) { (reader) throws(KVError) in
    let heads = try StreamingHeads.read(&reader)
    return .modifier { (selection) throws(KVError) in
      try selection.heads(
        table: heads.table, from: heads.source, share: heads.share, threshold: heads.threshold, sinks: heads.sinks,
        recent: heads.recent)
    }
  }
}

/// Which heads stream, and what they keep.
public struct StreamingHeads: Sendable {
  public let table: HeadTable?
  public let share: Double
  public let threshold: Double?
  public let sinks: Int
  public let recent: Int
  /// [layer][KV head]
  let streaming: [[Bool]]
  /// The table as a text wrote it.
  let source: SpecValue

  public init(
    table: HeadTable?, share: Double = 0.5, threshold: Double? = nil, sinks: Int = 128, recent: Int = 256,
    source: SpecValue? = nil
  ) throws(KVError) {
    guard (0...1).contains(share), (0...2).contains(threshold ?? 0), (0...1_048_576).contains(sinks),
      (1...1_048_576).contains(recent)
    else {
      throw KVError(
        .invalidOption,
        "streaming heads take a share in 0...1, a threshold in 0...2, 0 or more sinks and at least 1 recent token; got "
          + "\(share), \(threshold ?? 0), \(sinks) and \(recent)")
    }
    self.table = table
    self.share = share
    self.threshold = threshold
    self.sinks = sinks
    self.recent = recent
    self.source =
      source ?? .list((table?.scores ?? []).map { .list($0.map(SpecValue.decimal)) })
    streaming =
      table.map { table in
        threshold.map { table.streaming(below: $0) } ?? table.streaming(share: share)
      } ?? []
  }

  func streams(layer: Int, head: Int) -> Bool { streaming.indices.contains(layer) && streaming[layer][head] }

  /// Lines are the layers with a cache, in order, or all layers.
  func validate(_ shape: ModelShape) throws(KVError) {
    guard let table else {
      throw KVError(
        .missingInput, "streaming heads need a table: a path, or numbers such as [[0.9,0.1],[0.2,0.8]]")
    }
    guard table.scores.count == shape.layers.count else {
      throw KVError(
        .shapeMismatch,
        "a table of heads has a line for each of the \(shape.layers.count) layers; got "
          + "\(table.scores.count)")
    }
    for (index, layer) in shape.layers.enumerated() where layer.cached {
      guard table.scores[index].count == layer.kvHeads else {
        throw KVError(
          .shapeMismatch,
          "a table of heads has a number for each of the \(layer.kvHeads) KV heads; got \(table.scores[index].count)",
          layer: index)
      }
    }
  }

  var options: [SpecOption] {
    [
      SpecOption("table", source),
      threshold.map { SpecOption("threshold", .decimal($0)) } ?? SpecOption("share", .decimal(share)),
      SpecOption("sinks", .integer(sinks)), SpecOption("recent", .integer(recent)),
    ]
  }

  static let descriptions: [MethodDescription.Option] = [
    .init("table", "path of a table of heads, or its numbers: [[0.9,0.1],[0.2,0.8]]"),
    .init("share", "part of all heads that keep only sinks and newest tokens"),
    .init("threshold", "heads below it do, instead of share"),
    .init("sinks", "first tokens those heads keep"), .init("recent", "newest tokens those heads keep"),
  ]

  static func read(_ reader: inout OptionReader) throws(KVError) -> StreamingHeads {
    let (table, source) = try readTable(&reader)
    guard !(reader.has("share") && reader.has("threshold")) else {
      throw KVError(
        .invalidOption, "\(reader.stage.name) takes share or threshold, not both", offset: reader.stage.offset)
    }
    let threshold = reader.has("threshold") ? try reader.double("threshold", in: 0...2) : nil
    var share = 0.5
    if threshold == nil {
      share = try reader.double("share", default: 0.5, in: 0...1)
      reader.offer("threshold")
    } else {
      reader.offer("share")
    }
    let sinks = try reader.int("sinks", default: 128, in: 0...1_048_576)
    let recent = try reader.int("recent", default: 256, in: 1...1_048_576)
    return try StreamingHeads(
      table: table, share: share, threshold: threshold, sinks: sinks, recent: recent, source: source)
  }

  private static func readTable(_ reader: inout OptionReader) throws(KVError) -> (HeadTable?, SpecValue) {
    let none = SpecValue.list([])
    let value = try reader.read(
      "table", default: none, expected: "a path or a list of lists of numbers in 0...1", spec: { $0 }
    ) { (value) throws(KVError) -> SpecValue? in
      switch value.kind {
      case .text: return value
      case .list: return value
      default: return nil
      }
    }
    guard let value else { return (nil, none) }
    switch value.kind {
    case .text(let path): return (try HeadTable(contentsOf: path), value)
    case .list(let rows) where !rows.isEmpty:
      var numbers: [[Double]] = []
      for row in rows {
        var line: [Double] = []
        guard case .list(let items) = row.kind else {
          throw KVError(.invalidOption, "a table of heads is a list of lists, one a layer; found \(row.found)")
        }
        for item in items {
          switch item.kind {
          case .integer(let number): line.append(Double(number))
          case .decimal(let number): line.append(number)
          default: throw KVError(.invalidOption, "a table of heads holds numbers in 0...1; found \(item.found)")
          }
        }
        numbers.append(line)
      }
      return (try HeadTable(numbers), value)
    default: return (nil, none)
    }
  }
}

/// Sinks and newest tokens for streaming heads; what another allocator says for the others.
public struct HeadAllocator: Allocator {
  let streaming: StreamingHeads
  let others: any Allocator

  public init(heads: StreamingHeads, others: any Allocator) {
    streaming = heads
    self.others = others
  }

  public var spansLayers: Bool { others.spansLayers }
  public func needsScores(_ request: AllocationRequest) -> Bool { others.needsScores(request) }

  public func validate(_ shape: ModelShape) throws(KVError) {
    try streaming.validate(shape)
    try others.validate(shape)
  }

  public func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    zip(requests, try others.allocate(requests)).map { request, counts in
      counts.enumerated().map { head, count in
        guard streaming.streams(layer: request.layer, head: head) else { return count }
        return min(request.rows[head], streaming.sinks + streaming.recent)
      }
    }
  }
}

/// Sinks and newest rows for streaming heads; another rule for the others.
public struct HeadRule: SelectionRule {
  let streaming: StreamingHeads
  let others: (any SelectionRule)?

  public init(heads: StreamingHeads, others: (any SelectionRule)?) {
    streaming = heads
    self.others = others
  }

  public func validate(_ shape: ModelShape) throws(KVError) { try others?.validate(shape) }

  public func choose(_ layer: LayerView, scores: ScoreTable, splits: [BudgetSplit], into routing: inout Routing) {
    var left = splits
    for (head, split) in splits.enumerated() {
      if streaming.streams(layer: layer.layer, head: head) {
        let sinks = max(split.sinks, min(streaming.sinks, split.kept - split.window))
        let newest = split.tokens - (split.kept - sinks)
        routing.send(head: head, rows: split.sinks..<sinks, to: .tier(0))
        routing.send(head: head, rows: (newest..<split.tokens).clamped(to: split.candidates), to: .tier(0))
        // Nothing is left to choose in this head.
        left[head] = BudgetSplit.resolve(
          budgetTokens: split.sinks + split.window, tokens: split.tokens, sinks: split.sinks, window: split.window)
      } else if others == nil {
        scores.forEachLargest(split.chosen, head: head, in: split.candidates) { routing[head, $0] = .tier(0) }
      }
    }
    others?.choose(layer, scores: scores, splits: left, into: &routing)
  }
}
