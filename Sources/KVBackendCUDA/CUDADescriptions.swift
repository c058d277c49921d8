internal import CKVCUDA
internal import KVCore

/// An attention plan as the kernels read it, in arrays that keep their capacity from call to call.
///
/// A turn is some tokens of one sequence: intermediate results stay small when a prompt is attended. Work is cut by the
/// shapes of one sequence only: the same bits come out alone or in a batch.
struct CUDADescriptions {
  /// Tokens of a turn when rows gather statistics (their logits are kept then), and when they do not.
  private static let scoredTokens = 64
  private static let plainTokens = 256
  /// Query rows beyond which there are blocks enough without cutting the rows.
  private static let manyQueries = 256

  struct Turn {
    var pieces: Range<Int>
    var merges: Range<Int>
    var statistics: Range<Int>
    var longestStatistic = 0
    /// The queries of its tokens: floats of device memory, [KV head][token][group][keyDim].
    var queries: Int
    var sequence: Int
    var tokens: Range<Int>
  }

  private(set) var slices: [kv_slice] = []
  private(set) var works: [kv_work] = []
  private(set) var sequences: [kv_sequence] = []
  private(set) var pieces: [kv_piece] = []
  private(set) var merges: [kv_merge] = []
  private(set) var statistics: [kv_statistic] = []
  private(set) var partials: [UInt64] = []
  private(set) var turns: [Turn] = []
  /// Floats of device memory that the turns need.
  private(set) var floats = 0

  /// - Parameter whole: one turn a sequence, whatever its length.
  mutating func describe(_ plan: AttentionPlan, whole: Bool = false) {
    slices.removeAll(keepingCapacity: true)
    works.removeAll(keepingCapacity: true)
    sequences.removeAll(keepingCapacity: true)
    pieces.removeAll(keepingCapacity: true)
    merges.removeAll(keepingCapacity: true)
    statistics.removeAll(keepingCapacity: true)
    partials.removeAll(keepingCapacity: true)
    turns.removeAll(keepingCapacity: true)
    floats = 0
    for rows in plan.rows {
      works.append(
        kv_work(
          positions: rows.positions.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
          bias: rows.bias.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
          score: rows.score.map { UInt64(UInt(bitPattern: $0)) } ?? 0, first_position: Int64(rows.firstPosition),
          count: UInt32(rows.count), keys: add(rows.keys, plan), key_slices: UInt32(rows.keys.count),
          values: add(rows.values, plan), value_slices: UInt32(rows.values.count)))
    }
    for index in plan.sequences.indices {
      let sequence = plan.sequences[index]
      let scored = sequence.work.contains { plan.rows[$0].score != nil }
      let most = whole ? sequence.tokens : scored ? CUDADescriptions.scoredTokens : CUDADescriptions.plainTokens
      var first = 0
      while first < sequence.tokens {
        let end = min(first + most, sequence.tokens)
        addTurn(first..<end, of: index, plan)
        first = end
      }
    }
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

  private mutating func take(_ count: Int) -> Int {
    let offset = floats
    floats += (count + 63) / 64 * 64
    return offset
  }

  /// Rows of one piece: whole tiles, at most 64 pieces a head.
  private static func pieceRows(_ count: Int, _ sequence: SequenceWork) -> Int {
    let tile = KV_TILE_ROWS
    if sequence.tokens * sequence.group > manyQueries { return max(count, 1) }
    return max(4, (count + 64 * tile - 1) / (64 * tile)) * tile
  }

  private mutating func addTurn(_ tokens: Range<Int>, of index: Int, _ plan: AttentionPlan) {
    let sequence = plan.sequences[index]
    let number = sequences.count
    let m = tokens.count * sequence.group
    let queries = take(sequence.kvHeads * m * sequence.keyDim)
    // Addresses of outputs are known once the memory is; see `CUDABackend.attend`.
    sequences.append(
      kv_sequence(
        output: 0, log_sum_exp: 0,
        first_position: sequence.firstPosition == .max ? .max : Int64(sequence.firstPosition + tokens.lowerBound),
        output_head_stride: 0, output_token_stride: 0, scale: sequence.scale, softcap: sequence.softcap,
        sliding_window: UInt32(sequence.slidingWindow), tokens: UInt32(tokens.count), group: UInt32(sequence.group),
        key_dim: UInt32(sequence.keyDim), value_dim: UInt32(sequence.valueDim)))
    let firsts = (pieces: pieces.count, merges: merges.count, statistics: statistics.count)
    var longest = 0
    var work = sequence.work.lowerBound
    for head in 0..<sequence.kvHeads {
      let firstPartial = partials.count
      let totals = take(2 * m)
      while work < sequence.work.upperBound, plan.rows[work].kvHead == head {
        let rows = plan.rows[work]
        var kept: Int?
        if rows.score != nil, rows.count > 0 {
          // Query rows before the observed ones leave nothing.
          let first = max(0, sequence.observedFrom - tokens.lowerBound) * sequence.group
          if first < m {
            let offset = take(m * rows.count)
            kept = offset
            statistics.append(
              kv_statistic(
                work: UInt32(work), rows: UInt32(m - first), kept: UInt64(offset + first * rows.count),
                totals: UInt64(totals + 2 * first)))
            longest = max(longest, rows.count)
          }
        }
        addPieces(
          of: work, turn: number, sequence, rows: rows.count, m: m,
          queries: queries + head * m * sequence.keyDim, kept: kept)
        work += 1
      }
      for row in 0..<m {
        merges.append(
          kv_merge(
            sequence: UInt32(number), head: UInt32(head), row: UInt32(row),
            partials: UInt32(partials.count - firstPartial), first: UInt64(firstPartial),
            total: UInt64(totals + 2 * row)))
      }
    }
    turns.append(
      Turn(
        pieces: firsts.pieces..<pieces.count, merges: firsts.merges..<merges.count,
        statistics: firsts.statistics..<statistics.count, longestStatistic: longest, queries: queries,
        sequence: index, tokens: tokens))
  }

  private mutating func addPieces(
    of work: Int, turn: Int, _ sequence: SequenceWork, rows: Int, m: Int, queries: Int, kept: Int?
  ) {
    let length = CUDADescriptions.pieceRows(rows, sequence)
    let queryRows = KV_QUERY_ROWS
    let channels = KV_CHANNELS
    for first in stride(from: 0, to: rows, by: length) {
      let partial = take(m * (2 + sequence.valueDim))
      partials.append(UInt64(partial))
      for row in stride(from: 0, to: m, by: queryRows) {
        // Where only weights are wanted there is one block without channels.
        for channel in stride(from: 0, to: max(sequence.valueDim, 1), by: channels) {
          pieces.append(
            kv_piece(
              work: UInt32(work), sequence: UInt32(turn), first: UInt32(first),
              end: UInt32(min(first + length, rows)), row: UInt32(row), rows: UInt32(min(queryRows, m - row)),
              channel: UInt32(channel), channels: UInt32(min(channels, sequence.valueDim - channel)),
              queries: UInt64(queries), partial: UInt64(partial), kept: kept.map(UInt64.init) ?? .max))
        }
      }
    }
  }

  // MARK: Addresses, once they are known

  mutating func setOutput(
    turn: Int, address: UnsafeMutablePointer<Float>, headStride: Int, tokenStride: Int,
    logSumExp: UnsafeMutablePointer<Float>?
  ) {
    sequences[turn].output = UInt64(UInt(bitPattern: address))
    sequences[turn].output_head_stride = Int64(headStride)
    sequences[turn].output_token_stride = Int64(tokenStride)
    sequences[turn].log_sum_exp = logSumExp.map { UInt64(UInt(bitPattern: $0)) } ?? 0
  }

  /// Turns offsets of queries into addresses.
  mutating func setQueries(memory: UnsafeMutablePointer<Float>) {
    for index in pieces.indices {
      pieces[index].queries = UInt64(UInt(bitPattern: memory + Int(pieces[index].queries)))
    }
  }

  /// Queries of one work item that lie somewhere else: those that were turned for it.
  mutating func setQueries(work: Int, turn: Int, address: UnsafeMutablePointer<Float>) {
    for index in turns[turn].pieces where pieces[index].work == work {
      pieces[index].queries = UInt64(UInt(bitPattern: address))
    }
  }
}
