internal import CKVCUDA
internal import KVCore

/// Some tokens of one sequence: queries on their way to the rows, pieces of rows, partials, statistics.
extension CUDADescriptions {
  /// Query rows beyond which there are blocks enough without cutting the rows.
  private static let manyQueries = 256

  /// Rows of one piece: whole tiles, at most 32 pieces a head, which fill a card together with the heads.
  static func pieceRows(_ count: Int, _ sequence: SequenceWork) -> Int {
    let tile = KV_TILE_ROWS
    if sequence.tokens * sequence.group > manyQueries { return max(count, 1) }
    return max(4, (count + 32 * tile - 1) / (32 * tile)) * tile
  }

  mutating func addTurn(_ tokens: Range<Int>, of index: Int, _ plan: AttentionPlan, to wave: inout Wave) {
    let sequence = plan.sequences[index]
    let number = sequences.count
    let m = tokens.count * sequence.group
    wave.queryRows = max(wave.queryRows, m)
    sequences.append(described(tokens, of: index, sequence))
    var work = sequence.work.lowerBound
    for head in 0..<sequence.kvHeads {
      let firstPartial = partials.count
      let totals = take(2 * m)
      let own = self.queries.count
      self.queries.append(queries(head: head, tokens: tokens, sequence, staged: stagedQueries[index]))
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

  /// Some tokens of a sequence as the kernels read them.
  func described(_ tokens: Range<Int>, of index: Int, _ sequence: SequenceWork) -> kv_sequence {
    let stride = outputs[index] < 0 ? sequence.outputTokenStride : sequence.valueDim
    let output =
      outputs[index] < 0
      ? UInt64(UInt(bitPattern: sequence.output + tokens.lowerBound * stride))
      : address(outputs[index] + tokens.lowerBound * stride)
    return kv_sequence(
      output: output, log_sum_exp: logSums[index] < 0 ? 0 : address(logSums[index] + tokens.lowerBound),
      first_position: sequence.firstPosition == .max ? .max : Int64(sequence.firstPosition + tokens.lowerBound),
      output_head_stride: Int64(outputs[index] < 0 ? sequence.outputHeadStride : sequence.tokens * stride),
      output_token_stride: Int64(stride), log_stride: Int64(sequence.tokens), scale: sequence.scale,
      softcap: sequence.softcap, sliding_window: UInt32(sequence.slidingWindow), tokens: UInt32(tokens.count),
      group: UInt32(sequence.group), key_dim: UInt32(sequence.keyDim), value_dim: UInt32(sequence.valueDim),
      all_tokens: UInt32(sequence.tokens), first_token: UInt32(tokens.lowerBound),
      query_place: UInt64(places[index].queries), output_place: UInt64(places[index].outputs))
  }

  /// The queries of one KV head as they lie with the engine, or staged before the descriptions.
  func queries(head: Int, tokens: Range<Int>, _ sequence: SequenceWork, staged: Int) -> kv_queries {
    let headStride = staged < 0 ? sequence.queryHeadStride : sequence.tokens * sequence.keyDim
    let tokenStride = staged < 0 ? sequence.queryTokenStride : sequence.keyDim
    let base = staged < 0 ? UInt64(UInt(bitPattern: sequence.queries)) : region + UInt64(staged)
    let offset = (head * sequence.group * headStride + tokens.lowerBound * tokenStride) * sequence.queryType.byteCount
    return kv_queries(
      base: base + UInt64(offset), shift: 0, token_stride: Int64(tokenStride), member_stride: Int64(headStride),
      type: UInt32(sequence.queryType.rawValue), dim: UInt32(sequence.keyDim), group: UInt32(sequence.group), padding: 0
    )
  }

  mutating func addRows(
    _ work: Int, turn: Int, _ tokens: Range<Int>, _ sequence: SequenceWork, _ plan: AttentionPlan, queries own: Int,
    m: Int, totals: Int, to wave: inout Wave
  ) {
    let rows = plan.rows[work]
    while keptWorks.count <= work { keptWorks.append(KeptWork()) }
    if rows.count == 0 { return }
    var kept: Int?
    if rows.score != nil {
      // Query rows before the observed ones leave nothing.
      let first = max(0, sequence.observedFrom - tokens.lowerBound) * sequence.group
      if first < m {
        // Room for the tokens to come.
        let room = tokens.count == 1 ? CUDADescriptions.keptRows(rows.count) : rows.count
        let offset = take(m * room)
        kept = offset
        keptWorks[work].statistic = statistics.count
        keptWorks[work].room = room
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
    keptWorks[work].ranges = keptRanges.count
    keptWorks[work].walk = walk
    var first = 0
    for index in ranges.indices {
      let range = ranges[index]
      var queries = own
      if range.keys != nil || keyBasis != nil || (rows.shift != 0 && sequence.rotary != nil) {
        queries = prepare(own, rows, keyBasis, map: range.keys, sequence, tokens, m: m)
      }
      let valueMap = sequence.valueDim == 0 ? 0 : range.values.map { tables.address(of: $0) } ?? 0
      let length = CUDADescriptions.pieceRows(range.end - first, sequence)
      let firstPiece = pieces.count
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
      keptRanges.append(
        KeptRange(
          kernel: range.kernel, first: first, end: range.end, length: length, firstPiece: firstPiece,
          pieces: pieces.count - firstPiece))
      first = range.end
    }
    keptWorks[work].rangeCount = ranges.count
  }

  mutating func addPieces(
    _ work: Int, turn: Int, rows: Range<Int>, m: Int, queries: Int, partial: Int, valueDim: Int,
    kept: Int?, kernel: Int
  ) {
    let queryRows = KV_QUERY_ROWS
    let channels = KV_CHANNELS
    for row in stride(from: 0, to: m, by: queryRows) {
      // Where only weights are wanted there is one block without channels.
      for channel in stride(from: 0, to: max(valueDim, 1), by: channels) {
        kernelOfPiece.append(UInt8(truncatingIfNeeded: kernel))
        pieces.append(
          kv_piece(
            work: UInt32(work), sequence: UInt32(turn), first: UInt32(rows.lowerBound), end: UInt32(rows.upperBound),
            row: UInt32(row), rows: UInt32(min(queryRows, m - row)), channel: UInt32(channel),
            channels: UInt32(min(channels, valueDim - channel)), queries: UInt32(queries),
            value_dim: UInt32(valueDim), partial: UInt64(partial), kept: kept.map(UInt64.init) ?? .max))
      }
    }
  }

  /// Queries of one head on their way to rows that lie behind a map, are latents, or count as later.
  mutating func prepare(
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
}
