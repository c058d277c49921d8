internal import CKVCUDA
package import KVCore
internal import Synchronization

/// Window attention for scorers: the attention kernels without values, then column sums.
extension CUDABackend {
  package func windowScores(_ request: WindowScoreRequest, into scores: inout ScoreTable) {
    let total = request.heads.reduce(0) { $0 + $1.count }
    if total == 0 { return }
    exclusivelyRecording { scratch throws(KVError) in
      let columns = try scratch.columns.bytes(total * 4, session).assumingMemoryBound(to: Float.self)
      let plan = AttentionPlan()
      plan.slices = ContiguousArray(request.slices)
      var next = 0
      for rows in request.heads {
        var work = rows
        work.score = columns + next
        plan.rows.append(work)
        next += rows.count
      }
      // Nothing is written to an output of no channels.
      plan.sequences.append(
        SequenceWork(
          queries: UnsafeRawPointer(request.queries), queryType: .f32,
          queryHeadStride: request.window * request.keyDim, queryTokenStride: request.keyDim, output: columns,
          outputHeadStride: 0, outputTokenStride: 0, logSumExp: nil, tokens: request.window,
          kvHeads: (request.heads.map(\.kvHead).max() ?? 0) + 1, group: request.group, keyDim: request.keyDim,
          valueDim: 0, scale: request.scale, softcap: request.softcap, firstPosition: request.firstPosition,
          slidingWindow: 0, rotary: nil, work: 0..<plan.rows.count))
      try attend(plan, &scratch, window: request.reduction)
      next = 0
      for (index, rows) in request.heads.enumerated() {
        for row in 0..<rows.count { scores[index, row] = columns[next + row] }
        next += rows.count
      }
    }
  }
}
