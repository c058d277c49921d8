public import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// KVMerger: runs of neighbouring tokens with nearly parallel keys become one row each. arXiv 2407.08454.
///
/// Needs: the attention weights of every token, or with `attention` the newest queries. Runs: after the prompt; with
/// `every`, again while decoding, on the tokens that have left the recent window since, which the paper leaves open.
///
/// The newest tokens and those with most attention stay alone. Of the others, neighbours whose keys have a cosine above
/// the threshold join; a run becomes one row in the place of its most attended token (the pivot), whose members weigh
/// exp(-|k - k_pivot|² / 2σ²). Without `budget` the threshold alone decides how many rows are left; with it the most alike
/// neighbours join until the budget is met.
///
/// No official code exists. Where the paper is open this library keeps the pivot's key, adds the logarithm of a run's
/// length to its logit, and leaves out no layer; `keys=average,bias=none` is the paper as it reads, third parties add
/// `skip_first=2,skip_last=1`.
extension Selection {
  /// - Parameters:
  ///   - budget: rows left in all; nil: the threshold decides.
  ///   - threshold: cosine above which neighbours join. With a budget: pairs below are never joined, and what is missing is
  ///     dropped, least attention first.
  ///   - recent: newest tokens that stay alone: a share of the tokens seen below 1, else tokens.
  ///   - heavy: tokens with most attention that stay alone, likewise.
  public static func kvMerger(
    budget: Budget? = nil, threshold: Double? = nil, recent: Double = 0.17, heavy: Double = 0.12,
    options: KVMergerOptions = KVMergerOptions(), every: Int? = nil
  ) throws(KVError) -> Selection {
    let least = threshold ?? (budget == nil ? 0.75 : -1)
    guard (-1...1).contains(least) else {
      throw KVError(.invalidOption, "kvmerger's threshold of cosines lies in -1...1; got \(least)")
    }
    for (name, number) in [("recent", recent), ("heavy", heavy)] where !(0...1_073_741_823).contains(number) {
      throw KVError(
        .invalidOption, "kvmerger's \(name) tokens are a share below 1 or a number of tokens; got \(number)")
    }
    guard options.sigma > 0, options.sigma.isFinite else {
      throw KVError(.invalidOption, "kvmerger's sigma is positive; got \(options.sigma)")
    }
    try budget?.validate()
    if let every, every < 1 {
      throw KVError(.invalidOption, "merging every \(every) tokens does not exist; at least 1, or never")
    }
    return Selection(
      spec: StageSpec(
        name: "kvmerger",
        options: (budget.map { [SpecOption("budget", $0.specValue)] } ?? []) + [
          SpecOption("threshold", .decimal(least)), SpecOption("recent", .decimal(recent)),
          SpecOption("heavy", .decimal(heavy)),
        ] + options.spec + [SpecOption("every", .integer(every ?? 0))]),
      scorer: ReceivedAttention(attention: options.attention), budget: budget ?? .unlimited,
      allocator: options.skipsLayers
        ? LeavingLayers(first: options.skipFirst, last: options.skipLast) : UniformAllocator(),
      router: RunRouter(
        exact: budget != nil, threshold: Float(least), recent: recent, heavy: heavy, options: options),
      schedule: Schedule(decodeInterval: every))
  }

  /// `kvmerger`, `kvmerger(budget=0.5)`.
  public static let kvMergerMethod = MethodDescription(
    name: "kvmerger", role: .selection, summary: "runs of neighbours with parallel keys become one row",
    paper: "arXiv 2407.08454",
    options: [
      .init("budget", "tokens, share of the tokens seen, or bytes left in all; without it the threshold decides"),
      .init("threshold", "cosine above which neighbours join; with a budget -1 unless given"),
      .init("recent", "newest tokens that stay alone: share of the tokens seen below 1, else tokens"),
      .init("heavy", "tokens with most attention that stay alone, likewise"),
      .init("width", "how weights fall with the distance of keys: fixed, rms or two_pass"),
      .init("sigma", "the distance, for width=fixed"),
      .init("keys", "keep, average or rotate"),
      .init("bias", "log_count or none"),
      .init("value_scale", "none, or count: values times the length of the run"),
      .init("scope", "head: runs of their own for every KV head; shared: one choice for all"),
      .init("attention", "newest queries whose attention counts, 0 for all so far"),
      .init("skip_first", "first layers that are left alone"),
      .init("skip_last", "last layers that are left alone"),
      .init("every", "decoded tokens between merges; 0 for never after the prompt"),
    ]
  ) { (reader) throws(KVError) in
    let budget = reader.has("budget") ? try reader.budget("budget") : nil
    if budget == nil { reader.offer("budget") }
    let threshold = try reader.double("threshold", default: budget == nil ? 0.75 : -1, in: -1...1)
    let recent = try reader.double("recent", default: 0.17, in: 0...1_073_741_823)
    let heavy = try reader.double("heavy", default: 0.12, in: 0...1_073_741_823)
    var options = KVMergerOptions()
    let width = try reader.name("width", default: "fixed", among: KVMergerOptions.Width.allCases.map(\.rawValue))
    options.width = KVMergerOptions.Width(rawValue: width) ?? .fixed
    options.sigma = try reader.double("sigma", default: 5, in: 0...1e30)
    let keys = try reader.name("keys", default: "keep", among: MergedKey.allCases.map(\.rawValue))
    options.key = MergedKey(rawValue: keys) ?? .keep
    options.logCount = try reader.name("bias", default: "log_count", among: ["log_count", "none"]) == "log_count"
    options.scalesValues = try reader.name("value_scale", default: "none", among: ["none", "count"]) == "count"
    options.sharesRuns = try reader.name("scope", default: "head", among: ["head", "shared"]) == "shared"
    let attention = try reader.int("attention", default: 0, in: 0...65_536)
    options.attention = attention == 0 ? .accumulated : .newest(attention)
    options.skipFirst = try reader.int("skip_first", default: 0, in: 0...65_536)
    options.skipLast = try reader.int("skip_last", default: 0, in: 0...65_536)
    let every = try reader.int("every", default: 0, in: 0...1_048_576)
    return .selection(
      try .kvMerger(
        budget: budget, threshold: threshold, recent: recent, heavy: heavy, options: options,
        every: every == 0 ? nil : every))
  }
}

/// What of KVMerger is seldom changed.
public struct KVMergerOptions: Sendable, Hashable {
  /// The σ of the weights.
  public enum Width: String, Sendable, Hashable, CaseIterable {
    /// `sigma`.
    case fixed
    /// σ² is the mean squared distance to the pivot in the run.
    case rms
    /// The paper's circular formula σ = Σ g / (√2 |S|), once, with g from `rms`.
    case twoPass = "two_pass"
  }

  public var width = Width.fixed
  public var sigma = 5.0
  public var key = MergedKey.keep
  /// A row of n tokens gets the log bias log n.
  public var logCount = true
  /// Values times the length of the run, one reading of the paper's equation 7.
  public var scalesValues = false
  /// One set of runs for all KV heads, from mean cosines and attention.
  public var sharesRuns = false
  public var attention = Prominence.Attention.accumulated
  /// First layers that are left alone.
  public var skipFirst = 0
  /// Last layers that are left alone.
  public var skipLast = 0

  fileprivate var skipsLayers: Bool { skipFirst > 0 || skipLast > 0 }

  public init() {}

  fileprivate var spec: [SpecOption] {
    let queries = if case .newest(let count) = attention { count } else { 0 }
    return [
      SpecOption("width", .text(width.rawValue)), SpecOption("sigma", .decimal(sigma)),
      SpecOption("keys", .text(key.rawValue)), SpecOption("bias", .text(logCount ? "log_count" : "none")),
      SpecOption("value_scale", .text(scalesValues ? "count" : "none")),
      SpecOption("scope", .text(sharesRuns ? "shared" : "head")), SpecOption("attention", .integer(queries)),
      SpecOption("skip_first", .integer(skipFirst)), SpecOption("skip_last", .integer(skipLast)),
    ]
  }
}

/// The budget everywhere but in the first and the last of the layers the policy chooses in, which keep all.
struct LeavingLayers: Allocator {
  let first: Int
  let last: Int

  func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    requests.map { request in
      request.index < first || request.index >= request.layers - last
        ? request.rows : zip(request.rows, request.budget).map { min($0, $1) }
    }
  }
}

/// Joins neighbouring rows into runs and sends each run into its most attended row.
struct RunRouter: Router {
  /// Whether a number of rows is to be met.
  let exact: Bool
  let threshold: Float
  let recent: Double
  let heavy: Double
  let options: KVMergerOptions

  var protection: Protection { Protection() }
  var inputs: RequiredInputs { RequiredInputs(rotary: options.key == .rotate) }
  var routesAlways: Bool { !exact }
  var merges: Bool { true }

  func route(
    _ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing
  ) throws(KVError) {
    for head in 0..<layer.kvHeads {
      routing.send(head: head, rows: 0..<layer.rowCount(head: head), to: .tier(0))
    }
    if layer.index < options.skipFirst || layer.index >= layer.layerCount - options.skipLast { return }
    // What was looked at before stays as it is: merged rows and those that were too unlike.
    let boundary = exact ? 0 : Int(layer.routerMemory.first ?? 0)
    if options.sharesRuns { try checkShared(layer) }
    let heads = (0..<layer.kvHeads).map { attention(layer, scores, head: $0) }
    var joined: [[Bool]] = []
    var ends: [Int] = []
    for head in 0..<layer.kvHeads {
      let (mask, end) = mask(layer, heads[head], head: head, kept: kept[head], boundary: boundary)
      ends.append(end)
      if options.sharesRuns, head > 0 {
        joined.append(joined[0])
        continue
      }
      joined.append(join(cosines(layer, head: head, mask), mask, remove: layer.rowCount(head: head) - kept[head]))
    }
    for head in 0..<layer.kvHeads {
      let slots = merge(runs(joined[head]), heads[head], layer, head, into: &routing)
      if exact {
        drop(slots, down: kept[head], attention: heads[head], before: ends[head], head: head, from: &routing)
      }
    }
    if !exact, let end = ends.first, end > 0 {
      // Exact in f32 up to 2^24 tokens; beyond, a few rows are looked at again.
      routing.memory = [Float(layer.position(head: 0, row: end - 1) + 1)]
    }
  }

  private func checkShared(_ layer: LayerView) throws(KVError) {
    let first = (0..<layer.rowCount(head: 0)).map { layer.position(head: 0, row: $0) }
    for head in 1..<max(layer.kvHeads, 1) where head < layer.kvHeads {
      guard (0..<layer.rowCount(head: head)).map({ layer.position(head: head, row: $0) }) == first else {
        throw KVError(.unsupported, "heads that hold different tokens cannot share runs; use scope=head", head: head)
      }
    }
  }

  /// Attention per row; the mean over heads where they share runs.
  private func attention(_ layer: LayerView, _ scores: ScoreTable, head: Int) -> [Float] {
    let rows = 0..<layer.rowCount(head: head)
    if !options.sharesRuns { return rows.map { scores[head, $0] } }
    return rows.map { row in (0..<layer.kvHeads).reduce(0) { $0 + scores[$1, row] } / Float(layer.kvHeads) }
  }

  private func tokens(_ number: Double, of seen: Int) -> Int {
    number < 1 ? Int(number * Double(seen)) : Int(number)
  }

  /// Rows that may join, and the first row of the recent window.
  private func mask(
    _ layer: LayerView, _ attention: [Float], head: Int, kept: Int, boundary: Int
  ) -> (mask: [Bool], end: Int) {
    let count = attention.count
    let window = min(tokens(recent, of: layer.tokensSeen), exact ? kept : count, count)
    let end = count - window
    var mask = [Bool](repeating: false, count: count)
    for row in 0..<end {
      mask[row] =
        layer.count(head: head, row: row) == 1
        && (boundary == 0 || layer.position(head: head, row: row) >= boundary)
    }
    selectLargest(min(tokens(heavy, of: layer.tokensSeen), end), of: attention[0..<end]) { mask[$0] = false }
    return (mask, end)
  }

  /// Of every pair of neighbours that may join, by its later row; below -1 for the others.
  private func cosines(_ layer: LayerView, head: Int, _ mask: [Bool]) -> [Float] {
    let pairs = mask.indices.dropFirst().filter { mask[$0 - 1] && mask[$0] }
    var result = [Float](repeating: -2, count: mask.count)
    let heads = options.sharesRuns ? 0..<layer.kvHeads : head..<head + 1
    var sums = [Float](repeating: 0, count: pairs.count)
    for head in heads {
      let own = layer.cosines(head: head, of: pairs.map { $0 - 1 }, and: Array(pairs))
      for index in sums.indices { sums[index] += own[index] }
    }
    for (index, row) in pairs.enumerated() { result[row] = sums[index] / Float(heads.count) }
    return result
  }

  /// Whether each row joins the one before it.
  private func join(_ cosines: [Float], _ mask: [Bool], remove: Int) -> [Bool] {
    var joined = [Bool](repeating: false, count: mask.count)
    guard exact else {
      for row in cosines.indices where cosines[row] > threshold { joined[row] = true }
      return joined
    }
    // -1 is no threshold: opposite neighbours join as well.
    let possible = cosines.indices.filter { cosines[$0] >= -1 && (threshold <= -1 || cosines[$0] > threshold) }
    let values = possible.map { cosines[$0] }
    selectLargest(remove, of: values[...]) { joined[possible[$0]] = true }
    return joined
  }

  private func runs(_ joined: [Bool]) -> [Range<Int>] {
    var runs: [Range<Int>] = []
    for row in joined.indices {
      if joined[row], let last = runs.last {
        runs[runs.count - 1] = last.lowerBound..<row + 1
      } else {
        runs.append(row..<row + 1)
      }
    }
    return runs
  }

  /// Merges the runs and returns what is left: the row and the attention of each.
  private func merge(
    _ runs: [Range<Int>], _ attention: [Float], _ layer: LayerView, _ head: Int, into routing: inout Routing
  ) -> [(row: Int, attention: Float)] {
    var slots: [(row: Int, attention: Float)] = []
    var pivots: [Int] = []
    var members: [Int] = []
    for run in runs {
      var pivot = run.lowerBound
      for row in run where attention[row] > attention[pivot] { pivot = row }
      slots.append((pivot, run.reduce(0) { $0 + attention[$1] }))
      if run.count == 1 { continue }
      for row in run {
        pivots.append(pivot)
        members.append(row)
      }
    }
    let distances = layer.squaredDistances(head: head, of: members, and: pivots)
    var start = 0
    for (index, run) in runs.enumerated() where run.count > 1 {
      let weights = KVMergerOptions.weights(
        distances[start..<start + run.count].map(Double.init), width: options.width, sigma: options.sigma)
      start += run.count
      add(run, pivot: slots[index].row, weights, head, to: &routing)
    }
    return slots
  }

  private func add(
    _ run: Range<Int>, pivot: Int, _ weights: [Double], _ head: Int, to routing: inout Routing
  ) {
    var merge = Routing.Merge(head: head, target: pivot)
    // Divided once, not weight by weight: rows that are all alike come out as they were.
    let divisor = weights.reduce(0, +)
    let own = Float(weights[pivot - run.lowerBound])
    merge.key = options.key
    (merge.keyWeight, merge.valueWeight) = (own, own)
    merge.keyDivisor = Float(divisor)
    merge.valueDivisor = Float(options.scalesValues ? divisor / Double(run.count) : divisor)
    if options.logCount { merge.logBias = logf(Float(run.count)) }
    merge.scores = options.logCount
    var terms: [Routing.Term] = []
    for row in run where row != pivot {
      terms.append(Routing.Term(row: row, weight: Float(weights[row - run.lowerBound])))
      routing[head, row] = .dropped
    }
    routing.merge(merge, terms: terms)
  }

  /// Drops what is too much after merging: least attention first, of equal rows the latest; recent rows last.
  private func drop(
    _ slots: [(row: Int, attention: Float)], down kept: Int, attention: [Float], before end: Int, head: Int,
    from routing: inout Routing
  ) {
    let excess = slots.count - kept
    if excess <= 0 { return }
    let candidates = slots.filter { $0.row < end }
    let staying = candidates.map(\.attention)
    var stays = [Bool](repeating: false, count: candidates.count)
    selectLargest(candidates.count - excess, of: staying[...]) { stays[$0] = true }
    var gone = Set<Int>()
    for (index, slot) in candidates.enumerated() where !stays[index] {
      routing[head, slot.row] = .dropped
      gone.insert(slot.row)
    }
    routing.forgetMerges(head: head, into: gone)
  }
}

extension KVMergerOptions {
  /// Weights of a run's members from their squared distances to the pivot.
  static func weights(_ distances: [Double], width: Width, sigma: Double) -> [Double] {
    func gaussian(_ variance: Double) -> [Double] {
      distances.map { variance > 0 ? exp(-$0 / (2 * variance)) : $0 == 0 ? 1 : 0 }
    }
    let mean = distances.reduce(0, +) / Double(max(distances.count, 1))
    switch width {
    case .fixed: return gaussian(sigma * sigma)
    case .rms: return gaussian(mean)
    case .twoPass:
      let sum = gaussian(mean).reduce(0, +)
      let second = sum / (2.0.squareRoot() * Double(distances.count))
      return gaussian(second * second)
    }
  }
}
