/// Merges the bytes of a word into tokens, best-ranked pair first, leftmost of equals first.
struct BytePairEncoder: Sendable {
  struct Merge: Sendable {
    let rank: Int32
    let result: Int32
  }

  /// Token of each single byte.
  let byteTokens: [Int32]
  /// Merge of a pair of tokens, left in the upper half of the key.
  let merges: [UInt64: Merge]

  static func key(_ left: Int32, _ right: Int32) -> UInt64 {
    UInt64(UInt32(bitPattern: left)) << 32 | UInt64(UInt32(bitPattern: right))
  }

  /// O(n log n) in the bytes of the word, so that a word of a million letters is no attack.
  func encode(_ word: ArraySlice<UInt8>) -> [Int32] {
    var tokens = word.map { byteTokens[Int($0)] }
    if tokens.count < 2 { return tokens }
    var links = Links(count: tokens.count)
    var queue = CandidateQueue()
    for left in 0..<tokens.count - 1 { push(left, tokens, links, into: &queue) }
    while let candidate = queue.pop() {
      let left = candidate.position
      let right = links.next[left]
      // A candidate is stale when either token was merged away or into something else since.
      guard tokens[left] >= 0, right < tokens.count, let merge = merges[Self.key(tokens[left], tokens[right])],
        merge.rank == candidate.rank
      else { continue }
      tokens[left] = merge.result
      tokens[right] = -1
      links.remove(right)
      if links.previous[left] >= 0 { push(links.previous[left], tokens, links, into: &queue) }
      push(left, tokens, links, into: &queue)
    }
    return tokens.filter { $0 >= 0 }
  }

  private func push(_ left: Int, _ tokens: [Int32], _ links: Links, into queue: inout CandidateQueue) {
    let right = links.next[left]
    guard right < tokens.count, let merge = merges[Self.key(tokens[left], tokens[right])] else { return }
    queue.push(Candidate(rank: merge.rank, position: left))
  }
}

/// A doubly linked list over positions; `next` is the count at the end, `previous` is -1 at the start.
private struct Links {
  private(set) var next: [Int]
  private(set) var previous: [Int]

  init(count: Int) {
    next = Array(1...count)
    previous = Array(-1..<count - 1)
  }

  mutating func remove(_ index: Int) {
    next[previous[index]] = next[index]
    if next[index] < next.count { previous[next[index]] = previous[index] }
  }
}

private struct Candidate {
  let rank: Int32
  let position: Int

  func precedes(_ other: Candidate) -> Bool {
    rank != other.rank ? rank < other.rank : position < other.position
  }
}

/// A binary heap, best candidate first.
private struct CandidateQueue {
  private var heap: [Candidate] = []

  mutating func push(_ candidate: Candidate) {
    heap.append(candidate)
    var child = heap.count - 1
    while child > 0 {
      let parent = (child - 1) / 2
      guard heap[child].precedes(heap[parent]) else { return }
      heap.swapAt(child, parent)
      child = parent
    }
  }

  mutating func pop() -> Candidate? {
    guard let best = heap.first, let last = heap.popLast() else { return nil }
    if heap.isEmpty { return best }
    heap[0] = last
    var parent = 0
    while true {
      var child = 2 * parent + 1
      guard child < heap.count else { return best }
      if child + 1 < heap.count, heap[child + 1].precedes(heap[child]) { child += 1 }
      guard heap[child].precedes(heap[parent]) else { return best }
      heap.swapAt(child, parent)
      parent = child
    }
  }
}
