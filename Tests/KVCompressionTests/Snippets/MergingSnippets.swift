import KVCompression
import Testing

/// Code of the merging pages.
@Suite struct MergingSnippets {
  @Test func policies() throws {
    let merged = Policy(try .h2o(budget: .fraction(0.2)).merging(), store: .dense(.f16))
    let cam = Policy(try .cam(start: 4, recent: 508, merge: 16), store: .dense(.f16))
    let merger = Policy(try .kvMerger(budget: .fraction(0.5)), store: .dense(.f16))
    let d2o = Policy(try .d2o(heavy: 0.2, recent: 0.1), store: .dense(.f16))
    let mini = Policy(store: try Store.kivi(keyBits: 4).miniCache(retained: .distant(0.05)))
    for policy in [merged, cam, merger, d2o, mini] {
      let again = try PolicyRegistry.standard.policy("\(policy.spec)")
      #expect(again.spec == policy.spec)
    }
  }

  /// Sends every second row into the one before it.
  struct PairRouter: Router {
    var protection: Protection { Protection() }
    var merges: Bool { true }

    func route(
      _ layer: LayerView, scores: ScoreTable, kept: [Int], into routing: inout Routing
    ) throws(KVError) {
      for head in 0..<layer.kvHeads {
        for row in stride(from: 0, to: layer.rowCount(head: head), by: 2) {
          routing.send(head: head, rows: row..<row + 1, to: .tier(0))
          let dropped = row + 1
          if dropped == layer.rowCount(head: head) { continue }
          var merge = Routing.Merge(head: head, target: row)
          merge.valueDivisor = 2
          merge.logBias = 0.6931472
          routing.merge(merge, terms: [Routing.Term(row: dropped, weight: 1)])
        }
      }
    }
  }

  @Test func aRouterThatMerges() throws {
    let selection = Selection(
      spec: nil, scorer: nil, budget: .fraction(0.5), router: PairRouter(), schedule: Schedule())
    let shape = ModelShape(layerCount: 1, queryHeads: 1, kvHeads: 1, headDim: 4)
    let cache = try KVCache(shape: shape, policy: Policy(selection, store: .dense(.f32)), backend: .cpu())
    let rows = (0..<20).map { Float($0) }
    try cache.append(
      layer: 0, keys: TensorView(rows.span, heads: 1, tokens: 5, dim: 4),
      values: TensorView(rows.span, heads: 1, tokens: 5, dim: 4))
    try cache.finishPrefill()
    #expect(try cache.read(layer: 0, head: 0).counts == [2, 2, 1])
    #expect(try cache.read(layer: 0, head: 0).values == [2, 3, 4, 5, 10, 11, 12, 13, 16, 17, 18, 19])
  }
}
