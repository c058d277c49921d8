import CCUDAEmulation
import CKVCUDA
import KVCompression
import KVCore
import KVExperiments
import Testing

@testable import KVBackendCUDA

extension CUDATests {
  /// An engine's own context, stream and device memory.
  @Suite struct AdoptionTests {
    /// A tensor of an engine on the card.
    final class DeviceTensor {
      let base: UnsafeMutableRawPointer
      let count: Int

      init(_ values: [Float]) throws {
        count = values.count
        base = try #require(cuda_emulation_take(values.count * 4))
        cuda_emulation_copy(base, values, count * 4)
      }

      deinit { cuda_emulation_give(base) }

      var values: [Float] {
        var result = [Float](repeating: 0, count: count)
        cuda_emulation_copy(&result, base, count * 4)
        return result
      }
    }

    @Test func contextAndStreamAreTheEngines() throws {
      let (context, stream) = (UnsafeMutableRawPointer(bitPattern: 0x10), UnsafeMutableRawPointer(bitPattern: 0x20))
      _ = try CUDABackend(
        driver: cuda_emulation_driver().assumingMemoryBound(to: ckv_cuda_driver.self), device: 0, context: context,
        stream: stream)
      var opened: (UnsafeMutableRawPointer?, UnsafeMutableRawPointer?) = (nil, nil)
      cuda_emulation_opened(&opened.0, &opened.1)
      #expect(opened.0 == context && opened.1 == stream)
    }

    /// Everything in device memory gives the bits that everything in ordinary memory gives; the emulated card faults if
    /// the host touches any of it.
    @Test(arguments: [
      "f16", "kivi(residual=32)", "h2o(budget=30)+f16", "snapkv(budget=30,window=4,kernel=3)+bf16",
      "tova(budget=30)", "pertoken+balanced", "zipcache+f16+kivi(residual=32)", "svd(rank_k=0.5,rope=post)",
      "streaming(sinks=2,recent=20)",
    ])
    func tensorsAreUsedInPlace(text: String) throws {
      let shape = LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 32)
      let model = ModelShape(layers: [shape], rotary: try RotaryEmbedding(headDim: 32))
      let policy = try PolicyRegistry.standard.policy(text)
      let near = try FedCache(policy, model, emulated())
      let far = try KVCache(shape: model, policy: policy, backend: emulated())
      for (turn, tokens) in [40, 24, 1, 1, 1].enumerated() {
        if turn == 2 {
          try near.cache.finishPrefill()
          try far.finishPrefill()
        }
        let expected = try near.step(tokens, seed: UInt64(turn))
        var numbers = FedCache.Numbers(seed: UInt64(turn))
        func tensor(_ heads: Int) throws -> DeviceTensor {
          try DeviceTensor((0..<heads * tokens * 32).map { _ in numbers.next() })
        }
        let (keys, values, queries) = (try tensor(2), try tensor(2), try tensor(4))
        try far.append(
          layer: 0, keys: TensorView(unsafeDeviceAddress: keys.base, type: .f32, heads: 2, tokens: tokens, dim: 32),
          values: TensorView(unsafeDeviceAddress: values.base, type: .f32, heads: 2, tokens: tokens, dim: 32))
        let output = try DeviceTensor([Float](repeating: .nan, count: 4 * tokens * 32))
        var view = try MutableTensorView(
          unsafeDeviceAddress: output.base.assumingMemoryBound(to: Float.self), heads: 4, tokens: tokens, dim: 32)
        try far.attend(
          layer: 0,
          queries: TensorView(unsafeDeviceAddress: queries.base, type: .f32, heads: 4, tokens: tokens, dim: 32),
          into: &view)
        #expect(output.values == expected, "\(text): turn \(turn)")
      }
      withExtendedLifetime(near) {}
    }

    @Test func stridesOfDeviceTensorsAreChecked() throws {
      let tensor = try DeviceTensor([1, 2, 3, 4])
      #expect(throws: KVError.self) {
        _ = try TensorView(unsafeDeviceAddress: tensor.base, type: .f32, heads: 1, tokens: -1, dim: 4)
      }
      #expect(throws: KVError.self) {
        _ = try TensorView(unsafeDeviceAddress: tensor.base, type: .f32, heads: 1, tokens: 1, dim: 4, headStride: -4)
      }
    }

    /// Whichever allocation fails while appending or attending: a typed error, and the next call goes on as if nothing
    /// had been.
    @Test(arguments: ["f16", "kivi(residual=32)", "tova(budget=30)+f16"])
    func outOfMemoryIsSurvived(text: String) throws {
      let shape = ModelShape(layers: [LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 32)])
      let policy = try PolicyRegistry.standard.policy(text)
      let expected = try FedCache(policy, shape, emulated())
      let outputs = try [40, 1, 1].enumerated().map { try expected.step($1, seed: UInt64($0)) }
      var failures = 0
      for after in 0..<12 {
        let subject = try FedCache(policy, shape, emulated())
        #expect(try subject.step(40, seed: 0) == outputs[0])
        cuda_emulation_fail_after(after)
        defer { cuda_emulation_fail_after(-1) }
        var failed = false
        // A larger step than before: memory between the calls must grow.
        do {
          _ = try subject.append(300, seed: 9)
        } catch {
          failed = true
          #expect(error.code == .outOfMemory, "\(error)")
        }
        cuda_emulation_fail_after(-1)
        if !failed { break }
        failures += 1
        #expect(subject.cache.tokensSeen(layer: 0) == 40)
        #expect(try subject.step(1, seed: 1) == outputs[1])
        #expect(try subject.step(1, seed: 2) == outputs[2])
      }
      #expect(failures > 0)
    }
  }
}
