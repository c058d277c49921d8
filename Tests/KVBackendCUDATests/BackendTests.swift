import CCUDAEmulation
import Foundation
import KVBackendCPU
import KVCompression
import KVCore
import KVExperiments
import Testing

extension CUDATests {
  @Suite struct BackendTests {
    static let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent()

    /// FNV-1a over names and contents, as the script that compiles the kernels writes it.
    static func fingerprint() throws -> String {
      let folder = root.appending(path: "Sources/CKVCUDA")
      let names = try FileManager.default.contentsOfDirectory(atPath: folder.appending(path: "kernels").path())
        .filter { $0.contains(".cu") }.sorted()
      var value: UInt64 = 0xCBF2_9CE4_8422_2325
      for path in names.map({ "kernels/\($0)" }) + ["include/ckv_cuda_abi.h"] {
        let url = folder.appending(path: path)
        for byte in Array(url.lastPathComponent.utf8) + (try Data(contentsOf: url)) {
          value = (value ^ UInt64(byte)) &* 0x100_0000_01B3
        }
      }
      let text = String(value, radix: 16)
      return String(repeating: "0", count: 16 - text.count) + text
    }

    @Test func compiledKernelsAreNotOlderThanTheirSources() throws {
      let folder = Self.root.appending(path: "Sources/CKVCUDA/ptx")
      let names = try FileManager.default.contentsOfDirectory(atPath: folder.path())
      #expect(names.count >= 2)
      let wanted = "// sources \(try Self.fingerprint())\n"
      for name in names {
        let text = try String(contentsOf: folder.appending(path: name), encoding: .utf8)
        #expect(text.hasPrefix(wanted), "\(name) is older than the kernels: run make ptx")
      }
    }

    /// Where there is a card this opens it; where there is none the error says what was looked for.
    @Test func missingDriverIsSaid() {
      do {
        let backend = try Backend.cuda()
        #expect(backend.name.hasPrefix("cuda ("))
      } catch {
        #expect(error.code == .unavailable)
        #expect(error.message.contains("CUDA"))
      }
      #expect(throws: KVError.self) { try Backend.cuda(device: -1) }
      do {
        _ = try emulatedDevice(7)
        Issue.record("device 7 does not exist")
      } catch {
        #expect("\(error)".contains("device 7"))
      }
    }

    @Test func nameAndCapability() throws { #expect(try emulated().name == "cuda (emulated, compute 8.0)") }

    /// Whichever allocation fails: a typed error, and the cache is what it was.
    @Test func outOfMemoryChangesNothing() throws {
      let geometry = ConformanceTests.geometries[0]
      var failures = 0
      for after in 0..<40 {
        let subject = try FedCache("h2o(budget=24)+kivi(bits=4,residual=32)", geometry, emulated())
        _ = try subject.step(40, seed: 1)
        let bytes = subject.cache.bytes
        let rows = try subject.cache.read(layer: 0, head: 0)
        cuda_emulation_fail_after(after)
        defer { cuda_emulation_fail_after(-1) }
        do {
          try subject.cache.finishPrefill()
          if after > 30 { break }
        } catch {
          cuda_emulation_fail_after(-1)
          failures += 1
          #expect(error.code == .outOfMemory, "\(error)")
          #expect(error.message.contains("CUDA_ERROR_OUT_OF_MEMORY"))
          #expect(subject.cache.tokensSeen(layer: 0) == 40)
          if after == 0 {
            #expect(subject.cache.bytes == bytes)
            #expect(try subject.cache.read(layer: 0, head: 0) == rows)
          }
        }
      }
      #expect(failures >= 3)
    }

    /// A NaN in device memory or outside it is refused with its place.
    @Test func nonFiniteValuesAreFound() throws {
      let geometry = ConformanceTests.geometries[0]
      let subject = try FedCache("f16", geometry, emulated())
      var keys = [Float](repeating: 1, count: 2 * 5 * 64)
      let values = keys
      keys[1 * 5 * 64 + 3 * 64 + 7] = .nan
      do {
        try subject.cache.append(
          layer: 0, keys: TensorView(keys.span, heads: 2, tokens: 5, dim: 64),
          values: TensorView(values.span, heads: 2, tokens: 5, dim: 64))
        Issue.record("a NaN was taken")
      } catch {
        #expect(error.code == .nonFinite && error.head == 1 && error.position == 3 && error.message.contains("7"))
      }
      keys[1 * 5 * 64 + 3 * 64 + 7] = 70000
      do {
        try subject.cache.append(
          layer: 0, keys: TensorView(keys.span, heads: 2, tokens: 5, dim: 64),
          values: TensorView(values.span, heads: 2, tokens: 5, dim: 64))
        Issue.record("70000 was taken")
      } catch {
        #expect(error.code == .unrepresentable && error.head == 1 && error.position == 3)
      }
      #expect(subject.cache.tokensSeen(layer: 0) == 0)
    }

    /// The same bits alone and in a batch of caches of different lengths.
    @Test func batchesHaveTheSameBits() throws {
      let geometry = ConformanceTests.geometries[0]
      let backend = try emulated()
      let shape = geometry.shape.layers[0]
      var caches: [KVCache] = []
      var alone: [Float] = []
      let query = (0..<shape.queryHeads * 64).map { Float($0 % 17) / 8 - 1 }
      for tokens in [5, 300, 65] {
        let subject = try FedCache("kivi(bits=4,residual=32)", geometry, backend)
        _ = try subject.step(tokens, seed: UInt64(tokens))
        try subject.cache.finishPrefill()
        caches.append(subject.cache)
        var output = [Float](repeating: 0, count: shape.queryHeads * 64)
        var span = output.mutableSpan
        var view = try MutableTensorView(&span, heads: shape.queryHeads, tokens: 1, dim: 64)
        try subject.cache.attend(
          layer: 0, queries: TensorView(query.span, heads: shape.queryHeads, tokens: 1, dim: 64), into: &view,
          options: AttentionOptions(commits: false))
        alone += output
      }
      // [head][cache][channel]
      var queries: [Float] = []
      for head in 0..<shape.queryHeads { for _ in caches { queries += query[head * 64..<(head + 1) * 64] } }
      var together = [Float](repeating: 0, count: queries.count)
      var span = together.mutableSpan
      var view = try MutableTensorView(&span, heads: shape.queryHeads, tokens: 3, dim: 64)
      try KVCache.attend(
        caches, layer: 0, queries: TensorView(queries.span, heads: shape.queryHeads, tokens: 3, dim: 64),
        tokens: [1, 1, 1], into: &view, options: AttentionOptions(commits: false))
      for cache in 0..<3 {
        for head in 0..<shape.queryHeads {
          for channel in 0..<64 {
            let a = alone[(cache * shape.queryHeads + head) * 64 + channel]
            let b = together[(head * 3 + cache) * 64 + channel]
            #expect(a.bitPattern == b.bitPattern)
          }
        }
      }
    }
  }
}
