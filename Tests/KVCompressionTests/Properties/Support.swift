import KVCompression
import KVCore
import KVExperiments
import Testing

// MARK: Small combinatorics with a trace

/// The labels of every loop around the running check.
enum Trace {
  @TaskLocal static var labels: [String] = []
  static var text: String { labels.joined(separator: ", ") }
}

/// Runs `body` for every value; what fails or throws inside names the values of all loops around it.
func withEvery<Values: Sequence>(_ label: String, in values: Values, _ body: (Values.Element) throws -> Void) {
  for value in values { labelled("\(label) \(value)") { try body(value) } }
}

/// One label more around `body`.
func labelled(_ label: String, _ body: () throws -> Void) {
  Trace.$labels.withValue(Trace.labels + [label]) {
    do { try body() } catch { Issue.record("[\(Trace.text)] threw \(error)") }
  }
}

/// Like `#expect`, but prints the trace, and cheap when it holds.
@discardableResult
func check(
  _ condition: Bool, _ what: @autoclosure () -> String, sourceLocation: SourceLocation = #_sourceLocation
) -> Bool {
  if !condition { Issue.record("[\(Trace.text)] \(what())", sourceLocation: sourceLocation) }
  return condition
}

/// Checks that two lists are equal to the bit and says where they first differ.
func checkSame(
  _ a: [Float], _ b: [Float], _ what: @autoclosure () -> String, sourceLocation: SourceLocation = #_sourceLocation
) {
  guard check(a.count == b.count, "\(what()): \(a.count) and \(b.count) numbers", sourceLocation: sourceLocation) else {
    return
  }
  for i in a.indices where a[i].bitPattern != b[i].bitPattern {
    check(false, "\(what()): element \(i) is \(a[i]) and \(b[i])", sourceLocation: sourceLocation)
    return
  }
}

/// Checks that attention outputs (values within 2) differ by no more than a few roundings.
func checkClose(
  _ a: [Float], _ b: [Float], within bound: Float = 1e-5, _ what: @autoclosure () -> String,
  sourceLocation: SourceLocation = #_sourceLocation
) {
  let worst = zip(a, b).map { abs($0 - $1) }.max() ?? 0
  check(a.count == b.count && worst <= bound, "\(what()): off by \(worst)", sourceLocation: sourceLocation)
}

/// Runs `body`, which must throw that code; checks what the error says and returns it.
@discardableResult
func expectError(
  _ code: KVError.Code, _ parts: String..., layer: Int? = nil, head: Int? = nil, position: Int? = nil,
  sourceLocation: SourceLocation = #_sourceLocation, _ body: () throws -> Void
) -> KVError? {
  do {
    try body()
    check(false, "expected \(code), nothing was thrown", sourceLocation: sourceLocation)
  } catch let error as KVError {
    check(error.code == code, "expected \(code), got \(error)", sourceLocation: sourceLocation)
    check(
      error.layer == layer && error.head == head && error.position == position,
      "expected layer \(layer as Any), head \(head as Any), position \(position as Any); got \(error)",
      sourceLocation: sourceLocation)
    for part in parts {
      check(error.message.contains(part), "\"\(part)\" is missing in: \(error)", sourceLocation: sourceLocation)
    }
    return error
  } catch {
    check(false, "expected \(code), got \(error)", sourceLocation: sourceLocation)
  }
  return nil
}

// MARK: Numbers

/// Small deterministic random numbers.
struct Dice {
  var generator: SeededGenerator
  init(_ seed: UInt64) { generator = SeededGenerator(seed: seed) }

  /// A multiple of 1/64 within ±2: exact in f32, f16 and bf16, so that dense stores must return it to the bit.
  mutating func exact() -> Float { Float(generator.integer(below: 255) - 127) / 64 }
  mutating func normal() -> Float { Float(generator.normal()) }
  mutating func below(_ n: Int) -> Int { generator.integer(below: n) }
  mutating func exacts(_ n: Int) -> [Float] { (0..<n).map { _ in exact() } }
  mutating func normals(_ n: Int) -> [Float] { (0..<n).map { _ in normal() } }
}

func bfloat16(_ x: Float) -> UInt16 {
  let bits = x.bitPattern
  if x.isNaN { return UInt16(bits >> 16) | 0x40 }
  return UInt16((bits &+ 0x7FFF &+ (bits >> 16 & 1)) >> 16)
}

// MARK: Models

/// Shapes a cache must live with, small.
struct Geometry: CustomStringConvertible {
  var queryHeads: Int
  var kvHeads: Int
  var keyDim: Int
  var valueDim: Int

  init(_ queryHeads: Int, _ kvHeads: Int, _ keyDim: Int, _ valueDim: Int? = nil) {
    self.queryHeads = queryHeads
    self.kvHeads = kvHeads
    self.keyDim = keyDim
    self.valueDim = valueDim ?? keyDim
  }

  var description: String { "\(queryHeads)/\(kvHeads)x\(keyDim):\(valueDim)" }

  func layer(slidingWindow: Int? = nil) -> LayerShape {
    LayerShape(
      queryHeads: queryHeads, kvHeads: kvHeads, keyDim: keyDim, valueDim: valueDim, slidingWindow: slidingWindow)
  }

  func shape(layers: Int = 1) -> ModelShape {
    ModelShape(layers: Array(repeating: layer(), count: layers))
  }

  /// The same, or with head sizes that are multiples of 32 where a store of the policy refuses others.
  func fitting(_ policy: Policy) throws -> Geometry {
    let backend = try Backend.cpu(threads: 1)
    let model = try shape(layers: 2, rotary: true)
    let made = Result { () throws(KVError) in try KVCache(shape: model, policy: policy, backend: backend) }
    guard case .failure(let error) = made, error.code == .unsupported, error.message.contains("no multiple") else {
      return self
    }
    return Geometry(queryHeads, kvHeads, (keyDim + 31) / 32 * 32, (valueDim + 31) / 32 * 32)
  }

  /// The same of a model that turns its keys, where there are two channels to turn.
  func shape(layers: Int, rotary: Bool) throws -> ModelShape {
    var shape = shape(layers: layers)
    if rotary, keyDim >= 2 { shape.rotary = try RotaryEmbedding(headDim: keyDim, rotaryDim: keyDim / 2 * 2) }
    return shape
  }

  /// GQA of 1, 2, 4 and 16, one KV head, odd head sizes, values of another size than keys.
  static let all = [
    Geometry(2, 2, 40), Geometry(4, 2, 67), Geometry(4, 1, 24, 40), Geometry(16, 1, 16, 9), Geometry(6, 3, 8, 33),
    Geometry(1, 1, 1, 3),
  ]
}

// MARK: Traffic

/// Keys, values and queries of a whole sequence, so that any cut into chunks feeds the same numbers.
struct Traffic {
  let shape: ModelShape
  let total: Int
  /// Per layer, [heads][total][dim].
  var keys: [[Float]] = []
  var values: [[Float]] = []
  var queries: [[Float]] = []

  init(_ shape: ModelShape, tokens: Int, seed: UInt64 = 1) {
    self.shape = shape
    total = tokens
    for (index, layer) in shape.layers.enumerated() {
      var dice = Dice(seed &* 1000 &+ UInt64(index))
      keys.append(dice.exacts(layer.kvHeads * tokens * layer.keyDim))
      values.append(dice.exacts(layer.kvHeads * tokens * layer.valueDim))
      queries.append(dice.normals(layer.queryHeads * tokens * layer.keyDim))
    }
  }

  func key(_ layer: Int, _ head: Int, _ token: Int) -> ArraySlice<Float> {
    let dim = shape.layers[layer].keyDim
    let start = (head * total + token) * dim
    return keys[layer][start..<start + dim]
  }

  func value(_ layer: Int, _ head: Int, _ token: Int) -> ArraySlice<Float> {
    let dim = shape.layers[layer].valueDim
    let start = (head * total + token) * dim
    return values[layer][start..<start + dim]
  }

  func query(_ layer: Int, _ head: Int, _ token: Int) -> ArraySlice<Float> {
    let dim = shape.layers[layer].keyDim
    let start = (head * total + token) * dim
    return queries[layer][start..<start + dim]
  }

  /// Tokens `range` of one of the tensors as [heads, range, dim].
  static func cut(_ elements: [Float], heads: Int, total: Int, dim: Int, _ range: Range<Int>) -> [Float] {
    (0..<heads).flatMap { elements[($0 * total + range.lowerBound) * dim..<($0 * total + range.upperBound) * dim] }
  }

  func keys(_ layer: Int, _ range: Range<Int>) -> [Float] {
    let s = shape.layers[layer]
    return Traffic.cut(keys[layer], heads: s.kvHeads, total: total, dim: s.keyDim, range)
  }

  func values(_ layer: Int, _ range: Range<Int>) -> [Float] {
    let s = shape.layers[layer]
    return Traffic.cut(values[layer], heads: s.kvHeads, total: total, dim: s.valueDim, range)
  }

  func queries(_ layer: Int, _ range: Range<Int>) -> [Float] {
    let s = shape.layers[layer]
    return Traffic.cut(queries[layer], heads: s.queryHeads, total: total, dim: s.keyDim, range)
  }

  func append(_ cache: KVCache, _ layer: Int, _ range: Range<Int>) throws {
    let s = shape.layers[layer]
    let k = keys(layer, range)
    let v = values(layer, range)
    try cache.append(
      layer: layer, keys: TensorView(k.span, heads: s.kvHeads, tokens: range.count, dim: s.keyDim),
      values: TensorView(v.span, heads: s.kvHeads, tokens: range.count, dim: s.valueDim))
  }

  @discardableResult
  func attend(
    _ cache: KVCache, _ layer: Int, _ range: Range<Int>, _ options: AttentionOptions? = nil
  ) throws -> [Float] {
    let s = shape.layers[layer]
    let q = queries(layer, range)
    var result = [Float](repeating: .nan, count: s.queryHeads * range.count * s.valueDim)
    var span = result.mutableSpan
    var output = try MutableTensorView(&span, heads: s.queryHeads, tokens: range.count, dim: s.valueDim)
    try cache.attend(
      layer: layer, queries: TensorView(q.span, heads: s.queryHeads, tokens: range.count, dim: s.keyDim),
      into: &output, options: options)
    _ = consume output
    return result
  }

  func observe(_ cache: KVCache, _ layer: Int, _ range: Range<Int>) throws {
    let s = shape.layers[layer]
    let q = queries(layer, range)
    try cache.observe(
      layer: layer, queries: TensorView(q.span, heads: s.queryHeads, tokens: range.count, dim: s.keyDim))
  }

  /// Appends and attends in every layer that has a cache; the outputs of all layers behind one another.
  @discardableResult
  func step(_ cache: KVCache, _ range: Range<Int>, options: AttentionOptions? = nil) throws -> [Float] {
    var result: [Float] = []
    for layer in shape.layers.indices where shape.layers[layer].cached {
      try append(cache, layer, range)
      result += try attend(cache, layer, range, options)
    }
    return result
  }

  /// A prompt in chunks, `finishPrefill`, then decoding by `by` tokens.
  @discardableResult
  func run(
    _ cache: KVCache, prompt: Int, decoded: Int = 0, chunk: Int? = nil, by: Int = 1
  ) throws -> [Float] {
    var outputs: [Float] = []
    for start in stride(from: 0, to: prompt, by: chunk ?? max(prompt, 1)) {
      outputs += try step(cache, start..<min(start + (chunk ?? prompt), prompt))
    }
    try cache.finishPrefill()
    for start in stride(from: prompt, to: prompt + decoded, by: by) {
      outputs += try step(cache, start..<min(start + by, prompt + decoded))
    }
    return outputs
  }
}

// MARK: What a cache holds

/// Everything readable of a cache, for comparing two of them to the bit.
struct Snapshot: Equatable {
  var heads: [[HeadContents]] = []
  var seen: [Int] = []
  var bytes = ByteCount()
  var statuses: [String] = []

  init(_ cache: KVCache) throws {
    for (index, layer) in cache.shape.layers.enumerated() where layer.cached {
      heads.append(try (0..<layer.kvHeads).map { try cache.read(layer: index, head: $0) })
      seen.append(cache.tokensSeen(layer: index))
    }
    bytes = cache.bytes
    statuses = cache.status.map { "\($0.state): \($0.reason) \($0.rowsHeld) \($0.tokensSeen)" }
  }
}

/// The kept positions of every layer and head.
func positions(_ cache: KVCache) throws -> [[[Int]]] {
  try cache.shape.layers.indices.filter { cache.shape.layers[$0].cached }.map { layer in
    try (0..<cache.shape.layers[layer].kvHeads).map { try cache.rows(layer: layer, head: $0) }
  }
}

/// Makes the cache of a text on a backend of its own.
func makeCache(
  _ text: String, _ shape: ModelShape, backend: Backend? = nil, attention: AttentionOptions = .init(),
  inputs: EngineInputs = .attendThrough
) throws -> KVCache {
  try KVCache(
    shape: shape, policy: PolicyRegistry.standard.policy(text), backend: backend ?? Backend.cpu(threads: 1),
    attention: attention, inputs: inputs)
}

extension Selection {
  /// The same choice at other times.
  func scheduled(_ schedule: Schedule) -> Selection {
    var copy = self
    copy.schedule = schedule
    return copy
  }
}

// MARK: The oracle

/// Attention in f64 over what `heads` (from `read`) say, and a bound on what f32 may differ from it.
///
/// With u = 2^-24: a logit of d products is off by at most (d + 4)·u·scale·Σ|q·k|, its difference to the maximum by
/// 2u·|logit|, exp by 4 ulp, a sum of n weights by n·u; so a weight by a factor 1 ± (2δ + (2n + 32)·u).
///
/// Kernels over affine codes add minima and codes times scales apart (`folded`): a number is then the sum of two, each
/// up to the largest of its group, and so are the roundings. Where codes use a part of their range only, their distance
/// from its middle is `codeRange` times as large, and so is what integer kernels round. Products of eight bits round an
/// element of a query or a weight by up to `rounding` of the largest of its kind; codes, times their scale, lie up to 4/3 of
/// the largest number of their group from their middle (of 2 bits; less with more).
struct Oracle {
  var outputs: [Double] = []
  var bounds: [Double] = []

  init(
    _ heads: [HeadContents], _ layer: LayerShape, queries: [Float], tokens: Int, firstPosition: Int,
    options: AttentionOptions = .init(), folded: Bool = false, codeRange: Double = 1, rounding: Double = 0
  ) throws {
    let reference = AttentionReference(
      scale: options.scale.map(Double.init), causal: options.causal, slidingWindow: layer.slidingWindow,
      softcap: options.softcap.map(Double.init))
    let scale = abs(options.scale.map(Double.init) ?? 1 / Double(layer.keyDim).squareRoot())
    let group = layer.group
    let unit = 0x1p-24
    for head in 0..<layer.kvHeads {
      let rows = heads[head].positions.count
      let own = Array(queries[head * group * tokens * layer.keyDim..<(head + 1) * group * tokens * layer.keyDim])
      if rows == 0 {
        outputs += Array(repeating: 0, count: group * tokens * layer.valueDim)
        bounds += Array(repeating: 0, count: group * tokens * layer.valueDim)
        continue
      }
      let result = try reference.attend(
        queries: HeadTensor(heads: group, tokens: tokens, dim: layer.keyDim, elements: own),
        keys: HeadTensor(heads: 1, tokens: rows, dim: layer.keyDim, elements: heads[head].keys),
        values: HeadTensor(heads: 1, tokens: rows, dim: layer.valueDim, elements: heads[head].values),
        queryPositions: (0..<tokens).map { firstPosition + $0 }, keyPositions: [heads[head].positions],
        logBias: [heads[head].logBias.map(Double.init)], keepWeights: true)
      outputs += result.outputs
      // The largest number of any group: at most the largest of the channel (keys) and of the row (values).
      var keyTops = [Double](repeating: 0, count: layer.keyDim)
      var valueTops = [Double](repeating: 0, count: rows)
      if folded {
        for row in 0..<rows {
          for c in 0..<layer.keyDim {
            keyTops[c] = max(keyTops[c], abs(Double(heads[head].keys[row * layer.keyDim + c])))
          }
          for c in 0..<layer.valueDim {
            valueTops[row] = max(valueTops[row], abs(Double(heads[head].values[row * layer.valueDim + c])))
          }
        }
      }
      for member in 0..<group {
        for token in 0..<tokens {
          let weights = result.weights(head: member, query: token)
          var magnitude = [Double](repeating: 0, count: layer.valueDim)
          var delta = 0.0
          for (row, weight) in weights.enumerated() where weight > 0 {
            var size = 0.0
            for c in 0..<layer.keyDim {
              size +=
                abs(Double(own[(member * tokens + token) * layer.keyDim + c]))
                * (abs(Double(heads[head].keys[row * layer.keyDim + c])) + 3 * codeRange * keyTops[c])
            }
            delta = max(delta, (Double(layer.keyDim) + 8) * unit * scale * size)
            for c in 0..<layer.valueDim {
              magnitude[c] +=
                weight
                * (abs(Double(heads[head].values[row * layer.valueDim + c])) + 3 * codeRange * valueTops[row])
            }
          }
          let first = (member * tokens + token) * layer.keyDim
          let largest = own[first..<first + layer.keyDim].reduce(0) { max($0, abs(Double($1))) }
          delta += rounding * scale * Double(layer.keyDim) * largest * 4 / 3 * (keyTops.max() ?? 0)
          let growth = 2 * delta + 4 * delta * delta  // e^x - 1 <= x + x^2 up to x = 1.79
          let factor = growth + Double(2 * rows + 32) * unit
          let weight = rounding * Double(rows) * (1 + growth) * (weights.max() ?? 0)
          let values = weight * 4 / 3 * (valueTops.max() ?? 0)
          bounds += magnitude.map { $0 * factor + values + 1e-30 }
        }
      }
    }
  }

  /// The largest violation of the bound, as a factor of it.
  func worst(_ output: [Float]) -> Double {
    zip(zip(output, outputs), bounds).reduce(0) { worst, item in
      let error = abs(Double(item.0.0) - item.0.1)
      return max(worst, error.isNaN ? .infinity : error == 0 ? 0 : error / max(item.1, 1e-300))
    }
  }

  /// Checks that `output` lies within the bound.
  func check(_ output: [Float], sourceLocation: SourceLocation = #_sourceLocation) {
    let worst = worst(output)
    KVCompressionTests.check(
      output.count == outputs.count && worst <= 1, "attention is off by \(worst) bounds", sourceLocation: sourceLocation
    )
  }
}

extension Traffic {
  /// Appends and attends tokens in one layer and compares with the oracle over what the cache holds at that time.
  @discardableResult
  func checkedStep(
    _ cache: KVCache, _ layer: Int, _ range: Range<Int>, options: AttentionOptions? = nil,
    sourceLocation: SourceLocation = #_sourceLocation
  ) throws -> [Float] {
    try append(cache, layer, range)
    let s = shape.layers[layer]
    let held = try (0..<s.kvHeads).map { try cache.read(layer: layer, head: $0) }
    let output = try attend(cache, layer, range, options)
    // The scale of RotateKV's squared levels at b bits is the range over b^2 - 1: 8-bit codes end at 63.
    let squared = cache.policy.tiers.contains { "\($0.spec)".contains("squared") }
    try Oracle(
      held, s, queries: queries(layer, range), tokens: range.count, firstPosition: range.lowerBound,
      options: options ?? cache.attention, folded: cache.policy.tiers.contains { $0.spec.name != "dense" },
      codeRange: squared ? 255 / 63 : 1
    ).check(output, sourceLocation: sourceLocation)
    return output
  }
}

/// Forks go their own way over shared memory; a saved cache continues with the same bits.
///
/// - Parameters:
///   - tokens: what follows.
///   - bound: of a loaded cache's outputs: kernels over codes round a run as a whole, and it is cut into other runs.
func checkForksAndFiles(
  _ cache: KVCache, _ traffic: Traffic, continuing tokens: Range<Int>, loadedWithin bound: Float = 1e-5,
  sourceLocation: SourceLocation = #_sourceLocation
) throws {
  let before = try Snapshot(cache)
  let fork = cache.fork()
  check(
    KVCache.bytes(of: [cache, fork]).total == cache.backend.memory.liveBytes, "bytes of a fork",
    sourceLocation: sourceLocation)
  let loaded = try KVCache.load(saved: cache.saved(), backend: .cpu(threads: 1))
  check(try Snapshot(loaded) == before, "what was loaded", sourceLocation: sourceLocation)
  check(
    loaded.bytes.total == loaded.backend.memory.liveBytes, "bytes of what was loaded", sourceLocation: sourceLocation)
  var outputs: [[Float]] = [[], [], []]
  for token in tokens {
    outputs[0] += try traffic.step(fork, token..<token + 1)
    outputs[1] += try traffic.step(loaded, token..<token + 1)
  }
  check(try Snapshot(cache) == before, "a cache changed with its fork", sourceLocation: sourceLocation)
  for token in tokens { outputs[2] += try traffic.step(cache, token..<token + 1) }
  checkClose(outputs[0], outputs[2], "a fork", sourceLocation: sourceLocation)
  checkClose(outputs[1], outputs[2], within: bound, "a loaded cache", sourceLocation: sourceLocation)
  check(
    cache.bytes.total + fork.bytes.total >= cache.backend.memory.liveBytes, "shared bytes",
    sourceLocation: sourceLocation)
}
