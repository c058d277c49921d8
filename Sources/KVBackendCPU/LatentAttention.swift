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
  func addLatents(
    _ work: RowsWork, _ lowRank: LowRankRows, _ space: LatentSpace, _ range: Range<Int>, _ queries: QueryBlock,
    _ partial: PartialBlock, _ kept: KeptWeights?, _ keptOffset: Int
  ) {
    let m = queries.rows
    let keyRank = lowRank.keyBasis?.capacity ?? keyDim
    let valueRank = valueDim == 0 ? 0 : lowRank.valueBasis?.capacity ?? valueDim
    var layout = Layout()
    let shift = space.memory + layout.take(m)
    let turned = space.memory + layout.take(m * max(keyRank, keyDim))
    let inner = PartialBlock(
      at: space.memory + layout.take(PartialBlock.floats(rows: m, valueDim: valueRank)), rows: m)
    let outer = PartialBlock(
      at: space.memory + layout.take(PartialBlock.floats(rows: m, valueDim: valueDim)), rows: m)
    let memory =
      space.memory
      + layout.take(RowAttention.floats(rows: m, keyDim: max(keyRank, keyDim), valueDim: max(valueRank, valueDim)))

    var latentQueries = queries
    var own = LatentSpace(memory: space.memory, backend: space.backend)
    var tile: RotatedTile?
    if let basis = lowRank.keyBasis, let rotary = lowRank.rotary {
      tile = RotatedTile(
        basis: basis, mean: lowRank.keyMean, offsets: space.backend.offsets(of: rotary), keyDim: keyDim,
        latents: space.memory + layout.take(LatentSpace.tileRows * keyRank),
        rows: space.memory + layout.take(LatentSpace.tileRows * keyDim), queries: turned,
        scratch: space.memory
          + layout.take(
            Int(ckv_scratch_floats(UInt32(max(keyDim, keyRank)), UInt32(max(LatentSpace.tileRows, m))))),
        backend: space.backend)
    } else if let basis = lowRank.keyBasis {
      withUnsafePointer(to: basis.kernelRun) {
        kernels.pointee.logits!(
          $0, 0, UInt32(keyRank), queries.base, UInt32(m), keyDim, 1, turned, keyRank, scratch)
      }
      latentQueries.base = UnsafePointer(turned)
      if let mean = lowRank.keyMean {
        for row in 0..<m { shift[row] = scale * kernels.pointee.dot!(queries.base + row * keyDim, mean, keyDim) }
        own.logitShift = UnsafePointer(shift)
      }
    }
    inner.clear(rows: m, valueDim: valueRank)
    var attention = RowAttention(
      kernels: kernels, plan: plan, keyDim: tile == nil ? keyRank : keyDim, valueDim: valueRank, scale: scale,
      softcap: softcap, slidingWindow: slidingWindow, rows: m, memory: memory)
    attention.latent = own
    attention.tile = tile
    attention.addRows(work, range, latentQueries, inner, kept, keptOffset)

    guard valueDim > 0, let basis = lowRank.valueBasis else {
      space.backend.merge(inner, into: partial, rows: m, dim: valueDim)
      return
    }
    outer.maxima.update(from: inner.maxima, count: m)
    outer.sums.update(from: inner.sums, count: m)
    outer.accumulators.update(repeating: 0, count: m * valueDim)
    withUnsafePointer(to: basis.kernelRun) {
      kernels.pointee.accumulate!(
        $0, 0, UInt32(valueRank), inner.accumulators, UInt32(m), valueRank, outer.accumulators, valueDim, scratch)
    }
    if let mean = lowRank.valueMean {
      for row in 0..<m where inner.sums[row] > 0 {
        kernels.pointee.axpy!(outer.accumulators + row * valueDim, mean, inner.sums[row], valueDim)
      }
    }
    space.backend.merge(outer, into: partial, rows: m, dim: valueDim)
  }

  /// Adds rows `range` of heads that share their latents: one pass over them serves the queries of all.
  func addLatents(
    _ members: UnsafeMutableBufferPointer<JoinedMember>, _ range: Range<Int>, _ space: LatentSpace
  ) {
    guard let first = members.first, let keyRank = first.work.lowRank?.keyBasis?.capacity,
      let valueRank = first.work.lowRank?.valueBasis?.capacity
    else { return }
    let queries = first.queries
    let (m, group) = (queries.rows, queries.group)
    let all = members.count * m
    var layout = Layout()
    let shift = space.memory + layout.take(all)
    let turned = space.memory + layout.take(all * keyRank)
    let inner = PartialBlock(
      at: space.memory + layout.take(PartialBlock.floats(rows: all, valueDim: valueRank)), rows: all)
    let outer = PartialBlock(
      at: space.memory + layout.take(PartialBlock.floats(rows: m, valueDim: valueDim)), rows: m)
    let memory =
      space.memory
      + layout.take(RowAttention.floats(rows: all, keyDim: max(keyRank, keyDim), valueDim: max(valueRank, valueDim)))

    // By token, then by head, as if all were heads of one group.
    for (index, member) in members.enumerated() {
      guard let lowRank = member.work.lowRank, let basis = lowRank.keyBasis else { continue }
      for token in 0..<queries.tokens {
        let source = member.queries.base + token * group * keyDim
        let row = (token * members.count + index) * group
        withUnsafePointer(to: basis.kernelRun) {
          kernels.pointee.logits!(
            $0, 0, UInt32(keyRank), source, UInt32(group), keyDim, 1, turned + row * keyRank, keyRank, scratch)
        }
        for own in 0..<group {
          let product = lowRank.keyMean.map { kernels.pointee.dot!(source + own * keyDim, $0, keyDim) }
          shift[row + own] = scale * (product ?? 0)
        }
      }
    }
    inner.clear(rows: all, valueDim: valueRank)
    var attention = RowAttention(
      kernels: kernels, plan: plan, keyDim: keyRank, valueDim: valueRank, scale: scale, softcap: softcap,
      slidingWindow: slidingWindow, rows: all, memory: memory)
    attention.latent = LatentSpace(memory: space.memory, backend: space.backend)
    attention.latent?.logitShift = UnsafePointer(shift)
    let joined = QueryBlock(
      base: turned, tokens: queries.tokens, group: members.count * group, firstPosition: queries.firstPosition)
    attention.addRows(first.work, range, joined, inner, nil, 0)

    for (index, member) in members.enumerated() {
      guard let lowRank = member.work.lowRank, let basis = lowRank.valueBasis else { continue }
      outer.accumulators.update(repeating: 0, count: m * valueDim)
      for token in 0..<queries.tokens {
        let row = (token * members.count + index) * group
        let target = outer.accumulators + token * group * valueDim
        withUnsafePointer(to: basis.kernelRun) {
          kernels.pointee.accumulate!(
            $0, 0, UInt32(valueRank), inner.accumulators + row * valueRank, UInt32(group), valueRank, target, valueDim,
            scratch)
        }
        for own in 0..<group {
          outer.maxima[token * group + own] = inner.maxima[row + own]
          outer.sums[token * group + own] = inner.sums[row + own]
          guard let mean = lowRank.valueMean, inner.sums[row + own] > 0 else { continue }
          kernels.pointee.axpy!(target + own * valueDim, mean, inner.sums[row + own], valueDim)
        }
      }
      space.backend.merge(outer, into: member.partial, rows: m, dim: valueDim)
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
