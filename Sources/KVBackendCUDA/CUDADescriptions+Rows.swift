internal import CKVCUDA
internal import KVCore

/// Rows of a plan: their slices, what is made of them before attention, and which kernel takes which of them.
extension CUDADescriptions {
  /// Rows of one work item that one kernel takes behind one pair of maps.
  struct RowRange {
    var keys: UnsafePointer<MapDescriptor>?
    var values: UnsafePointer<MapDescriptor>?
    var kernel: Int
    var end: Int
  }

  /// A place in two lists of slices that is reached row by row: the slices, where they begin, and the ranges before it, of
  /// which the last ends there.
  struct RangeWalk {
    var key = 0
    var value = 0
    var keyStart = 0
    var valueStart = 0
    var ranges = 0
    var end = 0
  }

  mutating func addWork(_ index: Int, of sequence: Int, _ plan: AttentionPlan) {
    let rows = plan.rows[index]
    let (positions, first) = withUnsafePointer(to: rows) {
      CUDADescriptions.positions(of: $0, plan.sequences[sequence])
    }
    var work = kv_work(
      positions: positions, bias: rows.bias.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
      score: rows.score.map { UInt64(UInt(bitPattern: $0)) } ?? 0, first_position: first, count: UInt32(rows.count),
      keys: add(rows.keys, plan), key_slices: UInt32(rows.keys.count), values: add(rows.values, plan),
      value_slices: UInt32(rows.values.count), padding: 0)
    if let lowRank = rows.lowRank, lowRank.turnsKeys, let rotary = lowRank.rotary, rows.count > 0 {
      let target = address(share(rows.count * plan.sequences[sequence].keyDim))
      restoreKeys(of: rows, lowRank, rotary, plan, at: Int(work.keys), to: target, dim: plan.sequences[sequence].keyDim)
      work.keys = UInt32(slices.count)
      work.key_slices = 1
      slices.append(
        kv_slice(
          data: target, scale: 0, min: 0, kind: 0, code: 0, dtype: 0, bits: 32, group: 1, factor: 1,
          dim: UInt32(plan.sequences[sequence].keyDim), first: 0, count: UInt32(rows.count), start: 0))
    }
    if let factored = rows.factored, rows.count > 0 {
      work.keys = scale(rows, rows.keys, factored.keys, plan)
      work.key_slices = 1
      if plan.sequences[sequence].valueDim > 0 {
        work.values = scale(rows, rows.values, factored.values, plan)
        work.value_slices = 1
      }
    }
    works.append(work)
  }

  /// Where the positions of rows lie, 0 for those that follow the second number.
  static func positions(of rows: UnsafePointer<RowsWork>, _ sequence: SequenceWork) -> (UInt64, Int64) {
    let (first, count) = (Int64(rows.pointee.firstPosition), rows.pointee.count)
    guard let positions = rows.pointee.positions else { return (0, first) }
    if sequence.slidingWindow == 0, count > 0,
      max(Int(positions[count - 1]), rows.pointee.highest) <= sequence.firstPosition
    {
      // Every query sees all of them, as nearly always while decoding: positions need not be read.
      return (0, -Int64(Int32.max))
    }
    return (UInt64(UInt(bitPattern: positions)), first)
  }

  /// Directions of one side to rows; returns the slice that describes them.
  mutating func scale(
    _ rows: RowsWork, _ list: Range<Int>, _ side: FactoredRows.Side, _ plan: AttentionPlan
  ) -> UInt32 {
    let dim = list.first.map { plan.slices[$0].run.dim } ?? 0
    let exactRows = side.slots == nil ? 0 : side.count
    let target = address(share(rows.count * dim))
    let (directions, lengths) = (Int(add(list, plan)), Int(add(side.lengths, plan)))
    let exact = Int(add(side.exact, plan))
    scaled.append(
      ScaledRows(
        directions: directions..<directions + list.count, maps: maps(of: list, plan), rows: rows.count, dim: dim,
        lengths: lengths..<lengths + side.lengths.count, target: target, exact: exact..<exact + side.exact.count,
        exactMaps: maps(of: side.exact, plan), exactRows: exactRows, exactTable: address(share(exactRows * dim)),
        slots: side.slots.map { UInt64(UInt(bitPattern: $0)) } ?? 0, offset: Int32(side.offset)))
    slices.append(
      kv_slice(
        data: target, scale: 0, min: 0, kind: 0, code: 0, dtype: 0, bits: 32, group: 1, factor: 1, dim: UInt32(dim),
        first: 0, count: UInt32(rows.count), start: 0))
    return UInt32(slices.count - 1)
  }

  /// Which rows of a list lie behind a map.
  mutating func maps(of list: Range<Int>, _ plan: AttentionPlan) -> [(rows: Range<Int>, map: kv_map)] {
    var result: [(rows: Range<Int>, map: kv_map)] = []
    var start = 0
    for index in list {
      let end = start + plan.slices[index].count
      if let map = plan.slices[index].run.map { result.append((start..<end, tables.map(map))) }
      start = end
    }
    return result
  }

  mutating func restoreKeys(
    of rows: RowsWork, _ lowRank: LowRankRows, _ rotary: RotaryEmbedding, _ plan: AttentionPlan, at first: Int,
    to target: UInt64, dim: Int
  ) {
    guard let slice = rows.keys.first else { return }
    let width = plan.slices[slice].run.dim
    let list = first..<first + rows.keys.count
    // Keys of several heads side by side are the same rows for each of them.
    let shared = restored.first {
      $0.rows == rows.count && slices[$0.slices.lowerBound].data == slices[first].data
        && slices[$0.slices.lowerBound].first == slices[first].first
    }
    let maps = shared == nil ? maps(of: rows.keys, plan) : []
    restored.append(
      RestoredRows(
        slices: list, rows: rows.count, width: width, table: shared?.table ?? address(share(rows.count * width)),
        isFirst: shared == nil, maps: maps, basis: lowRank.keyBasis?.kernelBasis(mean: lowRank.keyMean),
        channel: lowRank.keyChannels?.lowerBound ?? 0, dim: dim,
        positions: rows.positions.map { UInt64(UInt(bitPattern: $0)) } ?? 0,
        firstPosition: Int64(rows.firstPosition), rotary: tables.rotary(rotary, rounded: false), target: target))
  }

  /// Appends the slices of one list, each knowing the rows before it; returns where they begin.
  mutating func add(_ list: Range<Int>, _ plan: AttentionPlan) -> UInt32 {
    let begin = slices.count
    var start = 0
    let own = plan.slices
    for index in list {
      slices.append(own[index].kernelSlice(start: start))
      start += own[index].count
    }
    return UInt32(begin)
  }

  /// Ranges of rows whose keys lie behind one map, their values behind one, and which one kernel takes.
  mutating func findRanges(_ rows: RowsWork, _ plan: AttentionPlan, _ sequence: SequenceWork) {
    ranges.removeAll(keepingCapacity: true)
    walk = RangeWalk()
    if rows.factored != nil {
      ranges.append(RowRange(keys: nil, values: nil, kernel: 0, end: rows.count))
      return
    }
    withUnsafePointer(to: rows) { rows in
      plan.slices.withUnsafeBufferPointer { findRanges(rows, $0, sequence, from: RangeWalk()) }
    }
  }

  /// Goes on where `ranges` and a walk end.
  mutating func findRanges(
    _ work: UnsafePointer<RowsWork>, _ slices: UnsafeBufferPointer<RunSlice>, _ sequence: SequenceWork,
    from begin: RangeWalk
  ) {
    let (keys, values, count, frozen) = (
      work.pointee.keys, work.pointee.values, work.pointee.count, work.pointee.frozen
    )
    let isRestored = work.pointee.lowRank?.turnsKeys ?? false
    var key = keys.lowerBound + begin.key
    var value = values.lowerBound + begin.value
    let hasKernels =
      work.pointee.lowRank == nil && !keys.isEmpty && !values.isEmpty && sequence.valueDim == sequence.keyDim
    var keyEnd = isRestored || keys.isEmpty ? count : begin.keyStart + slices[key].count
    var valueEnd = values.isEmpty ? count : begin.valueStart + slices[value].count
    // Whether all slices so far stay as they are.
    var isFrozen = hasKernels
    while true {
      if isFrozen {
        // The next token may find other rows from here on.
        let (ownKey, ownValue) = (key - keys.lowerBound, value - values.lowerBound)
        walk = RangeWalk(
          key: ownKey, value: ownValue, keyStart: keyEnd - slices[key].count,
          valueStart: valueEnd - slices[value].count,
          ranges: ranges.count, end: ranges.last?.end ?? 0)
        isFrozen = ownKey < frozen.keys && ownValue < frozen.values
      }
      let end = min(keyEnd, valueEnd)
      var range = RowRange(
        keys: isRestored || keys.isEmpty ? nil : slices[key].run.map,
        values: values.isEmpty ? nil : slices[value].run.map, kernel: 0, end: end)
      if hasKernels {
        // Where this range begins, in the work item and in the slice of its keys.
        let start = ranges.last?.end ?? 0
        range.kernel = CUDADescriptions.kernel(
          slices[key], slices[value], start: start, keyStart: keyEnd - slices[key].count,
          after: ranges.last?.kernel)
      }
      if let last = ranges.last, last.keys == range.keys, last.values == range.values, last.kernel == range.kernel {
        ranges[ranges.count - 1].end = end
      } else {
        ranges.append(range)
      }
      if end >= count { return }
      if keyEnd == end {
        key += 1
        keyEnd += slices[key].count
      }
      if valueEnd == end {
        value += 1
        valueEnd += slices[value].count
      }
    }
  }

  /// Which kernel attends over such rows, an index of `attentionKernels`.
  ///
  /// - Parameters:
  ///   - start: where these rows begin in their work item, `keyStart` where the slice of keys does.
  ///   - kernel: which takes the rows before them.
  static func kernel(
    _ keySlice: RunSlice, _ valueSlice: RunSlice, start: Int, keyStart: Int, after kernel: Int?
  ) -> Int {
    let (keys, values) = (keySlice.run, valueSlice.run)
    guard keys.dim == values.dim, keys.map == nil, values.map == nil else { return 0 }
    // Raw values: this is asked for every slice of every decoded token.
    let (dense, half, brain) = (RowEncoding.Kind.dense.rawValue, UInt32(1), UInt32(2))
    let (keyType, valueType) = (UInt32(keys.encoding.type.rawValue), UInt32(values.encoding.type.rawValue))
    let (keyKind, valueKind) = (keys.encoding.kind.rawValue, values.encoding.kind.rawValue)
    if keyKind == RowEncoding.Kind.affinePerChannel.rawValue {
      let bits = keys.encoding.bits
      guard valueKind == RowEncoding.Kind.affinePerToken.rawValue, values.encoding.bits == bits, keys.dim == 128,
        keyType == half, valueType == half, values.encoding.group % 32 == 0, keySlice.first % 32 == 0,
        keyStart % 32 == 0
      else { return 0 }
      let own = bits == 2 ? 5 : bits == 4 ? 6 : bits == 8 ? 7 : 0
      // A range may go on anywhere, but begins with a block of 32 rows.
      return start % 32 == 0 || kernel == own ? own : 0
    }
    guard keyKind == dense, valueKind == dense, keyType == valueType else { return 0 }
    switch (keyType, keys.dim) {
    case (half, 64): return 1
    case (half, 128): return 2
    case (brain, 64): return 3
    case (brain, 128): return 4
    default: return 0
    }
  }
}

extension LowRankRows {
  /// Whether keys are rows only after they were turned to their positions.
  var turnsKeys: Bool { rotary != nil && (keyBasis != nil || keyChannels != nil) }
}
