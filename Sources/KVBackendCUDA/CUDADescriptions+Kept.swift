internal import CKVCUDA
internal import KVCore

/// The descriptions of one plan between calls, in pinned memory from which they go to the card.
final class CUDAKeptPlan {
  var plan = CUDADescriptions()
  var memory = CUDAScratch(pinned: true)
  var places = CUDABackend.Region()
  /// Of the plan that is described; nil: none.
  var generation: Int?
  /// Calls that changed what was there, instead of describing all of it.
  var repeats = 0
  private let session: CUDASession

  init(_ session: CUDASession) { self.session = session }

  deinit { memory.free(session) }
}

/// The next token of sequences whose descriptions were kept. What is new of it are the tensors, the counts of rows, and
/// where the last rows of every head lie: that is written over what was there.
extension CUDADescriptions {
  /// What a work item has in the descriptions.
  struct KeptWork {
    /// Its first range of `keptRanges`, and how many it has.
    var ranges = 0
    var rangeCount = 0
    /// Its index of `statistics`, -1 for none, and the rows there is room for.
    var statistic = -1
    var room = 0
    /// From where on ranges may change.
    var walk = RangeWalk()
  }

  /// Rows that one kernel takes, and their pieces, as they were before those were sorted.
  struct KeptRange {
    var kernel: Int
    var first: Int
    var end: Int
    /// Rows of a piece.
    var length: Int
    var firstPiece: Int
    var pieces: Int
  }

  /// Rows that there is room for where logits of `count` are kept.
  static func keptRows(_ count: Int) -> Int { (count + 255) / 256 * 256 }

  /// The descriptions where the card copies them from.
  private struct Written {
    let slices: UnsafeMutablePointer<kv_slice>
    let works: UnsafeMutablePointer<kv_work>
    let sequences: UnsafeMutablePointer<kv_sequence>
    let queries: UnsafeMutablePointer<kv_queries>
    let pieces: UnsafeMutablePointer<kv_piece>
    let statistics: UnsafeMutablePointer<kv_statistic>

    init(_ base: UnsafeMutableRawPointer, _ places: CUDABackend.Region) {
      slices = (base + places.slices).assumingMemoryBound(to: kv_slice.self)
      works = (base + places.works).assumingMemoryBound(to: kv_work.self)
      sequences = (base + places.sequences).assumingMemoryBound(to: kv_sequence.self)
      queries = (base + places.queries).assumingMemoryBound(to: kv_queries.self)
      pieces = (base + places.pieces).assumingMemoryBound(to: kv_piece.self)
      statistics = (base + places.statistics).assumingMemoryBound(to: kv_statistic.self)
    }
  }

  /// Brings descriptions up to date that were written to `base`, for a plan that repeats the one they were made of.
  ///
  /// - Returns: false where rows are cut otherwise now: all is to be described anew.
  mutating func describeAgain(
    _ plan: AttentionPlan, staging: [Staging], memory: UnsafeMutableRawPointer, region: UnsafeMutableRawPointer,
    written base: UnsafeMutableRawPointer, _ places: CUDABackend.Region
  ) -> Bool {
    guard isRepeatable, self.memory == UInt64(UInt(bitPattern: memory)),
      self.region == UInt64(UInt(bitPattern: region)), self.staging == staging
    else { return false }
    let written = Written(base, places)
    var longest = 0
    var query = 0
    // In place: copies of work items would count owners, for every head of every token.
    return plan.rows.withUnsafeBufferPointer { rows in
      plan.slices.withUnsafeBufferPointer { slices in
        for index in plan.sequences.indices {
          let sequence = plan.sequences[index]
          let known = written.sequences[index]
          guard (logSums[index] < 0) == (sequence.logSumExp == nil), Int(known.group) == sequence.group,
            Int(known.key_dim) == sequence.keyDim, Int(known.value_dim) == sequence.valueDim
          else { return false }
          written.sequences[index] = described(0..<1, of: index, sequence)
          for head in 0..<sequence.kvHeads {
            written.queries[query] = queries(head: head, tokens: 0..<1, sequence, staged: stagedQueries[index])
            query += 1
          }
          for work in sequence.work {
            if !describeAgain(work, sequence, rows, slices, written) { return false }
            if keptWorks[work].statistic >= 0 { longest = max(longest, rows[work].count) }
          }
        }
        waves[0].longestStatistic = longest
        return true
      }
    }
  }

  private mutating func describeAgain(
    _ index: Int, _ sequence: SequenceWork, _ all: UnsafeBufferPointer<RowsWork>,
    _ slices: UnsafeBufferPointer<RunSlice>, _ written: Written
  ) -> Bool {
    guard let rows = all.baseAddress.map({ $0 + index }) else { return false }
    let kept = keptWorks[index]
    let count = rows.pointee.count
    guard (rows.pointee.score == nil) == (kept.statistic < 0), kept.statistic < 0 || count <= kept.room else {
      return false
    }
    let (positions, first) = CUDADescriptions.positions(of: rows, sequence)
    let work = written.works + index
    work.pointee.positions = positions
    work.pointee.first_position = first
    work.pointee.bias = rows.pointee.bias.map { UInt64(UInt(bitPattern: $0)) } ?? 0
    work.pointee.score = rows.pointee.score.map { UInt64(UInt(bitPattern: $0)) } ?? 0
    work.pointee.count = UInt32(count)
    if kept.statistic >= 0 {
      written.statistics[kept.statistic].score = work.pointee.score
      written.statistics[kept.statistic].count = UInt32(count)
    }
    describeAgain(rows.pointee.keys, from: rows.pointee.frozen.keys, slices, written.slices + Int(work.pointee.keys))
    describeAgain(
      rows.pointee.values, from: rows.pointee.frozen.values, slices, written.slices + Int(work.pointee.values))
    return cutAgain(rows, kept, sequence, slices, written)
  }

  /// The slices of a list that may have changed.
  private func describeAgain(
    _ list: Range<Int>, from frozen: Int, _ slices: UnsafeBufferPointer<RunSlice>,
    _ target: UnsafeMutablePointer<kv_slice>
  ) {
    if frozen >= list.count { return }
    // Rows before them are as many as they were.
    var start = target[frozen].start
    for offset in frozen..<list.count {
      let (first, count) = (slices[list.lowerBound + offset].first, slices[list.lowerBound + offset].count)
      target[offset].first = UInt32(first)
      target[offset].count = UInt32(count)
      target[offset].start = start
      start += UInt32(count)
    }
  }

  /// Pieces of ranges that begin or end elsewhere.
  private mutating func cutAgain(
    _ rows: UnsafePointer<RowsWork>, _ kept: KeptWork, _ sequence: SequenceWork,
    _ slices: UnsafeBufferPointer<RunSlice>, _ written: Written
  ) -> Bool {
    ranges.removeAll(keepingCapacity: true)
    for index in 0..<kept.walk.ranges {
      let range = keptRanges[kept.ranges + index]
      ranges.append(RowRange(keys: nil, values: nil, kernel: range.kernel, end: range.end))
    }
    if kept.walk.ranges > 0 { ranges[kept.walk.ranges - 1].end = kept.walk.end }
    findRanges(rows, slices, sequence, from: kept.walk)
    guard ranges.count == kept.rangeCount else { return false }
    var first = 0
    for index in ranges.indices {
      let range = ranges[index]
      let known = keptRanges[kept.ranges + index]
      let length = known.length
      guard range.kernel == known.kernel, length == CUDADescriptions.pieceRows(range.end - first, sequence),
        (range.end - first + length - 1) / length == (known.end - known.first + length - 1) / length
      else { return false }
      if range.end != known.end || first != known.first {
        cutAgain(known, first..<range.end, written)
        keptRanges[kept.ranges + index].first = first
        keptRanges[kept.ranges + index].end = range.end
      }
      first = range.end
    }
    return true
  }

  private func cutAgain(_ known: KeptRange, _ rows: Range<Int>, _ written: Written) {
    let cuts = (rows.count + known.length - 1) / known.length
    // A cut has a piece for every few query rows and for every few channels.
    let each = known.pieces / cuts
    for cut in (rows.lowerBound == known.first ? cuts - 1 : 0)..<cuts {
      let begin = rows.lowerBound + cut * known.length
      for piece in known.firstPiece + cut * each..<known.firstPiece + (cut + 1) * each {
        let place = placeOfPiece.isEmpty ? piece : Int(placeOfPiece[piece])
        written.pieces[place].first = UInt32(begin)
        written.pieces[place].end = UInt32(min(begin + known.length, rows.upperBound))
      }
    }
  }

  /// Whether what was brought up to date is what a new description would be; for debug builds.
  func isAsNew(
    _ plan: AttentionPlan, staging: [Staging], memory: UnsafeMutableRawPointer, region: UnsafeMutableRawPointer,
    _ base: UnsafeMutableRawPointer, _ places: CUDABackend.Region
  ) -> Bool {
    var other = CUDADescriptions()
    other.describe(plan, staging: staging, memory: memory, region: region)
    func same<Element: BitwiseCopyable>(_ values: [Element], at offset: Int, _ size: Int? = nil) -> Bool {
      values.withUnsafeBytes { bytes in
        zip(bytes.indices, bytes).allSatisfy { index, byte in
          index % MemoryLayout<Element>.stride >= size ?? MemoryLayout<Element>.stride
            || base.load(fromByteOffset: offset + index, as: UInt8.self) == byte
        }
      }
    }
    return same(other.slices, at: places.slices) && same(other.works, at: places.works)
      // Behind these there is a gap before the last two numbers.
      && same(other.sequences, at: places.sequences, 84) && same(other.queries, at: places.queries)
      && same(other.pieces, at: places.pieces) && same(other.statistics, at: places.statistics)
      && same(other.merges, at: places.merges) && same(other.partials, at: places.partials)
      && other.floats == floats && other.waves.map(\.longestStatistic) == waves.map(\.longestStatistic)
      && other.waves.map(\.pieces) == waves.map(\.pieces)
  }
}
