import KVCompression
import KVCore
import KVExperiments
import Testing

/// Every CPU level this machine has against the portable one and against f64, through caches.
@Suite struct LevelTests {
  static let stores =
    ["f32", "f16", "bf16"]
    + [2, 3, 4, 8].flatMap { bits in
      ["f16", "bf16", "f32"].map { "kivi(bits=\(bits),residual=32,window=f32,metadata=\($0))" }
    }
    + [
      "int8(window=f32)", "int8(scale=head,group=32,window=f32)", "int8(group=16,metadata=f16,window=f32)",
      "int8(format=int4,window=f32)", "int8(format=int4,group=32,metadata=bf16,window=f32)",
      "int8(scale=tensor,factor=0.1,window=f32)", "fp8(window=f32)", "fp8(format=e5m2,scale=token,window=f32)",
      "fp8(scale=head,group=64,metadata=f16,window=f32)", "fp8(scale=token,group=24,window=f32)",
      "ggml(keys=q8_0,values=q8_0)", "ggml(keys=q5_0,values=q5_0)", "ggml(keys=q5_1,values=q5_1)",
      "ggml(keys=q4_0,values=q4_0)", "ggml(keys=q4_1,values=q4_1)", "ggml(keys=iq4_nl,values=iq4_nl)",
    ]
  static let dims = [1, 2, 7, 8, 15, 16, 17, 33, 40, 63, 67, 129]

  /// Codes and metadata, so decoded rows, are the same bits at every level; attention agrees with f64.
  @Test(arguments: stores)
  func everyLevel(store: String) throws {
    withEvery("dim", in: store.hasPrefix("ggml") ? [32, 64, 96, 128, 160] : Self.dims) { dim in
      let other = store.hasPrefix("ggml") ? 192 - dim : max(1, 130 - dim)
      let geometry = Geometry(2 * (1 + dim % 3), 2, dim, other)
      let traffic = Self.rough(geometry.shape(), tokens: 71, seed: UInt64(dim))
      var expected: [HeadContents]?
      withEvery("level", in: Backend.cpuLevels.reversed()) { level in
        let cache = try makeCache(store, traffic.shape, backend: .cpu(threads: 1, level: level))
        try traffic.append(cache, 0, 0..<70)
        try cache.finishPrefill()
        try traffic.checkedStep(cache, 0, 70..<71)
        let held = try (0..<2).map { try cache.read(layer: 0, head: $0) }
        guard let expected else {
          expected = held
          return
        }
        for head in 0..<2 {
          checkSame(held[head].keys, expected[head].keys, "keys of head \(head)")
          checkSame(held[head].values, expected[head].values, "values of head \(head)")
        }
      }
    }
  }

  /// Numbers of many magnitudes, with full mantissas.
  static func rough(_ shape: ModelShape, tokens: Int, seed: UInt64) -> Traffic {
    var traffic = Traffic(shape, tokens: tokens, seed: seed)
    var dice = Dice(seed)
    for i in traffic.keys[0].indices { traffic.keys[0][i] = dice.normal() * (i % 17 == 0 ? 8 : 1) }
    for i in traffic.values[0].indices { traffic.values[0][i] = dice.normal() * (i % 23 == 0 ? 1e-3 : 1) }
    return traffic
  }

  /// Queries of every type, few and many, at every level.
  @Test func queryTypesAndCounts() throws {
    let geometry = Geometry(6, 2, 40, 33)
    let traffic = Self.rough(geometry.shape(), tokens: 140, seed: 3)
    let layer = geometry.layer()
    withEvery("level", in: Backend.cpuLevels) { level in
      withEvery("store", in: ["f16", "kivi(bits=4,residual=32)"]) { store in
        let cache = try makeCache(store, traffic.shape, backend: .cpu(threads: 2, level: level))
        try traffic.append(cache, 0, 0..<140)
        if store.hasPrefix("kivi") { try cache.finishPrefill() }
        let held = try (0..<2).map { try cache.read(layer: 0, head: $0) }
        withEvery("queries", in: [1, 2, 5, 33]) { count in
          let range = 140 - count..<140
          let floats = traffic.queries(0, range)
          let halves = floats.map { Float16($0) }
          let brains = floats.map { bfloat16($0) }
          for type in ElementType.all where type == .f32 || count == 2 || count == 33 {
            var out = [Float](repeating: .nan, count: 6 * count * 33)
            var span = out.mutableSpan
            var view = try MutableTensorView(&span, heads: 6, tokens: count, dim: 33)
            let looking = AttentionOptions(softcap: count == 5 ? 4 : nil, commits: false)
            let exact: [Float]
            switch type {
            case .f16:
              try cache.attend(
                layer: 0, queries: TensorView(halves.span, heads: 6, tokens: count, dim: 40), into: &view,
                options: looking)
              exact = halves.map { Float($0) }
            case .bf16:
              try cache.attend(
                layer: 0, queries: TensorView(bfloat16: brains.span, heads: 6, tokens: count, dim: 40), into: &view,
                options: looking)
              exact = brains.map { Float(bitPattern: UInt32($0) << 16) }
            default:
              try cache.attend(
                layer: 0, queries: TensorView(floats.span, heads: 6, tokens: count, dim: 40), into: &view,
                options: looking)
              exact = floats
            }
            _ = consume view
            labelled("\(type)") {
              try Oracle(
                held, layer, queries: exact, tokens: count, firstPosition: range.lowerBound, options: looking,
                folded: store.hasPrefix("kivi")
              ).check(out)
            }
          }
        }
      }
    }
  }

  /// f16: subnormals, the largest number, ties to even; the same as Swift's own conversion.
  @Test func halfEdges() throws {
    let edges: [Float] = [
      0, -0.0, 0x1p-24, 0x1p-25, 0x1.8p-25, 0x1.000002p-25, -0x1p-24, 0x1.8p-24, 0x1p-14, 0x1.ff8p-15, 0x1.ffcp-15,
      0x1.ffep-15,
      65504, 65519, -65504, 65519.996, 1, 1.0004883, 1.0009766, 1.0014648, 2049, 2051, 1e-8, -1e-8, 1e-30, 0.1, 1 / 3,
      0x1p-149,
    ]
    withEvery("level", in: Backend.cpuLevels) { level in
      withEvery("length", in: [1, 3, 8, 15, 16, 17, edges.count]) { length in
        withEvery("shift", in: stride(from: 0, to: edges.count, by: 5)) { shift in
          let row = (0..<length).map { edges[($0 + shift) % edges.count] }
          let shape = Geometry(1, 1, length).shape()
          for store in ["f16", "bf16"] {
            let cache = try makeCache(store, shape, backend: .cpu(threads: 1, level: level))
            try cache.append(
              layer: 0, keys: TensorView(row.span, heads: 1, tokens: 1, dim: length),
              values: TensorView(row.span, heads: 1, tokens: 1, dim: length))
            let expected =
              store == "f16"
              ? row.map { Float(Float16($0)) } : row.map { Float(bitPattern: UInt32(bfloat16($0)) << 16) }
            checkSame(try cache.read(layer: 0, head: 0).keys, expected, "as \(store)")
            // Same type in and out: the bits themselves.
            let halves = row.map { Float16($0) }
            let same = try makeCache("f16", shape, backend: .cpu(threads: 1, level: level))
            try same.append(
              layer: 0, keys: TensorView(halves.span, heads: 1, tokens: 1, dim: length),
              values: TensorView(halves.span, heads: 1, tokens: 1, dim: length))
            checkSame(try same.read(layer: 0, head: 0).values, halves.map { Float($0) }, "f16 in f16")
          }
        }
      }
    }
  }

  /// Affine codes: at most half a step from the original, computed per group; equal values exactly; ends of the range
  /// exactly up to the metadata's rounding.
  @Test(arguments: [2, 3, 4, 8])
  func codesAreWithinHalfAStep(bits: Int) throws {
    let levels = Float(1 << bits - 1)
    withEvery("level", in: Backend.cpuLevels) { level in
      withEvery("metadata", in: ElementType.all) { metadata in
        withEvery("data", in: ["normal", "flat", "tiny", "large", "offset", "subnormal"]) { data in
          let (dim, tokens) = (67, 96)
          var traffic = Traffic(Geometry(1, 1, dim).shape(), tokens: tokens)
          var dice = Dice(8)
          for i in 0..<dim * tokens {
            let x = dice.normal()
            let y: Float =
              switch data {
              case "flat": -3.25
              case "tiny": x * 1e-6
              case "large": max(-65000, min(65000, x * 20000))
              case "offset": 1000 + x
              case "subnormal": x * 0x1p-24
              default: x
              }
            traffic.keys[0][i] = y
            traffic.values[0][i] = y
          }
          let cache = try makeCache(
            "kivi(bits=\(bits),residual=32,window=f32,metadata=\(metadata))", traffic.shape,
            backend: .cpu(threads: 1, level: level))
          try traffic.append(cache, 0, 0..<tokens)
          try cache.finishPrefill()
          let held = try cache.read(layer: 0, head: 0)
          func verify(_ indices: [Int], _ source: [Float], _ result: [Float], _ what: String) {
            let group = indices.map { source[$0] }
            let (low, high) = (group.min()!, group.max()!)
            // Metadata is rounded first: of relative u, or of an absolute half of the smallest subnormal.
            let unit: Float = metadata == .f32 ? 0x1p-24 : metadata == .f16 ? 0x1p-11 : 0x1p-8
            let floor: Float = metadata == .f16 ? 0x1p-25 : 0
            let step = (high - low) / levels
            let scaleError = step * unit + floor
            let lowError = abs(low) * unit + floor
            // Codes clamp at the ends: what rounding moves the range by is lost there.
            let bound =
              (step + scaleError) / 2 + lowError + levels * scaleError + 4 * max(abs(low), abs(high)) * 0x1p-24
            for i in indices where !(abs(result[i] - source[i]) <= bound) {
              check(false, "\(what) \(i): \(source[i]) became \(result[i]), bound \(bound)")
              return
            }
          }
          for block in 0..<3 {
            for c in 0..<dim { verify((0..<32).map { (block * 32 + $0) * dim + c }, traffic.keys[0], held.keys, "key") }
          }
          for token in 0..<64 {
            for first in stride(from: 0, to: dim, by: 32) {
              verify((first..<min(first + 32, dim)).map { token * dim + $0 }, traffic.values[0], held.values, "value")
            }
          }
        }
      }
    }
  }

  /// Logits that would overflow a naive softmax, and logits that are all equal.
  @Test func logitsOfAnySize() throws {
    let geometry = Geometry(2, 1, 16, 5)
    withEvery("level", in: Backend.cpuLevels) { level in
      withEvery("store", in: ["f32", "f16", "kivi(bits=8,residual=32)"]) { store in
        for factor in [1, 100, 10_000, 0] as [Float] {
          var traffic = Traffic(geometry.shape(), tokens: 70)
          traffic.queries[0] = traffic.queries[0].map { $0 * factor }
          let cache = try makeCache(store, traffic.shape, backend: .cpu(threads: 1, level: level))
          try traffic.append(cache, 0, 0..<69)
          if store.hasPrefix("kivi") { try cache.finishPrefill() }
          labelled("factor \(factor)") {
            let output = try traffic.checkedStep(cache, 0, 69..<70)
            check(output.allSatisfy(\.isFinite), "not finite: \(output)")
            if factor == 0, store == "f32" {
              let held = try cache.read(layer: 0, head: 0)
              for c in 0..<5 {
                let mean = (0..<70).reduce(0.0) { $0 + Double(held.values[$1 * 5 + c]) } / 70
                check(abs(Double(output[c]) - mean) < 1e-6, "mean \(mean), got \(output[c])")
              }
            }
          }
        }
      }
    }
  }

  /// Finite keys and queries whose product f32 cannot hold.
  @Test func logitsBeyondFloat() throws {
    withEvery("level", in: Backend.cpuLevels) { level in
      var traffic = Traffic(Geometry(1, 1, 8, 4).shape(), tokens: 20)
      traffic.queries[0] = traffic.queries[0].map { $0 * 1e25 }
      traffic.keys[0] = traffic.keys[0].map { $0 * 1e25 }
      let cache = try makeCache("f32", traffic.shape, backend: .cpu(threads: 1, level: level))
      expectError(.nonFinite, "query head", layer: 0) { _ = try traffic.step(cache, 0..<20) }
    }
  }

  /// Window scores and accumulated attention: the kept tokens are those of f64, but for near ties.
  @Test func selectionAgreesAcrossLevels() throws {
    let traffic = Self.rough(Geometry(6, 2, 40, 24).shape(), tokens: 130, seed: 11)
    withEvery(
      "policy",
      in: [
        "snapkv(budget=40,window=8)+f32", "snapkv(budget=40,window=8,pooling=max,reduction=max)+f32",
        "h2o(budget=40)+f32",
      ]
    ) {
      text in
      var first: [[[Int]]]?
      for level in Backend.cpuLevels {
        let cache = try makeCache(text, traffic.shape, backend: .cpu(threads: 2, level: level))
        try traffic.run(cache, prompt: 120, decoded: 10)
        let kept = try positions(cache)
        if let first {
          for (a, b) in zip(kept[0], first[0]) {
            check(Set(a).symmetricDifference(b).count <= 2, "\(level) keeps \(a), \(Backend.cpuLevels[0]) \(b)")
          }
        } else {
          first = kept
        }
      }
    }
  }
}
