internal import KVBackendCPU
public import KVCore

/// What the latents of some heads lost of the rows they stand for, and the least that as many channels could have lost.
public struct LatentError: Hashable, Sendable {
  /// Layers that share the latents, and the KV head; nil: all heads of these layers.
  public let layers: [Int]
  public let head: Int?
  public let side: Calibration.Side
  /// Latent channels.
  public let rank: Int
  public let tokens: Int
  /// Sums of squares: of the difference, of the smallest difference, and of the rows.
  public let error: Double
  public let optimum: Double
  public let energy: Double

  /// Every side of every group of heads whose older rows are latents.
  ///
  /// - Parameters:
  ///   - cache: a cache with a low-rank store.
  ///   - exact: one that holds the same tokens as they are, in f32 say.
  /// - Throws: `invalidOption` when `exact` lacks a token or has another shape; `nonFinite` when an eigenvalue iteration
  ///   does not converge.
  /// - Complexity: O(tokens · width² + width³) a group, `width` being the channels that share latents.
  public static func measure(_ cache: KVCache, against exact: KVCache) throws(KVError) -> [LatentError] {
    guard cache.shape == exact.shape else {
      throw KVError(.invalidOption, "a cache of the same model expected")
    }
    var result: [LatentError] = []
    for tier in cache.policy.tiers.indices {
      var seen: Set<ObjectIdentifier> = []
      for state in cache.layers where state.segments.indices.contains(tier) {
        guard let segment = state.segments[tier] as? LowRankSegment, let sides = segment.lowRank.sides,
          seen.insert(ObjectIdentifier(segment.lowRank)).inserted
        else { continue }
        let members = segment.lowRank.layers.map { cache.layers[$0].segments[tier] as? LowRankSegment }
        for (side, own) in [(Calibration.Side.keys, sides.keys), (.values, sides.values)] {
          guard let basis = own.basis else { continue }
          for unit in basis.ranks.indices {
            let group = Group(storage: segment.lowRank, members: members.compactMap { $0 }, unit: unit, side: side)
            if let error = try group.measure(basis, exact: exact) { result.append(error) }
          }
        }
      }
    }
    return result
  }

  /// One unit of heads.
  private struct Group {
    let storage: LowRankStorage
    let members: [LowRankSegment]
    let unit: Int
    let side: Calibration.Side

    func measure(_ basis: LatentBasis, exact: KVCache) throws(KVError) -> LatentError? {
      let (dim, width) = (basis.dim, basis.width)
      var rows = 0
      var x: [Float] = []
      var difference = 0.0
      for (member, segment) in members.enumerated() {
        for head in 0..<segment.kvHeads where storage.place(member: member, head: head).unit == unit {
          let block = storage.place(member: member, head: head).block
          let count = segment.frozen[head]
          if x.isEmpty {
            rows = count
            x = Array(repeating: 0, count: rows * width)
          }
          if rows == 0 { return nil }
          var own = try original(segment, exact, layer: storage.layers[member], head: head, count: rows)
          difference += distance(own, segment, head: head, count: rows)
          if side == .keys, let rotary = storage.rotary {
            let positions = (0..<rows).map { Int32(segment.position(head: head, slot: $0)) }
            var span = own.mutableSpan
            try rotary.unrotate(&span, stride: dim, positions: positions.span)
          }
          for row in 0..<rows { for c in 0..<dim { x[row * width + block * dim + c] = own[row * dim + c] } }
        }
      }
      let energy = x.reduce(0) { $0 + Double($1) * Double($1) }
      if basis.mean != nil { centre(&x, rows: rows, width: width) }
      var gram = LinearAlgebra.gram(x, rows: rows, columns: width)
      let values = try LinearAlgebra.symmetricEigenvalues(replacing: &gram, size: width)
      return LatentError(
        layers: storage.layers, head: storage.format.perHead ? unit : nil, side: side, rank: basis.ranks[unit],
        tokens: rows, error: difference, optimum: values.dropFirst(basis.ranks[unit]).reduce(0) { $0 + max($1, 0) },
        energy: energy)
    }

    /// The rows as they were, of the tokens that are latents.
    private func original(
      _ segment: LowRankSegment, _ exact: KVCache, layer: Int, head: Int, count: Int
    ) throws(KVError) -> [Float] {
      let held = try exact.read(layer: layer, head: head)
      let elements = side == .keys ? held.keys : held.values
      let dim = elements.count / max(held.positions.count, 1)
      var rows: [Float] = []
      rows.reserveCapacity(count * dim)
      var next = 0
      for slot in 0..<count {
        let position = segment.position(head: head, slot: slot)
        if next >= held.positions.count || held.positions[next] != position {
          next = held.positions.firstIndex(of: position) ?? held.positions.count
        }
        guard next < held.positions.count else {
          throw KVError(
            .invalidOption, "a cache with every token expected; it lacks this one", layer: layer, head: head,
            position: position)
        }
        rows += elements[next * dim..<(next + 1) * dim]
        next += 1
      }
      return rows
    }

    private func distance(_ rows: [Float], _ segment: LowRankSegment, head: Int, count: Int) -> Double {
      var restored = [Float](repeating: 0, count: rows.count)
      restored.withUnsafeMutableBufferPointer {
        guard let base = $0.baseAddress else { return }
        if side == .keys {
          segment.readKeys(head: head, range: 0..<count, into: base)
        } else {
          segment.readValues(head: head, range: 0..<count, into: base)
        }
      }
      return zip(rows, restored).reduce(0) { $0 + Double($1.0 - $1.1) * Double($1.0 - $1.1) }
    }

    private func centre(_ x: inout [Float], rows: Int, width: Int) {
      for c in 0..<width {
        var sum = 0.0
        for row in 0..<rows { sum += Double(x[row * width + c]) }
        let mean = Float(sum / Double(rows))
        for row in 0..<rows { x[row * width + c] -= mean }
      }
    }
  }
}
