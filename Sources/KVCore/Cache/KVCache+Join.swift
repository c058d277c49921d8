extension KVCache {
  /// Joins the groups of a layer whose other layers are as far as it is.
  ///
  /// A group that could not be joined for lack of memory stays as it was, readable and exact, and is tried again with
  /// the next step.
  package func join(groupsOf state: LayerState) throws(KVError) {
    for group in groups where group.layers.contains(state.layer) {
      let members = group.layers.map { layers[$0] }
      guard members.allSatisfy({ $0.phase == .decode && $0.seen == state.seen && $0.settledTokens == state.seen })
      else { continue }
      // Segments of the group first; what they hold is brought together in them, a piece at a time.
      while try join(group, members) {}
    }
  }

  /// Whether the members of a group got other segments.
  private func join(_ group: LayerGroup, _ members: [LayerState]) throws(KVError) -> Bool {
    let segments = members.map { $0.segments[group.tier] }
    let joined: [any Segment]?
    do throws(KVError) {
      joined = try group.factory.join(
        segments, layers: group.layers, shape: shape,
        decoding: segments.allSatisfy { $0 is any JointSegment }, backend: backend.operations)
    } catch {
      throw error.at(layer: members[members.count - 1].layer)
    }
    for member in members { debugCheck(member) }
    guard let joined else { return false }
    precondition(joined.count == members.count, "a group of \(members.count) layers joined into \(joined.count)")
    for (member, segment) in zip(members, joined) {
      member.segments[group.tier] = segment
      debugCheck(member)
    }
    return true
  }
}
