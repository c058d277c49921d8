internal import CKVCUDA
internal import KVCore

/// An attention plan as the kernels read it, in arrays that keep their capacity from call to call.
///
/// A turn is some tokens of one sequence: intermediate results stay small when a prompt is attended. The turns of all
/// sequences that can run at once are a wave: one launch of each kernel. Work is cut by the shapes of one sequence only:
/// the same bits come out alone or in a batch.
///
/// Addresses are those of the memory there is. Where it turns out too small the caller makes it larger and describes
/// again.
struct CUDADescriptions {
  /// Tokens of a turn when rows gather statistics (their logits are kept then), and when they do not.
  private static let scoredTokens = 64
  private static let plainTokens = 256
  /// The kernel that takes any rows, then those for dense rows and for codes of one length.
  static let attentionKernels: [CUDAKernel] = [
    .attend, .decodeHalf64, .decodeHalf128, .decodeBfloat64, .decodeBfloat128, .decodeCodes2, .decodeCodes4,
    .decodeCodes8,
  ]
  /// Query rows beyond which there are blocks enough without cutting the rows.
  private static let manyQueries = 256

  struct Wave {
    var phases = 0..<0
    /// Pieces from here on, and how many of them each kernel of `attentionKernels` takes, in their order.
    var firstPiece = 0
    var pieces = SIMD8<Int>()
    var restores = 0..<0
    var merges = 0..<0
    var statistics = 0..<0
    /// The most query rows of a turn, and the most rows of a statistic.
    var queryRows = 0
    var longestStatistic = 0
  }

  /// Keys that are turned to their positions after they are read: rows of f32 in device memory, before anything else.
  struct RestoredRows {
    /// Rows as they are encoded, and where they go as f32, `width` channels each; restored once for all that share them.
    var slices: Range<Int>
    var rows: Int
    var width: Int
    var table: UInt64
    var isFirst: Bool
    /// Rows behind a map each, in order.
    var maps: [(rows: Range<Int>, map: kv_map)]
    /// What latents are multiplied by; nil: the channels from `channel` on are the keys.
    var basis: kv_basis?
    var channel: Int
    var dim: Int
    var positions: UInt64
    var firstPosition: Int64
    var rotary: kv_rotary
    var target: UInt64
  }

  /// Rows that lie as directions with a length each: made into rows of f32 in device memory, before anything else.
  struct ScaledRows {
    var directions: Range<Int>
    var maps: [(rows: Range<Int>, map: kv_map)]
    var rows: Int
    var dim: Int
    var lengths: Range<Int>
    var target: UInt64
    /// Rows that take the place of some of them, and where those go as f32 first.
    var exact: Range<Int>
    var exactMaps: [(rows: Range<Int>, map: kv_map)]
    var exactRows: Int
    var exactTable: UInt64
    var slots: UInt64
    var offset: Int32
  }

  /// What the caller knows of memory: which addresses kernels can reach.
  struct Staging {
    /// Queries of the sequence are copied behind the descriptions.
    var queries = false
    var output = false
    var scores = false
  }

  private(set) var slices: [kv_slice] = []
  private(set) var works: [kv_work] = []
  private(set) var sequences: [kv_sequence] = []
  private(set) var queries: [kv_queries] = []
  private(set) var phases: [kv_phase] = []
  private(set) var pieces: [kv_piece] = []
  private(set) var restores: [kv_restore] = []
  private(set) var merges: [kv_merge] = []
  private(set) var statistics: [kv_statistic] = []
  private(set) var partials: [UInt64] = []
  /// Maps, bases, rotary embeddings and their numbers; they lie behind the staged queries, before everything else.
  private(set) var tables = CUDATables()
  private(set) var waves: [Wave] = []
  private(set) var restored: [RestoredRows] = []
  private(set) var scaled: [ScaledRows] = []
  /// Floats of device memory: what all waves share, and the largest wave behind it.
  private(set) var sharedFloats = 0
  private(set) var floats = 0
  /// Bytes of queries that are copied with the descriptions, and where those of each sequence begin.
  private(set) var queryBytes = 0
  private(set) var stagedQueries: [Int] = []
  /// Where each sequence's staged output and log sums lie in the shared floats; -1: not staged.
  private(set) var outputs: [Int] = []
  private(set) var logSums: [Int] = []
  /// (work, float offset) of staged scores.
  private(set) var scores: [(work: Int, offset: Int)] = []
  /// The part of the shared floats that goes back to the host.
  private(set) var results = 0..<0

  /// Elements of queries and outputs of the sequences before each.
  private var places: [(queries: Int, outputs: Int)] = []
  private var staging: [Staging] = []
  private var memory: UInt64 = 0
  private var region: UInt64 = 0
  /// Rows of one work item that one kernel takes behind one pair of maps.
  private struct RowRange {
    var keys: UnsafePointer<MapDescriptor>?
    var values: UnsafePointer<MapDescriptor>?
    var kernel: Int
    var end: Int
  }

  private var ranges: [RowRange] = []
  /// Pieces of the wave that is being described, by kernel.
  private var pending: [[kv_piece]] = Array(repeating: [], count: attentionKernels.count)
  /// Queries of the current head that were prepared: for the map, the basis and the shift of some rows.
  private var prepared: [(map: UInt64, basis: UInt64, shift: Int, queries: Int)] = []
  private var waveFloats = 0

  private mutating func clear() {
    slices.removeAll(keepingCapacity: true)
    works.removeAll(keepingCapacity: true)
    sequences.removeAll(keepingCapacity: true)
    queries.removeAll(keepingCapacity: true)
    phases.removeAll(keepingCapacity: true)
    pieces.removeAll(keepingCapacity: true)
    restores.removeAll(keepingCapacity: true)
    merges.removeAll(keepingCapacity: true)
    statistics.removeAll(keepingCapacity: true)
    partials.removeAll(keepingCapacity: true)
    stagedQueries.removeAll(keepingCapacity: true)
    waves.removeAll(keepingCapacity: true)
    restored.removeAll(keepingCapacity: true)
    scaled.removeAll(keepingCapacity: true)
    outputs.removeAll(keepingCapacity: true)
    logSums.removeAll(keepingCapacity: true)
    scores.removeAll(keepingCapacity: true)
    places.removeAll(keepingCapacity: true)
    queryBytes = 0
    sharedFloats = 0
    waveFloats = 0
    floats = 0
  }

  /// - Parameters:
  ///   - memory: the device memory that offsets of floats count in.
  ///   - region: the device memory these descriptions will be copied to.
  ///   - whole: one turn a sequence, whatever its length.
  mutating func describe(
    _ plan: AttentionPlan, staging: [Staging], memory: UnsafeMutableRawPointer, region: UnsafeMutableRawPointer,
    whole: Bool = false
  ) {
    clear()
    self.staging = staging
    self.memory = UInt64(UInt(bitPattern: memory))
    self.region = UInt64(UInt(bitPattern: region))
    var place = (queries: 0, outputs: 0)
    for index in plan.sequences.indices {
      stage(index, plan)
      places.append(place)
      let sequence = plan.sequences[index]
      place.queries += sequence.kvHeads * sequence.group * sequence.tokens * sequence.keyDim
      place.outputs += sequence.kvHeads * sequence.group * sequence.tokens * sequence.valueDim
    }
    results = 0..<sharedFloats
    tables.begin(at: self.region + UInt64(queryBytes))
    for index in plan.sequences.indices {
      for work in plan.sequences[index].work { addWork(work, of: index, plan) }
    }
    // The turns of a sequence add to the same statistics: only those of different sequences run at once.
    var first = Array(repeating: 0, count: plan.sequences.count)
    while true {
      waveFloats = sharedFloats
      let before = (phases.count, restores.count, merges.count, statistics.count)
      var wave = Wave()
      var any = false
      for index in plan.sequences.indices where first[index] < plan.sequences[index].tokens {
        let sequence = plan.sequences[index]
        let scored = sequence.work.contains { plan.rows[$0].score != nil }
        let most = whole ? sequence.tokens : scored ? CUDADescriptions.scoredTokens : CUDADescriptions.plainTokens
        let end = min(first[index] + most, sequence.tokens)
        addTurn(first[index]..<end, of: index, plan, to: &wave)
        first[index] = end
        any = true
      }
      if !any { break }
      floats = max(floats, waveFloats)
      wave.phases = before.0..<phases.count
      wave.restores = before.1..<restores.count
      wave.merges = before.2..<merges.count
      wave.statistics = before.3..<statistics.count
      wave.firstPiece = pieces.count
      for kernel in pending.indices {
        wave.pieces[kernel] = pending[kernel].count
        pieces += pending[kernel]
        pending[kernel].removeAll(keepingCapacity: true)
      }
      waves.append(wave)
    }
    floats = max(floats, sharedFloats)
  }

  private mutating func share(_ count: Int) -> Int {
    let offset = sharedFloats
    sharedFloats += (count + 63) / 64 * 64
    return offset
  }

  private mutating func take(_ count: Int) -> Int {
    let offset = waveFloats
    waveFloats += (count + 63) / 64 * 64
    return offset
  }

  private func address(_ offset: Int) -> UInt64 { memory + UInt64(offset * 4) }

  private mutating func stage(_ index: Int, _ plan: AttentionPlan) {
    let sequence = plan.sequences[index]
    let heads = sequence.kvHeads * sequence.group
    stagedQueries.append(staging[index].queries ? queryBytes : -1)
    if staging[index].queries {
      queryBytes += (heads * sequence.tokens * sequence.keyDim * sequence.queryType.byteCount + 255) / 256 * 256
    }
    outputs.append(staging[index].output ? share(heads * sequence.tokens * sequence.valueDim) : -1)
    logSums.append(sequence.logSumExp == nil ? -1 : share(heads * sequence.tokens))
    if !staging[index].scores { return }
    for work in sequence.work where plan.rows[work].score != nil && plan.rows[work].count > 0 {
      scores.append((work, share(plan.rows[work].count)))
    }
  }

  // MARK: Rows

  private mutating func addWork(_ index: Int, of sequence: Int, _ plan: AttentionPlan) {
    let rows = plan.rows[index]
    var positions = rows.positions.map { UInt64(UInt(bitPattern: $0)) } ?? 0
    var first = Int64(rows.firstPosition)
    if let last = rows.positions.map({ Int($0[max(rows.count, 1) - 1]) }),
      plan.sequences[sequence].slidingWindow == 0, rows.count > 0,
      max(last, rows.highest) <= plan.sequences[sequence].firstPosition
    {
      // Every query sees all of them, as nearly always while decoding: positions need not be read.
      positions = 0
      first = -Int64(Int32.max)
    }
    var work = kv_work(
      positions: positions, bias: rows.bias.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
      score: rows.score.map { UInt64(UInt(bitPattern: $0)) } ?? 0, first_position: first, count: UInt32(rows.count),
      keys: add(rows.keys, plan), key_slices: UInt32(rows.keys.count), values: add(rows.values, plan),
      value_slices: UInt32(rows.values.count), padding: 0)
    if let lowRank = rows.lowRank, lowRank.turnsKeys, let rotary = lowRank.rotary, rows.count > 0 {
      let target = address(share(rows.count * plan.sequences[sequence].keyDim))
      restoreKeys(of: rows, lowRank, rotary, plan, at: Int(work.keys), to: target, dim: plan.sequences[sequence].keyDim)
      work.keys = UInt32(slices.count)
      work.key_slices = 1
      slices.append(
        kv_slice(
          data: target, scale: 0, min: 0, kind: 0, code: 0, dtype: 0, bits: 32, group: 1, factor: 1,
          dim: UInt32(plan.sequences[sequence].keyDim), first: 0, count: UInt32(rows.count), start: 0))
    }
    if let factored = rows.factored, rows.count > 0 {
      work.keys = scale(rows, rows.keys, factored.keys, plan)
      work.key_slices = 1
      if plan.sequences[sequence].valueDim > 0 {
        work.values = scale(rows, rows.values, factored.values, plan)
        work.value_slices = 1
      }
    }
    works.append(work)
  }

  /// Directions of one side to rows; returns the slice that describes them.
  private mutating func scale(
    _ rows: RowsWork, _ list: Range<Int>, _ side: FactoredRows.Side, _ plan: AttentionPlan
  ) -> UInt32 {
    let dim = list.first.map { plan.slices[$0].run.dim } ?? 0
    let exactRows = side.slots == nil ? 0 : side.count
    let target = address(share(rows.count * dim))
    let (directions, lengths) = (Int(add(list, plan)), Int(add(side.lengths, plan)))
    let exact = Int(add(side.exact, plan))
    scaled.append(
      ScaledRows(
        directions: directions..<directions + list.count, maps: maps(of: list, plan), rows: rows.count, dim: dim,
        lengths: lengths..<lengths + side.lengths.count, target: target, exact: exact..<exact + side.exact.count,
        exactMaps: maps(of: side.exact, plan), exactRows: exactRows, exactTable: address(share(exactRows * dim)),
        slots: side.slots.map { UInt64(UInt(bitPattern: $0)) } ?? 0, offset: Int32(side.offset)))
    slices.append(
      kv_slice(
        data: target, scale: 0, min: 0, kind: 0, code: 0, dtype: 0, bits: 32, group: 1, factor: 1, dim: UInt32(dim),
        first: 0, count: UInt32(rows.count), start: 0))
    return UInt32(slices.count - 1)
  }

  /// Which rows of a list lie behind a map.
  private mutating func maps(of list: Range<Int>, _ plan: AttentionPlan) -> [(rows: Range<Int>, map: kv_map)] {
    var result: [(rows: Range<Int>, map: kv_map)] = []
    var start = 0
    for index in list {
      let end = start + plan.slices[index].count
      if let map = plan.slices[index].run.map { result.append((start..<end, tables.map(map))) }
      start = end
    }
    return result
  }

  private mutating func restoreKeys(
    of rows: RowsWork, _ lowRank: LowRankRows, _ rotary: RotaryEmbedding, _ plan: AttentionPlan, at first: Int,
    to target: UInt64, dim: Int
  ) {
    guard let slice = rows.keys.first else { return }
    let width = plan.slices[slice].run.dim
    let list = first..<first + rows.keys.count
    // Keys of several heads side by side are the same rows for each of them.
    let shared = restored.first {
      $0.rows == rows.count && slices[$0.slices.lowerBound].data == slices[first].data
        && slices[$0.slices.lowerBound].first == slices[first].first
    }
    let maps = shared == nil ? maps(of: rows.keys, plan) : []
    restored.append(
      RestoredRows(
        slices: list, rows: rows.count, width: width, table: shared?.table ?? address(share(rows.count * width)),
        isFirst: shared == nil, maps: maps, basis: lowRank.keyBasis?.kernelBasis(mean: lowRank.keyMean),
        channel: lowRank.keyChannels?.lowerBound ?? 0, dim: dim,
        positions: rows.positions.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
        firstPosition: Int64(rows.firstPosition), rotary: tables.rotary(rotary, rounded: false), target: target))
  }

  /// Appends the slices of one list, each knowing the rows before it; returns where they begin.
  private mutating func add(_ list: Range<Int>, _ plan: AttentionPlan) -> UInt32 {
    let begin = slices.count
    var start = 0
    for index in list {
      slices.append(plan.slices[index].kernelSlice(start: start))
      start += plan.slices[index].count
    }
    return UInt32(begin)
  }

  /// Ranges of rows whose keys lie behind one map, their values behind one, and which one kernel takes.
  private mutating func findRanges(_ rows: RowsWork, _ plan: AttentionPlan, _ sequence: SequenceWork) {
    ranges.removeAll(keepingCapacity: true)
    if rows.factored != nil {
      ranges.append(RowRange(keys: nil, values: nil, kernel: 0, end: rows.count))
      return
    }
    let isRestored = rows.lowRank?.turnsKeys ?? false
    var key = rows.keys.lowerBound
    var value = rows.values.lowerBound
    var keyEnd = isRestored || rows.keys.isEmpty ? rows.count : plan.slices[key].count
    var valueEnd = rows.values.isEmpty ? rows.count : plan.slices[value].count
    while true {
      let end = min(keyEnd, valueEnd)
      var range = RowRange(
        keys: isRestored || rows.keys.isEmpty ? nil : plan.slices[key].run.map,
        values: rows.values.isEmpty ? nil : plan.slices[value].run.map, kernel: 0, end: end)
      if rows.lowRank == nil, !rows.keys.isEmpty, !rows.values.isEmpty, sequence.valueDim == sequence.keyDim {
        // Where this range begins, in the work item and in the slice of its keys.
        let start = ranges.last?.end ?? 0
        range.kernel = CUDADescriptions.kernel(
          plan.slices[key], plan.slices[value], start: start,
          keyStart: keyEnd - plan.slices[key].count, after: ranges.last?.kernel)
      }
      if let last = ranges.last, last.keys == range.keys, last.values == range.values, last.kernel == range.kernel {
        ranges[ranges.count - 1].end = end
      } else {
        ranges.append(range)
      }
      if end >= rows.count { return }
      if keyEnd == end {
        key += 1
        keyEnd += plan.slices[key].count
      }
      if valueEnd == end {
        value += 1
        valueEnd += plan.slices[value].count
      }
    }
  }

  /// Which kernel attends over such rows, an index of `attentionKernels`.
  ///
  /// - Parameters:
  ///   - start: where these rows begin in their work item, `keyStart` where the slice of keys does.
  ///   - kernel: which takes the rows before them.
  private static func kernel(
    _ keySlice: RunSlice, _ valueSlice: RunSlice, start: Int, keyStart: Int, after kernel: Int?
  ) -> Int {
    let (keys, values) = (keySlice.run, valueSlice.run)
    guard keys.dim == values.dim, keys.map == nil, values.map == nil else { return 0 }
    if keys.encoding.kind == .affinePerChannel {
      let bits = keys.encoding.bits
      guard values.encoding.kind == .affinePerToken, values.encoding.bits == bits, keys.dim == 128,
        keys.encoding.type == .f16, values.encoding.type == .f16, values.encoding.group % 32 == 0,
        keySlice.first % 32 == 0, keyStart % 32 == 0
      else { return 0 }
      let own = bits == 2 ? 5 : bits == 4 ? 6 : bits == 8 ? 7 : 0
      // A range may go on anywhere, but begins with a block of 32 rows.
      return start % 32 == 0 || kernel == own ? own : 0
    }
    guard keys.encoding == values.encoding, keys.encoding.kind == .dense else { return 0 }
    switch (keys.encoding.type, keys.dim) {
    case (.f16, 64): return 1
    case (.f16, 128): return 2
    case (.bf16, 64): return 3
    case (.bf16, 128): return 4
    default: return 0
    }
  }

  // MARK: Turns

  /// Rows of one piece: whole tiles, at most 32 pieces a head, which fill a card together with the heads.
  private static func pieceRows(_ count: Int, _ sequence: SequenceWork) -> Int {
    let tile = KV_TILE_ROWS
    if sequence.tokens * sequence.group > manyQueries { return max(count, 1) }
    return max(4, (count + 32 * tile - 1) / (32 * tile)) * tile
  }

  private mutating func addTurn(_ tokens: Range<Int>, of index: Int, _ plan: AttentionPlan, to wave: inout Wave) {
    let sequence = plan.sequences[index]
    let number = sequences.count
    let m = tokens.count * sequence.group
    wave.queryRows = max(wave.queryRows, m)
    let stride = outputs[index] < 0 ? sequence.outputTokenStride : sequence.valueDim
    let output =
      outputs[index] < 0
      ? UInt64(UInt(bitPattern: sequence.output + tokens.lowerBound * stride))
      : address(outputs[index] + tokens.lowerBound * stride)
    sequences.append(
      kv_sequence(
        output: output, log_sum_exp: logSums[index] < 0 ? 0 : address(logSums[index] + tokens.lowerBound),
        first_position: sequence.firstPosition == .max ? .max : Int64(sequence.firstPosition + tokens.lowerBound),
        output_head_stride: Int64(outputs[index] < 0 ? sequence.outputHeadStride : sequence.tokens * stride),
        output_token_stride: Int64(stride), log_stride: Int64(sequence.tokens), scale: sequence.scale,
        softcap: sequence.softcap, sliding_window: UInt32(sequence.slidingWindow), tokens: UInt32(tokens.count),
        group: UInt32(sequence.group), key_dim: UInt32(sequence.keyDim), value_dim: UInt32(sequence.valueDim),
        all_tokens: UInt32(sequence.tokens), first_token: UInt32(tokens.lowerBound),
        query_place: UInt64(places[index].queries), output_place: UInt64(places[index].outputs)))
    var work = sequence.work.lowerBound
    for head in 0..<sequence.kvHeads {
      let firstPartial = partials.count
      let totals = take(2 * m)
      let own = addQueries(head: head, tokens: tokens, sequence, staged: stagedQueries[index])
      prepared.removeAll(keepingCapacity: true)
      while work < sequence.work.upperBound, plan.rows[work].kvHead == head {
        addRows(work, turn: number, tokens, sequence, plan, queries: own, m: m, totals: totals, to: &wave)
        work += 1
      }
      for row in 0..<m {
        merges.append(
          kv_merge(
            sequence: UInt32(number), head: UInt32(head), row: UInt32(row),
            partials: UInt32(partials.count - firstPartial), first: UInt64(firstPartial),
            total: UInt64(totals + 2 * row), queries: UInt32(own), padding: 0))
      }
    }
  }

  /// The queries of one KV head as they lie with the engine, or staged before the descriptions.
  private mutating func addQueries(
    head: Int, tokens: Range<Int>, _ sequence: SequenceWork, staged: Int
  ) -> Int {
    let headStride = staged < 0 ? sequence.queryHeadStride : sequence.tokens * sequence.keyDim
    let tokenStride = staged < 0 ? sequence.queryTokenStride : sequence.keyDim
    let base = staged < 0 ? UInt64(UInt(bitPattern: sequence.queries)) : region + UInt64(staged)
    let offset = (head * sequence.group * headStride + tokens.lowerBound * tokenStride) * sequence.queryType.byteCount
    queries.append(
      kv_queries(
        base: base + UInt64(offset), shift: 0, token_stride: Int64(tokenStride), member_stride: Int64(headStride),
        type: UInt32(sequence.queryType.rawValue), dim: UInt32(sequence.keyDim), group: UInt32(sequence.group),
        padding: 0))
    return queries.count - 1
  }

  private mutating func addRows(
    _ work: Int, turn: Int, _ tokens: Range<Int>, _ sequence: SequenceWork, _ plan: AttentionPlan, queries own: Int,
    m: Int, totals: Int, to wave: inout Wave
  ) {
    let rows = plan.rows[work]
    if rows.count == 0 { return }
    var kept: Int?
    if rows.score != nil {
      // Query rows before the observed ones leave nothing.
      let first = max(0, sequence.observedFrom - tokens.lowerBound) * sequence.group
      if first < m {
        let offset = take(m * rows.count)
        kept = offset
        let place = scores.first { $0.work == work }?.offset
        let isFirst = max(sequence.observedFrom, 0) >= tokens.lowerBound
        statistics.append(
          kv_statistic(
            score: place.map { address($0) } ?? works[work].score, kept: UInt64(offset + first * rows.count),
            totals: UInt64(totals + 2 * first), count: UInt32(rows.count), rows: UInt32(m - first),
            reduction: sequence.reduction == .max ? 1 : 0, fresh: place != nil && isFirst ? 1 : 0, shares: 0,
            entropy: 0, variance: 0, past: 0, padding: 0))
        wave.longestStatistic = max(wave.longestStatistic, rows.count)
      }
    }
    let isRestored = rows.lowRank?.turnsKeys ?? false
    let keyBasis = isRestored ? nil : rows.lowRank?.keyBasis
    let valueBasis = sequence.valueDim == 0 ? nil : rows.lowRank?.valueBasis
    let valueDim = valueBasis?.capacity ?? sequence.valueDim
    findRanges(rows, plan, sequence)
    var first = 0
    for index in ranges.indices {
      let range = ranges[index]
      var queries = own
      if range.keys != nil || keyBasis != nil || (rows.shift != 0 && sequence.rotary != nil) {
        queries = prepare(own, rows, keyBasis, map: range.keys, sequence, tokens, m: m)
      }
      let valueMap = sequence.valueDim == 0 ? 0 : range.values.map { tables.address(of: $0) } ?? 0
      let length = CUDADescriptions.pieceRows(range.end - first, sequence)
      for start in stride(from: first, to: range.end, by: length) {
        let partial = take(m * (2 + valueDim))
        var final = partial
        if valueMap != 0 || valueBasis != nil {
          if valueBasis != nil { final = take(m * (2 + sequence.valueDim)) }
          restores.append(
            kv_restore(
              from: UInt64(partial), to: UInt64(final), map: valueMap,
              basis: valueBasis.map { tables.address(of: $0, mean: rows.lowRank?.valueMean) } ?? 0, rows: UInt32(m),
              dim: UInt32(valueDim)))
        }
        partials.append(UInt64(final))
        addPieces(
          work, turn: turn, rows: start..<min(start + length, range.end), m: m, queries: queries, partial: partial,
          valueDim: valueDim, kept: kept, kernel: range.kernel)
      }
      first = range.end
    }
  }

  private mutating func addPieces(
    _ work: Int, turn: Int, rows: Range<Int>, m: Int, queries: Int, partial: Int, valueDim: Int,
    kept: Int?, kernel: Int
  ) {
    let queryRows = KV_QUERY_ROWS
    let channels = KV_CHANNELS
    for row in stride(from: 0, to: m, by: queryRows) {
      // Where only weights are wanted there is one block without channels.
      for channel in stride(from: 0, to: max(valueDim, 1), by: channels) {
        pending[kernel].append(
          kv_piece(
            work: UInt32(work), sequence: UInt32(turn), first: UInt32(rows.lowerBound), end: UInt32(rows.upperBound),
            row: UInt32(row), rows: UInt32(min(queryRows, m - row)), channel: UInt32(channel),
            channels: UInt32(min(channels, valueDim - channel)), queries: UInt32(queries),
            value_dim: UInt32(valueDim), partial: UInt64(partial), kept: kept.map(UInt64.init) ?? .max))
      }
    }
  }

  /// Queries of one head on their way to rows that lie behind a map, are latents, or count as later.
  private mutating func prepare(
    _ own: Int, _ rows: RowsWork, _ basis: RowRun?, map: UnsafePointer<MapDescriptor>?, _ sequence: SequenceWork,
    _ tokens: Range<Int>, m: Int
  ) -> Int {
    let later = sequence.rotary == nil ? 0 : rows.shift
    let mapAddress = map.map { tables.address(of: $0) } ?? 0
    let basisAddress = basis.map { tables.address(of: $0, mean: rows.lowRank?.keyMean) } ?? 0
    if let known = prepared.first(where: {
      $0.map == mapAddress && $0.basis == basisAddress && $0.shift == later
    }) {
      return known.queries
    }
    let dim = basis?.capacity ?? sequence.keyDim
    let target = take(m * dim)
    let isShifted = map?.pointee.offsets != nil || (basis != nil && rows.lowRank?.keyMean != nil)
    let to = kv_queries(
      base: address(target), shift: isShifted ? address(take(m)) : 0, token_stride: Int64(sequence.group * dim),
      member_stride: Int64(dim), type: 0, dim: UInt32(dim), group: UInt32(sequence.group), padding: 0)
    var rotary: UInt64 = 0
    if later != 0, let own = sequence.rotary {
      rotary = tables.address(of: own, rounded: own.angleProduct == .f32)
    }
    phases.append(
      kv_phase(
        from: queries[own], to: to, map: mapAddress, basis: basisAddress, rotary: rotary,
        position: sequence.firstPosition == .max ? .max : Int64(sequence.firstPosition + tokens.lowerBound),
        later: Int64(later), scale: sequence.scale, rows: UInt32(m)))
    queries.append(to)
    prepared.append((mapAddress, basisAddress, later, queries.count - 1))
    return queries.count - 1
  }

  /// Elements of queries of the sequences before this one.
  func queryPlace(_ index: Int) -> UInt64 { UInt64(places[index].queries) }

  /// The element that a kernel put on record, counted through all sequences.
  func fault(_ place: UInt64, isQuery: Bool, _ plan: AttentionPlan) -> AttentionFault? {
    if place == .max { return nil }
    let place = Int(place)
    func first(_ index: Int) -> Int { isQuery ? places[index].queries : places[index].outputs }
    guard let index = places.indices.last(where: { first($0) <= place }) else { return nil }
    let sequence = plan.sequences[index]
    let dim = isQuery ? sequence.keyDim : sequence.valueDim
    let row = (place - first(index)) / dim
    return AttentionFault(
      sequence: index, isQuery: isQuery,
      place: ElementPlace(
        head: row / sequence.tokens, token: row % sequence.tokens, channel: (place - first(index)) % dim))
  }

  /// Windows: what of a statistic lies behind the descriptions.
  mutating func setWindow(_ index: Int, shares: UInt64, entropy: UInt64, variance: UInt64, past: Int) {
    statistics[index].shares = shares
    statistics[index].entropy = entropy
    statistics[index].variance = variance
    statistics[index].past = UInt32(past)
  }
}

extension LowRankRows {
  /// Whether keys are rows only after they were turned to their positions.
  var turnsKeys: Bool { rotary != nil && (keyBasis != nil || keyChannels != nil) }
}
