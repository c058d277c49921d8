internal import KVCore

/// Generates layer after layer; carries the content from one layer to the next.
struct SyntheticBuilder {
  let options: SyntheticOptions
  let channels: SyntheticOptions.Channels
  let headKinds: [SyntheticHeadKind]
  let heavyHitters: [[Int]]

  private let rotation: HalfSplitRotation
  private let heads: [HeadBasis]
  private var state: [HeadState]

  /// What one KV head keeps through all layers.
  private struct HeadBasis {
    /// content channels x rank, rows of unit norm
    var keys: [Double]
    /// dim x rank, rows of unit norm
    var values: [Double]
    var outlierSigns: [Double]
    /// sinks, then heavy hitters
    var role: [TokenRole]
  }

  private enum TokenRole { case sink, heavy, plain }

  /// Standard normal numbers of one KV head that drift from layer to layer.
  private struct HeadState {
    var keyLatents: [Double]
    var keyNoise: [Double]
    var valueLatents: [Double]
    var valueNoise: [Double]
  }

  /// Purposes of random streams. The numbers are part of what a seed means: never reuse one.
  private enum Stream {
    static let basis = 1, heavy = 2, keyLatents = 3, keyNoise = 4, valueLatents = 5, valueNoise = 6, query = 7
    static let variety = 8
  }

  init(_ options: SyntheticOptions) {
    self.options = options
    let channels = options.channels
    self.channels = channels
    rotation = HalfSplitRotation(dim: options.dim, theta: options.ropeTheta)
    headKinds = SyntheticBuilder.kinds(options)
    heavyHitters = (0..<options.kvHeads).map { SyntheticBuilder.heavy(options, head: $0) }
    let hitters = heavyHitters
    heads = (0..<options.kvHeads).map { head in
      var random = SeededGenerator(seed: options.seed, streams: Stream.basis, head)
      var role = [TokenRole](repeating: .plain, count: options.tokens)
      for token in 0..<options.sinkTokens { role[token] = .sink }
      for token in hitters[head] { role[token] = .heavy }
      return HeadBasis(
        keys: SyntheticBuilder.basis(rows: channels.content.count, rank: options.rank, &random),
        values: SyntheticBuilder.basis(rows: options.dim, rank: options.rank, &random),
        outlierSigns: channels.outliers.map { _ in random.uniform() < 0.5 ? -1 : 1 }, role: role)
    }
    state = Array(
      repeating: HeadState(keyLatents: [], keyNoise: [], valueLatents: [], valueNoise: []), count: options.kvHeads)
  }

  /// Must be called for 0, 1, 2 … in order.
  mutating func layer(_ layer: Int) -> SyntheticLayer {
    let o = options
    var keys = HeadTensor(zeros: o.kvHeads, tokens: o.tokens, dim: o.dim)
    var before = keys
    var values = keys
    var targets: [[Int]] = []
    var queries = HeadTensor(zeros: o.queryHeads, tokens: o.queryRows, dim: o.dim)
    var probes = HeadTensor(zeros: o.queryHeads, tokens: o.probeQueries, dim: o.dim)
    for head in 0..<o.kvHeads {
      advance(layer, head)
      for token in 0..<o.tokens {
        var row = key(head, token)
        before.setRow(head: head, token: token, row)
        rotation.apply(&row, position: token)
        keys.setRow(head: head, token: token, row)
        values.setRow(head: head, token: token, value(head, token))
      }
      let group = o.queryHeads / o.kvHeads
      for queryHead in head * group..<(head + 1) * group {
        targets.append(queryRows(layer, head, queryHead, keys, &queries, &probes))
      }
    }
    return SyntheticLayer(
      keys: keys, keysBeforeRotation: before, values: values, queries: queries, probeQueries: probes,
      retrievalTargets: targets)
  }

  // MARK: Keys and values

  private mutating func advance(_ layer: Int, _ head: Int) {
    let o = options
    let rho = layer == 0 ? 0 : o.similarity(of: layer)
    func drift(_ old: [Double], _ purpose: Int, _ count: Int) -> [Double] {
      var random = SeededGenerator(seed: o.seed, streams: purpose, layer, head)
      if layer == 0 { return (0..<count).map { _ in random.normal() } }
      let fresh = (1 - rho * rho).squareRoot()
      return old.map { rho * $0 + fresh * random.normal() }
    }
    state[head] = HeadState(
      keyLatents: drift(state[head].keyLatents, Stream.keyLatents, o.tokens * o.rank),
      keyNoise: drift(state[head].keyNoise, Stream.keyNoise, o.tokens * o.dim),
      valueLatents: drift(state[head].valueLatents, Stream.valueLatents, o.tokens * o.rank),
      valueNoise: drift(state[head].valueNoise, Stream.valueNoise, o.tokens * o.dim))
  }

  private func key(_ head: Int, _ token: Int) -> [Double] {
    let (o, basis) = (options, heads[head])
    let role = basis.role[token]
    let noise = state[head].keyNoise[token * o.dim..<(token + 1) * o.dim]
    let contentScale = role == .sink ? o.sinkValueNorm : 1
    var row = noise.map { o.noise * $0 * contentScale }
    let latents = state[head].keyLatents[token * o.rank..<(token + 1) * o.rank]
    for (index, c) in channels.content.enumerated() {
      row[c] += contentScale * SyntheticBuilder.dot(basis.keys, index * o.rank, latents)
    }
    for (index, c) in channels.outliers.enumerated() {
      row[c] = basis.outlierSigns[index] * o.outlierOffset + o.outlierScale * noise[noise.startIndex + c]
    }
    if role == .sink { row[channels.sink] += amplitude(o.sinkLogit + o.lengthLogit) }
    if role == .heavy { row[channels.heavy] += amplitude(o.heavyHitterLogit) }
    return row
  }

  private func value(_ head: Int, _ token: Int) -> [Double] {
    let (o, basis) = (options, heads[head])
    let scale = basis.role[token] == .sink ? o.sinkValueNorm : 1
    let latents = state[head].valueLatents[token * o.rank..<(token + 1) * o.rank]
    return (0..<o.dim).map { c in
      scale
        * (SyntheticBuilder.dot(basis.values, c * o.rank, latents)
          + o.noise * state[head].valueNoise[token * o.dim + c])
    }
  }

  /// What key and query must each hold in a shared channel for their product to give `logit`.
  private func amplitude(_ logit: Double) -> Double {
    (logit * Double(options.dim).squareRoot()).squareRoot()
  }

  // MARK: Queries

  /// Fills the rows of one query head; returns what a retrieval head looks for.
  private func queryRows(
    _ layer: Int, _ head: Int, _ queryHead: Int, _ keys: HeadTensor, _ queries: inout HeadTensor,
    _ probes: inout HeadTensor
  ) -> [Int] {
    let o = options
    let kind = headKinds[queryHead]
    var variety = SeededGenerator(seed: o.seed, streams: Stream.variety, queryHead)
    let sink = 1 + o.headVariety * (2 * variety.uniform() - 1)
    let heavy = 1 + o.headVariety * (2 * variety.uniform() - 1)
    var targets: [Int] = []
    for index in 0..<o.queryRows + o.probeQueries {
      let isProbe = index >= o.queryRows
      let position = isProbe ? o.tokens : o.tokens - o.queryRows + index
      // One stream a row: the query of a position is the same however many rows are asked for.
      var random = SeededGenerator(
        seed: o.seed, streams: Stream.query, layer, queryHead, position, isProbe ? index - o.queryRows : 0)
      var row = noiseRow(head, &random)
      row[channels.sink] += sink * amplitude(o.sinkLogit + o.lengthLogit)
      row[channels.heavy] += heavy * amplitude(o.heavyHitterLogit)
      rotation.apply(&row, position: position)
      if let wanted = wanted(kind, head, position, keys, &random, &targets) {
        for c in row.indices { row[c] += wanted[c] }
      }
      if isProbe {
        probes.setRow(head: queryHead, token: index - o.queryRows, row)
      } else {
        queries.setRow(head: queryHead, token: index, row)
      }
    }
    return targets
  }

  /// Content nobody asked for: a random direction of the key space, scaled to logits of `noiseLogit`.
  private func noiseRow(_ head: Int, _ random: inout SeededGenerator) -> [Double] {
    let o = options
    var row = [Double](repeating: 0, count: o.dim)
    let latents = (0..<o.rank).map { _ in random.normal() }
    // A key's content is B z with z standard normal; q = B w gives q·k = wᵀ(BᵀB)z, and BᵀB is about content/rank.
    let spread = Double(channels.content.count) / Double(o.rank).squareRoot()
    let scale = o.noiseLogit * Double(o.dim).squareRoot() / spread
    for (index, c) in channels.content.enumerated() {
      row[c] = scale * SyntheticBuilder.dot(heads[head].keys, index * o.rank, latents[...])
    }
    for c in channels.outliers { row[c] = 0.1 * random.normal() }
    return row
  }

  /// The part of a query that looks for particular keys, in rotated space; nil when there is nothing to look for.
  private func wanted(
    _ kind: SyntheticHeadKind, _ head: Int, _ position: Int, _ keys: HeadTensor, _ random: inout SeededGenerator,
    _ targets: inout [Int]
  ) -> [Double]? {
    let o = options
    let last = min(position, o.tokens - 1)
    var mean = [Double](repeating: 0, count: o.dim)
    let logit: Double
    var weights: [(token: Int, weight: Double)]
    switch kind {
    case .retrieval:
      let target = random.integer(below: last + 1)
      targets.append(target)
      logit = o.retrievalLogit + o.lengthLogit
      weights = [(target, 1)]
    case .local, .mixed:
      logit = kind == .local ? o.localityLogit : o.localityLogit / 2
      weights = []
      var weight = 1.0
      for token in stride(from: last, through: max(0, last - o.localityWindow + 1), by: -1) {
        weights.append((token, weight))
        weight *= 0.7
      }
      let total = weights.reduce(0) { $0 + $1.weight }
      for index in weights.indices { weights[index].weight /= total }
    }
    // Sinks have a direction of their own; what is looked for is content.
    for (token, weight) in weights where heads[head].role[token] != .sink {
      let row = keys.row(head: head, token: token)
      for c in channels.content { mean[c] += weight * Double(row[row.startIndex + c]) }
    }
    let square = mean.reduce(0) { $0 + $1 * $1 }
    guard square > 0 else { return nil }
    let scale = logit * Double(o.dim).squareRoot() / square
    return mean.map { $0 * scale }
  }

  // MARK: Fixed structure

  private static func kinds(_ options: SyntheticOptions) -> [SyntheticHeadKind] {
    let count = options.queryHeads
    let local = Int((options.localHeadFraction * Double(count)).rounded())
    let retrieval = min(count - local, Int((options.retrievalHeadFraction * Double(count)).rounded()))
    let dealt = (0..<count).map { index -> SyntheticHeadKind in
      index < local ? .local : index >= count - retrieval ? .retrieval : .mixed
    }
    // Deal card n to KV head n mod kvHeads.
    let group = count / options.kvHeads
    return (0..<count).map { dealt[$0 % group * options.kvHeads + $0 / group] }
  }

  private static func heavy(_ options: SyntheticOptions, head: Int) -> [Int] {
    var random = SeededGenerator(seed: options.seed, streams: Stream.heavy, head)
    var candidates = Array(options.sinkTokens..<options.tokens)
    for index in 0..<options.heavyCount {
      candidates.swapAt(index, index + random.integer(below: candidates.count - index))
    }
    return candidates[..<options.heavyCount].sorted()
  }

  /// Rows of unit norm, so that content has variance 1 in every channel.
  private static func basis(rows: Int, rank: Int, _ random: inout SeededGenerator) -> [Double] {
    var result: [Double] = []
    result.reserveCapacity(rows * rank)
    for _ in 0..<rows {
      let row = (0..<rank).map { _ in random.normal() }
      let norm = row.reduce(0) { $0 + $1 * $1 }.squareRoot()
      result += row.map { $0 / norm }
    }
    return result
  }

  private static func dot(_ matrix: [Double], _ start: Int, _ vector: ArraySlice<Double>) -> Double {
    var sum = 0.0
    for (index, x) in vector.enumerated() { sum += matrix[start + index] * x }
    return sum
  }
}
