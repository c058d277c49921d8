internal import Foundation
internal import KVCompression

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// Values whose singular value decomposition is known: x[t][c] = Σ wᵢ·h(t, i)·h(c, i)/√(T·n), h being the entries ±1 of
/// Walsh-Hadamard matrices. The weights fall like 1/√(i + 1), slower than those of real caches.
private struct KnownSpectrum {
  let tokens: Int
  let width: Int

  func weight(_ i: Int) -> Float { 1 / Float(i + 1).squareRoot() }

  /// The norm of what is left when the first `rank` directions are taken away, over that of all.
  func bestError(rank: Int) -> Double {
    let squares = (0..<width).map { 1 / Double($0 + 1) }
    return (squares.dropFirst(rank).reduce(0, +) / squares.reduce(0, +)).squareRoot()
  }

  /// Row `token`, of entries around 1.
  func row(_ token: Int, into x: UnsafeMutablePointer<Float>) {
    let scale = 1 / Float(log(Double(width)) + 0.6).squareRoot()
    // A permutation of the tokens, so that neighbours differ.
    let t = token &* 20_041 % tokens
    for i in 0..<width { x[i] = (t & i).nonzeroBitCount % 2 == 0 ? weight(i) * scale : -weight(i) * scale }
    var half = 1
    while half < width {
      for base in stride(from: 0, to: width, by: 2 * half) {
        for i in base..<base + half {
          let (a, b) = (x[i], x[i + half])
          x[i] = a + b
          x[i + half] = a - b
        }
      }
      half *= 2
    }
  }
}

extension Benchmark {
  /// Latents of a prompt of 32768 tokens: one layer of 8 heads x 128 channels, and four layers together. Keys have 8
  /// channels and stay as they are, so that the time is that of the values.
  func factorisation(_ machine: Machine) throws(KVError) {
    let tokens = 32768
    for (store, layers, rank) in [
      ("svd(rank_k=full,rank_v=256,rope=post)", 1, 256), ("xkv(rank_k=full,rank_v=512)", 4, 512),
    ] where wanted("factor", store, tokens, layers, machine) {
      try factorisation(store, layers: layers, rank: rank, tokens: tokens, machine)
    }
  }

  private func factorisation(
    _ store: String, layers: Int, rank: Int, tokens: Int, _ machine: Machine
  ) throws(KVError) {
    let heads = BenchData.shape.kvHeads
    let dim = BenchData.dim
    let spectrum = KnownSpectrum(tokens: tokens, width: layers * heads * dim)
    let shape = ModelShape(
      layers: Array(repeating: LayerShape(queryHeads: heads, kvHeads: heads, keyDim: 8, valueDim: dim), count: layers),
      rotary: try RotaryEmbedding(headDim: 8))
    let full = try KVCache(
      shape: shape, policy: PolicyRegistry.standard.policy(store), backend: machine.backend, inputs: [])
    try fill(full, spectrum)
    let clock = ContinuousClock()
    let start = clock.now
    var seconds: [Double] = []
    var processor: [Double] = []
    var compressed: KVCache?
    while seconds.count < 3 || (seconds.count < 9 && start.duration(to: clock.now).seconds < options.secondsPerGroup) {
      compressed = nil
      let fork = full.fork()
      let before = Self.processorSeconds()
      seconds.append(try Self.seconds { () throws(KVError) in try fork.finishPrefill() })
      processor.append(Self.processorSeconds() - before)
      compressed = fork
    }
    var error = Double.nan
    if let compressed { error = try self.error(compressed, spectrum, layers: layers) }
    let best = spectrum.bestError(rank: rank)
    var record = BenchRecord(
      name: "factor", store: store, tokens: tokens, queries: layers, threads: machine.threads, seconds: seconds,
      bytes: tokens * spectrum.width * 2, readBandwidth: machine.probe.measure(), checked: error <= 1.01 * best)
    record.processorSeconds = BenchRecord.median(processor)
    record.errorOverBest = error / best
    report(record)
  }

  private func fill(_ cache: KVCache, _ spectrum: KnownSpectrum) throws(KVError) {
    let block = 1024
    let heads = BenchData.shape.kvHeads
    let own = heads * BenchData.dim
    let keys = [Float](repeating: 1, count: heads * block * 8)
    var rows = [Float](repeating: 0, count: block * spectrum.width)
    for first in stride(from: 0, to: spectrum.tokens, by: block) {
      rows.withUnsafeMutableBufferPointer { buffer in
        for row in 0..<block { spectrum.row(first + row, into: buffer.baseAddress! + row * spectrum.width) }
      }
      for layer in cache.shape.layers.indices {
        let end = (block - 1) * spectrum.width + (layer + 1) * own
        try cache.append(
          layer: layer, keys: TensorView(keys.span, heads: heads, tokens: block, dim: 8),
          values: TensorView(
            rows.span.extracting(layer * own..<end), heads: heads, tokens: block, dim: BenchData.dim,
            headStride: BenchData.dim, tokenStride: spectrum.width))
      }
    }
  }

  /// The relative error of every 29th row.
  private func error(_ cache: KVCache, _ spectrum: KnownSpectrum, layers: Int) throws(KVError) -> Double {
    let heads = BenchData.shape.kvHeads
    let dim = BenchData.dim
    var (sum, norm) = (0.0, 0.0)
    var row = [Float](repeating: 0, count: spectrum.width)
    for layer in 0..<layers {
      for head in 0..<heads {
        let held = try cache.read(layer: layer, head: head).values
        for token in stride(from: 0, to: spectrum.tokens, by: 29) {
          row.withUnsafeMutableBufferPointer { spectrum.row(token, into: $0.baseAddress!) }
          for c in 0..<dim {
            let exact = Double(row[(layer * heads + head) * dim + c])
            let difference = Double(held[token * dim + c]) - exact
            sum += difference * difference
            norm += exact * exact
          }
        }
      }
    }
    return (sum / norm).squareRoot()
  }

  /// Processor time of all threads so far.
  private static func processorSeconds() -> Double {
    var time = timespec()
    guard clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time) == 0 else { return .nan }
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
  }
}
