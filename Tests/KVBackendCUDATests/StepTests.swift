import CCUDAEmulation
import CKVCUDA
import KVCompression
import KVCore
import KVExperiments
import Testing

@testable import KVBackendCUDA

extension CUDATests {
  /// What one decoded token asks of the driver.
  @Suite struct StepTests {
    static let shape = ModelShape(layers: [LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 32)])

    /// Tensors of an engine on the card.
    final class Tensors {
      let keys: AdoptionTests.DeviceTensor
      let values: AdoptionTests.DeviceTensor
      let queries: AdoptionTests.DeviceTensor
      let output: AdoptionTests.DeviceTensor
      let tokens: Int

      init(_ tokens: Int, seed: UInt64) throws {
        self.tokens = tokens
        var numbers = FedCache.Numbers(seed: seed)
        func tensor(_ heads: Int) throws -> AdoptionTests.DeviceTensor {
          try AdoptionTests.DeviceTensor((0..<heads * tokens * 32).map { _ in numbers.next() })
        }
        (keys, values, queries) = (try tensor(2), try tensor(2), try tensor(4))
        output = try AdoptionTests.DeviceTensor([Float](repeating: .nan, count: 4 * tokens * 32))
      }

      func append(to cache: KVCache) throws {
        try cache.append(
          layer: 0, keys: TensorView(unsafeDeviceAddress: keys.base, type: .f32, heads: 2, tokens: tokens, dim: 32),
          values: TensorView(unsafeDeviceAddress: values.base, type: .f32, heads: 2, tokens: tokens, dim: 32))
      }

      func attend(_ cache: KVCache) throws {
        var view = try MutableTensorView(
          unsafeDeviceAddress: output.base.assumingMemoryBound(to: Float.self), heads: 4, tokens: tokens, dim: 32)
        try cache.attend(
          layer: 0,
          queries: TensorView(unsafeDeviceAddress: queries.base, type: .f32, heads: 4, tokens: tokens, dim: 32),
          into: &view)
      }
    }

    struct Calls: Equatable, CustomStringConvertible {
      var waits = 0
      var launches = 0
      var copies = 0
      var lookups = 0
      /// Which the driver waits for, too.
      var frees = 0
      var description: String {
        "\(waits) waits, \(launches) launches, \(copies) copies, \(lookups) lookups, \(frees) frees"
      }

      static func now() -> Calls {
        Calls(
          waits: cuda_emulation_calls("synchronize"), launches: cuda_emulation_calls("launch"),
          copies: cuda_emulation_calls("copy"), lookups: cuda_emulation_calls("accessible"),
          frees: cuda_emulation_calls("release") + cuda_emulation_calls("release_host"))
      }

      func since(_ before: Calls) -> Calls {
        Calls(
          waits: waits - before.waits, launches: launches - before.launches, copies: copies - before.copies,
          lookups: lookups - before.lookups, frees: frees - before.frees)
      }
    }

    static func calls(_ body: () throws -> Void) rethrows -> Calls {
      let before = Calls.now()
      try body()
      return Calls.now().since(before)
    }

    /// Steady state: every step waits twice, for the verdict over its rows and for its attention. Most steps are these
    /// calls and no other; what some do besides, encoding a group or compacting, is queued.
    @Test(arguments: [
      ("f16", Calls(waits: 2, launches: 3, copies: 1, lookups: 4)),
      // Values leave the dense window one by one: a launch a KV head.
      ("kivi(bits=4,residual=32)", Calls(waits: 2, launches: 5, copies: 1, lookups: 6)),
      ("h2o(budget=40)+f16", Calls(waits: 2, launches: 4, copies: 1, lookups: 5)),
    ])
    func decoding(text: String, expected: Calls) throws {
      let cache = try KVCache(shape: Self.shape, policy: PolicyRegistry.standard.policy(text), backend: emulated())
      let prompt = try Tensors(60, seed: 1)
      try prompt.append(to: cache)
      try prompt.attend(cache)
      try cache.finishPrefill()
      var steps: [Calls] = []
      var tensors: [Tensors] = []
      for turn in 0..<80 {
        let step = try Tensors(1, seed: UInt64(turn + 2))
        tensors.append(step)
        steps.append(
          try Self.calls {
            try step.append(to: cache)
            try step.attend(cache)
          })
      }
      let usual = steps.count { $0 == expected }
      let kept = try #require(cache.layers[0].plan?.kept as? CUDAKeptPlan)
      #expect(kept.repeats >= 50, "\(text): \(kept.repeats) of 80 steps changed the descriptions of the one before")
      #expect(usual >= 50, "\(text): \(Dictionary(grouping: steps, by: \.description).mapValues(\.count))")
      #expect(steps.allSatisfy { $0.waits == 2 && $0.launches <= 12 }, "\(steps)")
    }

    /// Descriptions are kept of batches too, and never taken for those of other caches: steps alone, together, with a cache
    /// replaced by a fork that has gone on by itself, and after a trim. Debug builds compare with new ones at every step.
    @Test(arguments: ["f16", "kivi(bits=4,residual=32)", "h2o(budget=40)+f16"])
    func keptDescriptions(text: String) throws {
      let policy = try PolicyRegistry.standard.policy(text)
      let backends = (try emulated(), try Backend.cpu(threads: 1, level: "portable"))
      let subjects = try (0..<2).map { _ in try FedCache(policy, Self.shape, backends.0) }
      let references = try (0..<2).map { _ in try FedCache(policy, Self.shape, backends.1) }
      var seed: UInt64 = 0
      func agree(_ caches: [KVCache], _ others: [KVCache], _ what: String) throws {
        seed += 1
        var numbers = FedCache.Numbers(seed: seed)
        let count = caches.count
        let rows = (0..<2 * 32).map { _ in numbers.next() }
        let queries = (0..<4 * count * 32).map { _ in numbers.next() }
        let outputs = try [caches, others].map { caches in
          for cache in caches {
            try cache.append(
              layer: 0, keys: TensorView(rows.span, heads: 2, tokens: 1, dim: 32),
              values: TensorView(rows.span, heads: 2, tokens: 1, dim: 32))
          }
          var output = [Float](repeating: .nan, count: queries.count)
          var span = output.mutableSpan
          var view = try MutableTensorView(&span, heads: 4, tokens: count, dim: 32)
          try KVCache.attend(
            caches, layer: 0, queries: TensorView(queries.span, heads: 4, tokens: count, dim: 32),
            tokens: Array(repeating: 1, count: count), into: &view)
          return output
        }
        #expect(FedCache.distance(outputs[0], outputs[1]) <= 1e-5, "\(text): \(what)")
      }
      for life in subjects + references {
        _ = try life.step(60, seed: 1)
        try life.cache.finishPrefill()
      }
      var (own, other) = (subjects.map(\.cache), references.map(\.cache))
      for _ in 0..<6 { try agree(own, other, "a batch") }
      for _ in 0..<3 { try agree([own[0]], [other[0]], "alone") }
      for _ in 0..<3 { try agree(own, other, "a batch again") }
      let forks = (own[1].fork(), other[1].fork())
      for _ in 0..<3 { try agree([forks.0], [forks.1], "a fork alone") }
      for _ in 0..<2 { try agree(own, other, "the batch beside it") }
      (own[1], other[1]) = forks
      for _ in 0..<4 { try agree(own, other, "a batch with the fork") }
      if text == "f16" {
        for caches in [own, other] { try caches[0].trim(to: caches[0].tokensSeen(layer: 0) - 3) }
      }
      for _ in 0..<4 { try agree(own, other, "after a trim") }
      #expect((own[0].layers[0].plan?.kept as? CUDAKeptPlan).map { $0.repeats > 8 } == true)
    }

    /// Queries, keys or values that are not finite are found on the card, and nothing has changed then: neither rows nor
    /// what was observed.
    @Test(arguments: ["f16", "h2o(budget=40)+f16", "kivi(residual=32)"], [1, 80])
    func nonFinite(text: String, tokens: Int) throws {
      let policy = try PolicyRegistry.standard.policy(text)
      let (subject, other) = (
        try KVCache(shape: Self.shape, policy: policy, backend: emulated()),
        try KVCache(shape: Self.shape, policy: policy, backend: emulated())
      )
      func refuse(_ tensor: AdoptionTests.DeviceTensor, at index: Int, _ value: Float, _ body: () throws -> Void)
        -> KVError?
      {
        var (bad, was) = (value, tensor.values[index])
        cuda_emulation_copy(tensor.base + index * 4, &bad, 4)
        defer { cuda_emulation_copy(tensor.base + index * 4, &was, 4) }
        do { try body() } catch { return error as? KVError }
        return nil
      }
      for (turn, count) in [30, tokens, 1].enumerated() {
        let step = try Tensors(count, seed: UInt64(turn + 1))
        let last = count - 1
        let key = refuse(step.keys, at: (count + last) * 32 + 7, .nan) { try step.append(to: subject) }
        #expect(key?.code == .nonFinite && key?.head == 1, "\(String(describing: key))")
        #expect(key?.message.contains("channel 7 of a key") == true)
        let value = refuse(step.values, at: last * 32 + 3, -.infinity) { try step.append(to: subject) }
        #expect(value?.code == .nonFinite && value?.message.contains("channel 3 of a value") == true)
        let beyond = refuse(step.values, at: last * 32 + 3, 70_000) { try step.append(to: subject) }
        #expect(beyond?.code == .unrepresentable && beyond?.head == 0)
        try step.append(to: subject)
        for (index, bad) in [(3 * count + last) * 32 + 31, last * 32].enumerated() {
          let query = refuse(step.queries, at: bad, index == 0 ? .nan : .infinity) { try step.attend(subject) }
          #expect(query?.code == .nonFinite && query?.head == (index == 0 ? 3 : 0), "\(String(describing: query))")
          #expect(query?.position == (turn == 0 ? 29 : turn == 1 ? 29 + tokens : 30 + tokens))
          #expect(query?.message.contains("channel \(index == 0 ? 31 : 0) of a query") == true)
        }
        try step.attend(subject)
        let output = step.output.values
        try step.append(to: other)
        try step.attend(other)
        #expect(output == step.output.values, "\(text), turn \(turn)")
        if turn == 1 {
          try subject.finishPrefill()
          try other.finishPrefill()
        }
      }
      #expect(try subject.read(layer: 0, head: 1) == other.read(layer: 0, head: 1))
    }

    /// Finite keys and queries whose product is not: said.
    @Test(arguments: ["f32", "h2o(budget=40)+f32", "tova(budget=40)+f32"])
    func logitsBeyondFloats(text: String) throws {
      let life = try FedCache(PolicyRegistry.standard.policy(text), Self.shape, emulated())
      life.size = 1e30
      life.querySize = 1e30
      #expect {
        _ = try life.step(3, seed: 1)
      } throws: {
        ($0 as? KVError)?.code == .nonFinite && "\($0)".contains("beyond what f32 holds")
      }
    }

    /// Whichever call of the driver fails: an error that names the call.
    @Test(arguments: ["launch", "copy", "synchronize"])
    func failingCalls(name: String) throws {
      let words = ["launch": "launching kv_", "copy": "copying ", "synchronize": "waiting for the stream"]
      var failures = 0
      for after in 0..<30 {
        let life = try FedCache(
          PolicyRegistry.standard.policy("h2o(budget=24)+positions+f16"),
          ModelShape(layers: Self.shape.layers, rotary: RotaryEmbedding(headDim: 32)), emulated())
        cuda_emulation_fail_call(name, after)
        defer { cuda_emulation_fail_call(name, -1) }
        do {
          _ = try life.step(40, seed: 1)
          try life.cache.finishPrefill()
          for turn in 2..<5 { _ = try life.step(1, seed: UInt64(turn)) }
        } catch {
          failures += 1
          #expect(error.code == .unavailable, "\(error)")
          #expect(error.message.contains("CUDA_ERROR_EMULATED"), "\(error)")
          #expect(error.message.contains(words[name] ?? "?"), "\(error)")
          // A context is lost after an error: the cache says so again, and does not crash.
          cuda_emulation_fail_call(name, -1)
          #expect(throws: KVError.self) { _ = try life.step(1, seed: 9) }
        }
      }
      #expect(failures > 5)
    }
  }
}
