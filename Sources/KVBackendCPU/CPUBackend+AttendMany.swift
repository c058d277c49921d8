internal import CKVKernels
internal import KVCore

/// Attention of many queries: prefill chunks.
extension CPUBackend {
  /// Query rows (tokens times group) of one item: enough to use every key row often, few enough for the caches.
  private static let rowsPerItem = 128
  /// Items whose statistics are gathered before they are added, in order. Fixed, so that sums do not depend on threads.
  private static let wave = 16

  func attendMany(_ plan: AttentionPlan, sequence index: Int) {
    let sequence = plan.sequences[index]
    let tokens = max(1, CPUBackend.rowsPerItem / sequence.group)
    let blocks = (sequence.tokens + tokens - 1) / tokens
    let m = tokens * sequence.group
    let heads = headWork(plan, sequence)
    let scored = sequence.work.contains { plan.rows[$0].score != nil }
    let longest =
      heads.map { range in
        range.reduce(0) { $0 + CPUBackend.padded(plan.rows[$1].count) }
      }.max() ?? 0

    var layout = Layout()
    let perWorker =
      RowAttention.floats(rows: m, keyDim: sequence.keyDim, valueDim: sequence.valueDim)
      + m * sequence.keyDim + PartialBlock.floats(rows: m, valueDim: sequence.valueDim)
      + (scored ? m * longest + m * longest / blockRows : 0) + 64 + LatentSpace.floats(plan, sequence, rows: m)
    let items = heads.count * blocks
    let workers = max(1, min(threads, items))
    let stride = (perWorker + 15) / 16 * 16
    let scratch = layout.take(workers * stride)
    let columns = scored ? layout.take(CPUBackend.wave * longest) : 0
    let memory = plan.workspace.floats(layout.total)

    plan.slices.withUnsafeBufferPointer { slices in
      // A cache without any row still needs its zero outputs: an empty list of slices has no address to give.
      let anyRun = UnsafePointer<RunSlice>(bitPattern: MemoryLayout<RunSlice>.alignment)
      guard let base = slices.baseAddress ?? anyRun else { return }
      let view = AttentionPlanView(slices: base)
      for first in Swift.stride(from: 0, to: items, by: scored ? CPUBackend.wave : items) {
        let count = scored ? min(CPUBackend.wave, items - first) : items
        parallel(count) { worker, local in
          let item = first + local
          let block = item % blocks
          let range = block * tokens..<min((block + 1) * tokens, sequence.tokens)
          let observed = scored && range.upperBound > sequence.observedFrom
          attendBlock(
            plan, view, sequence, head: item / blocks, work: heads[item / blocks], tokens: range,
            memory: memory + scratch + worker * stride,
            columns: observed ? memory + columns + local * longest : nil, longest: longest)
        }
        if scored {
          for local in 0..<count where ((first + local) % blocks + 1) * tokens > sequence.observedFrom {
            addColumns(
              memory + columns + local * longest, to: heads[(first + local) / blocks], plan, sequence.reduction)
          }
        }
      }
    }
  }

  /// Items of `plan.rows` of each KV head, empty for heads without rows.
  private func headWork(_ plan: AttentionPlan, _ sequence: SequenceWork) -> [Range<Int>] {
    var result: [Range<Int>] = []
    var start = sequence.work.lowerBound
    for head in 0..<sequence.kvHeads {
      var end = start
      while end < sequence.work.upperBound, plan.rows[end].kvHead == head { end += 1 }
      result.append(start..<end)
      start = end
    }
    return result
  }

  private func attendBlock(
    _ plan: AttentionPlan, _ view: AttentionPlanView, _ sequence: SequenceWork, head: Int, work: Range<Int>,
    tokens: Range<Int>, memory: UnsafeMutablePointer<Float>, columns: UnsafeMutablePointer<Float>?, longest: Int
  ) {
    let m = tokens.count * sequence.group
    let partial = PartialBlock(at: memory, rows: m)
    partial.clear(rows: m, valueDim: sequence.valueDim)
    let queries = memory + PartialBlock.floats(rows: m, valueDim: sequence.valueDim)
    let keptBase = queries + m * sequence.keyDim
    let kept = columns.map { _ in
      KeptWeights(base: keptBase, stride: longest, maxima: keptBase + m * longest)
    }
    let rest = kept == nil ? keptBase : keptBase + m * longest + m * longest / blockRows
    let attention = rowAttention(sequence, view, rows: m, scratch: rest)
    var offset = 0
    var shift: Int?
    for index in work {
      let rows = plan.rows[index]
      if rows.shift != shift {
        loadQueries(sequence, work: rows, tokens: tokens, into: queries)
        shift = rows.shift
      }
      let firstPosition =
        sequence.firstPosition == Int.max ? Int.max : sequence.firstPosition + tokens.lowerBound
      attention.add(
        rows, range: 0..<rows.count,
        queries: QueryBlock(
          base: queries, tokens: tokens.count, group: sequence.group, firstPosition: firstPosition),
        to: partial, kept: kept, keptOffset: offset)
      offset += CPUBackend.padded(rows.count)
    }
    writeOutput(partial, sequence, kvHead: head, tokens: tokens)
    guard let columns, let kept else { return }
    columns.update(repeating: 0, count: longest)
    addScores(
      kept, offset: 0, count: offset, partial, rows: m,
      from: max(0, sequence.observedFrom - tokens.lowerBound) * sequence.group, sequence.reduction, to: columns)
  }

  private func addColumns(
    _ columns: UnsafePointer<Float>, to work: Range<Int>, _ plan: AttentionPlan, _ reduction: AttentionReduction
  ) {
    let add = reduction == .sum ? kernels.pointee.axpy! : kernels.pointee.max_scaled!
    var offset = 0
    for index in work {
      let rows = plan.rows[index]
      if let score = rows.score { add(score, columns + offset, 1, rows.count) }
      offset += CPUBackend.padded(rows.count)
    }
  }
}
