/// One number per slot of a head (positions, log biases, accumulated attention), in host-visible memory.
///
/// Grows by an eighth, at least 64 slots; copied on write when a fork shares it.
package struct Column<Element: BitwiseCopyable> {
  package private(set) var buffer: Buffer?
  package private(set) var count = 0
  package private(set) var capacity = 0

  package init() {}

  package var base: UnsafeMutablePointer<Element>? {
    buffer.map { $0.base.assumingMemoryBound(to: Element.self) }
  }

  package subscript(index: Int) -> Element {
    precondition(index >= 0 && index < count, "slot \(index) of a column of \(count)")
    return base.unsafelyUnwrapped[index]
  }

  package func withSpan<R>(_ body: (UnsafeBufferPointer<Element>) -> R) -> R {
    body(UnsafeBufferPointer(start: base, count: count))
  }

  /// Slots there will be room for after `reserve`.
  package static func grown(capacity: Int, count: Int, adding: Int) -> Int {
    let needed = count + adding
    if needed <= capacity { return capacity }
    return capacity == 0 ? needed : Swift.max(needed, capacity + Swift.max(64, capacity / 8))
  }

  /// Makes room for `adding` more slots in memory that nobody else writes.
  package mutating func reserve(_ adding: Int, backend: any ComputeBackend) throws(KVError) {
    let wanted = Column.grown(capacity: capacity, count: count, adding: adding)
    if wanted == capacity, buffer == nil || isKnownUniquelyReferenced(&buffer) { return }
    let fresh = try backend.allocate(byteCount: Swift.max(wanted, 1) * MemoryLayout<Element>.stride, hostVisible: true)
    if let base { fresh.base.copyMemory(from: base, byteCount: count * MemoryLayout<Element>.stride) }
    buffer = fresh
    capacity = wanted
  }

  /// Appends into reserved room.
  package mutating func append(_ value: Element) {
    precondition(count < capacity, "column of \(capacity) slots is full")
    base.unsafelyUnwrapped[count] = value
    count += 1
  }

  package mutating func append(repeating value: Element, count added: Int) {
    for _ in 0..<added { append(value) }
  }

  /// Memory that may be written in place: copied first when a fork shares it.
  package mutating func makeUnique(backend: any ComputeBackend) throws(KVError) { try reserve(0, backend: backend) }

  /// Overwrites one slot. The caller has made the column unique.
  package mutating func set(_ index: Int, _ value: Element) {
    precondition(index >= 0 && index < count, "slot \(index) of a column of \(count)")
    base.unsafelyUnwrapped[index] = value
  }

  package mutating func removeLast(_ removed: Int) {
    precondition(removed <= count, "removing \(removed) of \(count) slots")
    count -= removed
  }

  /// A new column with the slots of `kept`, in their order.
  package func gathered(_ kept: [Int], backend: any ComputeBackend) throws(KVError) -> Column {
    var result = Column()
    if kept.isEmpty { return result }
    try result.reserve(kept.count, backend: backend)
    for index in kept { result.append(self[index]) }
    return result
  }
}

/// Positions of the slots of one head, ascending. A head that never lost a token stores only its first position.
package struct PositionColumn {
  package private(set) var first: Int
  package private(set) var count = 0
  /// Nil while positions are `first ..< first + count`.
  package private(set) var explicit: Column<Int32>?

  package init(first: Int = 0) { self.first = first }

  package subscript(index: Int) -> Int {
    if let explicit { return Int(explicit[index]) }
    precondition(index >= 0 && index < count, "slot \(index) of \(count) positions")
    return first + index
  }

  package var last: Int? { count == 0 ? nil : self[count - 1] }

  package mutating func reserve(next: Int, adding: Int, backend: any ComputeBackend) throws(KVError) {
    if explicit == nil, count == 0 || first + count == next { return }
    if explicit == nil {
      var column = Column<Int32>()
      try column.reserve(count + adding, backend: backend)
      for i in 0..<count { column.append(Int32(first + i)) }
      explicit = column
    } else {
      try explicit!.reserve(adding, backend: backend)
    }
  }

  /// Appends `next ..< next + added` into reserved room.
  package mutating func append(next: Int, adding: Int) {
    if explicit != nil {
      for i in 0..<adding { explicit!.append(Int32(next + i)) }
    } else if count == 0 {
      first = next
    }
    count += adding
  }

  /// Appends ascending positions behind the last.
  package mutating func append(_ added: [Int], backend: any ComputeBackend) throws(KVError) {
    guard let head = added.first else { return }
    let consecutive = added[added.count - 1] - head + 1 == added.count
    if explicit == nil, consecutive, count == 0 || first + count == head {
      append(next: head, adding: added.count)
      return
    }
    var column = explicit ?? Column<Int32>()
    if explicit == nil {
      try column.reserve(count + added.count, backend: backend)
      for i in 0..<count { column.append(Int32(first + i)) }
    } else {
      explicit = nil  // so that the column is not shared while it grows
      try column.reserve(added.count, backend: backend)
    }
    for position in added { column.append(Int32(position)) }
    if count == 0 { first = head }
    explicit = column
    count += added.count
  }

  package mutating func removeLast(_ removed: Int) {
    explicit?.removeLast(removed)
    count -= removed
  }

  /// The positions of the slots `kept`: again implicit when they are consecutive.
  package func gathered(_ kept: [Int], backend: any ComputeBackend) throws(KVError) -> PositionColumn {
    guard let head = kept.first else { return PositionColumn() }
    var result = PositionColumn(first: self[head])
    var consecutive = true
    for (i, slot) in kept.enumerated() where self[slot] != result.first + i {
      consecutive = false
      break
    }
    if !consecutive {
      var column = Column<Int32>()
      try column.reserve(kept.count, backend: backend)
      for slot in kept { column.append(Int32(self[slot])) }
      result.explicit = column
    }
    result.count = kept.count
    return result
  }

  /// First slot whose position is at least `position`. O(log count).
  package func lowerBound(_ position: Int) -> Int {
    if explicit == nil { return Swift.min(Swift.max(position - first, 0), count) }
    var low = 0
    var high = count
    while low < high {
      let middle = (low + high) / 2
      if self[middle] < position { low = middle + 1 } else { high = middle }
    }
    return low
  }

  package init(restoring explicit: Column<Int32>?, first: Int, count: Int) {
    self.explicit = explicit
    self.first = first
    self.count = count
  }
}
