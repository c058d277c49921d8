import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Products of eight bits, where this CPU has them.
@Suite struct ProductsTests {
  static let available = Backend.cpuProducts.contains(.bf16)

  static func backend(_ threads: Int = 1) throws -> Backend { try .cpu(threads: threads, products: .bf16) }

  /// What an output may be off by: logits by 2^-7 of the magnitudes they sum, which is what weights are off by twice
  /// over, and values by 2^-7 of the largest.
  static func bound(_ traffic: Traffic, _ layer: Int, _ queries: Range<Int>, _ dim: Int) -> Float {
    func most(_ x: [Float]) -> Float { x.map(abs).max() ?? 0 }
    let (q, k) = (traffic.queries(layer, queries), traffic.keys(layer, 0..<queries.upperBound))
    let logit = 0x1.02p-7 * most(q) * most(k) * Float(dim).squareRoot()
    return most(traffic.values(layer, 0..<queries.upperBound)) * (0x1.02p-7 + 4 * logit) + 1e-5
  }

  @Test(.enabled(if: available)) func withinTheBound() throws {
    withEvery("geometry", in: [Geometry(8, 2, 40, 33), Geometry(16, 1, 128), Geometry(3, 3, 7, 64)]) { geometry in
      withEvery("store", in: ["f16", "bf16", "f32", "fp8"]) { store in
        let tokens = 1060  // the rows that all queries see are taken by a kernel of their own
        let traffic = Traffic(geometry.shape(), tokens: tokens)
        let caches = try [.cpu(threads: 1), Self.backend()].map { try makeCache(store, traffic.shape, backend: $0) }
        for cache in caches {
          try traffic.append(cache, 0, 0..<tokens)
          try cache.finishPrefill()
        }
        checkSame(
          try caches[0].read(layer: 0, head: 0).keys, try caches[1].read(layer: 0, head: 0).keys, "what is held")
        withEvery("queries", in: [1, 2, 12, 33]) { count in
          let range = tokens - count..<tokens
          let rows = caches.indices.map { index in
            labelledResult { try traffic.attend(caches[index], 0, range, AttentionOptions(commits: false)) }
          }
          let few = count * geometry.queryHeads / geometry.kvHeads < 12
          if few || store.hasPrefix("f32") || store == "fp8" {
            checkSame(rows[0], rows[1], "nothing is rounded")
          } else {
            checkClose(rows[0], rows[1], within: Self.bound(traffic, 0, range, geometry.keyDim), "rounded")
            check(rows[0] != rows[1], "the other kernels ran")
          }
        }
      }
    }
  }

  /// Stores of codes that integer kernels take.
  static let codes =
    [2, 3, 4, 8].map { "kivi(bits=\($0),residual=32,window=f32)" } + [
      "pertoken(bits=4,window=9)", "pertoken(bits=2,group=32,window=9)", "pertoken(bits=3,window=9)",
      "int8(window=f32)", "int8(format=int4,group=32,window=f32)", "int8(scale=head,group=32,window=f32)",
      "ggml(keys=q8_0,values=q8_0)", "ggml(keys=q5_0,values=q5_0)", "ggml(keys=q5_1,values=q5_1)",
      "ggml(keys=q4_0,values=q4_0)", "ggml(keys=q4_1,values=q4_1)", "ggml(keys=iq4_nl,values=iq4_nl)",
      "quant(keys=channel,key_bits=3,key_residual=64,values=int4)",
    ]

  /// Any number of queries over codes: within what rounding them can cost, and far from it as a rule.
  @Test(.enabled(if: available), arguments: codes) func codesWithinTheBound(store: String) throws {
    withEvery("geometry", in: [Geometry(8, 2, 64, 96), Geometry(3, 3, 32, 64)]) { geometry in
      let traffic = Traffic(geometry.shape(), tokens: 200)
      let caches = try [.cpu(threads: 1), Self.backend()].map { try makeCache(store, traffic.shape, backend: $0) }
      for cache in caches {
        try traffic.append(cache, 0, 0..<200)
        try cache.finishPrefill()
      }
      let held = try (0..<geometry.kvHeads).map { try caches[1].read(layer: 0, head: $0) }
      check(try (0..<geometry.kvHeads).map { try caches[0].read(layer: 0, head: $0) } == held, "what is held")
      withEvery("queries", in: [1, 2, 3, 12]) { count in
        let range = 200 - count..<200
        let looking = AttentionOptions(commits: false)
        let rows = try caches.map { try traffic.attend($0, 0, range, looking) }
        try Oracle(
          held, geometry.layer(), queries: traffic.queries(0, range), tokens: count, firstPosition: range.lowerBound,
          options: looking, folded: true, rounding: 1.0 / 254
        ).check(rows[1])
        let size = rows[0].reduce(0) { $0 + $1 * $1 }
        let error = zip(rows[0], rows[1]).reduce(0) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
        check(error > 0, "the other kernels ran")
        check(error <= size * 0.03 * 0.03, "off by \((error / size).squareRoot()) of the outputs")
      }
    }
  }

  /// What f32 does not hold is an error at any precision.
  @Test func notANumber() throws {
    let stores = Self.codes.filter { $0.contains("window=f32") }.map { String($0.dropLast()) + ",metadata=f32)" }
    withEvery("store", in: stores) { store in
      withEvery("products", in: Backend.cpuProducts) { products in
        var traffic = Traffic(Geometry(1, 1, 64).shape(), tokens: 100)
        traffic.keys[0] = traffic.keys[0].map { $0 * 1e25 }
        traffic.queries[0] = traffic.queries[0].map { $0 * 1e25 }
        let cache = try makeCache(store, traffic.shape, backend: .cpu(threads: 1, products: products))
        try traffic.append(cache, 0, 0..<100)
        try cache.finishPrefill()
        expectError(.nonFinite, "query head", layer: 0) { _ = try traffic.attend(cache, 0, 99..<100) }
        for bad: Float in [.nan, .infinity] {
          traffic.queries[0][99 * 64 + 7] = bad
          expectError(.nonFinite, "channel 7", layer: 0, head: 0, position: 99) {
            _ = try traffic.attend(cache, 0, 99..<100)
          }
        }
      }
    }
  }

  private func labelledResult(_ body: () throws -> [Float]) -> [Float] {
    do { return try body() } catch {
      check(false, "threw \(error)")
      return []
    }
  }

  @Test(.enabled(if: available)) func sameBitsAtAnyThreadCount() throws {
    let traffic = Traffic(Geometry(8, 2, 40, 33).shape(), tokens: 2300)
    withEvery("store", in: ["f16", "kivi(bits=4,residual=32)"]) { store in
      let outputs = try [1, 2, 5].map { threads in
        let cache = try makeCache(store, traffic.shape, backend: Self.backend(threads))
        try traffic.append(cache, 0, 0..<2300)
        try cache.finishPrefill()
        let looking = AttentionOptions(commits: false)
        return try traffic.attend(cache, 0, 2290..<2300, looking) + traffic.attend(cache, 0, 2250..<2300, looking)
      }
      checkSame(outputs[0], outputs[1], "2 threads")
      checkSame(outputs[0], outputs[2], "5 threads")
    }
  }

  @Test func refused() {
    expectError(.unavailable, "bf16", "portable") {
      _ = try Backend.cpu(level: "portable", products: .bf16)
    }
    if !Self.available { expectError(.unavailable, "bf16") { _ = try Self.backend() } }
    #expect(Backend.cpuProducts.first == .f32)
  }
}
