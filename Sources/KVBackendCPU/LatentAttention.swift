internal import CKVKernels
internal import KVCore

/// Working memory for attention over latents or directions, and what it needs to know of the model.
struct LatentSpace {
  /// Rows restored at a time: with their latents they stay in the second-level cache.
  static let tileRows = 256
  /// Query rows of several heads that meet the same latents together, at most.
  static let joinedQueries = 128

  let memory: UnsafeMutablePointer<Float>
  let backend: CPUBackend
  /// Added to every logit of a query row: the query times the mean that was taken off the keys.
  var logitShift: UnsafePointer<Float>?

  init(memory: UnsafeMutablePointer<Float>, backend: CPUBackend) {
    self.memory = memory
    self.backend = backend
  }

  static func floats(_ plan: AttentionPlan, _ sequence: SequenceWork, rows: Int? = nil) -> Int {
    var most = 0
    for index in sequence.work {
      let m = rows ?? sequence.tokens * sequence.group
      // Few queries serve all heads of joined keys in one piece of work.
      most = max(
        most,
        floats(
          plan.rows[index], plan.slices, rows: m, keyDim: sequence.keyDim, valueDim: sequence.valueDim,
          members: rows == nil ? sequence.kvHeads : 1))
    }
    return most
  }

  static func floats(
    _ work: ArraySlice<RowsWork>, _ slices: [RunSlice], rows: Int, keyDim: Int, valueDim: Int
  ) -> Int {
    work.reduce(0) {
      max($0, floats($1, slices, rows: rows, keyDim: keyDim, valueDim: valueDim, members: 1))
    }
  }

  private static func floats(
    _ work: RowsWork, _ slices: some RandomAccessCollection<RunSlice>, rows: Int, keyDim: Int, valueDim: Int,
    members: Int
  ) -> Int {
    if work.factored != nil { return RowAttention.factoredFloats(rows: rows) }
    guard let lowRank = work.lowRank else { return 0 }
    if lowRank.keyChannels != nil, let slice = work.keys.first {
      let run = slices[slices.index(slices.startIndex, offsetBy: slice)].run
      return joinedFloats(width: run.dim, rows: rows, keyDim: keyDim, members: members)
    }
    let most = work.joinsLatents ? max(rows, min(rows * members, joinedQueries)) : rows
    return floats(lowRank, rows: most, keyDim: keyDim, valueDim: valueDim)
  }

  private static func floats(_ lowRank: LowRankRows, rows m: Int, keyDim: Int, valueDim: Int) -> Int {
    let keyRank = lowRank.keyBasis?.capacity ?? keyDim
    let valueRank = valueDim == 0 ? 0 : lowRank.valueBasis?.capacity ?? valueDim
    var layout = Layout()
    _ = layout.take(m)
    _ = layout.take(m * max(keyRank, keyDim))
    _ = layout.take(PartialBlock.floats(rows: m, valueDim: valueRank))
    _ = layout.take(PartialBlock.floats(rows: m, valueDim: valueDim))
    _ = layout.take(RowAttention.floats(rows: m, keyDim: max(keyRank, keyDim), valueDim: max(valueRank, valueDim)))
    if lowRank.rotary != nil, lowRank.keyBasis != nil {
      _ = layout.take(tileRows * keyRank)
      _ = layout.take(tileRows * keyDim)
      _ = layout.take(Int(ckv_scratch_floats(UInt32(max(keyDim, keyRank)), UInt32(max(tileRows, m)))))
    }
    return layout.total
  }
}

extension RowsWork {
  /// Latents of keys and values that stay latents, at positions without gaps and with nothing beside the rows: heads that
  /// share them differ in their bases only.
  var joinsLatents: Bool {
    guard let lowRank, lowRank.keyChannels == nil, lowRank.rotary == nil else { return false }
    return lowRank.keyBasis != nil && lowRank.valueBasis != nil && positions == nil && bias == nil && score == nil
  }
}

/// Keys that are restored from latents and turned to their positions, a tile at a time, on their way to the logits.
struct RotatedTile {
  let basis: RowRun
  let mean: UnsafePointer<Float>?
  let offsets: RotaryOffsets
  let keyDim: Int
  /// [tileRows][rank], [tileRows][keyDim], [query rows][keyDim], kernel scratch.
  let latents: UnsafeMutablePointer<Float>
  let rows: UnsafeMutablePointer<Float>
  let queries: UnsafeMutablePointer<Float>
  let scratch: UnsafeMutablePointer<Float>
  let backend: CPUBackend
}

/// Attention in the compressed space.
///
/// Logits: a query times a restored key is the query times the basis, once, times the latents. Values: weights times
/// latents, and that times the basis, once. Only where keys are turned after they are restored do the rows themselves
/// appear, in tiles of `LatentSpace.tileRows`.
extension RowAttention {
  /// Adds rows `range` of heads that share their latents, or of one: one pass over them serves the queries of all.
  func addLatents(
    _ members: UnsafeMutableBufferPointer<JoinedMember>, _ range: Range<Int>, _ space: LatentSpace
  ) {
    guard let first = members.first, let lowRank = first.work.lowRank else { return }
    let all = members.count * first.queries.rows
    let keyRank = lowRank.keyBasis?.capacity ?? keyDim
    let valueRank = valueDim == 0 ? 0 : lowRank.valueBasis?.capacity ?? valueDim
    var layout = Layout()
    let shift = space.memory + layout.take(all)
    let turned = space.memory + layout.take(all * max(keyRank, keyDim))
    let inner = PartialBlock(
      at: space.memory + layout.take(PartialBlock.floats(rows: all, valueDim: valueRank)), rows: all)
    let outer = PartialBlock(
      at: space.memory + layout.take(PartialBlock.floats(rows: all, valueDim: valueDim)), rows: first.queries.rows)
    let memory =
      space.memory
      + layout.take(RowAttention.floats(rows: all, keyDim: max(keyRank, keyDim), valueDim: max(valueRank, valueDim)))

    var queries = first.queries
    var own = LatentSpace(memory: space.memory, backend: space.backend)
    var tile: RotatedTile?
    if let basis = lowRank.keyBasis, let rotary = lowRank.rotary {
      tile = RotatedTile(
        basis: basis, mean: lowRank.keyMean, offsets: space.backend.offsets(of: rotary), keyDim: keyDim,
        latents: space.memory + layout.take(LatentSpace.tileRows * keyRank),
        rows: space.memory + layout.take(LatentSpace.tileRows * keyDim), queries: turned,
        scratch: space.memory
          + layout.take(
            Int(ckv_scratch_floats(UInt32(max(keyDim, keyRank)), UInt32(max(LatentSpace.tileRows, all))))),
        backend: space.backend)
    } else if lowRank.keyBasis != nil {
      absorb(members, keyRank, into: turned, shift: shift)
      queries.base = UnsafePointer(turned)
      queries.group *= members.count
      own.logitShift = lowRank.keyMean == nil ? nil : UnsafePointer(shift)
    }
    inner.clear(rows: all, valueDim: valueRank)
    var attention = RowAttention(
      kernels: kernels, plan: plan, keyDim: tile == nil ? keyRank : keyDim, valueDim: valueRank, scale: scale,
      softcap: softcap, slidingWindow: slidingWindow, rows: all, memory: memory)
    attention.latent = own
    attention.tile = tile
    // Heads together leave nothing behind: see `joinsLatents`.
    attention.addRows(first.work, range, queries, inner, first.kept, first.keptOffset)
    if lowRank.valueBasis == nil || valueDim == 0 {
      space.backend.merge(inner, into: first.partial, rows: all, dim: valueDim)
    } else {
      restore(inner, valueRank, members, by: outer, space.backend)
    }
  }

  /// Runs of the query rows of member `index` of `count`: where each begins, and where it lies among the rows of all
  /// members. Those are by token, then by head, as if all were heads of one group.
  private func forEachRun(
    _ queries: QueryBlock, _ index: Int, of count: Int, _ body: (_ row: Int, _ place: Int, _ rows: Int) -> Void
  ) {
    if count == 1 { return body(0, 0, queries.rows) }
    for token in 0..<queries.tokens {
      body(token * queries.group, (token * count + index) * queries.group, queries.group)
    }
  }

  /// Queries times the bases of their heads, and times the means that were taken off the keys.
  private func absorb(
    _ members: UnsafeMutableBufferPointer<JoinedMember>, _ keyRank: Int, into target: UnsafeMutablePointer<Float>,
    shift: UnsafeMutablePointer<Float>
  ) {
    for (index, member) in members.enumerated() {
      guard let lowRank = member.work.lowRank, let basis = lowRank.keyBasis else { continue }
      forEachRun(member.queries, index, of: members.count) { row, place, rows in
        let source = member.queries.base + row * keyDim
        withUnsafePointer(to: basis.kernelRun) {
          kernels.pointee.logits!(
            $0, 0, UInt32(keyRank), source, UInt32(rows), keyDim, 1, target + place * keyRank, keyRank, scratch)
        }
        guard let mean = lowRank.keyMean else { return }
        for i in 0..<rows { shift[place + i] = scale * kernels.pointee.dot!(source + i * keyDim, mean, keyDim) }
      }
    }
  }

  /// Sums of latents times the bases of their heads, merged into the partials of these.
  private func restore(
    _ inner: PartialBlock, _ valueRank: Int, _ members: UnsafeMutableBufferPointer<JoinedMember>,
    by outer: PartialBlock, _ backend: CPUBackend
  ) {
    for (index, member) in members.enumerated() {
      guard let lowRank = member.work.lowRank, let basis = lowRank.valueBasis else { continue }
      outer.accumulators.update(repeating: 0, count: member.queries.rows * valueDim)
      forEachRun(member.queries, index, of: members.count) { row, place, rows in
        let target = outer.accumulators + row * valueDim
        withUnsafePointer(to: basis.kernelRun) {
          kernels.pointee.accumulate!(
            $0, 0, UInt32(valueRank), inner.accumulators + place * valueRank, UInt32(rows), valueRank, target, valueDim,
            scratch)
        }
        for i in 0..<rows {
          outer.maxima[row + i] = inner.maxima[place + i]
          outer.sums[row + i] = inner.sums[place + i]
          guard let mean = lowRank.valueMean, inner.sums[place + i] > 0 else { continue }
          kernels.pointee.axpy!(target + i * valueDim, mean, inner.sums[place + i], valueDim)
        }
      }
      backend.merge(outer, into: member.partial, rows: member.queries.rows, dim: valueDim)
    }
  }

  /// Logits of rows `range`: keys restored from their latents, turned by their distance from the first row of the tile,
  /// against queries turned back by that row's position.
  func formRotated(
    _ work: RowsWork, _ tile: RotatedTile, _ range: Range<Int>, _ queries: QueryBlock,
    into target: UnsafeMutablePointer<Float>, stride: Int
  ) {
    let rank = tile.basis.capacity
    let dim = tile.keyDim
    withUnsafeTemporaryAllocation(of: UInt32.self, capacity: LatentSpace.tileRows) { buffer in
      guard let distances = buffer.baseAddress else { return }
      var start = range.lowerBound
      while start < range.upperBound {
        let first = work.position(start)
        var end = start
        while end < range.upperBound, end - start < LatentSpace.tileRows,
          (0..<RotaryOffsets.count).contains(work.position(end) - first)
        {
          distances[end - start] = UInt32(work.position(end) - first)
          end += 1
        }
        let count = end - start
        forEach(work.keys, start..<end) { run, row, rows, offset in
          tile.backend.read(
            RunSlice(run: run, first: row, count: rows), into: tile.latents + offset * rank, stride: rank)
        }
        tile.backend.multiply(
          latents: tile.latents, count: count, basis: tile.basis, mean: tile.mean, into: tile.rows,
          scratch: tile.scratch)
        tile.offsets.turn(tile.rows, stride: dim, offsets: distances, count: count, back: false, kernels)
        tile.queries.update(from: queries.base, count: queries.rows * dim)
        tile.offsets.turn(tile.queries, stride: dim, by: first, count: queries.rows, back: true, kernels)
        let run = RowRun(encoding: .dense(.f32), dim: dim, capacity: count, base: tile.rows)
        withUnsafePointer(to: run.kernelRun) {
          kernels.pointee.logits!(
            $0, 0, UInt32(count), tile.queries, UInt32(queries.rows), dim, scale,
            target + start - range.lowerBound, stride, tile.scratch)
        }
        start = end
      }
    }
  }
}
