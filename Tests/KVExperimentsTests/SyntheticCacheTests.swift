import Foundation
import KVCore
import KVExperiments
import Testing

@Suite struct SyntheticCacheTests {
  private func options(_ change: (inout SyntheticOptions) -> Void = { _ in }) -> SyntheticOptions {
    var options = SyntheticOptions()
    options.layers = 2
    options.tokens = 160
    options.queryTokens = 32
    change(&options)
    return options
  }

  private func cosine(_ a: HeadTensor, _ b: HeadTensor) throws -> Double {
    try FidelityMetrics.cosine(a.elements, reference: b.elements)
  }

  @Test func shapesAndReproducibility() throws {
    let options = options {
      $0.probeQueries = 3
      $0.tokens = 40
      $0.layers = 3
    }
    let (one, two) = (try SyntheticCache(options), try SyntheticCache(options))
    #expect(one.layers == two.layers && one.layers.count == 3)
    for layer in one.layers {
      #expect(layer.keys.shape == [2, 40, 64] && layer.values.shape == [2, 40, 64])
      #expect(layer.queries.shape == [8, 32, 64] && layer.probeQueries.shape == [8, 3, 64])
      for tensor in [layer.keys, layer.values, layer.queries, layer.probeQueries] { try tensor.checkFinite("tensor") }
    }
    #expect(one.queryPositions == Array(8..<40))
    var other = options
    other.seed = 2
    #expect(try SyntheticCache(other).layers[0].keys != one.layers[0].keys)
    // Fewer query rows, fewer probes, fewer layers: the same numbers.
    var fewer = options
    fewer.queryTokens = 5
    fewer.probeQueries = 1
    fewer.layers = 1
    let small = try SyntheticCache(fewer).layers[0]
    #expect(small.keys == one.layers[0].keys)
    #expect(try small.queries == one.layers[0].queries.slice(tokens: 27..<32))
    #expect(try small.probeQueries == one.layers[0].probeQueries.slice(tokens: 0..<1))
  }

  /// The bits themselves: a change here changes what every seed means.
  @Test func goldenBits() throws {
    var generator = SeededGenerator(seed: 42)
    let drawn = (0..<4).map { _ in generator.next() }
    let published: [UInt64] = [
      1_546_998_764_402_558_742, 6_990_951_692_964_543_102, 12_544_586_762_248_559_009, 17_057_574_109_182_124_193,
    ]
    #expect(drawn == published)
    let cache = try SyntheticCache(
      options {
        $0.tokens = 16
        $0.queryTokens = 4
      })
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    for layer in cache.layers {
      for tensor in [layer.keys, layer.values, layer.queries] {
        for element in tensor.elements { hash = (hash ^ UInt64(element.bitPattern)) &* 0x100_0000_01B3 }
      }
    }
    #expect(hash == 15_631_984_680_551_607_611)
  }

  @Test func normalNumbersAreNormal() {
    var random = SeededGenerator(seed: 5, streams: 1, 2)
    var moments = MeanAccumulator()
    var fourth = MeanAccumulator()
    for _ in 0..<100_000 {
      let x = random.normal()
      moments.add(x)
      fourth.add(x * x * x * x)
    }
    #expect(moments.least > -9 && moments.greatest < 9)
    // Five standard errors: 1/√n, √(2/n), √(96/n).
    #expect(abs(moments.mean) < 0.016 && abs(moments.variance - 1) < 0.023 && abs(fourth.mean - 3) < 0.16)
    var seen = Set<Int>()
    for _ in 0..<200 { seen.insert(random.integer(below: 7)) }
    #expect(seen == Set(0..<7))
  }

  @Test func sinkTakesMassAndHasASmallValue() throws {
    let cache = try SyntheticCache(options())
    for layer in cache.layers {
      let sums = try AttentionReference().columnSums(queries: layer.queries, keys: layer.keys)
      for (head, column) in sums.enumerated() {
        #expect(column[0] / 32 > 0.2, "query head \(head): \(column[0] / 32)")
      }
      func norm(_ t: Int) -> Float { layer.values.row(head: 0, token: t).reduce(0) { $0 + $1 * $1 }.squareRoot() }
      #expect(norm(0) < 0.3 * norm(1))
    }
    // The share does not fade in longer contexts.
    let long = try SyntheticCache(options { $0.tokens = 1024 }).layers[1]
    let longSums = try AttentionReference().columnSums(queries: long.queries, keys: long.keys)
    #expect(longSums.reduce(0) { $0 + $1[0] } / (32 * 8) > 0.3)
    // Without it, token 0 is a token as others.
    let plain = try SyntheticCache(options { $0.sinkTokens = 0 }).layers[0]
    let sums = try AttentionReference().columnSums(queries: plain.queries, keys: plain.keys)
    #expect(sums.allSatisfy { $0[0] / 32 < 0.2 })
  }

  @Test func heavyHittersStandOutInColumnSums() throws {
    let cache = try SyntheticCache(options())
    #expect(cache.heavyHitters.allSatisfy { $0.count == 5 && $0 == $0.sorted() && !$0.contains(0) })
    for layer in cache.layers {
      let sums = try AttentionReference().columnSums(queries: layer.queries, keys: layer.keys)
      for head in 0..<2 {
        // All query heads of the KV head together; only tokens that every query sees, and not the locality's window.
        let column = (0..<120).map { token in (0..<4).reduce(0) { $0 + sums[head * 4 + $1][token] } }
        let heavy = cache.heavyHitters[head].filter { $0 < 120 }
        let rest = (1..<120).filter { !heavy.contains($0) }.map { column[$0] }.sorted()
        for token in heavy { #expect(column[token] > 5 * rest[rest.count / 2], "token \(token)") }
      }
    }
  }

  @Test func outlierChannelsStandOut() throws {
    let cache = try SyntheticCache(options())
    #expect(cache.outlierChannels.count == 2)
    for layer in cache.layers {
      for head in 0..<2 {
        let means = (0..<64).map { c in
          (0..<160).reduce(0) { $0 + abs(layer.keysBeforeRotation[head, $1, c]) } / 160
        }
        let typical = means.sorted()[32]
        for c in 0..<64 {
          if cache.outlierChannels.contains(c) {
            #expect(means[c] > 6 * typical)
          } else {
            #expect(means[c] < 4 * typical, "channel \(c)")
          }
        }
      }
    }
    #expect(try SyntheticCache(options { $0.outlierChannels = 0 }).outlierChannels.isEmpty)
  }

  @Test func headsDifferAsTheirKindsSay() throws {
    let cache = try SyntheticCache(options())
    #expect(cache.headKinds.filter { $0 == .local }.count == 4)
    #expect(cache.headKinds.filter { $0 == .retrieval }.count == 2)
    #expect(Set(cache.headKinds[..<4]) == Set(SyntheticHeadKind.allCases))
    let layer = cache.layers[1]
    let result = try AttentionReference().attend(
      queries: layer.queries, keys: layer.keys, values: layer.values, keepWeights: true)
    var recent: [SyntheticHeadKind: MeanAccumulator] = [:]
    var found = MeanAccumulator()
    for head in 0..<8 {
      for query in 0..<32 {
        let weights = Array(result.weights(head: head, query: query))
        let position = 128 + query
        let rest = 1 - weights[0]
        recent[cache.headKinds[head], default: .init()].add(weights[position - 7...position].reduce(0, +) / rest)
        if cache.headKinds[head] == .retrieval {
          let target = layer.retrievalTargets[head][query]
          if target > 0 { found.add(weights[target] / rest) }
        } else {
          #expect(layer.retrievalTargets[head].isEmpty)
        }
      }
    }
    let (local, mixed, retrieval) = (recent[.local]!.mean, recent[.mixed]!.mean, recent[.retrieval]!.mean)
    #expect(local > 0.3 && local > 1.2 * mixed && mixed > 1.2 * retrieval, "\(local) \(mixed) \(retrieval)")
    #expect(found.mean > 0.4, "\(found.mean)")
  }

  @Test func adjacentLayersAreAsSimilarAsAskedFor() throws {
    for similarity in [0, 0.5, 0.9, 1] {
      let cache = try SyntheticCache(
        options {
          $0.layers = 3
          $0.layerSimilarity = similarity
          $0.layerSimilarityGrowth = 0.05
          ($0.outlierChannels, $0.sinkTokens, $0.heavyHitterFraction) = (0, 0, 0)
          $0.queryTokens = 0
        })
      for layer in 1...2 {
        let expected = min(1, similarity + 0.05 * Double(layer - 1))
        let (a, b) = (cache.layers[layer - 1], cache.layers[layer])
        // Rank 16, 160 tokens, 2 heads: 5120 independent pairs, a standard error below 0.02.
        #expect(abs(try cosine(a.values, b.values) - expected) < 0.07)
        #expect(abs(try cosine(a.keys, b.keys) - expected) < 0.07)
      }
    }
  }

  @Test func contentHasTheRankAskedFor() throws {
    let cache = try SyntheticCache(
      options {
        $0.rank = 6
        $0.noise = 0
        $0.sinkTokens = 0
        $0.queryTokens = 0
      })
    let noisy = try SyntheticCache(
      options {
        $0.rank = 6
        $0.sinkTokens = 0
        $0.queryTokens = 0
      })
    func residual(_ tensor: HeadTensor, directions: Int) -> Double {
      // Gram-Schmidt over the rows: what is left of the other rows after the first few directions.
      var basis: [[Double]] = []
      var (left, total) = (0.0, 0.0)
      for token in 0..<tensor.tokens {
        var row = tensor.row(head: 0, token: token).map { Double($0) }
        total += row.reduce(0) { $0 + $1 * $1 }
        for b in basis {
          let along = zip(row, b).reduce(0) { $0 + $1.0 * $1.1 }
          for c in row.indices { row[c] -= along * b[c] }
        }
        let square = row.reduce(0) { $0 + $1 * $1 }
        if basis.count < directions { basis.append(row.map { $0 / square.squareRoot() }) } else { left += square }
      }
      return left / total
    }
    #expect(residual(cache.layers[1].values, directions: 6) < 1e-6)
    #expect(residual(cache.layers[1].values, directions: 5) > 1e-3)
    #expect(residual(noisy.layers[1].values, directions: 6) > 1e-3)
  }

  @Test func rotationIsTheHalfSplitOne() throws {
    let layer = try SyntheticCache(options()).layers[0]
    for token in [0, 1, 17, 159] {
      for c in 0..<32 {
        let angle = Double(token) * pow(10_000, -2 * Double(c) / 64)
        let a = Double(layer.keysBeforeRotation[1, token, c])
        let b = Double(layer.keysBeforeRotation[1, token, c + 32])
        let bound = 1e-6 * (1 + abs(a) + abs(b))
        #expect(abs(Double(layer.keys[1, token, c]) - (a * cos(angle) - b * sin(angle))) < bound)
        #expect(abs(Double(layer.keys[1, token, c + 32]) - (a * sin(angle) + b * cos(angle))) < bound)
      }
    }
    let still = try SyntheticCache(options { $0.ropeTheta = nil }).layers[0]
    #expect(still.keys == still.keysBeforeRotation && still.keys == layer.keysBeforeRotation)
  }

  @Test func smallestSizes() throws {
    try withEvery("tokens", in: 1...3) { tokens in
      try withEvery("outliers", in: 0...1) { outliers in
        try withEvery("sinks", in: 0...tokens) { sinks in
          let cache = try SyntheticCache(
            options {
              ($0.tokens, $0.dim, $0.rank, $0.outlierChannels, $0.sinkTokens) = (tokens, 8, 1, outliers, sinks)
              ($0.queryTokens, $0.queryHeads, $0.kvHeads, $0.probeQueries) = (nil, 1, 1, 2)
              $0.noise = 0
              $0.heavyHitterFraction = 0
            })
          for layer in cache.layers {
            try layer.queries.checkFinite("queries")
            try layer.keys.checkFinite("keys")
          }
        }
      }
    }
  }

  @Test func optionsOutOfRangeAreNamed() {
    let changes: [(String, (inout SyntheticOptions) -> Void)] = [
      ("layers", { $0.layers = 0 }), ("kvHeads", { $0.kvHeads = 0 }), ("queryHeads", { $0.queryHeads = 1 }),
      ("queryHeads", { $0.queryHeads = 3 }), ("tokens", { $0.tokens = 0 }), ("dim", { $0.dim = 9 }),
      ("dim", { $0.dim = 6 }), ("queryTokens", { $0.queryTokens = 161 }), ("probeQueries", { $0.probeQueries = -1 }),
      ("outlierChannels", { $0.outlierChannels = 30 }), ("sinkTokens", { $0.sinkTokens = 161 }),
      ("rank", { $0.rank = 0 }), ("rank", { $0.rank = 59 }), ("localityWindow", { $0.localityWindow = 0 }),
      ("ropeTheta", { $0.ropeTheta = 0 }), ("heavyHitterFraction", { $0.heavyHitterFraction = 1.1 }),
      ("layerSimilarity", { $0.layerSimilarity = .nan }), ("noise", { $0.noise = .infinity }),
      ("localHeadFraction", { $0.localHeadFraction = 0.9 }), ("do not fit", { $0.heavyHitterFraction = 1 }),
    ]
    for (part, change) in changes {
      let error = expectError(.invalidOption) { try SyntheticCache(options(change)) }
      #expect(error?.message.contains(part) == true, "\(part): \(String(describing: error))")
    }
  }
}
