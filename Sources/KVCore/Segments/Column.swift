/// Numbers of the slots of a head (positions, log biases, observed attention), in host-visible memory: `width` of them
/// a slot, plane by plane.
///
/// ```
/// plane 0: slot 0 … count … capacity ┬ plane 1: slot 0 … count … capacity ┬ …
/// ```
/// Grows by an eighth, at least 64 slots; copied on write when a fork shares it.
package struct Column<Element: BitwiseCopyable> {
  package private(set) var buffer: Buffer?
  package private(set) var count = 0
  package private(set) var capacity = 0
  package let width: Int

  package init(width: Int = 1) { self.width = width }

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

  /// The most slots of memory that a column of `count` slots is left with: what growth gives, and as much again for slots
  /// that were dropped and compacted. More is what a cut left, and not worth keeping.
  package static func roomiest(_ count: Int) -> Int { count + Swift.max(128, count / 4) }

  /// Makes room for `adding` more slots in memory that nobody else writes.
  package mutating func reserve(_ adding: Int, backend: any ComputeBackend) throws(KVError) {
    let wanted = Column.grown(capacity: capacity, count: count, adding: adding)
    if wanted == capacity, buffer == nil || isKnownUniquelyReferenced(&buffer) { return }
    let size = MemoryLayout<Element>.stride
    let fresh = try backend.allocate(byteCount: Swift.max(wanted, 1) * width * size, hostVisible: true)
    if let base {
      for plane in 0..<width {
        (fresh.base + plane * wanted * size).copyMemory(from: base + plane * capacity, byteCount: count * size)
      }
    }
    buffer = fresh
    capacity = wanted
  }

  /// Appends into reserved room, the same in every plane.
  package mutating func append(_ value: Element) { append(repeating: value, count: 1) }

  package mutating func append(repeating value: Element, count added: Int) {
    precondition(count + added <= capacity, "column of \(capacity) slots is full")
    for plane in 0..<width {
      (base.unsafelyUnwrapped + plane * capacity + count).update(repeating: value, count: added)
    }
    count += added
  }

  /// Appends slots whose plane p holds `values[p]`.
  package mutating func append(planes values: [Element], count added: Int) {
    precondition(count + added <= capacity && values.count == width, "column of \(capacity) slots is full")
    for plane in 0..<width {
      (base.unsafelyUnwrapped + plane * capacity + count).update(repeating: values[plane], count: added)
    }
    count += added
  }

  /// Appends `added` values that the caller writes, into reserved room.
  package mutating func extend(by added: Int) -> UnsafeMutablePointer<Element> {
    precondition(count + added <= capacity, "column of \(capacity) slots is full")
    defer { count += added }
    return base.unsafelyUnwrapped + count
  }

  /// Memory that may be written in place: copied first when a fork shares it.
  package mutating func makeUnique(backend: any ComputeBackend) throws(KVError) { try reserve(0, backend: backend) }

  /// Overwrites one slot of a plane. The caller has made the column unique.
  package mutating func set(_ index: Int, plane: Int = 0, _ value: Element) {
    precondition(index >= 0 && index < count && plane < width, "slot \(index) of a column of \(count)")
    base.unsafelyUnwrapped[plane * capacity + index] = value
  }

  package mutating func removeLast(_ removed: Int) {
    precondition(removed <= count, "removing \(removed) of \(count) slots")
    count -= removed
  }

  /// Moves the slots that live down over those whose log bias is minus infinity. The caller has made the column unique;
  /// the biases may be its own.
  package mutating func compact(without bias: UnsafePointer<Float>) {
    guard let base else { return }
    var live = 0
    // The last plane's pass may overwrite the marks it has read, never those to come.
    for plane in 0..<width {
      let values = base + plane * capacity
      live = 0
      for slot in 0..<count where bias[slot] != -.infinity {
        values[live] = values[slot]
        live += 1
      }
    }
    count = live
  }

  /// A new column with the slots of `kept`, in their order.
  package func gathered(_ kept: [Int], backend: any ComputeBackend) throws(KVError) -> Column {
    var result = Column(width: width)
    if kept.isEmpty { return result }
    try result.reserve(kept.count, backend: backend)
    result.append(from: self, slots: kept)
    return result
  }

  /// Appends some slots of another column of the same width into reserved room.
  package mutating func append(from other: Column, slots: [Int]) {
    precondition(count + slots.count <= capacity && width == other.width, "column of \(capacity) slots is full")
    guard let base, let source = other.base else { return }
    for plane in 0..<width {
      let target = base + plane * capacity + count
      for (offset, slot) in slots.enumerated() { target[offset] = source[plane * other.capacity + slot] }
    }
    count += slots.count
  }
}

/// Positions of the slots of one head, in the order the rows arrived. A head that never lost a token stores only its
/// first position.
///
/// Tokens arrive in order; rows that another tier sends later may be older than what is here. From slot `sortedFrom` on,
/// every position is larger than all before it, and those before are at most `highest`: what needs an order looks at the
/// slots behind and treats the others one by one.
package struct PositionColumn {
  package private(set) var first: Int
  package private(set) var count = 0
  /// 0 while positions ascend.
  package private(set) var sortedFrom = 0
  /// The largest position before `sortedFrom`; -1 while positions ascend.
  package private(set) var highest = -1
  /// The largest of all; -1 without slots.
  package private(set) var maximum = -1
  /// Nil while positions are `first ..< first + count`.
  package private(set) var explicit: Column<Int32>?

  package init(first: Int = 0) { self.first = first }

  package subscript(index: Int) -> Int {
    if let explicit { return Int(explicit[index]) }
    precondition(index >= 0 && index < count, "slot \(index) of \(count) positions")
    return first + index
  }

  package var isAscending: Bool { sortedFrom == 0 }

  package mutating func reserve(next: Int, adding: Int, backend: any ComputeBackend) throws(KVError) {
    if explicit == nil, count == 0 || first + count == next { return }
    if explicit == nil {
      // As much room as positions that were written down before would have grown to.
      var column = Column<Int32>()
      try column.reserve(Column<Int32>.grown(capacity: count, count: count, adding: adding), backend: backend)
      for i in 0..<count { column.append(Int32(first + i)) }
      explicit = column
    } else {
      try explicit!.reserve(adding, backend: backend)
    }
  }

  /// Appends `next ..< next + added`, later than all before, into reserved room.
  package mutating func append(next: Int, adding: Int) {
    if adding == 0 { return }
    precondition(next > maximum, "positions from \(next) behind \(maximum)")
    maximum = next + adding - 1
    if explicit != nil {
      for i in 0..<adding { explicit!.append(Int32(next + i)) }
    } else if count == 0 {
      first = next
    }
    count += adding
  }

  /// Room for the positions of rows from another tier, so that `append(_:)` cannot fail.
  package mutating func reserve(_ added: [Int], backend: any ComputeBackend) throws(KVError) {
    guard let head = added.first else { return }
    if explicit != nil {
      try explicit!.reserve(added.count, backend: backend)
      return
    }
    var consecutive = count == 0 || first + count == head
    for i in added.indices where consecutive { consecutive = added[i] == head + i }
    if consecutive { return }
    var column = Column<Int32>()
    try column.reserve(count + added.count, backend: backend)
    for i in 0..<count { column.append(Int32(first + i)) }
    explicit = column
  }

  /// Appends positions in any order into reserved room.
  package mutating func append(_ added: [Int]) {
    for position in added {
      if explicit != nil { explicit!.append(Int32(position)) }
      if count == 0 { first = position }
      note(position)
      count += 1
    }
  }

  /// What the position of slot `count` means for the order.
  private mutating func note(_ position: Int) {
    if position <= maximum {
      sortedFrom = count + 1
      highest = maximum
    } else {
      maximum = position
    }
  }

  /// O(1) for slots that arrived in order, else O(slots).
  package mutating func removeLast(_ removed: Int) {
    let kept = count - removed
    explicit?.removeLast(removed)
    if kept >= sortedFrom {
      count = kept
      maximum = kept == sortedFrom ? highest : self[kept - 1]
    } else {
      sortOut(kept)
    }
  }

  /// Finds out how far the first `slots` slots are in order, which become all there are.
  private mutating func sortOut(_ slots: Int) {
    (sortedFrom, highest, maximum) = (0, -1, -1)
    count = 0
    guard let explicit else {
      maximum = slots == 0 ? -1 : first + slots - 1
      count = slots
      return
    }
    explicit.withSpan { positions in
      for position in positions.prefix(slots) {
        note(Int(position))
        count += 1
      }
    }
    if slots > 0 { first = Int(explicit[0]) }
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
      let target = column.extend(by: kept.count)
      if let source = explicit?.base {
        for (i, slot) in kept.enumerated() { target[i] = source[slot] }
      } else {
        for (i, slot) in kept.enumerated() { target[i] = Int32(first + slot) }
      }
      result.explicit = column
    }
    result.sortOut(kept.count)
    return result
  }

  /// Moves explicit positions of live slots down over dead ones.
  package mutating func compact(without bias: UnsafePointer<Float>, backend: any ComputeBackend) throws(KVError) {
    try explicit?.makeUnique(backend: backend)
    explicit?.compact(without: bias)
    if let slots = explicit?.count { sortOut(slots) }
  }

  /// First slot from `sortedFrom` on whose position is at least `position`. O(log count).
  package func lowerBound(_ position: Int) -> Int {
    if explicit == nil { return Swift.min(Swift.max(position - first, 0), count) }
    var low = sortedFrom
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
    sortOut(count)
  }
}
