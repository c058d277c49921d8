extension KVCache {
  /// Brings the rows a router sends into others there, before they are dropped.
  package func merge(_ routing: Routing, _ view: LayerView, _ state: LayerState) throws(KVError) {
    if routing.merges.isEmpty { return }
    // All tiers or none.
    var changes: [() -> Void] = []
    for (index, segment) in state.segments.enumerated() {
      var numbers: [Int] = []
      var heads: [HeadMerges] = []
      for head in 0..<view.kvHeads {
        let own = routing.merges.filter {
          $0.head == head && Int(view.reference(head: head, row: $0.target).segment) == index
        }
        guard !own.isEmpty, let sides = policy.tiers[index].factory(layer: state.layer, of: layers.count).merging
        else { continue }
        numbers.append(head)
        heads.append(describe(own, routing, view, segment, sides))
      }
      if !heads.isEmpty { changes.append(try segment.merge(heads, head: numbers)) }
    }
    for change in changes { change() }
  }

  private func describe(
    _ merges: [Routing.Merge], _ routing: Routing, _ view: LayerView, _ segment: any Segment, _ sides: MergingSides
  ) -> HeadMerges {
    let head = merges[0].head
    func slot(_ merge: Routing.Merge) -> Int { Int(view.reference(head: head, row: merge.target).slot) }
    let merges = merges.sorted { slot($0) < slot($1) }
    var result = HeadMerges(
      keys: RowMix(
        dim: view.shape.keyDim, type: sides.keys.window, range: sides.keys.range(dim: view.shape.keyDim)),
      values: RowMix(
        dim: view.shape.valueDim, type: sides.values.window, range: sides.values.range(dim: view.shape.valueDim)))
    for merge in merges {
      let place = slot(merge)
      let terms = routing.terms[merge.terms]
      var count = view.count(head: head, row: merge.target)
      let columns = segment.observed(head: head)
      var observed = (0..<columns.width).map { columns.value(column: $0, slot: place) }
      if merge.counts { for term in terms { count += view.count(head: head, row: term.row) } }
      if merge.scores, let observer {
        for term in terms {
          for column in observed.indices {
            observed[column] = observer.merged(
              column: column, observed[column], view.observed(head: head, row: term.row, column: column))
          }
        }
      }
      result.slots.append(
        HeadMerges.Slot(
          slot: place, logBias: merge.logBias ?? segment.logBias(head: head, slot: place), count: count,
          observed: observed))
      if merge.key != .keep { result.keySlots.append(place) }
      result.valueSlots.append(place)
    }
    fill(&result.keys, merges.filter { $0.key != .keep }, routing, view, .keys)
    fill(&result.values, merges, routing, view, .values)
    return result
  }

  /// The table of rows and the weights of one side.
  private func fill(
    _ mix: inout RowMix, _ merges: [Routing.Merge], _ routing: Routing, _ view: LayerView, _ side: LayerView.Side
  ) {
    guard let head = merges.first?.head else { return }
    let isKeys = side == .keys
    // A turned row stands in the table once for every row it is turned to; others once in all.
    var rows: [Int] = []
    var number = [Int32](repeating: -1, count: view.rowCount(head: head))
    func enter(_ row: Int) -> UInt32 {
      if number[row] < 0 {
        number[row] = Int32(rows.count)
        rows.append(row)
      }
      return UInt32(number[row])
    }
    for merge in merges {
      mix.index.append(enter(merge.target))
      mix.weights.append(isKeys ? merge.keyWeight : merge.valueWeight)
      for term in routing.terms[merge.terms] {
        if isKeys, merge.key == .rotate {
          mix.turns.append(
            (rows.count, view.position(head: head, row: term.row), view.position(head: head, row: merge.target)))
          mix.index.append(UInt32(rows.count))
          rows.append(term.row)
        } else {
          mix.index.append(enter(term.row))
        }
        mix.weights.append(isKeys ? term.keyWeight : term.valueWeight)
      }
      mix.starts.append(UInt32(mix.index.count))
      mix.divisors.append(isKeys ? merge.keyDivisor : merge.valueDivisor)
    }
    mix.rotary = shape.rotary
    mix.rows = view.slices(head: head, rows: rows, side)
  }
}
