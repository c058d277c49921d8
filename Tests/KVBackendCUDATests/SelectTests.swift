import CCUDAEmulation
import CKVCUDA
import KVCompression
import KVExperiments
import Testing

@testable import KVBackendCUDA
@testable import KVCore

extension CUDATests {
  /// Rows chosen on the card are those that the host would choose.
  @Suite struct SelectTests {
    /// Every kind of score that ties or sorts oddly.
    static let kinds: [@Sendable (inout FedCache.Numbers) -> Float] = [
      { $0.next() },
      { ($0.next() * 3).rounded() },
      { $0.next() < 0 ? 0 : -0.0 },
      { $0.next() * (64 * .leastNonzeroMagnitude) },
      { $0.next() < -0.5 ? -.infinity : $0.next() > 0.5 ? .infinity : $0.next() },
      { _ in 1 },
      { Float(bitPattern: 0x3f80_0000 | UInt32(abs($0.next() * 40))) },
    ]

    @Test(arguments: kinds.indices)
    func asOnTheHost(kind: Int) throws {
      let backend = try CUDABackend(
        driver: cuda_emulation_driver().assumingMemoryBound(to: ckv_cuda_driver.self), device: 0)
      var numbers = FedCache.Numbers(seed: UInt64(kind + 1))
      // Ragged lists with budgets of their own, shorter and longer than a block has threads.
      let counts = [1, 2, 31, 128, 129, 700, 1500]
      for share in [0.001, 0.3, 0.99, 1] {
        let lists = counts.map { count in (0..<count).map { _ in Self.kinds[kind](&numbers) } }
        let takes = counts.map { max(1, Int(Double($0) * share)) }
        var expected: [UInt32] = []
        for (index, list) in lists.enumerated() {
          selectLargest(takes[index], of: list[...]) { expected.append(UInt32($0 + 10 * index)) }
        }
        let all = lists.flatMap(\.self)
        let chosen = all.withUnsafeBufferPointer { buffer -> [UInt32]? in
          var next = buffer.baseAddress!
          var choices: [RowChoice] = []
          for (index, count) in counts.enumerated() {
            choices.append(RowChoice(scores: next, count: count, take: takes[index], offset: 10 * index))
            next += count
          }
          return backend.selectLargest(choices)
        }
        #expect(chosen == expected, "kind \(kind), share \(share)")
      }
    }

    /// Whole lives, chosen on the card and on the host by the scores of the same card: the same bits.
    @Test(arguments: [
      "snapkv(budget=24,window=5,kernel=3)", "snapkv(budget=24,window=5,kernel=7,pooling=max,reduction=sum)",
      "snapkv(budget=[[20,31]],window=5,kernel=1)", "snapkv(budget=0.3,window=4,every=4)+f32",
      "snapkv(budget=24,window=5)+positions", "snapkv(budget=0.5,window=32)", "snapkv(budget=24,window=5)+adakv",
      "h2o(budget=24)", "knorm(budget=24)", "keydiff(budget=[[18,29]])+schedule(chunks=true,every=3)",
    ])
    func livesAreTheSame(text: String) throws {
      let policy = try PolicyRegistry.standard.policy(text)
      let shape = try PolicyTests.shape()
      let before = cuda_emulation_launches("kv_select")
      let (own, other) = (
        try FedCache(policy, shape, emulated()),
        try FedCache(policy, shape, emulatedDevice(0, leastSelected: .max))
      )
      for (turn, tokens) in [33, 1, 38, 1, 1, 1, 1, 1].enumerated() {
        if turn == 3 {
          try own.cache.finishPrefill()
          #expect(cuda_emulation_launches("kv_select") > before)
          let after = cuda_emulation_launches("kv_select")
          try other.cache.finishPrefill()
          #expect(cuda_emulation_launches("kv_select") == after)
        }
        #expect(try own.step(tokens, seed: UInt64(turn)) == other.step(tokens, seed: UInt64(turn)), "\(text) \(turn)")
      }
      for head in 0..<2 {
        #expect(try own.cache.read(layer: 0, head: head) == other.cache.read(layer: 0, head: head), "\(text)")
      }
    }

    /// Scores of a window stay on the card: the list of those that stay comes back, and one wait is all.
    @Test func scoresStayOnTheCard() throws {
      let policy = try PolicyRegistry.standard.policy("snapkv(budget=24,window=5,kernel=3)")
      let life = try FedCache(policy, PolicyTests.shape(), emulated())
      _ = try life.step(70, seed: 1)
      let (pools, waits) = (cuda_emulation_launches("kv_pool"), cuda_emulation_calls("synchronize"))
      try life.cache.finishPrefill()
      #expect(cuda_emulation_launches("kv_pool") == pools + 1)
      #expect(cuda_emulation_calls("synchronize") <= waits + 2)
    }

    /// Whichever allocation fails while choosing: the host chooses, or an error that changes nothing.
    @Test(arguments: ["snapkv(budget=24,window=5,kernel=3)", "knorm(budget=24)", "h2o(budget=24)+positions"])
    func outOfMemory(text: String) throws {
      let policy = try PolicyRegistry.standard.policy(text)
      let shape = try PolicyTests.shape()
      func life() throws -> FedCache {
        let life = try FedCache(policy, shape, emulated())
        _ = try life.step(70, seed: 1)
        return life
      }
      let expected = try life()
      try expected.cache.finishPrefill()
      let rows = try expected.cache.read(layer: 0, head: 1)
      for after in 0..<12 {
        let subject = try life()
        cuda_emulation_fail_after(after)
        defer { cuda_emulation_fail_after(-1) }
        do {
          try subject.cache.finishPrefill()
        } catch {
          cuda_emulation_fail_after(-1)
          #expect(error.code == .outOfMemory)
          #expect(subject.cache.tokensSeen(layer: 0) == 70)
          try subject.cache.finishPrefill()
        }
        cuda_emulation_fail_after(-1)
        #expect(try subject.cache.read(layer: 0, head: 1) == rows, "\(text), allocation \(after)")
      }
    }
  }
}
