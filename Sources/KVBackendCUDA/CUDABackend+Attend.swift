internal import CKVCUDA
package import KVCore
internal import Synchronization

/// Attention of a plan: its descriptions go to the card in one copy, then two to five launches a wave, then what the
/// engine wants in ordinary memory comes back in one copy.
extension CUDABackend {
  package func attend(_ plan: AttentionPlan) throws(KVError) { _ = try attendFinite(plan) }

  package var checksAttention: Bool { true }
  package var keepsPlans: Bool { true }

  package func attendFinite(_ plan: AttentionPlan) throws(KVError) -> AttentionFault? {
    if plan.sequences.isEmpty { return nil }
    try session.surviving()
    var fault: AttentionFault?
    try exclusively { scratch throws(KVError) in
      let kept = kept(of: plan)
      // Descriptions that are kept take the place of those that are not while they are used.
      if let kept { swap(&scratch.plan, &kept.plan) }
      defer { if let kept { swap(&scratch.plan, &kept.plan) } }
      findStaging(plan, &scratch)
      var written: (base: UnsafeMutableRawPointer, places: Region)?
      if let kept, plan.isRepeated { written = repeated(plan, kept, &scratch).map { ($0, kept.places) } }
      if written == nil {
        kept?.generation = nil
        try describe(plan, scratch.staging, &scratch)
        if let kept, scratch.plan.isRepeatable { written = keep(plan, kept, &scratch).map { ($0, kept.places) } }
      }
      let found = try scratch.pinned.bytes(Self.faultBytes + scratch.plan.results.count * 4, session)
      found.initializeMemory(as: UInt64.self, repeating: .max, count: 2)
      try run(plan, &scratch, window: nil, found: found, written: written)
      fault = copyOut(plan, &scratch, found: found, results: found + Self.faultBytes)
    }
    try session.surviving()
    return fault
  }

  /// Which tensors kernels cannot reach.
  private func findStaging(_ plan: AttentionPlan, _ scratch: inout Scratch) {
    scratch.staging.removeAll(keepingCapacity: true)
    for sequence in plan.sequences {
      var score: UnsafeMutablePointer<Float>?
      for work in sequence.work where score == nil { score = plan.rows[work].score }
      scratch.staging.append(
        CUDADescriptions.Staging(
          queries: !session.accessible(sequence.queries), output: !session.accessible(sequence.output),
          scores: score.map { !session.accessible($0) } ?? false))
    }
  }

  // MARK: Descriptions that are kept

  /// Where the descriptions of one token a sequence are kept; nil for other calls.
  private func kept(of plan: AttentionPlan) -> CUDAKeptPlan? {
    for index in plan.sequences.indices where plan.sequences[index].tokens != 1 { return nil }
    if let kept = plan.kept { return unsafeDowncast(kept, to: CUDAKeptPlan.self) }
    let kept = CUDAKeptPlan(session)
    plan.kept = kept
    return kept
  }

  /// The descriptions of the call before, brought up to date in the pinned memory where they lie; nil where that is not
  /// enough.
  private func repeated(
    _ plan: AttentionPlan, _ kept: CUDAKeptPlan, _ scratch: inout Scratch
  ) -> UnsafeMutableRawPointer? {
    guard kept.generation == plan.generation, let base = kept.memory.base,
      let device = scratch.device.base, let region = scratch.region.base,
      scratch.plan.describeAgain(
        plan, staging: scratch.staging, memory: device, region: region, written: base, kept.places)
    else { return nil }
    kept.repeats += 1
    assert(scratch.plan.isAsNew(plan, staging: scratch.staging, memory: device, region: region, base, kept.places))
    return base
  }

  /// Writes new descriptions to pinned memory of their own; nil where there is none.
  private func keep(
    _ plan: AttentionPlan, _ kept: CUDAKeptPlan, _ scratch: inout Scratch
  ) -> UnsafeMutableRawPointer? {
    kept.places = Region(scratch.plan)
    // What is queued has passed: attention waits for its output.
    guard let base = try? kept.memory.bytes(kept.places.total, session) else { return nil }
    write(scratch.plan, to: base, kept.places)
    kept.generation = plan.generation
    return base
  }

  /// Where kernels put on record what is not finite, before the results in pinned memory.
  static let faultBytes = 256

  /// Where the parts of one call lie in the region that is copied, in bytes.
  struct Region {
    var faults = 0
    var tables = 0
    var slices = 0
    var works = 0
    var sequences = 0
    var queries = 0
    var phases = 0
    var pieces = 0
    var restores = 0
    var merges = 0
    var statistics = 0
    var partials = 0
    var total = 0

    init() {}

    init(_ plan: CUDADescriptions) {
      var layout = CUDALayout()
      _ = layout.take(plan.queryBytes, of: UInt8.self, atLeast: 0)
      tables = layout.total
      // The tables know their addresses: nothing lies between them and the queries.
      _ = layout.take(plan.tables.words.count, of: UInt64.self)
      slices = layout.take(plan.slices.count, of: kv_slice.self)
      works = layout.take(plan.works.count, of: kv_work.self)
      sequences = layout.take(plan.sequences.count, of: kv_sequence.self)
      queries = layout.take(plan.queries.count, of: kv_queries.self)
      phases = layout.take(plan.phases.count, of: kv_phase.self)
      pieces = layout.take(plan.pieces.count, of: kv_piece.self)
      restores = layout.take(plan.restores.count, of: kv_restore.self)
      merges = layout.take(plan.merges.count, of: kv_merge.self)
      statistics = layout.take(plan.statistics.count, of: kv_statistic.self)
      partials = layout.take(plan.partials.count, of: UInt64.self)
      faults = layout.take(2, of: UInt64.self)
      total = layout.total
    }
  }

  /// Describes the plan for the memory there is, and once more when that turns out too small.
  func describe(
    _ plan: AttentionPlan, _ staging: [CUDADescriptions.Staging], _ scratch: inout Scratch, whole: Bool = false
  ) throws(KVError) {
    while true {
      let memory = try scratch.device.bytes(1, session)
      let region = try scratch.region.bytes(1, session)
      scratch.plan.describe(plan, staging: staging, memory: memory, region: region, whole: whole)
      let floats = scratch.plan.floats * 4
      let bytes = Region(scratch.plan).total
      if scratch.device.holds(floats), scratch.region.holds(bytes) { return }
      _ = try scratch.device.bytes(floats, session)
      _ = try scratch.region.bytes(bytes, session)
    }
  }

  /// Writes descriptions as the card will have them.
  private func write(_ written: CUDADescriptions, to host: UnsafeMutableRawPointer, _ places: Region) {
    copy(written.tables.words, to: host + places.tables)
    copy(written.slices, to: host + places.slices)
    copy(written.works, to: host + places.works)
    copy(written.sequences, to: host + places.sequences)
    copy(written.queries, to: host + places.queries)
    copy(written.phases, to: host + places.phases)
    copy(written.pieces, to: host + places.pieces)
    copy(written.restores, to: host + places.restores)
    copy(written.merges, to: host + places.merges)
    copy(written.statistics, to: host + places.statistics)
    copy(written.partials, to: host + places.partials)
  }

  /// Copies the descriptions and queues every launch.
  ///
  /// - Parameters:
  ///   - found: pinned memory where two places are put on record.
  ///   - kept: pinned memory where the descriptions have been written; nil: nowhere yet.
  func run(
    _ plan: AttentionPlan, _ scratch: inout Scratch, window: kv_window_rule?, found: UnsafeMutableRawPointer,
    written kept: (base: UnsafeMutableRawPointer, places: Region)? = nil
  ) throws(KVError) {
    let places: Region
    let host: UnsafeMutableRawPointer
    if let kept {
      (host, places) = (kept.base, kept.places)
    } else {
      places = Region(scratch.plan)
      host = try scratch.ring.bytes(places.total, session)
      write(scratch.plan, to: host, places)
    }
    let region = try scratch.region.bytes(places.total, session)
    let memory = try scratch.device.bytes(scratch.plan.floats * 4, session)
    for index in plan.sequences.indices where scratch.plan.stagedQueries[index] >= 0 {
      stageQueries(plan.sequences[index], at: host + scratch.plan.stagedQueries[index])
    }
    (host + places.faults).initializeMemory(as: UInt64.self, repeating: .max, count: 2)
    let faults = kv_faults(
      guard: UInt64(UInt(bitPattern: region + places.faults)), found: UInt64(UInt(bitPattern: found)))
    session.copy(to: region, from: host, places.total)

    for rows in scratch.plan.restored {
      let list = region + places.slices + rows.slices.lowerBound * MemoryLayout<kv_slice>.stride
      restore(rows, list)
    }
    for rows in scratch.plan.scaled { scale(rows, region + places.slices) }
    if scratch.plan.waves.count > 1, window == nil { checkQueries(plan, scratch.plan, region, faults) }
    for wave in scratch.plan.waves { launch(wave, region, places, memory, window: window, faults) }
  }

  /// Queries of several waves are looked at before the first of these adds statistics.
  private func checkQueries(
    _ plan: AttentionPlan, _ written: CUDADescriptions, _ region: UnsafeMutableRawPointer, _ faults: kv_faults
  ) {
    for (index, sequence) in plan.sequences.enumerated()
    where sequence.work.contains(where: { plan.rows[$0].score != nil }) {
      let staged = written.stagedQueries[index]
      let heads = sequence.kvHeads * sequence.group
      let view = kv_view(
        base: UInt64(UInt(bitPattern: staged < 0 ? sequence.queries : UnsafeRawPointer(region + staged))),
        head_stride: Int64(staged < 0 ? sequence.queryHeadStride : sequence.tokens * sequence.keyDim),
        token_stride: Int64(staged < 0 ? sequence.queryTokenStride : sequence.keyDim),
        type: UInt32(sequence.queryType.rawValue), heads: UInt32(heads), tokens: UInt32(sequence.tokens),
        dim: UInt32(sequence.keyDim))
      session.launch(
        .checkQueries, x: gridBlocks(heads * sequence.tokens * sequence.keyDim), view, written.queryPlace(index), faults
      )
    }
  }

  /// Keys to their positions: rows as f32, out from behind their maps, then times a basis or some of their channels.
  private func restore(_ rows: CUDADescriptions.RestoredRows, _ list: UnsafeMutableRawPointer) {
    let width = UInt64(rows.width)
    if rows.isFirst { read(list, rows.slices.count, rows: rows.rows, dim: rows.width, rows.maps, to: rows.table) }
    let dim = UInt32(rows.dim)
    guard let basis = rows.basis else {
      session.launch(
        .turnChannels, x: rows.rows, rows.table, width, UInt32(rows.channel), dim, rows.positions, rows.firstPosition,
        rows.rotary, rows.target)
      return
    }
    restore(rows.table, rows: rows.rows, basis, to: rows.target)
    session.launch(
      .turnChannels, x: rows.rows, rows.target, UInt64(rows.dim), UInt32(0), dim, rows.positions, rows.firstPosition,
      rows.rotary, rows.target)
  }

  /// Rows as f32, out from behind their maps.
  private func read(
    _ list: UnsafeMutableRawPointer, _ count: Int, rows: Int, dim: Int, _ maps: [(rows: Range<Int>, map: kv_map)],
    to target: UInt64
  ) {
    session.launch(.read, x: gridBlocks(rows * dim), list, UInt32(count), UInt32(rows), target, UInt64(dim))
    for part in maps {
      session.launch(
        .map, x: part.rows.count, target + UInt64(part.rows.lowerBound * dim * 4), UInt64(dim), part.map, UInt32(1),
        UInt32(1))
    }
  }

  /// Directions to rows; those that stayed exact take their places.
  private func scale(_ rows: CUDADescriptions.ScaledRows, _ slices: UnsafeMutableRawPointer) {
    func list(_ range: Range<Int>) -> UnsafeMutableRawPointer {
      slices + range.lowerBound * MemoryLayout<kv_slice>.stride
    }
    read(
      list(rows.directions), rows.directions.count, rows: rows.rows, dim: rows.dim, rows.maps, to: rows.target)
    session.launch(
      .scaleRows, x: rows.rows, rows.target, UInt32(rows.dim), list(rows.lengths), UInt32(rows.lengths.count))
    if rows.exactRows == 0 { return }
    read(
      list(rows.exact), rows.exact.count, rows: rows.exactRows, dim: rows.dim, rows.exactMaps, to: rows.exactTable)
    session.launch(
      .placeRows, x: rows.exactRows, rows.exactTable, UInt32(rows.dim), rows.slots, rows.offset, UInt32(rows.rows),
      rows.target)
  }

  private func launch(
    _ wave: CUDADescriptions.Wave, _ region: UnsafeMutableRawPointer, _ places: Region,
    _ memory: UnsafeMutableRawPointer, window: kv_window_rule?, _ faults: kv_faults
  ) {
    let sequences = region + places.sequences
    session.launch(
      .prepare, x: wave.phases.count, y: wave.queryRows,
      region + places.phases + wave.phases.lowerBound * MemoryLayout<kv_phase>.stride)
    var piece = wave.firstPiece
    for (index, kernel) in CUDADescriptions.attentionKernels.enumerated() {
      session.launch(
        kernel, x: wave.pieces[index], region + places.pieces + piece * MemoryLayout<kv_piece>.stride, sequences,
        region + places.works, region + places.slices, region + places.queries, memory)
      piece += wave.pieces[index]
    }
    session.launch(
      .restorePartials, x: wave.restores.count, y: wave.queryRows,
      region + places.restores + wave.restores.lowerBound * MemoryLayout<kv_restore>.stride, memory)
    session.launch(
      .finish, x: wave.merges.count, region + places.merges + wave.merges.lowerBound * MemoryLayout<kv_merge>.stride,
      sequences, region + places.partials, region + places.queries, faults, memory)
    let statistics = region + places.statistics + wave.statistics.lowerBound * MemoryLayout<kv_statistic>.stride
    let blocks = (wave.longestStatistic + KV_THREADS - 1) / KV_THREADS
    if let window {
      session.launch(.window, x: wave.statistics.count, y: blocks, statistics, memory, window)
    } else {
      session.launch(.statistics, x: wave.statistics.count, y: blocks, statistics, memory, faults)
    }
  }

  private func copy<Element: BitwiseCopyable>(_ values: [Element], to target: UnsafeMutableRawPointer) {
    values.withUnsafeBytes { bytes in
      if let base = bytes.baseAddress { target.copyMemory(from: base, byteCount: bytes.count) }
    }
  }

  /// Queries in ordinary memory, [head][token][keyDim].
  private func stageQueries(_ sequence: SequenceWork, at target: UnsafeMutableRawPointer) {
    let size = sequence.queryType.byteCount
    let bytes = sequence.keyDim * size
    for head in 0..<sequence.kvHeads * sequence.group {
      for token in 0..<sequence.tokens {
        (target + (head * sequence.tokens + token) * bytes).copyMemory(
          from: sequence.queries + (head * sequence.queryHeadStride + token * sequence.queryTokenStride) * size,
          byteCount: bytes)
      }
    }
  }

  /// Outputs, log sums and scores that lie in ordinary memory. Waits for the stream; says what was not finite.
  private func copyOut(
    _ plan: AttentionPlan, _ scratch: inout Scratch, found: UnsafeMutableRawPointer, results: UnsafeMutableRawPointer
  ) -> AttentionFault? {
    let count = scratch.plan.results.count
    let base = results.assumingMemoryBound(to: Float.self)
    if let memory = scratch.device.base { session.copy(to: base, from: memory, count * 4) }
    session.synchronize()
    for (index, isQuery) in [true, false].enumerated() {
      let place = found.load(fromByteOffset: index * 8, as: UInt64.self)
      if place == .max { continue }
      if let fault = scratch.plan.fault(place, isQuery: isQuery, plan) { return fault }
    }
    if count == 0 { return nil }
    let written = scratch.plan
    for (index, sequence) in plan.sequences.enumerated() {
      let heads = sequence.kvHeads * sequence.group
      if written.logSums[index] >= 0 {
        sequence.logSumExp?.update(from: base + written.logSums[index], count: heads * sequence.tokens)
      }
      if written.outputs[index] < 0 { continue }
      let source = base + written.outputs[index]
      for head in 0..<heads {
        for token in 0..<sequence.tokens {
          (sequence.output + head * sequence.outputHeadStride + token * sequence.outputTokenStride)
            .update(from: source + (head * sequence.tokens + token) * sequence.valueDim, count: sequence.valueDim)
        }
      }
    }
    for staged in written.scores {
      let rows = plan.rows[staged.work]
      guard let score = rows.score else { continue }
      let source = base + staged.offset
      let reduction = plan.sequences.first { $0.work.contains(staged.work) }?.reduction ?? .sum
      for row in 0..<rows.count {
        score[row] = reduction == .max ? max(score[row], source[row]) : score[row] + source[row]
      }
    }
    return nil
  }
}
