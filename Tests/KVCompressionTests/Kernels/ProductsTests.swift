import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// Products of bf16, where this CPU has them.
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
      withEvery("store", in: ["f16", "bf16", "f32", "kivi(bits=4,residual=32)"]) { store in
        let tokens = 1060  // the rows that all queries see are taken by a kernel of their own
        let traffic = Traffic(geometry.shape(), tokens: tokens)
        let caches = try [.cpu(threads: 1), Self.backend()].map { try makeCache(store, traffic.shape, backend: $0) }
        for cache in caches {
          try traffic.append(cache, 0, 0..<tokens)
          if store.hasPrefix("kivi") { try cache.finishPrefill() }
        }
        checkSame(
          try caches[0].read(layer: 0, head: 0).keys, try caches[1].read(layer: 0, head: 0).keys, "what is held")
        withEvery("queries", in: [1, 2, 12, 33]) { count in
          let range = tokens - count..<tokens
          let rows = caches.indices.map { index in
            labelledResult { try traffic.attend(caches[index], 0, range, AttentionOptions(commits: false)) }
          }
          let few = count * geometry.queryHeads / geometry.kvHeads < 12
          if few || store == "f32" {
            checkSame(rows[0], rows[1], "nothing is rounded")
          } else {
            checkClose(rows[0], rows[1], within: Self.bound(traffic, 0, range, geometry.keyDim), "rounded")
            check(store.hasPrefix("kivi") || rows[0] != rows[1], "the other kernels ran")
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
    let outputs = try [1, 2, 5].map { threads in
      let cache = try makeCache("f16", traffic.shape, backend: Self.backend(threads))
      try traffic.append(cache, 0, 0..<2300)
      let looking = AttentionOptions(commits: false)
      return try traffic.attend(cache, 0, 2290..<2300, looking) + traffic.attend(cache, 0, 2250..<2300, looking)
    }
    checkSame(outputs[0], outputs[1], "2 threads")
    checkSame(outputs[0], outputs[2], "5 threads")
  }

  @Test func refused() {
    expectError(.unavailable, "bf16", "portable") {
      _ = try Backend.cpu(level: "portable", products: .bf16)
    }
    if !Self.available { expectError(.unavailable, "bf16") { _ = try Self.backend() } }
    #expect(Backend.cpuProducts.first == .f32)
  }
}
