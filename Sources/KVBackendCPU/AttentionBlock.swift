internal import CKVKernels
internal import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// Rows whose logits are formed at one time: 1024 logits of a few query rows stay in the first-level cache, and the
/// keys and values of 1024 rows in the second.
let blockRows = 1024
/// Between the logits of two query rows, where they lie in working memory: a line of the cache more than a block, so that
/// the same row's logits do not all compete for one set of it.
private let logitStride = blockRows + 16

/// The queries of one KV head in one piece of work: `tokens` positions of `group` heads each, token-major.
struct QueryBlock {
  /// f32 [tokens * group][keyDim], already turned to the phase of the rows they will meet.
  var base: UnsafePointer<Float>
  var tokens: Int
  var group: Int
  /// Position of the first token; `Int.max` sees everything.
  var firstPosition: Int
  var rows: Int { tokens * group }
}

/// A running partial per query row.
struct PartialBlock {
  var maxima: UnsafeMutablePointer<Float>
  var sums: UnsafeMutablePointer<Float>
  /// [rows][valueDim].
  var accumulators: UnsafeMutablePointer<Float>

  static func floats(rows: Int, valueDim: Int) -> Int { rows * (2 + valueDim) }

  init(at base: UnsafeMutablePointer<Float>, rows: Int) {
    maxima = base
    sums = base + rows
    accumulators = base + 2 * rows
  }

  func clear(rows: Int, valueDim: Int) {
    for row in 0..<rows {
      maxima[row] = -.infinity
      sums[row] = 0
    }
    accumulators.update(repeating: 0, count: rows * valueDim)
  }
}

/// Where the exponentials of every row are kept when the caller wants statistics: one row of `stride` floats per query
/// row, and the maximum each block of rows was taken relative to.
struct KeptWeights {
  var base: UnsafeMutablePointer<Float>
  var stride: Int
  /// [block][query row].
  var maxima: UnsafeMutablePointer<Float>
}

/// Attention of one query block over rows of one head: logits, softmax relative to the block, values, merge. The one
/// loop behind decoding, prefill and window scores.
struct RowAttention {
  let kernels: UnsafePointer<ckv_kernels>
  let plan: AttentionPlanView
  let keyDim: Int
  let valueDim: Int
  let scale: Float
  let softcap: Float
  let slidingWindow: Int
  /// [query rows][logitStride] logits, then kernel scratch, then queries or sums behind the map of some rows.
  let logits: UnsafeMutablePointer<Float>
  let scratch: UnsafeMutablePointer<Float>
  let mapped: UnsafeMutablePointer<Float>
  /// What restoring latents needs; nil where no row is one.
  var latent: LatentSpace?
  /// Keys of the rows in work are restored and turned tile by tile.
  var tile: RotatedTile?

  static func floats(rows: Int, keyDim: Int, valueDim: Int) -> Int {
    let dim = UInt32(max(keyDim, valueDim))
    return rows * logitStride + kernelFloats(rows: rows, dim: dim) + Int(ckv_mapped_floats(dim, UInt32(rows)))
  }

  /// Whole cache lines, so that what follows stays aligned.
  private static func kernelFloats(rows: Int, dim: UInt32) -> Int {
    (Int(ckv_scratch_floats(dim, UInt32(rows))) + 15) / 16 * 16
  }

  /// - Parameter memory: `floats(rows:keyDim:valueDim:)` of them.
  init(
    kernels: UnsafePointer<ckv_kernels>, plan: AttentionPlanView, keyDim: Int, valueDim: Int, scale: Float,
    softcap: Float, slidingWindow: Int, rows: Int, memory: UnsafeMutablePointer<Float>
  ) {
    self.kernels = kernels
    self.plan = plan
    self.keyDim = keyDim
    self.valueDim = valueDim
    self.scale = scale
    self.softcap = softcap
    self.slidingWindow = slidingWindow
    logits = memory
    scratch = memory + rows * logitStride
    mapped = scratch + RowAttention.kernelFloats(rows: rows, dim: UInt32(max(keyDim, valueDim)))
  }

  /// Adds rows `range` of `work` to the partial. With `kept`, the exponentials are also left there, at the row's own
  /// index plus `keptOffset`.
  func add(
    _ work: RowsWork, range: Range<Int>, queries: QueryBlock, to partial: PartialBlock, kept: KeptWeights? = nil,
    keptOffset: Int = 0
  ) {
    guard let lowRank = work.lowRank, let latent else {
      addRows(work, range, queries, partial, kept, keptOffset)
      return
    }
    withUnsafeTemporaryAllocation(of: JoinedMember.self, capacity: 1) { members in
      members.initializeElement(
        at: 0,
        to: JoinedMember(work: work, queries: queries, partial: partial, kept: kept, keptOffset: keptOffset))
      if lowRank.keyChannels != nil {
        addJoined(members, range, latent)
      } else {
        addLatents(members, range, latent)
      }
      members.deinitializeElement(at: 0)
    }
  }

  func addRows(
    _ work: RowsWork, _ range: Range<Int>, _ queries: QueryBlock, _ partial: PartialBlock, _ kept: KeptWeights?,
    _ keptOffset: Int
  ) {
    var start = range.lowerBound
    while start < range.upperBound {
      let end = min(start + blockRows, range.upperBound)
      addBlock(work, start..<end, queries, partial, kept, keptOffset)
      start = end
    }
  }

  /// - Parameter formed: logits of the block, `blockRows` floats a query row; nil: not formed yet.
  func addBlock(
    _ work: RowsWork, _ block: Range<Int>, _ queries: QueryBlock, _ partial: PartialBlock, _ kept: KeptWeights?,
    _ keptOffset: Int, formed: UnsafePointer<Float>? = nil
  ) {
    let m = queries.rows
    let visible = visibleRows(work, queries, block)
    if kept == nil, formed == nil, addAtOnce(work, visible, queries, partial) { return }
    let target = kept.map { $0.base + keptOffset + block.lowerBound } ?? logits
    let stride = kept?.stride ?? logitStride
    if let kept {
      // Rows no query of the block sees weigh nothing.
      let maxima = kept.maxima + (keptOffset + block.lowerBound) / blockRows * m
      for row in 0..<m { maxima[row] = -.infinity }
      let (before, after) = (visible.lowerBound - block.lowerBound, block.upperBound - visible.upperBound)
      for row in 0..<m {
        let line = target + row * stride
        if visible.isEmpty {
          line.update(repeating: 0, count: block.count)
        } else {
          line.update(repeating: 0, count: before)
          (line + block.count - after).update(repeating: 0, count: after)
        }
      }
    }
    if visible.isEmpty { return }
    let offset = visible.lowerBound - block.lowerBound
    if let formed {
      for row in 0..<m {
        (target + offset + row * stride).update(from: formed + row * blockRows + offset, count: visible.count)
      }
    } else if let tile {
      formRotated(work, tile, visible, queries, into: target + offset, stride: stride)
    } else {
      form(work.keys, visible, queries, into: target + offset, stride: stride)
    }
    if let keys = work.factored?.keys, let latent {
      applyLengths(keys, visible, queries, memory: latent.memory, to: target + offset, stride: stride)
    }
    if let shift = latent?.logitShift {
      for row in 0..<m where shift[row] != 0 {
        let line = target + offset + row * stride
        for i in 0..<visible.count { line[i] += shift[row] }
      }
    }

    for token in 0..<queries.tokens {
      let own = rows(work, queries, token: token).clamped(to: visible)
      let maxima = kept.map { $0.maxima + (keptOffset + block.lowerBound) / blockRows * m }
      withBias(of: work, own, queries, token: token) { bias in
        for member in 0..<queries.group {
          let row = token * queries.group + member
          softmax(
            target + row * stride, own: own, visible: visible, blockStart: block.lowerBound, bias: bias, row: row,
            partial: partial, kept: maxima)
        }
      }
    }
    if valueDim == 0 { return }
    if let values = work.factored?.values, let latent {
      accumulateFactored(
        work, values, visible, memory: latent.memory, weights: target + offset, stride: stride, rows: m, partial)
    } else {
      accumulate(work.values, visible, weights: target + offset, stride: stride, rows: m, partial)
    }
  }

  /// The same by the kernel that does all three steps at once, where the level has it and it takes these rows: rows as
  /// they are, seen by every query, whose logits nothing is added to.
  private func addAtOnce(
    _ work: RowsWork, _ visible: Range<Int>, _ queries: QueryBlock, _ partial: PartialBlock
  ) -> Bool {
    guard let attend = kernels.pointee.attend, !visible.isEmpty, softcap <= 0, work.bias == nil, work.sortedFrom == 0,
      work.factored == nil, latent?.logitShift == nil, tile == nil,
      rows(work, queries, token: 0).clamped(to: visible) == visible,
      rows(work, queries, token: queries.tokens - 1).clamped(to: visible) == visible
    else { return false }
    /// Calls the kernel for every pair of runs that meets the range; false as soon as one is refused.
    func forAll(asking: Bool) -> Bool {
      var done = true
      forEach(work.keys, visible) { keys, firstKey, count, offset in
        let start = visible.lowerBound + offset
        forEach(work.values, start..<start + count) { values, firstValue, count, offset in
          guard done, keys.map == nil, values.map == nil else {
            done = false
            return
          }
          withUnsafePointer(to: keys.kernelRun) { keyRun in
            withUnsafePointer(to: values.kernelRun) { valueRun in
              done = attend(
                keyRun, UInt32(firstKey + offset), valueRun, UInt32(firstValue), asking ? 0 : UInt32(count),
                queries.base, UInt32(queries.rows), keyDim, scale, partial.maxima, partial.sums, partial.accumulators,
                valueDim, scratch)
            }
          }
        }
      }
      return done
    }
    return forAll(asking: true) && forAll(asking: false)
  }

  /// Turns one line of logits into weights relative to the running maximum of its query row, and merges.
  private func softmax(
    _ line: UnsafeMutablePointer<Float>, own: Range<Int>, visible: Range<Int>, blockStart: Int,
    bias: UnsafePointer<Float>?, row: Int, partial: PartialBlock, kept: UnsafeMutablePointer<Float>?
  ) {
    let first = visible.lowerBound - blockStart
    if own.isEmpty {
      (line + first).update(repeating: 0, count: visible.count)
      return
    }
    let begin = own.lowerBound - blockStart
    if begin > first { (line + first).update(repeating: 0, count: begin - first) }
    let end = own.upperBound - blockStart
    let last = visible.upperBound - blockStart
    if end < last { (line + end).update(repeating: 0, count: last - end) }

    var sum: Float = 0
    let top = kernels.pointee.softmax!(
      line + begin, UInt32(own.count), softcap, bias, &sum)
    if sum == 0 { return }
    let accumulator = partial.accumulators + row * valueDim
    if top > partial.maxima[row] {
      if partial.sums[row] > 0 {
        let shrink = expf(partial.maxima[row] - top)
        partial.sums[row] *= shrink
        if valueDim > 0 { kernels.pointee.scale_in_place!(accumulator, shrink, valueDim) }
      }
      partial.maxima[row] = top
      partial.sums[row] += sum
    } else {
      let shrink = expf(top - partial.maxima[row])
      partial.sums[row] += sum * shrink
      kernels.pointee.scale_in_place!(line + begin, shrink, own.count)
    }
    kept?[row] = partial.maxima[row]
  }

  // MARK: Rows a query sees

  /// Rows of `work` that the query of a token sees: at or before its position, inside the sliding window. Rows in no
  /// order are all among them; `withBias` takes back those that are not seen.
  private func rows(_ work: RowsWork, _ queries: QueryBlock, token: Int) -> Range<Int> {
    if queries.firstPosition == Int.max { return 0..<work.count }
    let position = queries.firstPosition + token
    let end = work.lowerBound(position + 1)
    if slidingWindow == 0 || work.sortedFrom > 0 { return 0..<end }
    return min(work.lowerBound(position - slidingWindow + 1), end)..<end
  }

  /// Calls `body` with the log biases of the rows `own`, minus infinity for those in no order that the query of a token
  /// does not see. There are none of these while decoding: what moved between tiers is older than the query.
  private func withBias(
    of work: RowsWork, _ own: Range<Int>, _ queries: QueryBlock, token: Int, _ body: (UnsafePointer<Float>?) -> Void
  ) {
    let stored = work.bias.map { $0 + own.lowerBound }
    let position = queries.firstPosition == Int.max ? Int.max : queries.firstPosition + token
    let unsorted = own.clamped(to: 0..<work.sortedFrom)
    if position == Int.max || slidingWindow == 0 && (unsorted.isEmpty || position >= work.highest)
      || work.sortedFrom == 0
    {
      body(stored)
      return
    }
    withUnsafeTemporaryAllocation(of: Float.self, capacity: own.count) { bias in
      guard let base = bias.baseAddress else { return }
      for (index, row) in own.enumerated() {
        let other = work.position(row)
        let seen = other <= position && (slidingWindow == 0 || other > position - slidingWindow)
        base[index] = seen ? stored?[index] ?? 0 : -.infinity
      }
      body(base)
    }
  }

  /// Rows of the block that any query sees.
  private func visibleRows(_ work: RowsWork, _ queries: QueryBlock, _ block: Range<Int>) -> Range<Int> {
    let first = rows(work, queries, token: 0)
    let last = rows(work, queries, token: queries.tokens - 1)
    return (first.lowerBound..<max(last.upperBound, first.lowerBound)).clamped(to: block)
  }

  // MARK: Kernels over slices

  func form(
    _ slices: Range<Int>, _ range: Range<Int>, _ queries: QueryBlock, into target: UnsafeMutablePointer<Float>,
    stride: Int
  ) {
    forEach(slices, range) { run, first, count, offset in
      run.withKernelMap { map in
        withUnsafePointer(to: run.kernelRun) {
          ckv_mapped_logits(
            kernels, map, $0, UInt32(first), UInt32(count), queries.base, UInt32(queries.rows), keyDim, scale,
            target + offset, stride, scratch, mapped)
        }
      }
    }
  }

  func accumulate(
    _ slices: Range<Int>, _ range: Range<Int>, weights: UnsafePointer<Float>, stride: Int, rows: Int,
    _ partial: PartialBlock
  ) {
    forEach(slices, range) { run, first, count, offset in
      run.withKernelMap { map in
        withUnsafePointer(to: run.kernelRun) {
          ckv_mapped_accumulate(
            kernels, map, $0, UInt32(first), UInt32(count), weights + offset, UInt32(rows), stride,
            partial.accumulators, valueDim, scratch, mapped)
        }
      }
    }
  }

  /// Calls `body(run, first row of the run, count, offset from range.lowerBound)` for every slice that meets `range`.
  func forEach(_ slices: Range<Int>, _ range: Range<Int>, _ body: (RowRun, Int, Int, Int) -> Void) {
    var start = 0
    for index in slices {
      let slice = plan.slices[index]
      let end = start + slice.count
      if end > range.lowerBound, start < range.upperBound {
        let low = max(start, range.lowerBound)
        let high = min(end, range.upperBound)
        body(slice.run, slice.first + low - start, high - low, low - range.lowerBound)
      }
      if end >= range.upperBound { return }
      start = end
    }
  }
}

/// The arrays of a plan as pointers, readable from every worker.
struct AttentionPlanView {
  let slices: UnsafePointer<RunSlice>
}

extension RowsWork {
  /// First row whose position is at least `position`, of those in order.
  func position(_ row: Int) -> Int { positions.map { Int($0[row]) } ?? firstPosition + row }

  func lowerBound(_ position: Int) -> Int {
    guard let positions else { return min(max(position - firstPosition, 0), count) }
    if count > sortedFrom, Int(positions[count - 1]) < position { return count }
    var low = sortedFrom
    var high = count
    while low < high {
      let middle = (low + high) / 2
      if Int(positions[middle]) < position { low = middle + 1 } else { high = middle }
    }
    return low
  }
}
