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
