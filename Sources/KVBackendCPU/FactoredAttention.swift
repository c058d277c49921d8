internal import CKVKernels
internal import KVCore

/// Attention over directions with a length each. A block of logits is multiplied by the lengths of its keys, a block of
/// weights by those of its values; logits and weights of rows that stayed exact come from and go to these rows.
extension RowAttention {
  /// Floats of working memory: weights times lengths, logits or weights of exact rows, lengths.
  static func factoredFloats(rows: Int) -> Int { (2 * rows + 1) * blockRows }

  /// Logits of the block `range`, at `target`, from those of its directions.
  func applyLengths(
    _ side: FactoredRows.Side, _ range: Range<Int>, _ queries: QueryBlock, memory: UnsafeMutablePointer<Float>,
    to target: UnsafeMutablePointer<Float>, stride: Int
  ) {
    let m = queries.rows
    let lengths = memory + 2 * m * blockRows
    load(side, range, into: lengths)
    for row in 0..<m { ckv_multiply(target + row * stride, lengths, range.count) }
    guard let slots = side.slots else { return }
    let rows = exactRows(side, range)
    if rows.isEmpty { return }
    let exact = memory + m * blockRows
    form(side.exact, rows, queries, into: exact, stride: blockRows)
    for row in 0..<m {
      let line = target + row * stride - range.lowerBound - side.offset
      let own = exact + row * blockRows - rows.lowerBound
      for index in rows { line[Int(slots[index])] = own[index] }
    }
  }

  /// Adds the values of the block `range` by `weights`, which stay as they are.
  func accumulateFactored(
    _ work: RowsWork, _ side: FactoredRows.Side, _ range: Range<Int>, memory: UnsafeMutablePointer<Float>,
    weights: UnsafePointer<Float>, stride: Int, rows m: Int, _ partial: PartialBlock
  ) {
    let lengths = memory + 2 * m * blockRows
    load(side, range, into: lengths)
    for row in 0..<m {
      (memory + row * blockRows).update(from: weights + row * stride, count: range.count)
      ckv_multiply(memory + row * blockRows, lengths, range.count)
    }
    let rows = side.slots == nil ? 0..<0 : exactRows(side, range)
    let exact = memory + m * blockRows
    if let slots = side.slots, !rows.isEmpty {
      for row in 0..<m {
        let line = weights + row * stride - range.lowerBound - side.offset
        let scaled = memory + row * blockRows - range.lowerBound - side.offset
        let own = exact + row * blockRows - rows.lowerBound
        for index in rows {
          own[index] = line[Int(slots[index])]
          // A weight of 0 adds nothing: the row's direction does not count.
          scaled[Int(slots[index])] = 0
        }
      }
    }
    accumulate(work.values, range, weights: memory, stride: blockRows, rows: m, partial)
    if rows.isEmpty { return }
    accumulate(side.exact, rows, weights: exact, stride: blockRows, rows: m, partial)
  }

  /// Lengths of the rows of a block as f32.
  private func load(_ side: FactoredRows.Side, _ range: Range<Int>, into target: UnsafeMutablePointer<Float>) {
    forEach(side.lengths, range) { run, first, count, offset in
      let type = run.encoding.type
      kernels.pointee.convert!(
        target + offset, UInt32(ElementType.f32.rawValue), run.base + first * type.byteCount, UInt32(type.rawValue),
        count)
    }
  }

  /// Which exact rows lie in a block.
  private func exactRows(_ side: FactoredRows.Side, _ range: Range<Int>) -> Range<Int> {
    guard let slots = side.slots else { return 0..<0 }
    func first(from slot: Int) -> Int {
      var (low, high) = (0, side.count)
      while low < high {
        let middle = (low + high) / 2
        if Int(slots[middle]) < slot { low = middle + 1 } else { high = middle }
      }
      return low
    }
    return first(from: range.lowerBound + side.offset)..<first(from: range.upperBound + side.offset)
  }
}
