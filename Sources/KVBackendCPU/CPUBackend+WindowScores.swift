internal import CKVKernels
package import KVCore

/// Window attention for scorers: column sums of the softmax of the last queries over all rows.
extension CPUBackend {
  package func windowScores(_ request: WindowScoreRequest, into scores: inout ScoreTable) {
    // Pieces of rows of one KV head lie behind one another in the request.
    var heads: [Range<Int>] = []
    for index in request.heads.indices {
      if index > 0, request.heads[index].kvHead == request.heads[index - 1].kvHead {
        heads[heads.count - 1] = heads[heads.count - 1].lowerBound..<index + 1
      } else {
        heads.append(index..<index + 1)
      }
    }
    let starts = request.heads.indices.map { scores.range(head: $0).lowerBound }
    let total = scores.values.count
    scores.values.withUnsafeMutableBufferPointer { values in
      guard let base = values.baseAddress, total > 0 else { return }
      request.slices.withUnsafeBufferPointer { slices in
        guard let sliceBase = slices.baseAddress else { return }
        let view = AttentionPlanView(slices: sliceBase)
        parallel(heads.count) { _, item in
          self.scoreHead(request, work: heads[item], view: view) { base + starts[$0] }
        }
      }
    }
  }

  /// Scores of one KV head. The exponentials of a few query rows over all rows are formed, normalised, summed.
  private func scoreHead(
    _ request: WindowScoreRequest, work: Range<Int>, view: AttentionPlanView,
    target: (Int) -> UnsafeMutablePointer<Float>
  ) {
    let padded = work.reduce(0) { $0 + CPUBackend.padded(request.heads[$1].count) }
    let group = request.group
    // As many window positions at a time as keep the exponentials within a few megabytes.
    let tokens = min(request.window, max(1, 2_097_152 / max(padded * group, 1)))
    let m = tokens * group
    var layout = Layout()
    let kept = layout.take(m * padded)
    let maxima = layout.take(m * padded / blockRows)
    let queries = layout.take(m * request.keyDim)
    let partial = layout.take(PartialBlock.floats(rows: m, valueDim: 0))
    let columns = layout.take(group * padded)
    let scratch = layout.take(RowAttention.floats(rows: m, keyDim: request.keyDim, valueDim: 0))
    let workspace = Workspace()
    let memory = workspace.floats(layout.total)
    (memory + columns).update(repeating: 0, count: group * padded)

    for first in stride(from: 0, to: request.window, by: tokens) {
      let count = min(tokens, request.window - first)
      let rows = count * group
      let attention = RowAttention(
        kernels: kernels, plan: view, keyDim: request.keyDim, valueDim: 0, scale: request.scale,
        softcap: request.softcap, slidingWindow: 0, rows: m, memory: memory + scratch)
      gatherQueries(
        request, kvHead: request.heads[work.lowerBound].kvHead, tokens: first..<first + count, into: memory + queries)
      let block = PartialBlock(at: memory + partial, rows: rows)
      block.clear(rows: rows, valueDim: 0)
      let weights = KeptWeights(base: memory + kept, stride: padded, maxima: memory + maxima)
      var offset = 0
      for index in work {
        attention.add(
          request.heads[index], range: 0..<request.heads[index].count,
          queries: QueryBlock(
            base: memory + queries, tokens: count, group: group, firstPosition: request.firstPosition + first),
          to: block, kept: weights, keptOffset: offset)
        offset += CPUBackend.padded(request.heads[index].count)
      }
      addColumns(weights, block, rows: rows, group: group, padded: padded, to: memory + columns)
    }
    reduce(memory + columns, group: group, padded: padded, request.reduction, work, request, target)
  }

  private func gatherQueries(
    _ request: WindowScoreRequest, kvHead: Int, tokens: Range<Int>, into target: UnsafeMutablePointer<Float>
  ) {
    let dim = request.keyDim
    for (local, token) in tokens.enumerated() {
      for member in 0..<request.group {
        let head = kvHead * request.group + member
        (target + (local * request.group + member) * dim).update(
          from: request.queries + (head * request.window + token) * dim, count: dim)
      }
    }
  }

  /// Adds the probabilities of every query row to the column sums of its query head.
  private func addColumns(
    _ weights: KeptWeights, _ block: PartialBlock, rows: Int, group: Int, padded: Int,
    to columns: UnsafeMutablePointer<Float>
  ) {
    for first in stride(from: 0, to: padded, by: blockRows) {
      let maxima = weights.maxima + first / blockRows * rows
      for row in 0..<rows where block.sums[row] > 0 && maxima[row] > -.infinity {
        let factor = exponential(maxima[row] - block.maxima[row]) / block.sums[row]
        kernels.pointee.axpy!(
          columns + row % group * padded + first, weights.base + row * weights.stride + first, factor, blockRows)
      }
    }
  }

  private func exponential(_ x: Float) -> Float {
    var value = x
    kernels.pointee.exp_shift!(&value, 1, 0)
    return value
  }

  private func reduce(
    _ columns: UnsafeMutablePointer<Float>, group: Int, padded: Int, _ reduction: GroupReduction,
    _ work: Range<Int>, _ request: WindowScoreRequest, _ target: (Int) -> UnsafeMutablePointer<Float>
  ) {
    var offset = 0
    for index in work {
      let count = request.heads[index].count
      let result = target(index)
      for row in 0..<count {
        var value = columns[offset + row]
        for member in 1..<max(group, 1) where member < group {
          let other = columns[member * padded + offset + row]
          value = reduction == .max ? max(value, other) : value + other
        }
        result[row] = reduction == .mean ? value / Float(group) : value
      }
      offset += CPUBackend.padded(count)
    }
  }
}
