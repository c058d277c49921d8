/// What a merged row's key becomes.
public enum MergedKey: String, Sendable, Hashable, CaseIterable {
  /// The key of the row that takes others in stays as it is: safe under rotary embeddings.
  case keep
  /// The weighted sum of the keys as cached. Keys of different positions are turned by different angles, so the faster
  /// channels partly cancel.
  case average
  /// Each key is turned to the position of the row that takes it in first, then summed. Needs the rotary embedding.
  case rotate
}

extension Routing {
  /// A row that goes into another one, and with which weight.
  public struct Term: Hashable, Sendable {
    public var row: Int
    public var keyWeight: Float
    public var valueWeight: Float

    public init(row: Int, keyWeight: Float, valueWeight: Float) {
      self.row = row
      self.keyWeight = keyWeight
      self.valueWeight = valueWeight
    }

    /// The same weight for key and value.
    public init(row: Int, weight: Float) { self.init(row: row, keyWeight: weight, valueWeight: weight) }
  }

  /// A row that takes others in: `(own weight · row + Σ weight · term) / divisor`, in f32, terms in ascending rows,
  /// rounded once.
  public struct Merge: Sendable {
    public var head: Int
    public var target: Int
    public var key: MergedKey = .keep
    public var keyWeight: Float = 1
    public var keyDivisor: Float = 1
    public var valueWeight: Float = 1
    public var valueDivisor: Float = 1
    /// Added to the row's logit from now on; nil: as before.
    public var logBias: Float?
    /// Whether the row now stands for the tokens of its terms too.
    public var counts = true
    /// Whether it has now received the attention of its terms too, as it will from now on with the right bias.
    public var scores = true
    package var terms: Range<Int> = 0..<0

    public init(head: Int, target: Int) {
      self.head = head
      self.target = target
    }
  }

  /// Says that a row that stays takes in rows that are dropped. A row may be dropped into several.
  ///
  /// Where nothing is merged, dropping is all that happens.
  public mutating func merge(_ merge: Merge, terms added: [Term]) {
    if added.isEmpty { return }
    var merge = merge
    merge.terms = terms.count..<terms.count + added.count
    terms += added
    merges.append(merge)
  }

  private func stays(_ merge: Merge, in layer: LayerView) -> Bool {
    let tier = Int(layer.reference(head: merge.head, row: merge.target).segment)
    return self[merge.head, merge.target] == .tier(tier)
  }

  /// Decided once for all merges, before anything changes: a router of a user's own may say anything.
  package func checkMerges(of layer: LayerView) throws(KVError) {
    var taken = Set<Int>()
    for merge in merges {
      guard merge.head >= 0, merge.head < layer.kvHeads else {
        throw KVError(.invalidOption, "a router merges rows of head \(merge.head) of \(layer.kvHeads)")
      }
      let rows = layer.rowCount(head: merge.head)
      let own = [merge.keyWeight, merge.keyDivisor, merge.valueWeight, merge.valueDivisor, merge.logBias ?? 0]
      guard (0..<rows).contains(merge.target), stays(merge, in: layer),
        taken.insert(starts[merge.head] + merge.target).inserted
      else {
        throw KVError(
          .invalidOption,
          "a row that takes others in must stay in its tier, and be named once; got row \(merge.target) of \(rows)",
          head: merge.head)
      }
      var last = -1
      for term in terms[merge.terms] {
        guard term.row > last, term.row < rows, self[merge.head, term.row] == .dropped else {
          throw KVError(
            .invalidOption,
            "rows that go into row \(merge.target) must be dropped ones, each once, ascending; got row \(term.row)",
            head: merge.head)
        }
        guard term.keyWeight.isFinite, term.valueWeight.isFinite else {
          throw KVError(
            .nonFinite, "row \(term.row) would be merged with a weight that is not finite", head: merge.head)
        }
        last = term.row
      }
      guard own.allSatisfy(\.isFinite), merge.keyDivisor != 0, merge.valueDivisor != 0 else {
        throw KVError(
          .nonFinite, "row \(merge.target) would be merged with weights, a divisor or a bias that are not finite or 0",
          head: merge.head)
      }
    }
  }
}

extension Routing {
  /// Takes merges back whose rows are dropped after all.
  public mutating func forgetMerges(head: Int, into rows: Set<Int>) {
    if rows.isEmpty { return }
    merges.removeAll { $0.head == head && rows.contains($0.target) }
  }
}
