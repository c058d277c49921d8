/// Doing what a plan says.
extension KVCache {
  /// With `moreToCome` gaps are closed inside the memory there is, which the next chunk needs again.
  func apply(_ plan: LayerPlan, moreToCome: Bool) throws(KVError) {
    let state = plan.state
    if state.phase == .prefill { state.allocation = plan.allocation }
    state.headsAreAlike = false
    let before = plan.rows.max() ?? 0
    guard let routing = plan.routing else {
      state.outcome = .withinBudget(rows: before)
      return
    }
    let view = plan.view ?? LayerView(state, options: attention, backend: backend.operations)
    let eager = state.phase == .prefill
    let (dropped, moves) = departures(routing, view, state)
    do throws(KVError) {
      let leaving = state.segments.indices.filter { dropped[$0].contains { !$0.isEmpty } }
      for index in leaving { try state.segments[index].prepareDrop(dropped[index]) }
      if policy.positions == .rerotate, let rotary = shape.rotary {
        try state.segments[0].turnKeys(turns(routing, view), rotary: rotary)
      }
      try move(moves, in: state) { () throws(KVError) in try merge(routing, view, state) }
      if let memory = routing.memory { state.routerMemory = memory }
      // Only memory that is given back could fail from here on, and then it stays.
      for index in leaving { try state.segments[index].drop(dropped[index]) }
      for index in leaving {
        if moreToCome {
          try state.segments[index].reclaimInPlace()
        } else {
          try state.segments[index].reclaim(eager: eager)
        }
      }
    } catch {
      throw error.at(layer: state.layer)
    }
    if dropped.contains(where: { $0.contains { !$0.isEmpty } }) { state.frozenBelow = state.seen }
    let after = (0..<view.kvHeads).map { state.liveRows(head: $0) }.max() ?? 0
    state.outcome = .compressed(before: before, after: after, at: state.seen)
  }

  /// Slots that leave their tier, `[from][head]`, and where those that are not dropped go, `[from][to][head]`.
  private func departures(
    _ routing: Routing, _ view: LayerView, _ state: LayerState
  ) -> (dropped: [[[Int]]], moves: [[[[Int]]]]) {
    var dropped = state.segments.map { segment in Array(repeating: [Int](), count: segment.kvHeads) }
    var moves = state.segments.map { _ in
      state.segments.map { segment in Array(repeating: [Int](), count: segment.kvHeads) }
    }
    // With one tier only what leaves it is of interest: a few rows of thousands, while decoding.
    let staying: Routing.Outcome? = state.segments.count == 1 ? .tier(0) : nil
    for head in 0..<view.kvHeads {
      routing.forEach(head: head, notIn: staying) { row, outcome in
        let place = view.reference(head: head, row: row)
        let from = Int(place.segment)
        if outcome == .dropped {
          dropped[from][head].append(Int(place.slot))
        } else if Int(outcome.rawValue) != from {
          outcome.precondition(tiers: state.segments.count)
          moves[from][Int(outcome.rawValue)][head].append(Int(place.slot))
          dropped[from][head].append(Int(place.slot))
        }
      }
    }
    return (dropped, moves)
  }

  /// Refuses rows that the tier they go to cannot hold, while every layer is as it was.
  func checkRanges(_ plan: LayerPlan) throws(KVError) {
    let state = plan.state
    let taken = state.segments.map(\.largestTaken)
    let held = state.segments.map(\.largestHeld)
    func narrows(_ from: Int, _ to: Int) -> Bool {
      taken[to].keys < held[from].keys || taken[to].values < held[from].values
    }
    let tiers = state.segments.indices
    guard let routing = plan.routing, tiers.contains(where: { from in tiers.contains { narrows(from, $0) } })
    else { return }
    let view = plan.view ?? LayerView(state, options: attention, backend: backend.operations)
    let moves = departures(routing, view, state).moves
    for from in tiers {
      for to in tiers where narrows(from, to) {
        for head in moves[from][to].indices {
          do throws(KVError) {
            let slots = moves[from][to][head]
            let rows = state.segments[from].slices(head: head, slots: slots)
            try check(rows.keys, "key", within: taken[to].keys, slots, state.segments[from], head, tier: to)
            try check(rows.values, "value", within: taken[to].values, slots, state.segments[from], head, tier: to)
          } catch {
            throw error.at(layer: state.layer)
          }
        }
      }
    }
  }

  private func check(
    _ slices: [RunSlice], _ what: String, within limit: Float, _ slots: [Int], _ segment: any Segment, _ head: Int,
    tier: Int
  ) throws(KVError) {
    guard let dim = slices.first?.run.dim, !isWithin(limit, slices, dim) else { return }
    // The first row that is beyond: the others may be many.
    var index = 0
    for slice in slices {
      for row in slice.first..<slice.first + slice.count {
        if !isWithin(limit, [RunSlice(run: slice.run, first: row, count: 1)], dim) {
          throw KVError(
            .unrepresentable,
            "a \(what) that goes to store \(tier + 1) of \(policy.tiers.count) is beyond ±\(limit), the largest that "
              + "\(policy.tiers[tier].spec.name) can hold; store rows and metadata there in a wider type",
            head: head, position: segment.position(head: head, slot: slots[index]))
        }
        index += 1
      }
    }
  }

  private func isWithin(_ limit: Float, _ slices: [RunSlice], _ dim: Int) -> Bool {
    let (low, high) = backend.operations.channelRange(slices, dim: dim)
    // A backend without rows leaves the range empty.
    return zip(low, high).allSatisfy { $0 > $1 || max(abs($0), abs($1)) <= limit }
  }

  /// By how much each surviving key becomes later: by the rows behind it that go.
  private func turns(_ routing: Routing, _ view: LayerView) -> [[SlotTurn]] {
    (0..<view.kvHeads).map { head in
      var turns: [SlotTurn] = []
      var gone = 0
      for row in stride(from: view.rowCount(head: head) - 1, through: 0, by: -1) {
        if routing[head, row] == .dropped {
          gone += 1
          continue
        }
        if gone == 0 { continue }
        let slot = Int(view.reference(head: head, row: row).slot)
        if let last = turns.last, last.by == gone {
          // Slots between that are dead already turn along.
          turns[turns.count - 1].slots = slot..<last.slots.upperBound
        } else {
          turns.append(SlotTurn(slots: slot..<slot + 1, by: gone))
        }
      }
      return turns.reversed()
    }
  }

  /// Copies rows into other tiers, `moves[from][to][head]`, and does `then`: all of it, or nothing when either fails.
  private func move(
    _ moves: [[[[Int]]]], in state: LayerState, then: () throws(KVError) -> Void
  ) throws(KVError) {
    let columns = observedColumns(state)
    var done: [(tier: Int, counts: [Int])] = []
    do throws(KVError) {
      for from in state.segments.indices {
        for to in state.segments.indices where moves[from][to].contains(where: { !$0.isEmpty }) {
          try state.segments[to].absorb(from: state.segments[from], slots: moves[from][to], observed: columns)
          done.append((to, moves[from][to].map(\.count)))
        }
      }
      try then()
    } catch {
      for (tier, counts) in done.reversed() { state.segments[tier].retract(counts) }
      throw error
    }
  }

  /// Before any layer changes.
  func checkTiers(of routing: Routing, in view: LayerView) {
    for head in 0..<view.kvHeads {
      routing.forEach(head: head, notIn: .tier(0)) { _, outcome in
        if outcome != .dropped { outcome.precondition(tiers: view.segments.count) }
      }
    }
  }
}

extension Routing.Outcome {
  /// A router that names a tier there is not is a programmer's mistake.
  fileprivate func precondition(tiers: Int) {
    Swift.precondition(Int(rawValue) < tiers, "a router sent a row to tier \(rawValue) of \(tiers)")
  }
}
