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
    let planes = request.columnPlanes
    let columns = layout.take(planes * group * padded)
    let scratch = layout.take(RowAttention.floats(rows: m, keyDim: request.keyDim, valueDim: 0))
    let latents = layout.take(
      LatentSpace.floats(request.heads[work], request.slices, rows: m, keyDim: request.keyDim, valueDim: 0))
    let workspace = Workspace()
    let memory = workspace.floats(layout.total)
    (memory + columns).update(repeating: 0, count: planes * group * padded)
    var entropy = 0.0

    for first in stride(from: 0, to: request.window, by: tokens) {
      let count = min(tokens, request.window - first)
      let rows = count * group
      var attention = RowAttention(
        kernels: kernels, plan: view, keyDim: request.keyDim, valueDim: 0, scale: request.scale,
        softcap: request.softcap, slidingWindow: 0, rows: m, memory: memory + scratch)
      attention.latent = LatentSpace(memory: memory + latents, backend: self)
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
      switch request.statistic {
      case .belowEvenShare:
        countBelow(weights, block, request, work, tokens: first..<first + count, padded: padded, to: memory + columns)
      default:
        addColumns(weights, block, request, rows: rows, isFirst: first == 0, padded: padded, to: memory + columns)
      }
      if request.totals != nil { entropy += self.entropy(weights, block, request, work, rows: rows) }
    }
    if let totals = request.totals {
      totals[request.heads[work.lowerBound].kvHead] = WindowTotals(
        entropy: entropy, variance: variance(memory + columns, request, work, padded: padded))
    }
    finish(memory + columns, request, padded: padded)
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

  /// Factor that makes probabilities of a block's exponentials of one query row; 0 when it sees nothing there.
  private func factor(_ block: PartialBlock, row: Int, maximum: Float) -> Float {
    guard block.sums[row] > 0, maximum > -.infinity else { return 0 }
    return exponential(maximum - block.maxima[row]) / block.sums[row]
  }

  /// Adds the probabilities of every query row to the columns of its query head: the sum or the maximum, and with
  /// moments their spread around those of the first query.
  private func addColumns(
    _ weights: KeptWeights, _ block: PartialBlock, _ request: WindowScoreRequest, rows: Int, isFirst: Bool,
    padded: Int, to columns: UnsafeMutablePointer<Float>
  ) {
    let group = request.group
    let moments = request.columnPlanes > 1
    for first in stride(from: 0, to: padded, by: blockRows) {
      let maxima = weights.maxima + first / blockRows * rows
      for row in 0..<rows {
        let factor = factor(block, row: row, maximum: maxima[row])
        let source = weights.base + row * weights.stride + first
        let target = columns + row % group * padded + first
        if moments {
          let spread = target + group * padded
          let origin = spread + group * padded
          if isFirst, row < group, factor > 0 { kernels.pointee.axpy!(origin, source, factor, blockRows) }
          kernels.pointee.moments!(target, spread, origin, source, factor, blockRows)
        } else if factor > 0 {
          let add = request.statistic == .max ? kernels.pointee.max_scaled! : kernels.pointee.axpy!
          add(target, source, factor, blockRows)
        }
      }
    }
  }

  /// Counts, for every row and query head, the queries that see the row and give it less than an even share.
  private func countBelow(
    _ weights: KeptWeights, _ block: PartialBlock, _ request: WindowScoreRequest, _ work: Range<Int>,
    tokens: Range<Int>, padded: Int, to columns: UnsafeMutablePointer<Float>
  ) {
    let group = request.group
    for (local, token) in tokens.enumerated() {
      let position = request.firstPosition + token
      var live = 0
      for index in work { live += request.heads[index].live(upTo: position) }
      let pivot = 1 / Float(max(live, 1))
      for member in 0..<group {
        let row = local * group + member
        var offset = 0
        for index in work {
          let rows = request.heads[index]
          let visible = rows.lowerBound(position + 1)
          for first in stride(from: 0, to: visible, by: blockRows) {
            let maximum = weights.maxima[(offset + first) / blockRows * tokens.count * group + row]
            kernels.pointee.count_below!(
              columns + member * padded + offset + first, weights.base + row * weights.stride + offset + first,
              factor(block, row: row, maximum: maximum), pivot, min(blockRows, visible - first))
          }
          offset += CPUBackend.padded(rows.count)
        }
      }
    }
  }

  /// Entropy over the rows older than the window, of some query rows.
  private func entropy(
    _ weights: KeptWeights, _ block: PartialBlock, _ request: WindowScoreRequest, _ work: Range<Int>, rows: Int
  ) -> Double {
    var total = 0.0
    for row in 0..<rows {
      var offset = 0
      for index in work {
        let past = request.heads[index].lowerBound(request.firstPosition)
        for first in stride(from: 0, to: past, by: blockRows) {
          let maximum = weights.maxima[(offset + first) / blockRows * rows + row]
          let factor = factor(block, row: row, maximum: maximum)
          if factor == 0 { continue }
          total += kernels.pointee.entropy!(
            weights.base + row * weights.stride + offset + first, factor, min(blockRows, past - first))
        }
        offset += CPUBackend.padded(request.heads[index].count)
      }
    }
    return total
  }

  /// The sum over query heads and rows older than the window of the variance over the window.
  private func variance(
    _ columns: UnsafePointer<Float>, _ request: WindowScoreRequest, _ work: Range<Int>, padded: Int
  ) -> Double {
    if request.columnPlanes < 3 { return 0 }
    var total = 0.0
    for member in 0..<request.group {
      var offset = member * padded
      for index in work {
        let past = request.heads[index].lowerBound(request.firstPosition)
        for slot in offset..<offset + past {
          total += Double(request.variance(columns, slot, plane: request.group * padded))
        }
        offset += CPUBackend.padded(request.heads[index].count)
      }
    }
    return total
  }

  /// Turns moments into the score of each query head, in the first plane.
  private func finish(_ columns: UnsafeMutablePointer<Float>, _ request: WindowScoreRequest, padded: Int) {
    guard case .meanVariance(let gamma) = request.statistic else { return }
    let plane = request.group * padded
    for slot in 0..<plane {
      columns[slot] = columns[slot] / Float(request.window) + gamma * request.variance(columns, slot, plane: plane)
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

extension WindowScoreRequest {
  /// Columns a query head needs while the window is walked: the score; with moments also the spread around the first
  /// query, and the first query.
  fileprivate var columnPlanes: Int {
    if case .meanVariance = statistic { return 3 }
    return totals == nil || statistic != .sum ? 1 : 3
  }

  /// Variance over the window from sum, spread and origin, which lie `plane` floats apart.
  fileprivate func variance(_ columns: UnsafePointer<Float>, _ slot: Int, plane: Int) -> Float {
    if window < 2 { return 0 }
    let offset = columns[slot] - Float(window) * columns[2 * plane + slot]
    return max(0, columns[plane + slot] - offset * offset / Float(window)) / Float(window - 1)
  }
}

extension RowsWork {
  /// Live rows at or before a position.
  fileprivate func live(upTo position: Int) -> Int {
    let visible = lowerBound(position + 1)
    guard let bias else { return visible }
    var count = 0
    for row in 0..<visible where bias[row] != -.infinity { count += 1 }
    return count
  }
}
