import CCUDAEmulation
import CKVCUDA
import Foundation
import KVBackendCPU
import KVCompression
import KVCore
import KVExperiments
import Testing

@testable import KVBackendCUDA

extension CUDATests {
  /// Bases and latents made on the card, with libraries that compute by the definitions of their functions, against
  /// those of the processor.
  @Suite struct AlgebraTests {
    // MARK: Which libraries

    @Test func librariesAreSaid() throws {
      #expect(try emulatedWithLibraries().linearAlgebra == "libcublas and libcusolver, emulated, on the card")
      let without = try emulated().linearAlgebra
      #expect(without.hasSuffix(", on the processor, as cuBLAS and cuSOLVER are not asked for"), "\(without)")
      #expect(try Backend.cpu(threads: 1).linearAlgebra.hasSuffix("on the processor"))
    }

    /// Where they are not installed the sentence names every file that was looked for.
    @Test func missingLibrariesAreNoError() throws {
      let found = CUDALibraries.installed.find()
      if let functions = found.functions {
        #expect(String(cString: functions.pointee.names).contains("libcusolver.so"))
      } else {
        for name in ["libcublas.so.12", "libcublas.so.13", "libcublas.so.11"] {
          #expect(found.reason.contains(name), "\(found.reason)")
        }
        let backend = try emulatedDevice(0, libraries: .installed)
        #expect(backend.linearAlgebra.contains("on the processor, as libcublas.so.12: "))
        // And rows are factored all the same.
        let life = try FedCache("svd(rank_k=0.5,rank_v=0.5,rope=post)", ConformanceTests.geometries[0], backend)
        _ = try life.step(40, seed: 1)
        try life.cache.finishPrefill()
      }
    }

    @Test func statusesHaveNames() {
      for (status, name) in [(1, "NOT_INITIALIZED"), (3, "ALLOC_FAILED"), (13, "EXECUTION_FAILED"), (99, "unknown")] {
        #expect(String(cString: ckv_cuda_blas_status(Int32(status))).contains(name))
      }
      for (status, name) in [(2, "ALLOC_FAILED"), (3, "INVALID_VALUE"), (7, "INTERNAL_ERROR"), (99, "unknown")] {
        #expect(String(cString: ckv_cuda_solver_status(Int32(status))).contains(name))
      }
    }

    // MARK: Matrices

    /// A matrix of rows that a backend holds, made of the same numbers for every backend.
    final class Held {
      private(set) var matrix: RowMatrix
      private var buffers: [Buffer] = []

      /// - Parameters:
      ///   - dims: channels of each column block.
      ///   - short: rows that the last block lacks.
      init(
        _ backend: any ComputeBackend, rows: Int, dims: [Int], type: ElementType = .f32, leading: Int = 0,
        short: Int = 0, scale: Float = 1, rotary: RotaryEmbedding? = nil, explicit: Bool = false
      ) throws {
        let width = dims.reduce(0, +)
        let elements = Held.elements(leading + rows, width)
        matrix = RowMatrix(rows: rows, columns: [], leading: Array(elements[..<(leading * width)]))
        var start = 0
        for (index, dim) in dims.enumerated() {
          let held = index == dims.count - 1 ? rows - short : rows
          var block: [Float] = []
          for row in leading..<leading + held { block += elements[row * width + start..<row * width + start + dim] }
          let buffer = try backend.allocate(byteCount: max(held * dim, 1) * type.byteCount, hostVisible: false)
          buffers.append(buffer)
          let run = RowRun(encoding: .dense(type), dim: dim, capacity: held, base: buffer.base)
          block.withUnsafeMutableBytes { raw in
            guard let base = raw.baseAddress, held > 0 else { return }
            let source = RowRun(encoding: .dense(.f32), dim: dim, capacity: held, base: base)
            withUnsafePointer(to: RunSlice(run: source, first: 0, count: held)) {
              backend.transcode(UnsafeBufferPointer(start: $0, count: 1), to: run, row: 0)
            }
          }
          // Two slices, so that pieces of rows cross their seam.
          let cut = held / 3
          matrix.columns.append(
            RowMatrix.Columns(
              slices: [RunSlice(run: run, first: 0, count: cut), RunSlice(run: run, first: cut, count: held - cut)],
              dim: dim, positions: explicit ? (0..<rows).map { Int32(3 * $0 + 2) } : nil, firstPosition: 7,
              rotary: rotary, scale: scale))
          start += dim
        }
      }

      /// Twelve directions whose strengths fall by a fifth each, and little else.
      static func elements(_ rows: Int, _ width: Int) -> [Float] {
        var numbers = FedCache.Numbers(seed: 11)
        let directions = 12
        let left = (0..<rows * directions).map { _ in numbers.next() }
        var right = (0..<directions * width).map { _ in numbers.next() }
        var weight: Float = 1
        for i in 0..<directions {
          for c in 0..<width { right[i * width + c] *= weight }
          weight *= 0.8
        }
        var result = (0..<rows * width).map { _ in 1e-3 * numbers.next() }
        for row in 0..<rows {
          for i in 0..<directions {
            for c in 0..<width { result[row * width + c] += left[row * directions + i] * right[i * width + c] }
          }
        }
        return result
      }
    }

    struct Case: Sendable, CustomStringConvertible {
      var rows: Int
      var dims: [Int]
      var rank = 6
      var type = ElementType.f32
      var leading = 0
      var short = 0
      var scale: Float = 1
      var turned = false
      var explicit = false
      var centred = false
      var algorithm = FactorOptions.Algorithm.automatic
      var description: String { "\(rows) x \(dims), rank \(rank), \(algorithm.rawValue)" }

      func held(_ backend: any ComputeBackend) throws -> Held {
        try Held(
          backend, rows: rows, dims: dims, type: type, leading: leading, short: short, scale: scale,
          rotary: turned ? RotaryEmbedding(headDim: dims[0]) : nil, explicit: explicit)
      }

      var options: FactorOptions {
        var options = FactorOptions()
        options.algorithm = algorithm
        options.centred = centred
        options.seed = 5
        return options
      }
    }

    static let cases = [
      Case(rows: 90, dims: [16, 16]),
      Case(rows: 90, dims: [40, 24, 3]),
      Case(rows: 300, dims: [16, 16], turned: true),
      Case(rows: 70, dims: [16, 16], type: .f16, turned: true, explicit: true),
      Case(rows: 70, dims: [20, 20], type: .bf16, scale: 0.25),
      Case(rows: 50, dims: [16, 16], leading: 9, short: 11, centred: true),
      // Fewer rows than columns.
      Case(rows: 20, dims: [32, 32]),
      Case(rows: 20, dims: [32, 40], leading: 3, scale: 3, turned: false, centred: true),
      Case(rows: 1, dims: [9], rank: 1),
      Case(rows: 9, dims: [1], rank: 1),
      Case(rows: 0, dims: [8, 8], rank: 4),
      // More pieces of rows than one.
      Case(rows: 600, dims: [8, 8]),
      Case(rows: 300, dims: [24, 24], algorithm: .randomised),
      Case(rows: 40, dims: [24, 24], rank: 4, algorithm: .randomised),
      Case(rows: 700, dims: [16, 16], rank: 5, turned: true, centred: true, algorithm: .randomised),
    ]

    @Test(arguments: cases)
    func basesAreTheProcessors(_ item: Case) throws {
      let before = cuda_emulation_allocated()
      do {
        let subject = try emulatedWithLibraries()
        let reference = try CPUBackend(threads: 1, level: "portable")
        let (own, other) = (try item.held(subject.operations), try item.held(reference))
        let live = subject.memory.liveBytes
        let a = try subject.operations.factor([own.matrix], ranks: [item.rank], options: item.options)[0]
        let b = try reference.factor([other.matrix], ranks: [item.rank], options: item.options)[0]
        #expect(a.rank == b.rank && a.width == b.width && a.basis.count == b.basis.count)
        // Rows turned in one step and in two differ by roundings; strengths a fifth apart hold them down to a few times
        // that. The range finder squares in f32.
        let bound: Float = item.algorithm == .randomised ? 1e-3 : 2e-5
        #expect(FedCache.distance(a.basis, b.basis) <= bound, "off by \(FedCache.distance(a.basis, b.basis))")
        #expect(FedCache.distance(a.mean, b.mean) <= 1e-5)
        #expect(abs(a.energy - b.energy) <= 1e-5 * b.energy)
        for (x, y) in zip(a.singularValues, b.singularValues) { #expect(abs(x - y) <= 1e-4 * b.energy.squareRoot()) }
        #expect(a.singularValues.count == b.singularValues.count)
        // The same bits every time, and no memory kept.
        let again = try subject.operations.factor([own.matrix], ranks: [item.rank], options: item.options)[0]
        #expect(again.basis == a.basis && again.energy == a.energy)
        #expect(subject.memory.liveBytes == live)

        // Latents of both, on the same basis.
        for type in [ElementType.f32, .f16] {
          let (x, y) = (
            try latents(own, b, type, subject.operations), try latents(other, b, type, reference)
          )
          let size = y.result.largest
          #expect(FedCache.distance(x.latents, y.latents) <= (type == .f32 ? 1e-5 : 2e-3) * max(size, 1))
          #expect(abs(x.result.largest - y.result.largest) <= 1e-5 * max(size, 1))
          #expect(abs(x.result.energy - y.result.energy) <= 1e-5 * y.result.energy)
          #expect(abs(x.result.kept - y.result.kept) <= 1e-5 * y.result.energy)
        }
      }
      #expect(cuda_emulation_allocated() == before)
      #expect(cuda_emulation_handles() == 0)
    }

    private func latents(
      _ held: Held, _ factors: Factors, _ type: ElementType, _ backend: any ComputeBackend
    ) throws -> (latents: [Float], result: ProjectionResult) {
      let (rows, rank) = (held.matrix.height, factors.rank)
      let buffer = try backend.allocate(byteCount: max(rows * rank, 1) * type.byteCount, hostVisible: false)
      let run = RowRun(encoding: .dense(type), dim: rank, capacity: rows, base: buffer.base)
      let cut = rows / 2
      let result = try backend.project([
        Projection(
          matrix: held.matrix, encoder: factors.basis, mean: factors.mean,
          targets: [RunSlice(run: run, first: 0, count: cut), RunSlice(run: run, first: cut, count: rows - cut)])
      ])[0]
      var latents = [Float](repeating: 0, count: rows * rank)
      latents.withUnsafeMutableBufferPointer {
        guard let base = $0.baseAddress, rows * rank > 0 else { return }
        backend.read(RunSlice(run: run, first: 0, count: rows), into: base, stride: rank)
      }
      return (latents, result)
    }

    /// Rows in ordinary memory, as refreshed bases bring them, and results that go there; rows without an encoder; and
    /// an encoder of no rows, which only measures.
    @Test func ordinaryMemory() throws {
      for subject in [try emulatedWithLibraries(), try emulated()] {
        let (rows, width, rank) = (7, 10, 3)
        let elements = Held.elements(rows, width)
        let encoder = Array(elements[..<(rank * width)])
        let (source, target) = (
          UnsafeMutablePointer<Float>.allocate(capacity: rows * width),
          UnsafeMutablePointer<Float>.allocate(capacity: rows * width)
        )
        defer {
          source.deallocate()
          target.deallocate()
        }
        source.update(from: elements, count: rows * width)
        func slice(_ base: UnsafeMutablePointer<Float>, _ dim: Int) -> RunSlice {
          RunSlice(
            run: RowRun(
              encoding: .dense(.f32), dim: dim, capacity: rows, base: UnsafeMutableRawPointer(base)), first: 0,
            count: rows)
        }
        let matrix = RowMatrix(rows: rows, columns: [.init(slices: [slice(source, width)], dim: width)])
        _ = try subject.operations.project([
          Projection(matrix: matrix, encoder: encoder, mean: [], targets: [slice(target, rank)])
        ])
        let expected = LinearAlgebra.product(
          elements, encoder, rows: rows, columns: width, width: rank, transposed: true)
        #expect(FedCache.distance(Array(UnsafeBufferPointer(start: target, count: rows * rank)), expected) <= 1e-5)
        _ = try subject.operations.project([
          Projection(matrix: matrix, encoder: nil, mean: [], targets: [slice(target, width)])
        ])
        #expect(Array(UnsafeBufferPointer(start: target, count: rows * width)) == elements)
        let measured = try subject.operations.project([
          Projection(matrix: matrix, encoder: [], mean: [], targets: [])
        ])[0]
        let energy = elements.reduce(0.0) { $0 + Double($1) * Double($1) }
        #expect(abs(measured.energy - energy) <= 1e-6 * energy && measured.kept == 0 && measured.largest == 0)
      }
    }

    /// Latents that are no numbers, and finite ones behind them: said wherever they are made.
    @Test func latentsBeyondFloats() throws {
      var elements: [Float] = [3e38, 3e38, 1, 1]
      for backend in [try emulatedWithLibraries().operations, try emulated().operations, try CPUBackend(threads: 1)] {
        let result = try elements.withUnsafeMutableBytes { (raw) throws -> ProjectionResult in
          let run = RowRun(encoding: .dense(.f32), dim: 2, capacity: 2, base: raw.baseAddress!)
          let columns = RowMatrix.Columns(slices: [RunSlice(run: run, first: 0, count: 2)], dim: 2)
          return try backend.project([
            Projection(matrix: RowMatrix(rows: 2, columns: [columns]), encoder: [2, -2], mean: [], targets: [])
          ])[0]
        }
        #expect(result.largest == .infinity, "\(backend.name)")
      }
    }

    /// More rows of ordinary memory than are staged at once, as a long basis brings them.
    @Test func longRowsOfOrdinaryMemory() throws {
      let (rows, dim) = (290, 1024)
      let backend = try emulated().operations
      var elements = (0..<rows * dim).map { Float($0 % 2000) - 1000 }
      let buffer = try backend.allocate(byteCount: rows * dim * 2, hostVisible: false)
      let run = RowRun(encoding: .dense(.f16), dim: dim, capacity: rows, base: buffer.base)
      elements.withUnsafeMutableBytes { raw in
        let source = RowRun(encoding: .dense(.f32), dim: dim, capacity: rows, base: raw.baseAddress!)
        withUnsafePointer(to: RunSlice(run: source, first: 0, count: rows)) {
          backend.transcode(UnsafeBufferPointer(start: $0, count: 1), to: run, row: 0)
        }
      }
      var back = [Float](repeating: 0, count: rows * dim)
      back.withUnsafeMutableBufferPointer {
        backend.read(RunSlice(run: run, first: 0, count: rows), into: $0.baseAddress!, stride: dim)
      }
      #expect(back == elements)
    }

    // MARK: Whole lives

    /// Numbers of f32 throughout: nothing is rounded to a neighbour that is far.
    static let exact = [
      "svd(rank_k=0.3,rank_v=0.6,latents=f32,basis=f32,window=f32)",
      "svd(rank_k=0.5,rank_v=full,scope=head,rope=post,latents=f32,basis=f32,window=f32)",
      "svd(rank_k=0.4,rank_v=0.5,new=project,keep=3,latents=f32,basis=f32,window=f32)",
      "svd(rank_k=full,rank_v=0.5,new=refresh,keep=2,every=5,latents=f32,basis=f32,window=f32)",
      "xkv(rank_k=0.1,rank_v=0.2,latents=f32,basis=f32,window=f32)",
    ]

    /// Latents and bases in f16, codes of latents, and what is projected without being factored.
    static let rounded = [
      "svd(rank_k=0.3,rank_v=0.6)", "svd(rank_k=0.2,rank_v=full,new=project,keep=3,latents=int4)",
      "svd(rank_k=0.5,rank_v=0.5,latents=int8)", "xkv(rank_k=0.1,rank_v=0.2)", "rotatekv(key_bits=4)",
      "h2o(budget=40)+svd(rank_k=0.2,rank_v=0.2)",
    ]

    @Test(arguments: exact)
    func exactLives(text: String) throws { try compare(PolicyRegistry.standard.policy(text), text, bound: 2e-5) }

    /// A latent or an element of a basis that lies between two numbers of f16 may become the other one: half of 2^-10 of
    /// a row of length 6, at most.
    @Test(arguments: rounded)
    func roundedLives(text: String) throws { try compare(PolicyRegistry.standard.policy(text), text, bound: 3e-3) }

    /// Latents on calibrated bases, which are projected on the card but not found there; CSKV's codes too.
    @Test(arguments: ["minimum", "integer"])
    func calibrated(zero: String) throws {
      let layer = LayerShape(queryHeads: 4, kvHeads: 2, keyDim: 32, valueDim: 32)
      for item in try Conformance.cases(of: .standard, layer: layer, rotary: RotaryEmbedding(headDim: 32))
      where ["cskv", "matryoshka"].contains(item.method) {
        try compare(item.policy, item.text, bound: 3e-3, factors: false)
      }
      let calibration = try calibration(layer)
      for (bits, rolling) in [(LatentFormat.int8, false), (.int4, true), (.int3, false), (.int2, true)] {
        let store = try Store.cskv(
          calibration: calibration, keyRank: .share(0.5), valueRank: .share(0.7), window: 32, rolling: rolling,
          latents: bits, integerZero: zero == "integer")
        // Without libraries latents are those of the CPU, and so are the codes.
        let name = "cskv(latents=\(bits.name),zero=\(zero))"
        try compare(Policy(store: store), name, bound: 1e-5, libraries: false)
        try compare(Policy(store: store), name, bound: 3e-3, factors: false)
      }
    }

    private func calibration(_ layer: LayerShape) throws -> NamedCalibration {
      let tokens = 160
      let calibrator = try Calibrator(
        .shrunkChannels(), shape: ModelShape(layers: [layer], rotary: RotaryEmbedding(headDim: 32)))
      var numbers = FedCache.Numbers(seed: 5)
      let keys = (0..<layer.kvHeads * tokens * layer.keyDim).map { _ in numbers.next() }
      let values = (0..<layer.kvHeads * tokens * layer.valueDim).map { _ in numbers.next() }
      try calibrator.add(
        layer: 0, keys: TensorView(keys.span, heads: layer.kvHeads, tokens: tokens, dim: layer.keyDim),
        values: TensorView(values.span, heads: layer.kvHeads, tokens: tokens, dim: layer.valueDim), firstPosition: 0)
      return try NamedCalibration(calibrator.finish())
    }

    private func compare(
      _ policy: Policy, _ text: String, bound: Float, factors: Bool = true, libraries: Bool = true
    ) throws {
      let before = cuda_emulation_allocated()
      let calls = Self.products()
      let layers = text.hasPrefix("xkv") ? 4 : 1
      do {
        var conformance = try Conformance(
          libraries ? emulatedWithLibraries() : emulated(), against: .cpu(threads: 1, level: "portable"),
          shape: PolicyTests.shape(layers: layers))
        conformance.bound = min(bound, 2e-5)
        conformance.latentBound = bound
        let outcome = try conformance.run(policy)
        #expect(outcome.complaint == nil, "\(text): \(outcome)")
      }
      #expect(cuda_emulation_allocated() == before, "\(text) leaks")
      #expect(cuda_emulation_handles() == 0)
      let made = zip(Self.products(), calls).map { $0 - $1 }
      if !libraries { #expect(made == [0, 0, 0]) }
      if libraries, !text.hasPrefix("rotatekv") { #expect(made[0] > 0, "\(text) was not projected on the card") }
      if libraries, factors, !text.hasPrefix("rotatekv") {
        #expect(made[1] > 0 && made[2] > 0, "\(text) was not factored on the card")
      }
    }

    private static func products() -> [Int] {
      ["cublasSgemm_v2", "cublasDsyrk_v2", "cusolverDnDsyevd"].map { (name: String) in cuda_emulation_calls(name) }
    }

    /// Heads of odd sizes, one token, many query heads to one.
    @Test(arguments: ConformanceTests.geometries.filter { $0.slidingWindow == nil })
    func oddShapes(_ geometry: ConformanceTests.Geometry) throws {
      for tokens in [1, 2, 35] {
        let policy = try PolicyRegistry.standard.policy(
          "svd(rank_k=0.5,rank_v=0.5,rope=post,latents=f32,basis=f32,window=f32)")
        let subject = try FedCache(policy, geometry.shape, emulatedWithLibraries())
        let reference = try FedCache(policy, geometry.shape, .cpu(threads: 1, level: "portable"))
        for turn in 0..<3 {
          let (a, b) = (
            try subject.step(turn == 0 ? tokens : 1, seed: UInt64(turn)),
            try reference.step(turn == 0 ? tokens : 1, seed: UInt64(turn))
          )
          #expect(FedCache.distance(a, b) <= 2e-5, "\(geometry), \(tokens) tokens, turn \(turn)")
          if turn == 0 {
            try subject.cache.finishPrefill()
            try reference.cache.finishPrefill()
          }
        }
        #expect(subject.cache.bytes == reference.cache.bytes)
      }
    }

    // MARK: Failures

    static let text = "svd(rank_k=0.3,rank_v=0.6,latents=f32,basis=f32)"

    /// What a failure leaves: the rows, dense and exact, and latents with the next step.
    private func survive(_ subject: FedCache, _ rows: HeadContents, _ dense: FedCache, _ words: String) throws {
      #expect(try subject.cache.read(layer: 0, head: 1) == rows, "\(words)")
      #expect(subject.cache.bytes.payload == dense.cache.bytes.payload, "\(words)")
      #expect(subject.cache.backend.memory.liveBytes == subject.cache.bytes.total, "\(words)")
      #expect(try subject.step(1, seed: 1) == dense.step(1, seed: 1), "\(words)")
      #expect(subject.cache.bytes.payload < dense.cache.bytes.payload, "\(words)")
      #expect(subject.cache.backend.memory.liveBytes == subject.cache.bytes.total, "\(words)")
      _ = try subject.step(1, seed: 2)
    }

    private func fed(_ text: String) throws -> FedCache {
      let life = try FedCache(
        PolicyRegistry.standard.policy(text), PolicyTests.shape(), emulatedWithLibraries())
      _ = try life.step(40, seed: 0)
      return life
    }

    /// Whichever call of a library fails: an error that names it.
    @Test(arguments: [
      ("cublasCreate_v2", 1, "CUBLAS_STATUS_NOT_INITIALIZED"), ("cublasCreate_v2", 3, "CUBLAS_STATUS_ALLOC_FAILED"),
      ("cublasSetStream_v2", 1, "CUBLAS_STATUS_NOT_INITIALIZED"),
      ("cusolverDnCreate", 2, "CUSOLVER_STATUS_ALLOC_FAILED"),
      ("cusolverDnSetStream", 1, "CUSOLVER_STATUS_NOT_INITIALIZED"),
      ("cublasDsyrk_v2", 13, "CUBLAS_STATUS_EXECUTION_FAILED"),
      ("cublasDgemm_v2", 14, "CUBLAS_STATUS_INTERNAL_ERROR"), ("cublasSgemm_v2", 3, "CUBLAS_STATUS_ALLOC_FAILED"),
      ("cusolverDnDsyevd_bufferSize", 3, "CUSOLVER_STATUS_INVALID_VALUE"),
      ("cusolverDnDsyevd", 6, "CUSOLVER_STATUS_EXECUTION_FAILED"),
    ])
    func failingLibraries(name: String, status: Int32, words: String) throws {
      var failures = 0
      for after in 0..<40 {
        // Fewer rows than columns: the route with most calls.
        let subject = try fed(Self.text)
        let rows = try subject.cache.read(layer: 0, head: 1)
        cuda_emulation_fail_library(name, after, status)
        defer { cuda_emulation_fail_library(name, -1, 0) }
        do {
          try subject.cache.finishPrefill()
          break
        } catch {
          cuda_emulation_fail_library(name, -1, 0)
          failures += 1
          #expect(error.code == (words.contains("ALLOC_FAILED") ? .outOfMemory : .unavailable), "\(error)")
          #expect(error.message.contains("\(name) gave \(words)"), "\(error)")
          #expect(error.layer == 0)
          try survive(subject, rows, fed("f16"), "\(name), \(after) before")
        }
      }
      #expect(failures > 0 && failures < 40, "\(name): \(failures)")
      #expect(cuda_emulation_handles() == 0)
    }

    /// Whichever allocation fails, and all after it.
    @Test func outOfMemory() throws {
      var failures = 0
      for after in 0..<80 {
        let subject = try fed(Self.text)
        let rows = try subject.cache.read(layer: 0, head: 1)
        cuda_emulation_exhaust_after(after)
        defer { cuda_emulation_exhaust_after(-1) }
        do {
          try subject.cache.finishPrefill()
          break
        } catch {
          cuda_emulation_exhaust_after(-1)
          failures += 1
          #expect(error.code == .outOfMemory, "\(error)")
          try survive(subject, rows, fed("f16"), "\(after) allocations before")
        }
      }
      #expect(failures > 20 && failures < 80, "\(failures)")
    }

    /// An iteration that does not converge, and the card's own calls failing under it.
    @Test func noConvergence() throws {
      let subject = try FedCache(
        PolicyRegistry.standard.policy(Self.text), PolicyTests.shape(), emulatedWithLibraries())
      _ = try subject.step(40, seed: 0)
      let bytes = subject.cache.bytes
      cuda_emulation_set_info(3)
      #expect {
        try subject.cache.finishPrefill()
      } throws: {
        ($0 as? KVError)?.code == .nonFinite && "\($0)".contains("cusolverDnDsyevd info 3")
      }
      #expect(subject.cache.bytes == bytes)
      try subject.cache.finishPrefill()

      for name in ["launch", "copy", "synchronize"] {
        var failures = 0
        for after in 0..<12 {
          let life = try FedCache(
            PolicyRegistry.standard.policy(Self.text), PolicyTests.shape(), emulatedWithLibraries())
          _ = try life.step(40, seed: 0)
          cuda_emulation_fail_call(name, after)
          defer { cuda_emulation_fail_call(name, -1) }
          do { try life.cache.finishPrefill() } catch {
            failures += 1
            #expect(error.code == .unavailable, "\(error)")
          }
        }
        #expect(failures > 5, "\(name)")
      }
    }
  }
}
