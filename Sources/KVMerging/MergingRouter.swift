public import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// What another router drops goes into rows that stay, as a rule says. Where the rule refuses every merge, the other
/// router's choice is all that happens, to the bit.
public struct MergingRouter: Router {
  public let base: any Router
  public let rule: MergeRule

  public init(_ base: any Router, rule: MergeRule) {
    self.base = base
    self.rule = rule
  }

  public var protection: Protection { base.protection }
  public var tierCount: Int { base.tierCount }
  public var routesAlways: Bool { base.routesAlways }
  public var inputs: RequiredInputs { base.inputs.union(rule.inputs) }
  public var merges: Bool { true }

  /// A row that goes into another.
  struct Pair {
    var source: Int
    var target: Int
    var weight: Float = 1
  }

  public func route(
    _ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing
  ) throws(KVError) {
    try base.route(layer, scores: scores, kept: kept, into: &routing)
    var heads: [Candidates] = []
    for head in 0..<layer.kvHeads { heads.append(candidates(layer, head, scores, routing)) }
    if heads.allSatisfy({ $0.dropped.isEmpty }) { return }
    gate(&heads, layer, &routing)
    var attention: ScoreTable?
    if case .prominence(let prominence) = rule.weights { attention = try prominence.attention(of: layer) }
    for head in heads.indices where !heads[head].pairs.isEmpty {
      weigh(&heads[head], layer, attention)
      add(heads[head].pairs, layer, head, to: &routing)
    }
  }

  /// The rows of one head that may merge, with their targets and how alike they are.
  struct Candidates {
    var head: Int
    var dropped: [Int] = []
    var kept: [Int] = []
    /// In ascending order of sources.
    var pairs: [Pair] = []
    /// Of each pair, when asked for.
    var cosines: [Float] = []
  }

  // MARK: Where to

  private func candidates(
    _ layer: LayerView, _ head: Int, _ scores: ScoreTable, _ routing: Routing
  ) -> Candidates {
    var result = Candidates(head: head)
    for row in 0..<layer.rowCount(head: head) {
      if routing[head, row] == .dropped { result.dropped.append(row) } else { result.kept.append(row) }
    }
    if result.kept.isEmpty { return result }
    switch rule.candidates {
    case .all: break
    case .newest(let count): result.dropped.removeFirst(max(0, result.dropped.count - count))
    case .best(let count):
      // Backwards, so that of equal rows the newest come first.
      let backwards = Array(result.dropped.reversed())
      var best: [Int] = []
      selectLargest(count, of: backwards.map { scores[head, $0] }[...]) { best.append(backwards[$0]) }
      result.dropped = best.reversed()
    }
    // Only rows that stay in their tier can be changed there.
    if base.tierCount > 1 {
      result.kept = result.kept.filter {
        routing[head, $0] == .tier(Int(layer.reference(head: head, row: $0).segment))
      }
      if result.kept.isEmpty { return result }
    }
    switch rule.targets {
    case .nearestKey:
      let nearest = layer.nearestKeys(head: head, of: result.dropped, among: result.kept)
      result.pairs = zip(result.dropped, nearest.rows).map { Pair(source: $0, target: $1) }
      result.cosines = nearest.cosines
      return result
    case .nearestPosition: nearestPositions(&result, layer)
    case .next(let width): nextRows(&result, width)
    }
    if rule.needsCosines {
      result.cosines = layer.cosines(head: head, of: result.pairs.map(\.source), and: result.pairs.map(\.target))
    }
    return result
  }

  private func nearestPositions(_ heads: inout Candidates, _ layer: LayerView) {
    var later = 0
    for row in heads.dropped {
      while later < heads.kept.count, heads.kept[later] < row { later += 1 }
      guard later > 0 else {
        heads.pairs.append(Pair(source: row, target: heads.kept[0]))
        continue
      }
      var target = heads.kept[later - 1]
      if later < heads.kept.count {
        let position = layer.position(head: heads.head, row: row)
        let before = position - layer.position(head: heads.head, row: target)
        let after = layer.position(head: heads.head, row: heads.kept[later]) - position
        if after < before { target = heads.kept[later] }
      }
      heads.pairs.append(Pair(source: row, target: target))
    }
  }

  private func nextRows(_ heads: inout Candidates, _ width: Int) {
    var later = 0
    for row in heads.dropped {
      while later < heads.kept.count, heads.kept[later] < row { later += 1 }
      for index in later..<min(later + width, heads.kept.count) {
        heads.pairs.append(Pair(source: row, target: heads.kept[index]))
      }
    }
  }

  // MARK: Whether

  private func gate(_ heads: inout [Candidates], _ layer: LayerView, _ routing: inout Routing) {
    if rule.fraction < 1 {
      for head in heads.indices {
        let count = Int((rule.fraction * Double(heads[head].pairs.count)).rounded(.up))
        var wanted = [Bool](repeating: false, count: heads[head].pairs.count)
        selectLargest(count, of: heads[head].cosines[...]) { wanted[$0] = true }
        keep(&heads[head]) { wanted[$0] }
      }
    }
    switch rule.gate {
    case .open: return
    case .cosine(let threshold):
      let least = Float(threshold)
      for head in heads.indices {
        let cosines = heads[head].cosines
        keep(&heads[head]) { cosines[$0] >= least }
      }
    case .movingAverage(let old, let new, let averaged):
      var sum = 0.0
      var count = 0
      for head in heads {
        for cosine in head.cosines { sum += Double(cosine) }
        count += head.cosines.count
      }
      if count == 0 { return }
      let mean = sum / Double(count)
      let threshold = layer.routerMemory.first.map { old * Double($0) + new * mean } ?? mean
      routing.memory = [Float(threshold)]
      // One rounding of the mean must not refuse rows that are all alike.
      let least = Float(threshold)
      let all = heads.map(\.cosines)
      for head in heads.indices {
        keep(&heads[head]) { index in
          if !averaged { return all[head][index] >= least }
          let others = all.filter { $0.count > index }
          return others.reduce(0) { $0 + $1[index] } / Float(others.count) >= least
        }
      }
    }
  }

  private func keep(_ head: inout Candidates, where wanted: (Int) -> Bool) {
    let indices = head.pairs.indices.filter(wanted)
    head.pairs = indices.map { head.pairs[$0] }
    head.cosines = indices.map { head.cosines[$0] }
  }

  // MARK: With which weight

  private func weigh(_ head: inout Candidates, _ layer: LayerView, _ attention: ScoreTable?) {
    switch rule.weights {
    case .one: return
    case .cosine: for index in head.pairs.indices { head.pairs[index].weight = head.cosines[index] }
    case .exponential: for index in head.pairs.indices { head.pairs[index].weight = expf(head.cosines[index]) }
    case .shifted: for index in head.pairs.indices { head.pairs[index].weight = (head.cosines[index] + 1) / 2 }
    case .length:
      let own = layer.lengths(head: head.head, .values, of: head.pairs.map(\.source))
      let other = layer.lengths(head: head.head, .values, of: head.pairs.map(\.target))
      for index in head.pairs.indices {
        head.pairs[index].weight = max(head.cosines[index], 0) * own[index] / (own[index] + other[index] + 1e-6)
      }
    case .prominence(let prominence):
      if let attention { weigh(&head, layer, attention, prominence) }
    }
  }

  private func weigh(
    _ head: inout Candidates, _ layer: LayerView, _ attention: ScoreTable, _ prominence: Prominence
  ) {
    let largest = head.kept.reduce(-Float.infinity) { max($0, attention[head.head, $1]) }
    // Sums over the rows that stay from each of them on.
    var behind = [Float](repeating: 0, count: head.kept.count + 1)
    for index in head.kept.indices.reversed() {
      behind[index] = behind[index + 1] + attention[head.head, head.kept[index]]
    }
    var later = 0
    var start = 0
    while start < head.pairs.count {
      let source = head.pairs[start].source
      var end = start
      while end < head.pairs.count, head.pairs[end].source == source { end += 1 }
      while later < head.kept.count, head.kept[later] < source { later += 1 }
      let targets = head.pairs[start..<end]
      let reference: Float
      switch prominence.reference {
      case .followers:
        reference = targets.reduce(0) { $0 + attention[head.head, $1.target] } / Float(targets.count)
      case .later: reference = behind[later] / Float(max(head.kept.count - later, 1))
      case .largest: reference = largest
      }
      let weight = prominence.draw(
        prominence.probability(attention[head.head, source], reference), layer: layer.layer, head: head.head,
        position: layer.position(head: head.head, row: source))
      for index in start..<end { head.pairs[index].weight = weight / Float(targets.count) }
      start = end
    }
  }

  // MARK: What comes of it

  private func add(_ pairs: [Pair], _ layer: LayerView, _ head: Int, to routing: inout Routing) {
    // By target, sources still ascending: a stable sort over rows.
    var byTarget = [Int32](repeating: 0, count: layer.rowCount(head: head) + 1)
    for pair in pairs { byTarget[pair.target + 1] += 1 }
    for row in 1..<byTarget.count { byTarget[row] += byTarget[row - 1] }
    var order = [Int](repeating: 0, count: pairs.count)
    for (index, pair) in pairs.enumerated() {
      order[Int(byTarget[pair.target])] = index
      byTarget[pair.target] += 1
    }
    var start = 0
    var own: [Pair] = []
    while start < order.count {
      let target = pairs[order[start]].target
      own.removeAll(keepingCapacity: true)
      while start < order.count, pairs[order[start]].target == target {
        own.append(pairs[order[start]])
        start += 1
      }
      add(own, into: target, layer, head, to: &routing)
    }
  }

  private func add(
    _ pairs: [Pair], into target: Int, _ layer: LayerView, _ head: Int, to routing: inout Routing
  ) {
    // A weight of nothing leaves the row as it is.
    if rule.update == .add, pairs.allSatisfy({ $0.weight == 0 }) { return }
    var merge = Routing.Merge(head: head, target: target)
    var own: Float = 1
    var divisor: Float = 1
    var weights = pairs.map(\.weight)
    let added = Float(pairs.count)
    switch rule.update {
    case .counts:
      own = Float(layer.count(head: head, row: target))
      weights = pairs.map { Float(layer.count(head: head, row: $0.source)) }
      divisor = weights.reduce(own, +)
    case .mean:
      weights = pairs.map { _ in 1 }
      divisor = 1 + added
    case .damped: divisor = 1 + added
    case .weighted:
      if case .exponential = rule.weights { own = expf(1) }
      divisor = weights.reduce(own, +)
    case .add: break
    case .pivot:
      own = 1 + added / 2
      weights = pairs.map { _ in 0.5 }
      divisor = 1 + added
    }
    merge.key = rule.key
    (merge.keyWeight, merge.valueWeight) = (own, own)
    (merge.keyDivisor, merge.valueDivisor) = (divisor, divisor)
    // A row that is spread over several is no part of one of them.
    if case .next(let width) = rule.targets, width != 1 {
      merge.counts = false
    } else if rule.logCount {
      let tokens = pairs.reduce(layer.count(head: head, row: target)) { $0 + layer.count(head: head, row: $1.source) }
      merge.logBias = logf(Float(tokens))
    }
    merge.scores = merge.logBias != nil
    routing.merge(merge, terms: zip(pairs, weights).map { Routing.Term(row: $0.source, weight: $1) })
  }
}
