/// Which map rows go through before they are encoded, and the numbers per channel it takes from data.
extension RowStore {
  /// The map of the oldest `count` tail rows: the format's own, the shared one, or one with the numbers of these rows.
  mutating func mapForTail(
    _ count: Int, _ encoding: RowEncoding, backend: any ComputeBackend
  ) throws(KVError) -> RowMap? {
    let scaling = format.map.scaling
    guard scaling != .none, let fixedMap else { return fixedMap }
    var outcome: Result<RowMap, KVError> = .success(fixedMap)
    withUnsafeTemporaryAllocation(of: Float.self, capacity: 2 * dim) { range in
      guard let low = range.baseAddress else { return }
      let high = low + dim
      low.update(repeating: .infinity, count: dim)
      high.update(repeating: -.infinity, count: dim)
      // Slice by slice without a list: a store may encode every token as it comes.
      forEachSlice(bodyRows..<bodyRows + count) { slice in
        withUnsafePointer(to: slice) {
          backend.channelRange(
            UnsafeBufferPointer(start: $0, count: 1), map: fixedMap.descriptor, low: low, high: high)
        }
      }
      if scaling.isShared, let shared = sharedMap, shared.holds(low: low, high: high, backend: backend) {
        outcome = .success(shared)
        return
      }
      do throws(KVError) {
        outcome = .success(
          try makeMap(
            low: Array(UnsafeBufferPointer(start: low, count: dim)),
            high: Array(UnsafeBufferPointer(start: high, count: dim)), queries: nil, encoding, backend: backend))
      } catch {
        outcome = .failure(error)
      }
    }
    let map = try outcome.get()
    if scaling.isShared, sharedMap == nil { sharedMap = map }
    return map
  }

  var isUncalibrated: Bool { format.map.scaling.isShared && sharedMap == nil }

  /// Takes the numbers of all rows to come from these, when they are not known yet.
  mutating func calibrate(
    over rows: [RunSlice], queries: [Float]?, backend: any ComputeBackend
  ) throws(KVError) {
    guard isUncalibrated, let encoding = format.body, let fixedMap else { return }
    let (low, high) = backend.channelRange(rows, map: fixedMap.descriptor, dim: dim)
    sharedMap = try makeMap(low: low, high: high, queries: queries, encoding, backend: backend)
  }

  private func makeMap(
    low: [Float], high: [Float], queries: [Float]?, _ encoding: RowEncoding, backend: any ComputeBackend
  ) throws(KVError) -> RowMap {
    guard let fixedMap else { preconditionFailure("a format with numbers per channel has a map") }
    let scaling = format.map.scaling
    let values = scaling.numbers(low: low, high: high, queries: queries, levels: Float(1 << encoding.bits - 1))
    return try RowMap(fixedMap, numbers: values, type: encoding.type, backend: backend)
  }
}

extension RowMap {
  /// The same map with numbers per channel, rounded to the type they are stored in.
  package convenience init(
    _ fixed: RowMap, numbers: [Float], type: ElementType, backend: any ComputeBackend
  ) throws(KVError) {
    let dim = fixed.fixed.dim
    let rows = numbers.count / dim
    let buffer = try backend.allocate(byteCount: rows * dim * type.byteCount, hostVisible: false)
    let source = try backend.allocate(byteCount: numbers.count * 4, hostVisible: true)
    numbers.withUnsafeBytes { raw in
      if let base = raw.baseAddress { source.base.copyMemory(from: base, byteCount: raw.count) }
    }
    let from = RowRun(encoding: .dense(.f32), dim: dim, capacity: rows, base: source.base)
    backend.transcode(
      [RunSlice(run: from, first: 0, count: rows)],
      to: RowRun(encoding: .dense(type), dim: dim, capacity: rows, base: buffer.base), row: 0)
    self.init(fixed: fixed.fixed, numbers: buffer, count: rows, type: type)
  }

  /// Factors, then offsets, as rows of their own; nil for a map without numbers.
  package var numberRun: RowRun? {
    guard let numbers else { return nil }
    let map = descriptor.pointee
    return RowRun(
      encoding: .dense(map.type), dim: fixed.dim, capacity: map.offsets == nil ? 1 : 2, base: numbers.base)
  }

  /// Whether rows in that range are finite in the type of the metadata once they are divided.
  func holds(low: UnsafePointer<Float>, high: UnsafePointer<Float>, backend: any ComputeBackend) -> Bool {
    guard let run = numberRun else { return true }
    let limit = descriptor.pointee.type.largestFinite / 2
    return withUnsafeTemporaryAllocation(of: Float.self, capacity: fixed.dim) { room in
      guard let factors = room.baseAddress else { return true }
      backend.read(RunSlice(run: run, first: 0, count: 1), into: factors, stride: fixed.dim)
      for channel in 0..<fixed.dim where max(abs(low[channel]), abs(high[channel])) > limit * factors[channel] {
        // A backend without rows leaves the range empty.
        if low[channel] <= high[channel] { return false }
      }
      return true
    }
  }
}
