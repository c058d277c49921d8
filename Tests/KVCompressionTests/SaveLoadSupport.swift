import KVCompression
import KVCore
import KVEviction
import KVQuantization

#if canImport(Glibc)
  import Glibc
#elseif canImport(Musl)
  import Musl
#else
  import Darwin
#endif

/// The same numbers on every machine.
struct SavedRandom: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
    return (state ^ state >> 29) &* 0xBF58_476D_1CE4_E5B9
  }
}

/// A path of its own, gone afterwards.
func withTemporaryPath(_ body: (String) throws -> Void) throws {
  let path = "/tmp/kv-saved-\(UInt64.random(in: 0...UInt64.max)).kvc"
  defer { unlink(path) }
  try body(path)
}

enum SavedCases {
  /// Full attention twice (grouped, values wider than keys), a sliding window, a layer without cache.
  static func shape(rotary: RotaryEmbedding? = nil) throws -> ModelShape {
    ModelShape(
      layers: [
        LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 40),
        LayerShape(queryHeads: 3, kvHeads: 3, keyDim: 32), .uncached,
        LayerShape(queryHeads: 2, kvHeads: 1, keyDim: 32, slidingWindow: 24),
      ], rotary: try rotary ?? RotaryEmbedding(headDim: 32))
  }

  static let texts = [
    "f32", "f16", "bf16", "kivi(bits=2,residual=32)", "kivi(bits=3,residual=64,metadata=bf16,window=bf16)",
    "kivi(bits=4,residual=32,metadata=f32,window=f32)", "kivi(bits=8,group=64,residual=64)",
    "streaming(sinks=4,recent=40)", "streaming(sinks=4,recent=40,positions=keep)", "h2o(heavy=20,recent=20)",
    "h2o(budget=0.3)", "snapkv(budget=48,window=8,every=16)", "snapkv(budget=64,window=8)",
    "h2o(heavy=40,recent=40)+kivi(bits=4,residual=32)", "snapkv(budget=80,window=8)+kivi(bits=2,residual=32)",
    "snapkv(budget=80,window=8,every=16)+kivi(bits=8,residual=32)", "h2o(budget=0.3)+merge(threshold=-1,keys=rotate)",
    "kvmerger(budget=0.4,every=8)",
    "d2o(skip_first=0,skip_last=0)+kivi(bits=8,residual=32)", "cam(budget=40)+bf16", "two tiers", "ragged heads",
    "int8", "fp8(scale=head,group=32,metadata=f16)", "h2o(heavy=40,recent=40)+int8(scale=tensor,factor=0.012)",
    "quant(keys=q4_1,values=int4,value_group=8)", "kivi(bits=2,residual=32)+layers(first=1,last=1)+fp8(format=e5m2)",
  ]

  static func policy(_ text: String) throws -> Policy {
    switch text {
    case "two tiers":
      return Policy(
        Selection(
          spec: StageSpec(name: "twotiers"),
          scorer: WindowAttention(window: 8, kernel: 3, pooling: .average, reduction: .mean), budget: .tokens(40),
          router: TopKRouter(Protection(sinks: 2, window: 8), others: .tier(1)), schedule: Schedule()),
        tiers: [.dense(.f16), try .kivi(keyBits: 4, residual: 32)])
    case "ragged heads":
      let base = try Selection.h2o(heavy: 30, recent: 20)
      return Policy(
        Selection(
          spec: StageSpec(name: "ragged"), scorer: base.scorer, budget: base.budget, allocator: RaggedAllocator(),
          router: base.router, schedule: Schedule(decodeInterval: 4)), store: try .kivi(keyBits: 8, residual: 32))
    default: return try PolicyRegistry.standard.policy(text)
    }
  }

  private struct RaggedAllocator: Allocator {
    func allocate(_ requests: [AllocationRequest]) throws(KVError) -> [[Int]] {
      requests.map { request in
        request.rows.indices.map { min(request.rows[$0], request.budget[$0] - 9 * $0) }
      }
    }
  }
}

/// One call of a cache's life.
enum SavedStep: Hashable {
  case tokens(Int)
  case finish, begin

  /// A prompt in chunks, decoding, a second prompt, decoding.
  static let life: [SavedStep] =
    [.tokens(55), .tokens(34), .finish] + Array(repeating: .tokens(1), count: 36)
    + [.begin, .tokens(21), .tokens(12), .finish] + Array(repeating: .tokens(1), count: 8)

  /// Rows move to a second tier once: the router of the hand-made policy cannot bring them back.
  static func life(of text: String) -> [SavedStep] {
    text == "two tiers" ? Array(life.prefix { $0 != .begin }) : life
  }

  /// Does the step; returns everything attention gave. Same seed, same inputs.
  @discardableResult
  func run(_ cache: KVCache, seed: UInt64) throws -> [Float] {
    switch self {
    case .finish: try cache.finishPrefill()
    case .begin: cache.beginPrefill()
    case .tokens(let count):
      var outputs: [Float] = []
      for (index, layer) in cache.shape.layers.enumerated() where layer.cached {
        var random = SavedRandom(state: seed &* 97 &+ UInt64(index))
        func numbers(_ heads: Int, _ dim: Int) -> [Float] {
          (0..<heads * count * dim).map { _ in Float.random(in: -1.5...1.5, using: &random) }
        }
        let keys = numbers(layer.kvHeads, layer.keyDim)
        let values = numbers(layer.kvHeads, layer.valueDim)
        let queries = numbers(layer.queryHeads, layer.keyDim)
        try cache.append(
          layer: index, keys: TensorView(keys.span, heads: layer.kvHeads, tokens: count, dim: layer.keyDim),
          values: TensorView(values.span, heads: layer.kvHeads, tokens: count, dim: layer.valueDim))
        var output = [Float](repeating: .nan, count: layer.queryHeads * count * layer.valueDim)
        var span = output.mutableSpan
        var view = try MutableTensorView(&span, heads: layer.queryHeads, tokens: count, dim: layer.valueDim)
        try cache.attend(
          layer: index, queries: TensorView(queries.span, heads: layer.queryHeads, tokens: count, dim: layer.keyDim),
          into: &view)
        _ = consume view
        outputs += output
      }
      return outputs
    }
    return []
  }
}
