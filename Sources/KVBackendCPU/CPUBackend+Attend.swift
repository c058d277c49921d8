internal import CKVKernels
package import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// Attention of a plan. Two shapes of work:
///
/// - few queries (decoding, drafts): one item per piece of rows of one head, partials merged afterwards in row order;
/// - many queries (prefill): one item per block of queries of one head, which walks all rows.
///
/// How work is cut depends on the shapes of one sequence only, never on threads or on the rest of a batch: the same bits
/// come out of any thread count, alone or in a batch.
extension CPUBackend {
  /// Queries up to which rows are split between items.
  private static let fewQueries = 32

  package func attend(_ plan: AttentionPlan) throws(KVError) {
    for index in plan.sequences.indices where plan.sequences[index].tokens > CPUBackend.fewQueries {
      attendMany(plan, sequence: index)
    }
    attendFew(plan)
  }

  // MARK: Few queries

  /// One piece of rows of one head of one sequence.
  private struct Piece: BitwiseCopyable {
    var sequence: Int
    var work: Int
    var first: Int
    var end: Int
    /// Offsets in the workspace, in floats.
    var queries: Int
    var partial: Int
    /// Exponentials of the whole head, when statistics are wanted.
    var kept: Int
    var keptMaxima: Int
    var keptStride: Int
    var keptOffset: Int
    /// The piece of another head that reads the same rows, after this one; -1: none.
    var sibling = -1
    /// Whether an earlier piece does this one's work.
    var isLed = false
    /// Behind the last piece of a head that this one leads; 0: each piece for itself.
    var headEnd = 0

    var range: Range<Int> { first..<end }
  }

  /// Rows of one item: at least a block, at most 32 items a head.
  private static func pieceRows(_ count: Int) -> Int {
    let blocks = (count + blockRows - 1) / blockRows
    return max(1, (blocks + 31) / 32) * blockRows
  }

  private func attendFew(_ plan: AttentionPlan) {
    var pieceCount = 0
    for sequence in plan.sequences where sequence.tokens <= CPUBackend.fewQueries {
      for index in sequence.work {
        let rows = CPUBackend.pieceRows(plan.rows[index].count)
        pieceCount += (plan.rows[index].count + rows - 1) / rows
      }
    }
    let pieces = UnsafeMutableBufferPointer(
      start: plan.bookkeeping.values(of: Piece.self, count: pieceCount), count: max(pieceCount, 1))
    var layout = Layout()
    var scratchFloats = 0
    var keptFloats = 0
    var filled = 0
    let takesHeads = takesHeads(plan)
    for (index, sequence) in plan.sequences.enumerated() where sequence.tokens <= CPUBackend.fewQueries {
      scratchFloats = max(
        scratchFloats,
        RowAttention.floats(
          rows: sequence.tokens * sequence.group, keyDim: sequence.keyDim, valueDim: sequence.valueDim)
          + LatentSpace.floats(plan, sequence))
      addPieces(
        of: index, plan, to: pieces, filled: &filled, layout: &layout, takesHeads: takesHeads, kept: &keptFloats)
    }
    linkSiblings(pieces, count: filled, plan)
    let workers = min(threads, max(filled, 1))
    let scratch = layout.take(workers * scratchFloats)
    let kept = layout.take(workers * keptFloats)
    let memory = plan.workspace.floats(layout.total)

    // Queries in f32, contiguous per head, turned for the rows they meet.
    for piece in 0..<filled where piece == 0 || pieces[piece].work != pieces[piece - 1].work {
      loadQueries(
        plan.sequences[pieces[piece].sequence], work: plan.rows[pieces[piece].work],
        tokens: 0..<plan.sequences[pieces[piece].sequence].tokens, into: memory + pieces[piece].queries)
    }
    plan.slices.withUnsafeBufferPointer { slices in
      guard let base = slices.baseAddress else { return }
      let view = AttentionPlanView(slices: base)
      parallel(filled) { worker, item in
        let own = memory + scratch + worker * scratchFloats
        if pieces[item].isLed { return }
        if pieces[item].headEnd > 0 {
          addHead(item, pieces, plan, view, memory, kept: kept + worker * keptFloats, scratch: own)
        } else if pieces[item].sibling < 0 {
          addPiece(pieces[item], plan, view, memory, scratch: own)
        } else {
          addPieces(from: item, pieces, plan, view, memory, scratch: own)
        }
      }
    }
    var start = 0
    while start < filled {
      let work = plan.rows[pieces[start].work]
      var end = start
      while end < filled, pieces[end].sequence == pieces[start].sequence,
        plan.rows[pieces[end].work].kvHead == work.kvHead
      {
        end += 1
      }
      if pieces[start].headEnd == 0 { finishHead(pieces[start..<end], plan, memory) }
      start = end
    }
    zeroHeadsWithoutRows(plan)
  }

  /// Whether one worker goes through all pieces of a head whose weights are kept: they are then added up before other
  /// rows have driven them out of its caches, and need memory once a worker instead of once a head. The results are those
  /// of pieces apart.
  private func takesHeads(_ plan: AttentionPlan) -> Bool {
    var heads = 0
    for sequence in plan.sequences where sequence.tokens <= CPUBackend.fewQueries { heads += sequence.kvHeads }
    return threads == 1 || heads >= 2 * threads
  }

  private func addPieces(
    of index: Int, _ plan: AttentionPlan, to pieces: UnsafeMutableBufferPointer<Piece>, filled: inout Int,
    layout: inout Layout, takesHeads: Bool, kept keptFloats: inout Int
  ) {
    let sequence = plan.sequences[index]
    let m = sequence.tokens * sequence.group
    var start = sequence.work.lowerBound
    while start < sequence.work.upperBound {
      let head = plan.rows[start].kvHead
      var end = start
      var padded = 0
      var scored = false
      // Rows that are decoded for several heads at once are not taken head by head.
      var joined = false
      while end < sequence.work.upperBound, plan.rows[end].kvHead == head {
        padded += CPUBackend.padded(plan.rows[end].count)
        scored = scored || plan.rows[end].score != nil
        joined = joined || plan.rows[end].lowRank?.keyChannels != nil
        end += 1
      }
      let whole = scored && takesHeads && !joined
      var (kept, keptMaxima) = (scored ? 0 : -1, m * padded)
      if whole {
        keptFloats = max(keptFloats, (m * padded + m * padded / blockRows + 15) / 16 * 16)
      } else if scored {
        kept = layout.take(m * padded)
        keptMaxima = layout.take(m * padded / blockRows)
      }
      let leader = filled
      var offset = 0
      for work in start..<end {
        let count = plan.rows[work].count
        let queries = layout.take(m * sequence.keyDim)
        let rows = CPUBackend.pieceRows(count)
        for first in stride(from: 0, to: count, by: rows) {
          pieces.initializeElement(
            at: filled,
            to: Piece(
              sequence: index, work: work, first: first, end: min(first + rows, count), queries: queries,
              partial: layout.take(PartialBlock.floats(rows: m, valueDim: sequence.valueDim)), kept: kept,
              keptMaxima: keptMaxima, keptStride: padded, keptOffset: offset))
          pieces[filled].isLed = whole && filled > leader
          filled += 1
        }
        offset += CPUBackend.padded(count)
      }
      if whole, filled > leader { pieces[leader].headEnd = filled }
      start = end
    }
  }

  /// Joins pieces of several heads that read the same memory: keys side by side are decoded for all of them at once, and
  /// latents meet the queries of all.
  private func linkSiblings(_ pieces: UnsafeMutableBufferPointer<Piece>, count: Int, _ plan: AttentionPlan) {
    for index in 0..<count where !pieces[index].isLed {
      let work = plan.rows[pieces[index].work]
      guard let lowRank = work.lowRank, lowRank.keyChannels != nil || work.joinsLatents else { continue }
      let sequence = plan.sequences[pieces[index].sequence]
      let m = sequence.tokens * sequence.group
      var members = 1
      var last = index
      // Pieces of a sequence lie together.
      for other in index + 1..<max(count, index + 1) {
        if pieces[other].sequence != pieces[index].sequence { break }
        guard sharesRows(pieces[index], pieces[other], plan) else { continue }
        if lowRank.keyChannels == nil, (members + 1) * m > LatentSpace.joinedQueries { break }
        pieces[last].sibling = other
        pieces[other].isLed = true
        last = other
        members += 1
      }
    }
  }

  private func sharesRows(_ a: Piece, _ b: Piece, _ plan: AttentionPlan) -> Bool {
    guard !b.isLed, a.first == b.first, a.end == b.end else { return false }
    let (one, other) = (plan.rows[a.work], plan.rows[b.work])
    guard one.kvHead != other.kvHead, one.count == other.count, sameRows(one.keys, other.keys, plan) else {
      return false
    }
    if one.lowRank?.keyChannels != nil { return other.lowRank?.keyChannels != nil }
    return other.joinsLatents && one.firstPosition == other.firstPosition && sameRows(one.values, other.values, plan)
  }

  private func sameRows(_ a: Range<Int>, _ b: Range<Int>, _ plan: AttentionPlan) -> Bool {
    guard let one = a.first, let other = b.first else { return false }
    return plan.slices[one].run.base == plan.slices[other].run.base
      && plan.slices[one].first == plan.slices[other].first
  }

  /// The work of linked pieces.
  private func addPieces(
    from index: Int, _ pieces: UnsafeMutableBufferPointer<Piece>, _ plan: AttentionPlan, _ view: AttentionPlanView,
    _ memory: UnsafeMutablePointer<Float>, scratch: UnsafeMutablePointer<Float>
  ) {
    let sequence = plan.sequences[pieces[index].sequence]
    let m = sequence.tokens * sequence.group
    let attention = rowAttention(sequence, view, rows: m, scratch: scratch)
    guard let space = attention.latent else { return }
    withUnsafeTemporaryAllocation(of: JoinedMember.self, capacity: sequence.kvHeads) { members in
      var count = 0
      var next = index
      while next >= 0 {
        let piece = pieces[next]
        let partial = PartialBlock(at: memory + piece.partial, rows: m)
        partial.clear(rows: m, valueDim: sequence.valueDim)
        members.initializeElement(
          at: count,
          to: JoinedMember(
            work: plan.rows[piece.work], queries: queries(of: piece, sequence, memory), partial: partial,
            kept: kept(of: piece, memory), keptOffset: piece.keptOffset))
        count += 1
        next = piece.sibling
      }
      let all = UnsafeMutableBufferPointer(rebasing: members[..<count])
      if plan.rows[pieces[index].work].lowRank?.keyChannels != nil {
        attention.addJoined(all, pieces[index].range, space)
      } else {
        attention.addLatents(all, pieces[index].range, space)
      }
      for member in 0..<count { members.deinitializeElement(at: member) }
    }
  }

  private func queries(
    of piece: Piece, _ sequence: SequenceWork, _ memory: UnsafeMutablePointer<Float>
  ) -> QueryBlock {
    QueryBlock(
      base: memory + piece.queries, tokens: sequence.tokens, group: sequence.group,
      firstPosition: sequence.firstPosition)
  }

  private func kept(of piece: Piece, _ memory: UnsafeMutablePointer<Float>) -> KeptWeights? {
    piece.kept < 0
      ? nil : KeptWeights(base: memory + piece.kept, stride: piece.keptStride, maxima: memory + piece.keptMaxima)
  }

  static func padded(_ rows: Int) -> Int { (rows + blockRows - 1) / blockRows * blockRows }

  private func addPiece(
    _ piece: Piece, _ plan: AttentionPlan, _ view: AttentionPlanView, _ memory: UnsafeMutablePointer<Float>,
    scratch: UnsafeMutablePointer<Float>
  ) {
    let sequence = plan.sequences[piece.sequence]
    let m = sequence.tokens * sequence.group
    let attention = rowAttention(sequence, view, rows: m, scratch: scratch)
    let partial = PartialBlock(at: memory + piece.partial, rows: m)
    partial.clear(rows: m, valueDim: sequence.valueDim)
    attention.add(
      plan.rows[piece.work], range: piece.range, queries: queries(of: piece, sequence, memory), to: partial,
      kept: kept(of: piece, memory), keptOffset: piece.keptOffset)
  }

  /// All pieces of a head, and what follows them.
  private func addHead(
    _ leader: Int, _ pieces: UnsafeMutableBufferPointer<Piece>, _ plan: AttentionPlan, _ view: AttentionPlanView,
    _ memory: UnsafeMutablePointer<Float>, kept: Int, scratch: UnsafeMutablePointer<Float>
  ) {
    let head = leader..<pieces[leader].headEnd
    for index in head {
      pieces[index].kept += kept
      pieces[index].keptMaxima += kept
      addPiece(pieces[index], plan, view, memory, scratch: scratch)
    }
    finishHead(pieces[head], plan, memory)
  }

  func rowAttention(
    _ sequence: SequenceWork, _ view: AttentionPlanView, rows: Int, scratch: UnsafeMutablePointer<Float>
  ) -> RowAttention {
    var attention = RowAttention(
      kernels: kernels, plan: view, keyDim: sequence.keyDim, valueDim: sequence.valueDim, scale: sequence.scale,
      softcap: sequence.softcap, slidingWindow: sequence.slidingWindow, rows: rows, memory: scratch)
    attention.latent = LatentSpace(
      memory: scratch
        + RowAttention.floats(rows: rows, keyDim: sequence.keyDim, valueDim: sequence.valueDim), backend: self)
    return attention
  }

  /// Merges the partials of one head in row order, writes the output, adds the statistics.
  private func finishHead(
    _ pieces: Slice<UnsafeMutableBufferPointer<Piece>>, _ plan: AttentionPlan, _ memory: UnsafeMutablePointer<Float>
  ) {
    guard let first = pieces.first else { return }
    let sequence = plan.sequences[first.sequence]
    let m = sequence.tokens * sequence.group
    let total = PartialBlock(at: memory + first.partial, rows: m)
    for piece in pieces.dropFirst() {
      merge(PartialBlock(at: memory + piece.partial, rows: m), into: total, rows: m, dim: sequence.valueDim)
    }
    writeOutput(total, sequence, kvHead: plan.rows[first.work].kvHead, tokens: 0..<sequence.tokens)
    if first.kept < 0 { return }
    for piece in pieces where piece.range.lowerBound == 0 {
      let work = plan.rows[piece.work]
      guard let score = work.score else { continue }
      addScores(
        KeptWeights(base: memory + piece.kept, stride: piece.keptStride, maxima: memory + piece.keptMaxima),
        offset: piece.keptOffset, count: work.count, total, rows: m, from: sequence.observedFrom * sequence.group,
        sequence.reduction, to: score)
    }
  }

  func merge(_ part: PartialBlock, into total: PartialBlock, rows: Int, dim: Int) {
    // NaN, from logits beyond f32, goes on to the output.
    for row in 0..<rows where part.sums[row] != 0 {
      let target = total.accumulators + row * dim
      let source = part.accumulators + row * dim
      if total.sums[row] == 0 {
        total.maxima[row] = part.maxima[row]
        total.sums[row] = part.sums[row]
        target.update(from: source, count: dim)
        continue
      }
      let top = max(total.maxima[row], part.maxima[row])
      let mine = expf(total.maxima[row] - top)
      let theirs = expf(part.maxima[row] - top)
      if mine != 1 { kernels.pointee.scale_in_place!(target, mine, dim) }
      kernels.pointee.axpy!(target, source, theirs, dim)
      total.sums[row] = total.sums[row] * mine + part.sums[row] * theirs
      total.maxima[row] = top
    }
  }

  /// Adds to each row the probability it received from the query rows of the block from `firstRow` on, or keeps the
  /// largest.
  func addScores(
    _ kept: KeptWeights, offset: Int, count: Int, _ total: PartialBlock, rows: Int, from firstRow: Int,
    _ reduction: AttentionReduction, to score: UnsafeMutablePointer<Float>
  ) {
    if firstRow >= rows { return }
    withUnsafeTemporaryAllocation(of: Float.self, capacity: rows - firstRow) { factors in
      guard let factor = factors.baseAddress else { return }
      for first in stride(from: 0, to: count, by: blockRows) {
        let length = min(blockRows, count - first)
        let maxima = kept.maxima + (offset + first) / blockRows * rows
        let lines = kept.base + firstRow * kept.stride + offset + first
        for row in firstRow..<rows {
          // The weights of a query that sees none of the rows are zeros.
          let sees = total.sums[row] > 0 && maxima[row] > -.infinity
          factor[row - firstRow] = sees ? expf(maxima[row] - total.maxima[row]) / total.sums[row] : 0
        }
        switch reduction {
        case .sum: kernels.pointee.add_rows!(score + first, lines, kept.stride, factor, UInt32(factors.count), length)
        case .max:
          for row in 0..<factors.count where factor[row] > 0 {
            kernels.pointee.max_scaled!(score + first, lines + row * kept.stride, factor[row], length)
          }
        }
      }
    }
  }

  func writeOutput(_ partial: PartialBlock, _ sequence: SequenceWork, kvHead: Int, tokens: Range<Int>) {
    for (local, token) in tokens.enumerated() {
      for member in 0..<sequence.group {
        let row = local * sequence.group + member
        let head = kvHead * sequence.group + member
        let target = sequence.output + head * sequence.outputHeadStride + token * sequence.outputTokenStride
        let sum = partial.sums[row]
        if sum != 0 {
          target.update(from: partial.accumulators + row * sequence.valueDim, count: sequence.valueDim)
          kernels.pointee.scale_in_place!(target, 1 / sum, sequence.valueDim)
        } else {
          target.update(repeating: 0, count: sequence.valueDim)
        }
        if let logSumExp = sequence.logSumExp {
          logSumExp[head * sequence.tokens + token] = sum != 0 ? partial.maxima[row] + logf(sum) : -.infinity
        }
      }
    }
  }

  /// Heads that hold nothing have no piece; their output is zero.
  private func zeroHeadsWithoutRows(_ plan: AttentionPlan) {
    for sequence in plan.sequences where sequence.tokens <= CPUBackend.fewQueries {
      for head in 0..<sequence.kvHeads {
        if sequence.work.contains(where: { plan.rows[$0].kvHead == head && plan.rows[$0].count > 0 }) { continue }
        withUnsafeTemporaryAllocation(
          of: Float.self,
          capacity: PartialBlock.floats(rows: sequence.tokens * sequence.group, valueDim: sequence.valueDim)
        ) { buffer in
          guard let base = buffer.baseAddress else { return }
          let empty = PartialBlock(at: base, rows: sequence.tokens * sequence.group)
          empty.clear(rows: sequence.tokens * sequence.group, valueDim: sequence.valueDim)
          writeOutput(empty, sequence, kvHead: head, tokens: 0..<sequence.tokens)
        }
      }
    }
  }

  // MARK: Queries

  /// Queries of some tokens and one KV head as f32 [token][group][keyDim], turned back by the shift of the rows.
  func loadQueries(
    _ sequence: SequenceWork, work: RowsWork, tokens: Range<Int>, into target: UnsafeMutablePointer<Float>
  ) {
    let convert = kernels.pointee.convert!
    let size = sequence.queryType.byteCount
    for (local, token) in tokens.enumerated() {
      for member in 0..<sequence.group {
        let head = work.kvHead * sequence.group + member
        let source =
          sequence.queries + (head * sequence.queryHeadStride + token * sequence.queryTokenStride) * size
        let row = target + (local * sequence.group + member) * sequence.keyDim
        convert(row, UInt32(ElementType.f32.rawValue), source, UInt32(sequence.queryType.rawValue), sequence.keyDim)
        if work.shift != 0, let rotary = sequence.rotary {
          // Only the difference matters; queries that see everything have no position of their own.
          let position =
            sequence.firstPosition == Int.max ? work.shift : sequence.firstPosition + token
          rotary.move(row: row, from: position, to: position - work.shift)
        }
      }
    }
  }
}

/// Hands out ranges of a workspace that is allocated once its size is known.
struct Layout {
  private(set) var total = 0

  /// Offset of `floats` floats, 64-byte aligned.
  mutating func take(_ floats: Int) -> Int {
    let offset = total
    total += (floats + 15) / 16 * 16
    return offset
  }
}
