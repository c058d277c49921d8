public import KVCore

/// The pyramid of budgets over layers by itself, behind any selection: `h2o(budget=0.25)+pyramid`. arXiv 2406.02069.
extension Selection {
  /// - Throws: `invalidOption` for a slope below 1.
  public func pyramid(
    beta: Double = 20, form: PyramidAllocator.Form = .exact, short: PyramidAllocator.Short = .uniform
  ) throws(KVError) -> Selection {
    let allocator = try PyramidAllocator(beta: beta, form: form, short: short)
    let spec = StageSpec(name: "pyramid", options: allocator.options)
    return modified(by: spec) { $0.allocator = $0.allocator.under(allocator) }
  }

  /// `pyramid(beta=20,form=exact)`.
  public static let pyramidMethod = MethodDescription(
    name: "pyramid", role: .modifier, summary: "budgets that fall linearly from the first layer to the last",
    paper: "arXiv 2406.02069", options: PyramidAllocator.descriptions
  ) { (reader) throws(KVError) in
    let (beta, form, short) = try PyramidAllocator.read(&reader, form: .exact)
    return .modifier { (selection) throws(KVError) in try selection.pyramid(beta: beta, form: form, short: short) }
  }
}

/// Budgets that decrease arithmetically from the first layer to the last: PyramidKV.
///
/// With `base` = budget - protected rows: the last layer gets `base / beta` rows beyond the protected ones, the first
/// `2 · base - base / beta`. Where that is more than there are, the first keeps all and the last gets what is left.
public struct PyramidAllocator: LayerAllocator {
  /// How the line is rounded.
  public enum Form: String, Sendable, Hashable, CaseIterable {
    /// The authors' integer divisions: the sum is up to a few rows a layer above the budget.
    case official
    /// The same line with its sum corrected to the budget, by the largest remainders.
    case exact
    /// Real numbers that include the window, rounded at the end; uniform where the line leaves its bounds.
    case kvpress
  }

  /// What happens to prompts of less than twice the base.
  public enum Short: String, Sendable, Hashable, CaseIterable {
    /// Every layer gets the same, as the authors do.
    case uniform
    /// The line is clipped at the top, as Ada-KV's pyramid mode does.
    case clip
  }

  public let beta: Double
  public let form: Form
  public let short: Short
  public var heads: any Allocator

  public init(
    beta: Double = 20, form: Form = .official, short: Short = .uniform, heads: any Allocator = UniformAllocator()
  ) throws(KVError) {
    guard beta >= 1, beta <= 1_048_576 else {
      throw KVError(.invalidOption, "a pyramid's beta must lie in 1...1048576; got \(beta)")
    }
    guard form != .official || beta == beta.rounded() else {
      throw KVError(.invalidOption, "the official pyramid divides by an integer beta; got \(beta)")
    }
    self.beta = beta
    self.form = form
    self.short = short
    self.heads = heads
  }

  public var spansLayers: Bool { heads.spansLayers }
  public func validate(_ shape: ModelShape) throws(KVError) { try heads.validate(shape) }

  public func needsScores(_ request: AllocationRequest) -> Bool { heads.needsScores(divided(request)) }

  public func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
    try heads.allocate(requests.map(divided))
  }

  /// The request with this layer's part of the budget. The prompt's length is the tokens seen: a layer that was cut
  /// short does not grow again while decoding.
  private func divided(_ request: AllocationRequest) -> AllocationRequest {
    var changed = request
    for head in request.rows.indices {
      let budget = request.budget[head]
      let share = Int((request.protection.windowShare * Double(budget)).rounded(.down))
      changed.budget[head] = rows(
        budget: budget, tokens: request.tokensSeen,
        protected: request.protection.sinks + max(request.protection.window, share), index: request.index,
        layers: request.layers)
    }
    return changed
  }

  /// Rows one layer keeps of `tokens`, protected ones included.
  public func rows(budget: Int, tokens: Int, protected: Int, index: Int, layers: Int) -> Int {
    if tokens <= budget { return tokens }
    let base = budget - protected
    if layers <= 1 || base <= 0 { return budget }
    if form == .kvpress { return kvpressRows(budget, tokens, protected, index, layers) }
    if short == .uniform, tokens < 2 * base { return budget }
    let (past, least) = (tokens - protected, protected == 0 ? 1 : 0)
    let rows =
      form == .official
      ? officialPast(base, past, index, layers) : exactPast(base, past, index, layers, least: least)
    // Attention over nothing has no value: without protected rows the last layer keeps one.
    return min(tokens, protected + max(least, rows))
  }

  private func officialPast(_ base: Int, _ past: Int, _ index: Int, _ layers: Int) -> Int {
    var least = base / Int(beta)
    var most = 2 * base - least
    if most >= past {
      most = past
      least = 2 * base - most
    }
    // Python divides towards minus infinity; the difference is negative where the clip turns the pyramid over.
    let step = Int((Double(most - least) / Double(layers - 1)).rounded(.down))
    return min(past, most - index * step)
  }

  private func exactPast(_ base: Int, _ past: Int, _ index: Int, _ layers: Int, least smallest: Int) -> Int {
    var least = Double(base) / beta
    var most = 2 * Double(base) - least
    if most > Double(past) {
      most = Double(past)
      least = 2 * Double(base) - most
    }
    let line = (0..<layers).map { most - Double($0) * (most - least) / Double(layers - 1) }
    var counts = line.map { Int(min(max($0, Double(smallest)), Double(past)).rounded(.down)) }
    // What rounding down left goes to the largest remainders, of equal ones to the first layer.
    var left = layers * base - counts.reduce(0, +)
    let order = line.indices.sorted {
      line[$0] - Double(counts[$0]) > line[$1] - Double(counts[$1])
        || (line[$0] - Double(counts[$0]) == line[$1] - Double(counts[$1]) && $0 < $1)
    }
    for layer in order + order where left > 0 && counts[layer] < past {
      counts[layer] += 1
      left -= 1
    }
    return counts[index]
  }

  private func kvpressRows(_ budget: Int, _ tokens: Int, _ window: Int, _ index: Int, _ layers: Int) -> Int {
    var least = Double(budget) / beta
    var most = 2 * Double(budget) - least
    if most >= Double(tokens - window) {
      most = Double(tokens - window)
      least = 2 * Double(budget) - most
    }
    guard Double(tokens) >= most, most >= least, least >= Double(window) else { return budget }
    let step = (most - least) / Double(layers - 1)
    return min(tokens, max(1, Int((most - Double(index) * step).rounded(.toNearestOrEven))))
  }
}

extension PyramidAllocator {
  var options: [SpecOption] {
    [
      SpecOption("beta", .decimal(beta)), SpecOption("form", .text(form.rawValue)),
      SpecOption("short", .text(short.rawValue)),
    ]
  }

  static let descriptions: [MethodDescription.Option] = [
    .init("beta", "the last layer gets this part of the mean, beyond protected rows"),
    .init("form", "rounding: official, exact (the sum is the budget) or kvpress"),
    .init("short", "prompts below twice the base: uniform, or clip the line"),
  ]

  static func read(
    _ reader: inout OptionReader, form: Form
  ) throws(KVError) -> (beta: Double, form: Form, short: Short) {
    let beta = try reader.double("beta", default: 20, in: 1...1_048_576)
    let name = try reader.name("form", default: form.rawValue, among: Form.allCases.map(\.rawValue))
    let short = try reader.name("short", default: Short.uniform.rawValue, among: Short.allCases.map(\.rawValue))
    return (beta, Form(rawValue: name) ?? form, Short(rawValue: short) ?? .uniform)
  }
}

extension Allocator {
  /// `layers` dividing between layers, with the way heads share kept from `self`.
  func under(_ layers: some LayerAllocator) -> any Allocator {
    var layers = layers
    layers.heads = (self as? any LayerAllocator)?.heads ?? self
    return layers
  }

  /// The heads sharing by `heads`, with the way layers share kept from `self`.
  func over(_ heads: any Allocator) -> any Allocator {
    guard var layers = self as? any LayerAllocator else { return heads }
    layers.heads = heads
    return layers
  }
}
