/// Contiguous rows of one KV head and one side in one encoding: the plain description kernels work on.
///
/// ```
/// base ┌ codes or elements of `capacity` rows ┬ scales ┬ minima ┐
///      0                              payloadBytes(capacity)
/// ```
package struct RowRun {
  package let encoding: RowEncoding
  package let dim: Int
  /// Rows the memory has room for; the metadata starts behind all of them.
  package let capacity: Int
  package let base: UnsafeMutableRawPointer
  /// What lies between these rows and those of the model; nil: nothing. Owned by whoever owns the rows.
  package let map: UnsafePointer<MapDescriptor>?

  package init(
    encoding: RowEncoding, dim: Int, capacity: Int, base: UnsafeMutableRawPointer,
    map: UnsafePointer<MapDescriptor>? = nil
  ) {
    self.encoding = encoding
    self.dim = dim
    self.capacity = capacity
    self.base = base
    self.map = map
  }

  package var scales: UnsafeMutableRawPointer { base + encoding.payloadBytes(rows: capacity, dim: dim) }
  package var minima: UnsafeMutableRawPointer { scales + encoding.scaleBytes(rows: capacity, dim: dim) }
}

/// Some consecutive rows of a run.
package struct RunSlice {
  package var run: RowRun
  package var first: Int
  package var count: Int

  package init(run: RowRun, first: Int, count: Int) {
    self.run = run
    self.first = first
    self.count = count
  }
}

extension RunSlice {
  /// The first `count` rows of some slices, which are removed from them.
  package static func take(_ count: Int, from slices: inout ArraySlice<RunSlice>) -> [RunSlice] {
    var result: [RunSlice] = []
    var left = count
    while left > 0, var slice = slices.popFirst() {
      let taken = min(left, slice.count)
      result.append(RunSlice(run: slice.run, first: slice.first, count: taken))
      slice.first += taken
      slice.count -= taken
      if slice.count > 0 { slices = [slice] + slices }
      left -= taken
    }
    return result
  }
}

extension [RunSlice] {
  /// Calls `body` with what lies in `range` of each slice, all rows counted one after the other, and its offset there.
  package func forEachPart<Failure: Error>(
    in range: Range<Int>, _ body: (RunSlice, _ offset: Int) throws(Failure) -> Void
  ) throws(Failure) {
    var start = 0
    for slice in self {
      let end = start + slice.count
      let low = Swift.max(start, range.lowerBound)
      let high = Swift.min(end, range.upperBound)
      if low < high {
        try body(RunSlice(run: slice.run, first: slice.first + low - start, count: high - low), low - range.lowerBound)
      }
      start = end
      if start >= range.upperBound { return }
    }
  }
}
