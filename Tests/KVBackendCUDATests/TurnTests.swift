import CCUDAEmulation
import KVBackendCPU
import KVCompression
import KVExperiments
import Testing

@testable import KVCore

extension CUDATests {
  /// Keys turned where they lie.
  @Suite struct TurnTests {
    static let embeddings: [(Int, Int?, RotaryEmbedding.Layout)] = [
      (64, nil, .halfSplit), (40, 32, .halfSplit), (40, nil, .interleaved), (8, 2, .interleaved), (130, 6, .halfSplit),
    ]

    /// Every layout, partial rotations and type of the store, through whole lives: chunks, ragged heads, decoding.
    @Test(arguments: embeddings.indices, ["f32", "f16", "bf16"])
    func lives(embedding: Int, store: String) throws {
      let (dim, rotaryDim, layout) = Self.embeddings[embedding]
      let rotary = try RotaryEmbedding(headDim: dim, rotaryDim: rotaryDim, theta: 500, layout: layout)
      let shape = ModelShape(
        layers: [LayerShape(queryHeads: 4, kvHeads: 2, keyDim: dim, valueDim: 24)], rotary: rotary)
      for selection in [
        "streaming(sinks=3,recent=12,positions=rerotate)", "snapkv(budget=20,window=4)+adakv+positions",
        "knorm(budget=20)+schedule(chunks=true,every=3)+positions",
      ] {
        let turns = cuda_emulation_launches("kv_turn_keys")
        var conformance = Conformance(
          try emulated(), against: try .cpu(threads: 1, level: "portable"), shape: shape)
        // Cosines of two libraries may differ in the last place: a key then rounds to its neighbour in the store.
        conformance.rowBound = store == "bf16" ? 0.03 : store == "f16" ? 0.004 : 1e-5
        conformance.bound = store == "f32" ? 1e-5 : 0.01
        let outcome = try conformance.run(PolicyRegistry.standard.policy("\(selection)+\(store)"))
        #expect(outcome.complaint == nil, "\(selection)+\(store): \(outcome)")
        #expect(cuda_emulation_launches("kv_turn_keys") > turns)
      }
    }

    /// Rows of several runs and forms, forwards and back by many positions: the bits of the CPU.
    @Test(arguments: embeddings.indices, [ElementType.f32, .f16, .bf16])
    func bitsOfTheCPU(embedding: Int, type: ElementType) throws {
      let (dim, rotaryDim, layout) = Self.embeddings[embedding]
      let rotary = try RotaryEmbedding(headDim: dim, rotaryDim: rotaryDim, theta: 500, layout: layout)
      let counts = [3, 40, 1]
      let by = [1, -700, 31_000]
      var results: [[Float]] = []
      var refused: [Int?] = []
      for backend in [try Backend.cpu(threads: 1, level: "portable"), try emulated()] {
        let operations = backend.operations
        var numbers = FedCache.Numbers(seed: 3)
        var buffers: [Buffer] = []
        var turns: [KeyTurn] = []
        for (index, count) in counts.enumerated() {
          let capacity = count + 5
          let values = (0..<capacity * dim).map { _ in numbers.next() }
          let bytes = capacity * dim * type.byteCount
          let buffer = try operations.allocate(byteCount: bytes, hostVisible: false)
          let run = RowRun(encoding: .dense(type), dim: dim, capacity: capacity, base: buffer.base)
          let view = try TensorView(values.span, heads: 1, tokens: capacity, dim: dim)
          _ = operations.write(
            view,
            to: [WriteTarget(head: 0, token: 0, slice: RunSlice(run: run, first: 0, count: capacity), range: .window)])
          turns.append(KeyTurn(slice: RunSlice(run: run, first: 2, count: count), by: by[index]))
          buffers.append(buffer)
        }
        // Nothing changes while it is only asked whether the rows could be held.
        refused.append(operations.turn(turns, rotary: rotary, limit: 1.12, writes: false))
        #expect(operations.turn(turns, rotary: rotary, limit: 100, writes: false) == nil)
        #expect(operations.turn(turns, rotary: rotary, limit: 100, writes: true) == nil)
        var rows: [Float] = []
        for turn in turns {
          let capacity = turn.slice.run.capacity
          var own = [Float](repeating: 0, count: capacity * dim)
          own.withUnsafeMutableBufferPointer {
            operations.read(
              RunSlice(run: turn.slice.run, first: 0, count: capacity), into: $0.baseAddress!, stride: dim)
          }
          rows += own
        }
        results.append(rows)
        withExtendedLifetime(buffers) {}
      }
      #expect(refused[0] != nil && refused[0] == refused[1])
      #expect(results[0] == results[1])
    }

    /// A key that its store could not hold after the turn: the error of the CPU, and nothing has changed.
    @Test func beyondTheStore() throws {
      let rotary = try RotaryEmbedding(headDim: 8)
      let shape = ModelShape(layers: [LayerShape(queryHeads: 2, kvHeads: 2, keyDim: 8, valueDim: 8)], rotary: rotary)
      let policy = try PolicyRegistry.standard.policy("streaming(sinks=1,recent=3,positions=rerotate)+f16")
      var messages: [String] = []
      for backend in [try Backend.cpu(threads: 1), try emulated()] {
        let life = try FedCache(policy, shape, backend)
        life.size = 59_000
        life.querySize = 1e-5
        _ = try life.step(9, seed: 4)
        let before = try (0..<2).map { try life.cache.read(layer: 0, head: $0) }
        do {
          try life.cache.finishPrefill()
          Issue.record("a key beyond f16 was turned")
        } catch {
          #expect(error.code == .unrepresentable)
          messages.append(error.description)
        }
        #expect(try (0..<2).map { try life.cache.read(layer: 0, head: $0) } == before)
      }
      #expect(messages.count == 2 && messages.first == messages.last)
    }
  }
}
