import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// The vectors, yardsticks and oracles of the quantization specification.
@Suite struct WorkedExampleQuantizationTests {
  /// Rows encoded by a backend: codes, metadata and what comes back.
  private struct Encoded {
    var codes: [Int] = []
    var words: [UInt32] = []
    var scales: [Float] = []
    var minima: [Float] = []
    var restored: [Float] = []
  }

  private func encode(
    _ rows: [Float], dim: Int, _ encoding: RowEncoding, level: String? = nil
  ) throws -> Encoded {
    let backend = try Backend.cpu(threads: 1, level: level).operations
    let count = rows.count / dim
    var dense = try Extent(encoding: .dense(.f32), capacity: count, dim: dim, backend: backend)
    dense.rows = count
    rows.withUnsafeBytes { dense.buffer.base.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
    var extent = try Extent(encoding: encoding, capacity: count, dim: dim, backend: backend)
    extent.rows = count
    let run = extent.run(dim: dim)
    backend.transcode([RunSlice(run: dense.run(dim: dim), first: 0, count: count)], to: run, row: 0)
    let store = RowStore(
      restoring: [extent], bodyExtents: 1, dim: dim,
      format: encoding.kind == .affinePerChannel
        ? try .blocks(of: encoding.group, window: .f32, body: encoding) : try .newest(0, window: .f32, body: encoding))
    let body = EncodedBody(store)
    var result = Encoded(words: body.words, scales: body.scales, minima: body.minima)
    result.restored = [Float](repeating: .nan, count: rows.count)
    result.restored.withUnsafeMutableBufferPointer {
      backend.read(RunSlice(run: run, first: 0, count: count), into: $0.baseAddress!, stride: dim)
    }
    if encoding.kind == .affinePerToken, encoding.bits != 3 {
      let per = 32 / encoding.bits
      let width = RowEncoding.wordsPerRow(dim: dim, bits: encoding.bits)
      for row in 0..<count {
        for c in 0..<dim {
          let word = body.words[row * width + c / per]
          result.codes.append(Int(word >> UInt32(c % per * encoding.bits) & (1 << UInt32(encoding.bits) - 1)))
        }
      }
    }
    return result
  }

  private func isClose(_ actual: [Float], _ wanted: [Float], _ tolerance: Float = 1e-6) -> Bool {
    actual.count == wanted.count && zip(actual, wanted).allSatisfy { abs($0 - $1) <= tolerance }
  }

  // MARK: Vectors (2.2)

  @Test(arguments: Backend.cpuLevels)
  func affineVectors(level: String) throws {
    let x: [Float] = [0.1, 0.9, -0.5, 1.5]
    let two = try encode(x, dim: 4, .affinePerToken(bits: 2, group: 8, metadata: .f32), level: level)
    #expect(two.codes == [1, 2, 0, 3])
    #expect(isClose(two.scales, [2.0 / 3]) && two.minima == [-0.5])
    #expect(isClose(two.restored, [0.166667, 0.833333, -0.5, 1.5]))
    let four = try encode(x, dim: 4, .affinePerToken(bits: 4, group: 8, metadata: .f32), level: level)
    #expect(four.codes == [4, 10, 0, 15], "4.5 rounds to even")
    #expect(isClose(four.scales, [2.0 / 15]))
  }

  @Test(arguments: Backend.cpuLevels)
  func packingIsLittleEndFirst(level: String) throws {
    let codes: [Float] = [3, 0, 1, 2, 2, 3, 0, 1, 1, 1, 0, 0, 3, 3, 2, 2]
    let encoded = try encode(codes, dim: 16, .affinePerToken(bits: 2, group: 16), level: level)
    #expect(encoded.words == [0xAF05_4E93])
    #expect(encoded.scales == [1] && encoded.minima == [0])
    #expect(encoded.restored == codes)

    // Per channel the same codes run down one channel: two words of 16 rows in a group of 32.
    let column = codes + codes
    let perChannel = try encode(column, dim: 1, .affinePerChannel(bits: 2, group: 32), level: level)
    #expect(perChannel.words == [0xAF05_4E93, 0xAF05_4E93])
    #expect(perChannel.restored == column)
  }

  @Test(arguments: Backend.cpuLevels)
  func constantGroupsAreExact(level: String) throws {
    for bits in [2, 3, 4, 8] {
      for value: Float in [0, -0.0, 1.5, -65504] {
        let rows = [Float](repeating: value, count: 32 * 32)
        for encoding in [
          try RowEncoding.affinePerToken(bits: bits, group: 32), try .affinePerChannel(bits: bits, group: 32),
        ] {
          let encoded = try encode(rows, dim: 32, encoding, level: level)
          #expect(encoded.restored == rows, "\(encoding), \(value)")
          #expect(encoded.scales.allSatisfy { $0 == 0 } && encoded.words.allSatisfy { $0 == 0 })
        }
      }
    }
  }

  /// Restored values quantize to the same codes again, with the same groups.
  @Test func requantizingRestoredRowsKeepsTheCodes() throws {
    let rows = normals(1000 * 32, seed: 4)
    let encoding = try RowEncoding.affinePerToken(bits: 2, group: 32, metadata: .f32)
    let once = try encode(rows, dim: 32, encoding)
    let twice = try encode(once.restored, dim: 32, encoding)
    #expect(once.codes == twice.codes)
  }

  // MARK: Relative errors (2.1)

  private func relativeError(_ restored: [Float], _ rows: [Float]) -> Double {
    var error = 0.0
    var size = 0.0
    for (x, y) in zip(rows, restored) {
      error += Double(x - y) * Double(x - y)
      size += Double(x) * Double(x)
    }
    return error / size
  }

  /// P1 on seeded N(0, 1), d = 128, f16 metadata, within the 3 % the specification allows.
  @Test func relativeErrorsOnNormalData() throws {
    let rows = normals(2048 * 128, seed: 20)
    let table: [Int: [Int: Double]] = [
      32: [2: 0.1545, 3: 0.02814, 4: 0.006112, 8: 2.12e-5],
      64: [2: 0.2025, 3: 0.03689, 4: 0.008033, 8: 2.78e-5],
      128: [2: 0.2516, 3: 0.04582, 4: 0.009905, 8: 3.45e-5],
    ]
    for (group, byBits) in table.sorted(by: { $0.key < $1.key }) {
      for (bits, wanted) in byBits.sorted(by: { $0.key < $1.key }) {
        let encoded = try encode(rows, dim: 128, .affinePerToken(bits: bits, group: group))
        let error = relativeError(encoded.restored, rows)
        #expect(abs(error / wanted - 1) < 0.03, "group \(group), \(bits) bits: \(error) instead of \(wanted)")
        GoldenTrace.print("yardstick G=\(group) b=\(bits): \(error), specification \(wanted)")
      }
    }
  }

  // MARK: Orderings (2.3)

  /// Keys with four offset channels: one scale per channel beats one per token by far.
  @Test(arguments: [2, 3, 4])
  func outlierChannelsWantChannelScales(bits: Int) throws {
    let (tokens, dim) = (512, 128)
    var random = SeededGenerator(seed: 7)
    var keys = (0..<tokens * dim).map { _ in Float(random.normal()) }
    for (channel, offset) in [(5, 6.0), (37, -8.0), (80, 10.0), (111, -12.0)] {
      for t in 0..<tokens { keys[t * dim + channel] = keys[t * dim + channel] * 1.5 + Float(offset) }
    }
    let queries = (0..<64 * dim).map { _ in Float(random.normal()) }
    func logitError(_ restored: [Float]) -> Double {
      var error = 0.0
      var size = 0.0
      for q in 0..<64 {
        var differences: [Double] = []
        var logits: [Double] = []
        for t in 0..<tokens {
          var (exact, off) = (0.0, 0.0)
          for c in 0..<dim {
            let weight = Double(queries[q * dim + c])
            exact += weight * Double(keys[t * dim + c])
            off += weight * Double(restored[t * dim + c] - keys[t * dim + c])
          }
          logits.append(exact)
          differences.append(off)
        }
        let (meanLogit, meanOff) = (
          logits.reduce(0, +) / Double(tokens), differences.reduce(0, +) / Double(tokens)
        )
        for t in 0..<tokens {
          error += (differences[t] - meanOff) * (differences[t] - meanOff)
          size += (logits[t] - meanLogit) * (logits[t] - meanLogit)
        }
      }
      return (error / size).squareRoot()
    }
    let channel = logitError(try encode(keys, dim: dim, .affinePerChannel(bits: bits, group: 32)).restored)
    let token = logitError(try encode(keys, dim: dim, .affinePerToken(bits: bits, group: 32)).restored)
    GoldenTrace.print("ordering b=\(bits): per channel \(channel), per token \(token)")
    #expect(channel * 2 < token, "per channel \(channel), per token \(token)")
    let wanted = try #require([2: 0.40, 3: 0.169, 4: 0.079][bits])
    #expect(abs(channel / wanted - 1) < 0.1, "per channel \(channel) instead of \(wanted)")
  }

  // MARK: KIVI (4, oracles)

  private func kivi(
    _ bits: Int = 2, residual: Int, window: ElementType = .f32, dim: Int = 64
  ) throws -> KVCache {
    try KVCache(
      Policy(store: try .kivi(keyBits: bits, residual: residual, window: window)), queryHeads: 4, kvHeads: 2, dim: dim)
  }

  /// (i) Fewer tokens than the window: exact attention, to the bit.
  @Test func belowTheWindowAttentionIsExact() throws {
    let (k, v, q) = (
      try normalTensor(2, 63, 64, seed: 1), try normalTensor(2, 63, 64, seed: 2), try normalTensor(4, 63, 64, seed: 3)
    )
    for type in ElementType.all {
      let exact = try KVCache(Policy(store: .dense(type)), queryHeads: 4, kvHeads: 2, dim: 64)
      let compressed = try kivi(residual: 64, window: type)
      var outputs: [[[Float]]] = []
      for cache in [exact, compressed] {
        try cache.append(k.slice(tokens: 0..<40), v.slice(tokens: 0..<40))
        var own = [try cache.attend(q.slice(tokens: 0..<40))]
        try cache.finishPrefill()
        for t in 40..<63 {
          try cache.append(k.slice(tokens: t..<t + 1), v.slice(tokens: t..<t + 1))
          own.append(try cache.attend(q.slice(tokens: t..<t + 1)))
        }
        outputs.append(own)
      }
      #expect(outputs[0] == outputs[1], "\(type)")
    }
  }

  /// (ii) Half a step, plus what rounding the metadata to f16 adds.
  @Test(arguments: [2, 3, 4, 8])
  func errorsStayWithinHalfAStep(bits: Int) throws {
    let dim = 64
    let rows = normals(64 * dim, seed: 8)
    for perChannel in [true, false] {
      for metadata in [ElementType.f32, .f16] {
        let encoding =
          perChannel
          ? try RowEncoding.affinePerChannel(bits: bits, group: 32, metadata: metadata)
          : try RowEncoding.affinePerToken(bits: bits, group: 32, metadata: metadata)
        let encoded = try encode(rows, dim: dim, encoding)
        // An f16 minimum moves by half a unit in the last place, an f16 scale by as much times the code.
        let unit: Float = metadata == .f16 ? 0x1p-11 : 0x1p-23
        let levels = Float((1 << bits) - 1)
        for index in rows.indices {
          let (row, c) = (index / dim, index % dim)
          let at = perChannel ? row / 32 * dim + c : row * (dim / 32) + c / 32
          let (scale, minimum) = (encoded.scales[at], encoded.minima[at])
          let slack = unit * (abs(minimum) + scale * levels) + 0x1p-22 * abs(rows[index])
          let off = abs(encoded.restored[index] - rows[index])
          #expect(off <= scale / 2 + slack, "element \(index), \(encoding): \(off) of \(scale / 2 + slack)")
        }
      }
    }
  }

  /// (iii) Dense keys: L mod R after the prompt, (L + n) mod R after n steps; dense values: min(L + n, R).
  @Test func denseRowsAfterPromptAndDecoding() throws {
    let (k, v) = (try normalTensor(2, 200, 8, seed: 1), try normalTensor(2, 200, 8, seed: 2))
    let (nextKey, nextValue) = (try normalTensor(2, 1, 8, seed: 3), try normalTensor(2, 1, 8, seed: 4))
    for residual in [32, 64, 96] {
      for prompt in [1, 31, 32, 33, 63, 64, 65, 96, 97, 128, 191, 192, 200] {
        let cache = try kivi(residual: residual, dim: 8)
        try cache.append(k.slice(tokens: 0..<prompt), v.slice(tokens: 0..<prompt))
        try cache.finishPrefill()
        for step in 0...100 {
          if step > 0 {
            try cache.append(nextKey, nextValue)
            try cache.commit(layer: 0)
          }
          let seen = prompt + step
          for head in try cache.segment.heads {
            #expect(
              head.keys.tailRows == seen % residual && head.values.tailRows == min(seen, residual)
                && head.keys.rows == seen && head.values.rows == seen,
              "R \(residual), L \(prompt), n \(step): \(head.keys.tailRows), \(head.values.tailRows)")
          }
        }
      }
    }
  }

  /// (v) D(b/8 + 4/G) bytes a token and head for K and V each, f16 metadata; rows and bytes as predicted.
  @Test(arguments: [2, 3, 4, 8])
  func bytesFollowTheFormula(bits: Int) throws {
    let (dim, group, residual) = (128, 32, 64)
    // The numbers do not matter here, only how many there are.
    let rows = try HeadTensor(
      heads: 2, tokens: 2500, dim: dim, elements: (0..<2 * 2500 * dim).map { Float($0 % 251) / 251 })
    for prompt in [1, 64, 65, 300, 1100, 2500] {
      let cache = try kivi(bits, residual: residual, window: .f16, dim: dim)
      let tokens = try rows.slice(tokens: 0..<prompt)
      try cache.append(tokens, tokens)
      try cache.finishPrefill()
      let keys = prompt / residual * residual
      let values = max(0, prompt - residual)
      var metadata = 0
      for head in try cache.segment.heads {
        for (body, rows) in [(EncodedBody(head.keys), keys), (EncodedBody(head.values), values)] {
          #expect(body.rows == rows)
          #expect(body.payloadBytes + body.metadataBytes == rows * (dim * bits / 8 + dim * 4 / group))
          metadata += body.metadataBytes
        }
      }
      #expect(cache.bytes.metadata >= metadata && cache.bytes.index == 0 && cache.bytes.state == 0)
      #expect(cache.bytes.total == cache.backend.memory.liveBytes)
      #expect(try cache.policy.estimate(shape: cache.shape, prompt: prompt) == cache.bytes)
      // Nothing but the windows' room comes on top.
      let formula = 2 * (keys + values) * (dim * bits / 8 + dim * 4 / group)
      let windows = 2 * 2 * (residual + 64) * dim * 2
      #expect(cache.bytes.total <= formula + windows + 2 * 64 * (dim + dim * 4 / group), "prompt \(prompt)")
    }
  }

  /// Tokens one by one, by threes, by sevens or all at once: the same codes, metadata and dense rows.
  @Test func anyChunksGiveTheSameBytes() throws {
    let (residual, prompt, decoded) = (32, 50, 210)
    let k = try normalTensor(2, prompt + decoded, 16, seed: 1)
    let v = try normalTensor(2, prompt + decoded, 16, seed: 2)
    var wanted: [[EncodedBody]] = []
    var contents: [HeadContents] = []
    for chunk in [1, 3, 7, 32, 33, decoded] {
      for chunkedPrompt in [true, false] {
        let cache = try kivi(residual: residual, window: .f16, dim: 16)
        let first = chunkedPrompt ? min(chunk, prompt) : prompt
        for start in stride(from: 0, to: prompt, by: first) {
          let range = start..<min(start + first, prompt)
          try cache.append(k.slice(tokens: range), v.slice(tokens: range))
          try cache.commit(layer: 0)
        }
        try cache.finishPrefill()
        for start in stride(from: prompt, to: prompt + decoded, by: chunk) {
          let range = start..<min(start + chunk, prompt + decoded)
          try cache.append(k.slice(tokens: range), v.slice(tokens: range))
          try cache.commit(layer: 0)
        }
        let bodies = try cache.segment.heads.map { [EncodedBody($0.keys), EncodedBody($0.values)] }
        let rows = try (0..<2).map { try cache.read(layer: 0, head: $0) }
        if wanted.isEmpty { (wanted, contents) = (bodies, rows) }
        #expect(bodies == wanted && rows == contents, "chunks of \(chunk), prompt chunked: \(chunkedPrompt)")
        for head in try cache.segment.heads {
          #expect(head.keys.tailRows == (prompt + decoded) % residual && head.values.tailRows == residual)
        }
      }
    }
    #expect(wanted[0][0].rows == 256)
  }
}
