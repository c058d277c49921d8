import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// CAKE against the authors' functions and decoding class. The two layers of an entry are a model of their own.
@Suite struct GoldenCAKETests {
  @Test func budgets() throws {
    let rows = try #require(Goldens.entry("cake.budgets").outputs["rows"]?.value)
    guard case .array(let cases) = rows else { return }
    #expect(cases.count >= 4)
    for one in cases {
      let parameters = try #require(one["parameters"])
      let preference = try #require(parameters["preference"]).numbers
      let window = try #require(parameters["window"]?.int)
      let total = (try #require(parameters["cacheSize"]?.int) - window) * preference.count
      let cap = try #require(parameters["tokens"]?.int) - window
      guard case .array(let layers) = try #require(one["afterEachLayer"]) else { continue }
      #expect(layers.count == preference.count)
      for (index, wanted) in layers.enumerated() {
        let shares = LayerPreference.share(total, by: Array(preference[...index]), cap: cap)
        #expect(shares.map { Double($0) } == wanted.numbers, "after layer \(index) of \(preference)")
      }
    }
  }

  @Test(arguments: ["cake.a.cascade.c64w16", "cake.a.once.c64w16"])
  func promptAndDecode(name: String) throws {
    let run = try GoldenRun(name)
    let file = try Goldens.file("inputs_a.safetensors")
    func tensor(_ layer: Int, _ what: String) throws -> HeadTensor {
      let name = "layers.\(layer).\(what)"
      let shape = try file.entry(named: name).shape
      return try HeadTensor(heads: shape[0], tokens: shape[1], dim: shape[2], elements: file.floats(named: name))
    }
    let parameters = try #require(run.entry.parameters)
    let tau1 = try #require(parameters["tau1"]?.double)
    let tau2 = try #require(parameters["tau2"]?.double)
    let window = try run.entry.int("window")
    let size = try run.entry.int("cacheSize")
    let policy = Policy(
      try .cake(budget: .tokens(size), window: window, tau1: tau1, tau2: tau2), store: .dense(.f32))
    let allocator = try #require(policy.allocator as? LayerPreference)
    let cache = try KVCache(
      shape: ModelShape(layerCount: 2, queryHeads: 4, kvHeads: 2, headDim: 64), policy: policy,
      backend: .cpu(threads: 2))
    var preferences: [Double] = []
    var kept: [Double] = []
    for layer in 0..<2 {
      try step(cache, layer, tensor(4 + layer, "keys"), tensor(4 + layer, "values"), tensor(4 + layer, "queries"))
      let table = try scores(cache, layer)
      preferences.append(allocator.preference(entropy: table.measures[0], variance: table.measures[1]))
      var past: [Float] = []
      for head in 0..<2 { for row in 0..<288 - window { past.append(table[head, row]) } }
      try run.expect("\(layer).scores", past)
      if name.contains("cascade") { try cache.finishPrefill(layer: layer) }
      if layer == 0 { kept = [Double(cache.rowsHeld(layer: 0, head: 0))] }
    }
    try run.expect("preference", preferences)
    if name.contains("once") { try cache.finishPrefill() }
    for layer in 0..<2 { kept.append(Double(cache.rowsHeld(layer: layer, head: 0))) }
    try run.expect("keptAfterEachLayer", kept)
    let budgets = LayerPreference.share(2 * (size - window), by: preferences, cap: 288 - window)
    try run.expect("budgets", budgets.map { Double($0) })
    for layer in 0..<2 {
      let held = try (0..<2).map { try cache.rows(layer: layer, head: $0) }
      #expect(held.allSatisfy { $0.count == budgets[layer] + window })
      try run.expect("\(layer).positions", positions: held)
      let probes = try tensor(4 + layer, "probe_queries").slice(tokens: 0..<Goldens.index.get().outputProbes)
      try run.expect(
        "\(layer).output",
        KernelAttention(backend: cache.backend).attend(
          probes, keys: tensor(4 + layer, "keys"), values: tensor(4 + layer, "values"),
          positions: Goldens.positions(run.entry, "\(layer).positions")))
    }
    for layer in 0..<2 {
      var positions: [[Int]] = []
      for index in 0..<4 {
        try step(
          cache, layer, tensor(4 + layer, "probe_keys").slice(tokens: index..<index + 1),
          tensor(4 + layer, "probe_values").slice(tokens: index..<index + 1),
          tensor(4 + layer, "probe_queries").slice(tokens: index..<index + 1))
        positions += try (0..<2).map { try cache.rows(layer: layer, head: $0) }
      }
      try run.expect("\(layer).decodePositions", positions: positions)
    }
    run.finish(except: ["0.decodeScores", "1.decodeScores"])
    #expect(cache.bytes.total == cache.backend.memory.liveBytes)
    #expect(cache.layers.allSatisfy { $0.queryWindow == nil }, "queries are the prompt's alone")
  }

  private func scores(_ cache: KVCache, _ layer: Int) throws -> ScoreTable {
    let view = LayerView(
      cache.layers[layer], options: cache.attention, backend: cache.backend.operations, rotary: nil)
    var table = ScoreTable(counts: view.rowCounts)
    try #require(cache.policy.scorer).score(view, into: &table)
    return table
  }

  private func step(
    _ cache: KVCache, _ layer: Int, _ keys: HeadTensor, _ values: HeadTensor, _ queries: HeadTensor
  ) throws {
    let (k, v, q) = (keys.elements, values.elements, queries.elements)
    try cache.append(
      layer: layer, keys: TensorView(k.span, heads: keys.heads, tokens: keys.tokens, dim: keys.dim),
      values: TensorView(v.span, heads: values.heads, tokens: values.tokens, dim: values.dim))
    var output = [Float](repeating: 0, count: queries.heads * queries.tokens * values.dim)
    var span = output.mutableSpan
    var view = try MutableTensorView(&span, heads: queries.heads, tokens: queries.tokens, dim: values.dim)
    try cache.attend(
      layer: layer, queries: TensorView(q.span, heads: queries.heads, tokens: queries.tokens, dim: queries.dim),
      into: &view)
  }
}
