import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// MiniCache against two re-implementations.
@Suite struct GoldenMiniCacheTests {
  private struct Input {
    var keys: [HeadTensor] = []
    var values: [HeadTensor] = []
    var probes: [HeadTensor] = []
    var tokens: Int

    init(_ entry: GoldenEntry) throws {
      let file = try Goldens.file(try #require(entry.input?["file"]?.string))
      tokens = try #require(entry.input?["tokens"]?.int)
      for layer in entry.input?["layers"]?.numbers.map({ Int($0) }) ?? [] {
        func tensor(_ name: String) throws -> HeadTensor {
          let name = "layers.\(layer).\(name)"
          let shape = try file.entry(named: name).shape
          return try HeadTensor(heads: shape[0], tokens: shape[1], dim: shape[2], elements: file.floats(named: name))
        }
        keys.append(try tensor("keys").slice(tokens: 0..<tokens))
        values.append(try tensor("values").slice(tokens: 0..<tokens))
        probes.append(try tensor("probe_queries").slice(tokens: 0..<Goldens.index.get().outputProbes))
      }
    }
  }

  private func cache(_ input: Input, _ options: String) throws -> KVCache {
    let (heads, dim) = (input.keys[0].heads, input.keys[0].dim)
    let shape = ModelShape(layerCount: 2, queryHeads: input.probes[0].heads, kvHeads: heads, headDim: dim)
    let cache = try makeCache("f32+minicache(from=0,lengths=f32,\(options))", shape)
    for layer in 0..<2 {
      let (k, v) = (input.keys[layer].elements, input.values[layer].elements)
      try cache.append(
        layer: layer, keys: TensorView(k.span, heads: heads, tokens: input.tokens, dim: dim),
        values: TensorView(v.span, heads: heads, tokens: input.tokens, dim: dim))
    }
    try cache.finishPrefill()
    return cache
  }

  private func sides(_ cache: KVCache, keys: Bool) throws -> [DirectionStorage.Side] {
    let segment = try #require(cache.layers[0].segments[0] as? DirectionSegment)
    return segment.shared.heads.map { keys ? $0.keys : $0.values }
  }

  private func rows(_ cache: KVCache, _ layer: Int, keys: Bool) throws -> [Float] {
    try (0..<cache.shape.layers[layer].kvHeads).flatMap { head in
      let held = try cache.read(layer: layer, head: head)
      return keys ? held.keys : held.values
    }
  }

  private func floats(_ store: RowStore) -> [Float] {
    store.slices(0..<store.rows).flatMap { slice in
      let base = (slice.run.base + slice.first * store.dim * 4).assumingMemoryBound(to: Float.self)
      return Array(UnsafeBufferPointer(start: base, count: slice.count * store.dim))
    }
  }

  /// Angles between the rows of the two layers, in parts of a half turn.
  private func distances(_ lower: HeadTensor, _ upper: HeadTensor) throws -> [Float] {
    let backend = try Backend.cpu(threads: 1).operations
    func slice(_ elements: UnsafePointer<Float>, _ head: HeadTensor) -> RunSlice {
      let count = head.heads * head.tokens
      return RunSlice(
        run: RowRun(
          encoding: .dense(.f32), dim: head.dim, capacity: count, base: UnsafeMutableRawPointer(mutating: elements)),
        first: 0, count: count)
    }
    return lower.elements.withUnsafeBufferPointer { x in
      upper.elements.withUnsafeBufferPointer { y in
        [Float](unsafeUninitializedCapacity: lower.heads * lower.tokens) { buffer, count in
          backend.shareDirections(
            DirectionRequest(
              lower: [slice(x.baseAddress!, lower)], upper: [slice(y.baseAddress!, upper)], dim: lower.dim, weight: 0.5,
              largest: .greatestFiniteMagnitude), into: buffer.baseAddress!)
          count = lower.heads * lower.tokens
        }
      }
    }.map { $0 / .pi }
  }

  @Test(arguments: Goldens.names("minicache.factory."))
  func largestAngles(name: String) throws {
    let run = try GoldenRun(name)
    let input = try Input(run.entry)
    let keys = name.contains(".keys.")
    let cache = try cache(input, "t=0.6,retain=share,share=0.05")
    let sides = try sides(cache, keys: keys)
    try run.expect("direction", sides.flatMap { floats($0.directions) })
    try run.expect("lowerNorms", sides.flatMap { floats($0.lengths[0]) })
    try run.expect("upperNorms", sides.flatMap { floats($0.lengths[1]) })
    let rows = keys ? input.keys : input.values
    try run.expect("distance", distances(rows[0], rows[1]))
    try run.expect("retained", positions: sides.map { side in side.exactSlots.withSpan { $0.map { Int($0) } } })
    try run.expect("lower", self.rows(cache, 0, keys: keys))
    try run.expect("upper", self.rows(cache, 1, keys: keys))
    if run.entry.outputs["lower.output"] != nil {
      // Restored values under keys as they were: those of a pair of equal layers.
      var unmerged = input
      unmerged.keys[1] = input.keys[0]
      let cache = try self.cache(unmerged, "t=0.6,retain=share,share=0.05")
      let q = input.probes[0].elements
      let (heads, tokens, dim) = (input.probes[0].heads, input.probes[0].tokens, input.probes[0].dim)
      var output = [Float](repeating: .nan, count: q.count)
      var span = output.mutableSpan
      var view = try MutableTensorView(&span, heads: heads, tokens: tokens, dim: dim)
      try cache.attend(
        layer: 0, queries: TensorView(q.span, heads: heads, tokens: tokens, dim: dim), into: &view,
        options: AttentionOptions(causal: false, commits: false))
      _ = consume view
      try run.expect("lower.output", output)
    }
    run.finish()
  }

  @Test(arguments: Goldens.names("minicache.xkv."))
  func literalThreshold(name: String) throws {
    let run = try GoldenRun(name)
    let input = try Input(run.entry)
    let keys = name.contains(".keys.")
    let cache = try cache(input, "t=0.6,retain=literal,gamma=0.05,scope=layer")
    var merged: [Double] = []
    for side in try sides(cache, keys: keys) {
      let kept = Set(side.exactSlots.withSpan { $0.map { Int($0) } })
      merged += (0..<input.tokens).map { kept.contains($0) ? 0 : 1 }
    }
    try run.expect("merged", merged)
    try run.expect("lower", rows(cache, 0, keys: keys))
    try run.expect("upper", rows(cache, 1, keys: keys))
    run.finish()
  }
}
