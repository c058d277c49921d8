internal import CKVCUDA
package import KVCore
internal import Synchronization

/// Attention of a plan: descriptions go to pinned memory, then three launches a turn: partials of pieces of rows, their
/// merge, statistics.
extension CUDABackend {
  package func attend(_ plan: AttentionPlan) throws(KVError) {
    if plan.sequences.isEmpty { return }
    try session.surviving()
    try exclusively { scratch throws(KVError) in try attend(plan, &scratch, window: nil) }
    try session.surviving()
  }

  /// Where the parts of one call lie in pinned memory, in bytes.
  private struct Places {
    var slices = 0
    var works = 0
    var sequences = 0
    var pieces = 0
    var merges = 0
    var statistics = 0
    var partials = 0
    /// Queries that lie in ordinary memory, outputs that do, log sums, queries turned for shifted rows: floats each.
    var queries: [Int] = []
    var outputs: [Int] = []
    var logSums: [Int] = []
    var turned = 0
    var total = 0
  }

  func attend(_ plan: AttentionPlan, _ scratch: inout Scratch, window: GroupReduction?) throws(KVError) {
    scratch.plan.describe(plan, whole: window != nil)
    let places = layOut(plan, scratch.plan)
    let pinned = try scratch.pinned.bytes(places.total, session)
    let memory = try scratch.device.bytes(scratch.plan.floats * 4, session).assumingMemoryBound(to: Float.self)
    scratch.plan.setQueries(memory: memory)

    for index in plan.sequences.indices { loadQueries(index, plan, scratch.plan, places, pinned, memory) }
    turnQueries(plan, &scratch.plan, places, pinned, memory)
    for (number, turn) in scratch.plan.turns.enumerated() {
      let sequence = plan.sequences[turn.sequence]
      var address = sequence.output
      var strides = (sequence.outputHeadStride, sequence.outputTokenStride)
      if places.outputs[turn.sequence] >= 0 {
        address = (pinned + places.outputs[turn.sequence]).assumingMemoryBound(to: Float.self)
        strides = (sequence.tokens * sequence.valueDim, sequence.valueDim)
      }
      let logSums = places.logSums[turn.sequence]
      scratch.plan.setOutput(
        turn: number, address: address + turn.tokens.lowerBound * strides.1, headStride: strides.0,
        tokenStride: strides.1,
        logSumExp: logSums < 0
          ? nil
          : (pinned + logSums).assumingMemoryBound(to: Float.self)
            + turn.tokens.lowerBound * sequence.kvHeads * sequence.group)
    }
    copy(scratch.plan.slices, to: pinned + places.slices)
    copy(scratch.plan.works, to: pinned + places.works)
    copy(scratch.plan.sequences, to: pinned + places.sequences)
    copy(scratch.plan.pieces, to: pinned + places.pieces)
    copy(scratch.plan.merges, to: pinned + places.merges)
    copy(scratch.plan.statistics, to: pinned + places.statistics)
    copy(scratch.plan.partials, to: pinned + places.partials)
    for turn in scratch.plan.turns { launch(turn, plan, places, pinned, memory, window: window) }
    session.synchronize()
    copyOut(plan, scratch.plan, places, pinned)
  }

  private func layOut(_ plan: AttentionPlan, _ written: CUDADescriptions) -> Places {
    var layout = CUDALayout()
    var places = Places()
    places.slices = layout.take(written.slices.count, of: kv_slice.self)
    places.works = layout.take(written.works.count, of: kv_work.self)
    places.sequences = layout.take(written.sequences.count, of: kv_sequence.self)
    places.pieces = layout.take(written.pieces.count, of: kv_piece.self)
    places.merges = layout.take(written.merges.count, of: kv_merge.self)
    places.statistics = layout.take(written.statistics.count, of: kv_statistic.self)
    places.partials = layout.take(written.partials.count, of: UInt64.self)
    for sequence in plan.sequences {
      let heads = sequence.kvHeads * sequence.group
      places.queries.append(
        session.accessible(sequence.queries)
          ? -1 : layout.take(heads * sequence.tokens * sequence.keyDim, of: Float.self))
      places.outputs.append(
        session.accessible(sequence.output)
          ? -1 : layout.take(heads * sequence.tokens * sequence.valueDim, of: Float.self))
      places.logSums.append(
        sequence.logSumExp == nil ? -1 : layout.take(heads * sequence.tokens, of: Float.self))
    }
    var turned = 0
    for turn in written.turns {
      let sequence = plan.sequences[turn.sequence]
      let shifted = sequence.work.filter { plan.rows[$0].shift != 0 }
      turned += shifted.count * turn.tokens.count * sequence.group * sequence.keyDim
    }
    places.turned = layout.take(turned, of: Float.self)
    places.total = layout.total
    return places
  }

  private func copy<Element: BitwiseCopyable>(_ values: [Element], to target: UnsafeMutableRawPointer) {
    values.withUnsafeBytes { bytes in
      if let base = bytes.baseAddress { target.copyMemory(from: base, byteCount: bytes.count) }
    }
  }

  private func launch(
    _ turn: CUDADescriptions.Turn, _ plan: AttentionPlan, _ places: Places, _ pinned: UnsafeMutableRawPointer,
    _ memory: UnsafeMutablePointer<Float>, window: GroupReduction?
  ) {
    let pieces = pinned + places.pieces + turn.pieces.lowerBound * MemoryLayout<kv_piece>.stride
    let merges = pinned + places.merges + turn.merges.lowerBound * MemoryLayout<kv_merge>.stride
    let statistics = pinned + places.statistics + turn.statistics.lowerBound * MemoryLayout<kv_statistic>.stride
    let sequences = pinned + places.sequences
    let works = pinned + places.works
    let data = UnsafeMutableRawPointer(memory)
    launch(.attend, x: turn.pieces.count, [pieces, sequences, works, pinned + places.slices, data])
    launch(.finish, x: turn.merges.count, [merges, sequences, pinned + places.partials, data])
    let threads = KV_THREADS
    let blocks = (turn.longestStatistic + threads - 1) / threads
    guard let window else {
      launch(.statistics, x: blocks, y: turn.statistics.count, [statistics, works, data])
      return
    }
    if turn.statistics.isEmpty { return }
    var addresses = (statistics, works, data)
    var numbers = (UInt32(plan.sequences[turn.sequence].group), window.kernelNumber)
    withUnsafeMutablePointer(to: &addresses.0) { statistics in
      withUnsafeMutablePointer(to: &addresses.1) { works in
        withUnsafeMutablePointer(to: &addresses.2) { data in
          withUnsafeMutablePointer(to: &numbers.0) { group in
            withUnsafeMutablePointer(to: &numbers.1) { reduction in
              var arguments: [UnsafeMutableRawPointer?] = [
                .init(statistics), .init(works), .init(data), .init(group), .init(reduction),
              ]
              session.launch(.window, x: blocks, y: turn.statistics.count, &arguments)
            }
          }
        }
      }
    }
  }

  /// Launches a kernel whose arguments are all addresses.
  private func launch(_ kernel: CUDAKernel, x: Int, y: Int = 1, _ addresses: [UnsafeMutableRawPointer]) {
    if x == 0 || y == 0 { return }
    var values = addresses.map { Optional($0) }
    values.withUnsafeMutableBytes { bytes in
      guard let base = bytes.baseAddress else { return }
      let size = MemoryLayout<UnsafeMutableRawPointer?>.stride
      var arguments = addresses.indices.map { Optional(base + $0 * size) }
      session.launch(kernel, x: x, y: y, &arguments)
    }
  }

  // MARK: Queries

  /// Queries as f32 [KV head][token][group][keyDim] in device memory, turn by turn.
  private func loadQueries(
    _ index: Int, _ plan: AttentionPlan, _ written: CUDADescriptions, _ places: Places,
    _ pinned: UnsafeMutableRawPointer, _ memory: UnsafeMutablePointer<Float>
  ) {
    let sequence = plan.sequences[index]
    let size = sequence.queryType.byteCount
    let heads = sequence.kvHeads * sequence.group
    var view = kv_view(
      base: UInt64(UInt(bitPattern: sequence.queries)), head_stride: Int64(sequence.queryHeadStride),
      token_stride: Int64(sequence.queryTokenStride), type: UInt32(sequence.queryType.rawValue),
      heads: UInt32(heads), tokens: 0, dim: UInt32(sequence.keyDim))
    if places.queries[index] >= 0 {
      let target = pinned + places.queries[index]
      for head in 0..<heads {
        for token in 0..<sequence.tokens {
          (target + (head * sequence.tokens + token) * sequence.keyDim * size).copyMemory(
            from: sequence.queries + (head * sequence.queryHeadStride + token * sequence.queryTokenStride) * size,
            byteCount: sequence.keyDim * size)
        }
      }
      view.base = UInt64(UInt(bitPattern: target))
      view.head_stride = Int64(sequence.tokens * sequence.keyDim)
      view.token_stride = Int64(sequence.keyDim)
    }
    let base = view.base
    for turn in written.turns where turn.sequence == index {
      view.base = base + UInt64(turn.tokens.lowerBound * Int(view.token_stride) * size)
      view.tokens = UInt32(turn.tokens.count)
      var group = UInt32(sequence.group)
      var out = UnsafeMutableRawPointer(memory + turn.queries)
      withUnsafeMutablePointer(to: &view) { view in
        withUnsafeMutablePointer(to: &group) { group in
          withUnsafeMutablePointer(to: &out) { out in
            var arguments: [UnsafeMutableRawPointer?] = [.init(view), .init(group), .init(out)]
            session.launch(
              .loadQueries, x: gridBlocks(heads * turn.tokens.count * sequence.keyDim), &arguments)
          }
        }
      }
    }
  }

  /// Rows that count as later than they are stored meet queries that were turned back by as much: a few rows of a
  /// policy with slot positions, on the host.
  private func turnQueries(
    _ plan: AttentionPlan, _ written: inout CUDADescriptions, _ places: Places, _ pinned: UnsafeMutableRawPointer,
    _ memory: UnsafeMutablePointer<Float>
  ) {
    if !plan.rows.contains(where: { $0.shift != 0 }) { return }
    var target = (pinned + places.turned).assumingMemoryBound(to: Float.self)
    for number in written.turns.indices {
      let turn = written.turns[number]
      let sequence = plan.sequences[turn.sequence]
      guard let rotary = sequence.rotary else { continue }
      let count = turn.tokens.count * sequence.group * sequence.keyDim
      for work in sequence.work where plan.rows[work].shift != 0 {
        let rows = plan.rows[work]
        session.copy(to: target, from: memory + turn.queries + rows.kvHead * count, count * 4)
        session.synchronize()
        for (local, token) in turn.tokens.enumerated() {
          // Only the difference matters; queries that see everything have no position of their own.
          let position = sequence.firstPosition == .max ? rows.shift : sequence.firstPosition + token
          for member in 0..<sequence.group {
            rotary.move(
              row: target + (local * sequence.group + member) * sequence.keyDim, from: position,
              to: position - rows.shift)
          }
        }
        written.setQueries(work: work, turn: number, address: target)
        target += count
      }
    }
  }

  // MARK: Outputs

  private func copyOut(
    _ plan: AttentionPlan, _ written: CUDADescriptions, _ places: Places, _ pinned: UnsafeMutableRawPointer
  ) {
    for index in plan.sequences.indices where places.outputs[index] >= 0 {
      let sequence = plan.sequences[index]
      let source = (pinned + places.outputs[index]).assumingMemoryBound(to: Float.self)
      for head in 0..<sequence.kvHeads * sequence.group {
        for token in 0..<sequence.tokens {
          (sequence.output + head * sequence.outputHeadStride + token * sequence.outputTokenStride)
            .update(from: source + (head * sequence.tokens + token) * sequence.valueDim, count: sequence.valueDim)
        }
      }
    }
    // Kernels write the log sums of a turn as [head][token of the turn]; the caller wants [head][token].
    for turn in written.turns where places.logSums[turn.sequence] >= 0 {
      let sequence = plan.sequences[turn.sequence]
      let heads = sequence.kvHeads * sequence.group
      guard let target = sequence.logSumExp else { continue }
      let source =
        (pinned + places.logSums[turn.sequence]).assumingMemoryBound(to: Float.self)
        + turn.tokens.lowerBound * heads
      for head in 0..<heads {
        (target + head * sequence.tokens + turn.tokens.lowerBound)
          .update(from: source + head * turn.tokens.count, count: turn.tokens.count)
      }
    }
  }
}

extension GroupReduction {
  fileprivate var kernelNumber: UInt32 {
    switch self {
    case .mean: 0
    case .max: 1
    case .sum: 2
    }
  }
}
