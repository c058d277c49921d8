import KVCompression
import Testing

@Suite struct SmokeTests {
  @Test(arguments: [
    "f32", "f16", "kivi(bits=4)", "snapkv(budget=64,window=8)", "h2o(heavy=24,recent=24)",
    "h2o(heavy=100,recent=100)+kivi(bits=2,residual=32)", "streaming(sinks=4,recent=60,positions=keep)",
    "snapkv(budget=0.25,window=8)+kivi",
  ])
  func lives(text: String) throws {
    let policy = try PolicyRegistry.standard.policy(text)
    let shape = ModelShape(layerCount: 2, queryHeads: 8, kvHeads: 2, headDim: 64)
    let backend = try Backend.cpu()
    let cache = try KVCache(shape: shape, policy: policy, backend: backend)
    var rng = SystemRandomNumberGenerator()
    func random(_ n: Int) -> [Float] { (0..<n).map { _ in Float.random(in: -1...1, using: &rng) } }
    func step(_ n: Int) throws {
      for layer in 0..<2 {
        let k = random(2 * n * 64), v = random(2 * n * 64), q = random(8 * n * 64)
        var o = [Float](repeating: .nan, count: 8 * n * 64)
        try cache.append(
          layer: layer, keys: TensorView(k.span, heads: 2, tokens: n, dim: 64),
          values: TensorView(v.span, heads: 2, tokens: n, dim: 64))
        var span = o.mutableSpan
        var out = try MutableTensorView(&span, heads: 8, tokens: n, dim: 64)
        try cache.attend(layer: layer, queries: TensorView(q.span, heads: 8, tokens: n, dim: 64), into: &out)
        _ = consume out
        #expect(o.allSatisfy { $0.isFinite })
      }
    }
    try step(300)
    try step(200)
    try cache.finishPrefill()
    for _ in 0..<150 { try step(1) }
    try step(5)
    print(text, cache.bytes, cache.rowsHeld(layer: 0, head: 0), backend.memory.liveBytes, backend.memory.allocations)
    #expect(cache.bytes.total == backend.memory.liveBytes)
    print(try policy.estimate(shape: shape, prompt: 500, decoded: 155))
  }
}
