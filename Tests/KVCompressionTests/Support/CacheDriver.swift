import Foundation
import KVCompression
import KVExperiments
import Testing

@testable import KVCore

extension KVCache {
  /// A cache of one layer that fits the tensors, on a backend of its own so that its bytes can be counted.
  convenience init(
    _ policy: any CompressionPolicy, queryHeads: Int, kvHeads: Int, dim: Int, slidingWindow: Int? = nil,
    rotary: RotaryEmbedding? = nil, attention: AttentionOptions = .init(), inputs: EngineInputs = .attendThrough
  ) throws {
    try self.init(
      shape: ModelShape(
        layerCount: 1, queryHeads: queryHeads, kvHeads: kvHeads, headDim: dim, slidingWindow: slidingWindow,
        rotary: rotary),
      policy: policy, backend: .cpu(threads: 2), attention: attention, inputs: inputs)
  }

  func append(_ keys: HeadTensor, _ values: HeadTensor) throws {
    let (k, v) = (keys.elements, values.elements)
    try append(
      layer: 0, keys: TensorView(k.span, heads: keys.heads, tokens: keys.tokens, dim: keys.dim),
      values: TensorView(v.span, heads: values.heads, tokens: values.tokens, dim: values.dim))
  }

  /// [queryHeads, n, valueDim].
  func attend(_ queries: HeadTensor, _ options: AttentionOptions? = nil) throws -> [Float] {
    let q = queries.elements
    let dim = shape.layers[0].valueDim
    var output = [Float](repeating: .nan, count: queries.heads * queries.tokens * dim)
    var span = output.mutableSpan
    var view = try MutableTensorView(&span, heads: queries.heads, tokens: queries.tokens, dim: dim)
    try attend(
      layer: 0, queries: TensorView(q.span, heads: queries.heads, tokens: queries.tokens, dim: queries.dim),
      into: &view, options: options)
    _ = consume view
    return output
  }

  /// Attention over everything cached that changes nothing: every query for itself.
  func look(_ queries: HeadTensor) throws -> [Float] {
    var options = attention
    options.causal = false
    options.commits = false
    return try attend(queries, options)
  }

  func observe(_ queries: HeadTensor) throws {
    let q = queries.elements
    try observe(
      layer: 0, queries: TensorView(q.span, heads: queries.heads, tokens: queries.tokens, dim: queries.dim))
  }

  /// Positions held per KV head.
  func positions() throws -> [[Int]] {
    try (0..<shape.layers[0].kvHeads).map { try rows(layer: 0, head: $0) }
  }

  var view: LayerView { LayerView(layers[0], options: attention, backend: backend.operations, rotary: shape.rotary) }

  /// Attention every live row has received, per KV head.
  func accumulated() -> [[Float]] {
    let view = view
    return (0..<view.kvHeads).map { head in
      (0..<view.rowCount(head: head)).map { view.accumulatedAttention(head: head, row: $0) }
    }
  }

  /// What the policy's scorer says of the live rows, per KV head.
  func scores() throws -> [[Float]] {
    let view = view
    var table = ScoreTable()
    table.reset(counts: view.rowCounts)
    try #require(policy.scorer).score(view, into: &table)
    return (0..<view.kvHeads).map { head in (0..<view.rowCount(head: head)).map { table[head, $0] } }
  }

  var segment: RowSegment {
    get throws { try #require(layers[0].segments[0] as? RowSegment) }
  }
}

/// Attention over some rows straight through the backend: log-sum-exps and biases, which caches do not hand out.
struct KernelAttention {
  var backend: Backend
  var scale: Float?
  var softcap: Float = 0
  var slidingWindow = 0
  /// Position of the first query; nil: everything is visible.
  var firstPosition: Int?

  init(backend: Backend) { self.backend = backend }

  /// Rows of f32, with a log bias per row if given.
  func segment(_ keys: HeadTensor, _ values: HeadTensor, bias: [[Float]]? = nil) throws -> RowSegment {
    let layer = LayerShape(queryHeads: keys.heads, kvHeads: keys.heads, keyDim: keys.dim, valueDim: values.dim)
    let format = RowFormat(keys: .dense(.f32), values: .dense(.f32))
    let plain = RowSegment(layer: layer, format: format, backend: backend.operations)
    let (k, v) = (keys.elements, values.elements)
    try plain.append(
      keys: TensorView(k.span, heads: keys.heads, tokens: keys.tokens, dim: keys.dim),
      values: TensorView(v.span, heads: values.heads, tokens: values.tokens, dim: values.dim), firstPosition: 0,
      observed: [])
    guard let bias else { return plain }
    var heads = plain.heads
    for head in heads.indices {
      var column = Column<Float>()
      try column.reserve(bias[head].count, backend: backend.operations)
      for value in bias[head] { column.append(value) }
      heads[head].columns.bias = column
      heads[head].columns.weighs = true
    }
    return RowSegment(restoring: heads, layer: layer, format: format, backend: backend.operations)
  }

  /// Outputs [queryHeads, n, valueDim] and log-sum-exps [queryHeads, n] over the union of the segments.
  func attend(_ queries: HeadTensor, over segments: [RowSegment]) throws -> (output: [Float], logSumExp: [Float]) {
    let layer = try #require(segments.first).layer
    let plan = AttentionPlan()
    for head in 0..<layer.kvHeads {
      for segment in segments {
        segment.describe(head: head, range: 0..<segment.slotCount(head: head), shift: 0, in: plan)
      }
    }
    var output = [Float](repeating: .nan, count: queries.heads * queries.tokens * layer.valueDim)
    var logSumExp = [Float](repeating: .nan, count: queries.heads * queries.tokens)
    queries.elements.withUnsafeBufferPointer { q in
      output.withUnsafeMutableBufferPointer { out in
        logSumExp.withUnsafeMutableBufferPointer { lse in
          plan.sequences.append(
            SequenceWork(
              queries: UnsafeRawPointer(q.baseAddress!), queryType: .f32,
              queryHeadStride: queries.tokens * queries.dim, queryTokenStride: queries.dim,
              output: out.baseAddress!, outputHeadStride: queries.tokens * layer.valueDim,
              outputTokenStride: layer.valueDim, logSumExp: lse.baseAddress!, tokens: queries.tokens,
              kvHeads: layer.kvHeads, group: queries.heads / layer.kvHeads, keyDim: layer.keyDim,
              valueDim: layer.valueDim, scale: scale ?? 1 / Float(layer.keyDim).squareRoot(), softcap: softcap,
              firstPosition: firstPosition ?? Int.max, slidingWindow: slidingWindow, rotary: nil,
              work: 0..<plan.rows.count))
          do { try backend.operations.attend(plan) } catch { Issue.record(error) }
        }
      }
    }
    return (output, logSumExp)
  }

  /// Attention over rows of a tensor, chosen per KV head: for outputs that are evaluated on a reference's positions.
  func attend(_ queries: HeadTensor, keys: HeadTensor, values: HeadTensor, positions: [[Int]]) throws -> [Float] {
    var output: [Float] = []
    let group = queries.heads / keys.heads
    for head in 0..<keys.heads {
      let rows = try segment(
        keys.gather(head: head, tokens: positions[head]), values.gather(head: head, tokens: positions[head]))
      output += try attend(queries.slice(heads: head * group..<(head + 1) * group), over: [rows]).output
    }
    return output
  }
}

/// What the encoded rows of one side of one head look like in memory, extents joined.
struct EncodedBody: Equatable {
  var words: [UInt32] = []
  var scales: [Float] = []
  var minima: [Float] = []
  var rows = 0
  var payloadBytes = 0
  var metadataBytes = 0

  init(_ store: RowStore) {
    for extent in store.extents[..<store.bodyExtents] {
      let run = extent.run(dim: store.dim)
      let encoding = run.encoding
      let payload = encoding.payloadBytes(rows: extent.rows, dim: store.dim)
      let start = encoding.payloadBytes(rows: extent.first, dim: store.dim)
      for word in 0..<payload / 4 { words.append((run.base + start).load(fromByteOffset: word * 4, as: UInt32.self)) }
      let metadata = encoding.scaleBytes(rows: extent.rows, dim: store.dim)
      let skipped = encoding.scaleBytes(rows: extent.first, dim: store.dim)
      scales += EncodedBody.numbers(run.scales + skipped, metadata, encoding.type)
      minima += EncodedBody.numbers(run.minima + skipped, metadata, encoding.type)
      rows += extent.rows
      payloadBytes += payload
      metadataBytes += metadata + encoding.minimumBytes(rows: extent.rows, dim: store.dim)
    }
  }

  private static func numbers(_ base: UnsafeMutableRawPointer, _ bytes: Int, _ type: ElementType) -> [Float] {
    (0..<bytes / type.byteCount).map { index in
      switch type {
      case .f16: Float(base.load(fromByteOffset: index * 2, as: Float16.self))
      case .bf16: Float(bitPattern: UInt32(base.load(fromByteOffset: index * 2, as: UInt16.self)) << 16)
      default: base.load(fromByteOffset: index * 4, as: Float.self)
      }
    }
  }
}

/// Standard normal numbers that are the same on every platform.
func normals(_ count: Int, seed: UInt64) -> [Float] {
  var random = SeededGenerator(seed: seed)
  return (0..<count).map { _ in Float(random.normal()) }
}

func normalTensor(_ heads: Int, _ tokens: Int, _ dim: Int, seed: UInt64) throws -> HeadTensor {
  try HeadTensor(heads: heads, tokens: tokens, dim: dim, elements: normals(heads * tokens * dim, seed: seed))
}

/// Measurements for reports: printed with `GOLDEN_TRACE=1`.
enum GoldenTrace {
  static let isOn = ProcessInfo.processInfo.environment["GOLDEN_TRACE"] != nil
  static func print(_ text: @autoclosure () -> String) { if isOn { Swift.print("golden", text()) } }
}
