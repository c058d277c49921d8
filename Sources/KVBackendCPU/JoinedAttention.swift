internal import CKVKernels
internal import KVCore

/// One head's part in work over keys that lie side by side.
struct JoinedMember {
  var work: RowsWork
  var queries: QueryBlock
  var partial: PartialBlock
  var kept: KeptWeights?
  var keptOffset: Int
}

/// Attention over keys of several heads side by side, before their rotary embedding.
///
/// A tile of rows is decoded once, whatever the map behind which it lies, and serves all heads that share it: each
/// takes its channels, turns them to their distance from the first row of the tile, and multiplies them with queries
/// turned back by that row's position. Softmax and values are those of any rows. Where the level has a kernel that does
/// all that in one go (`joined_logits`), and tokens are without gaps, it does.
extension RowAttention {
  /// Adds rows `range` of every member. All describe the same rows, each with channels of its own.
  func addJoined(
    _ members: UnsafeMutableBufferPointer<JoinedMember>, _ range: Range<Int>, _ space: LatentSpace
  ) {
    guard let first = members.first, let rotary = first.work.lowRank?.rotary,
      let width = plan.width(of: first.work.keys)
    else { return }
    let m = first.queries.rows
    var layout = Layout()
    let rows = space.memory + layout.take(LatentSpace.joinedRows * width)
    let table = space.memory + layout.take(keyDim)
    let turned = space.memory + layout.take(members.count * m * keyDim)
    let formed = space.memory + layout.take(members.count * m * blockRows)
    let offsets = space.backend.offsets(of: rotary)
    let together = canForm(members, range)
    withUnsafeTemporaryAllocation(of: UInt32.self, capacity: LatentSpace.joinedRows) { buffer in
      guard let distances = buffer.baseAddress else { return }
      var start = range.lowerBound
      while start < range.upperBound {
        let end = min(start + blockRows, range.upperBound)
        var row = start
        while row < end {
          let position = first.work.position(row)
          if together {
            let next = min(row + RotaryOffsets.count / 2, end)
            offsets.table(of: position, back: true, into: table)
            form(members, row..<next, table, turned, offsets, into: formed + row - start, scratch: rows)
            row = next
            continue
          }
          var next = row
          while next < end, next - row < LatentSpace.joinedRows,
            (0..<RotaryOffsets.count).contains(first.work.position(next) - position)
          {
            distances[next - row] = UInt32(first.work.position(next) - position)
            next += 1
          }
          forEach(first.work.keys, row..<next) { run, at, count, offset in
            space.backend.read(
              RunSlice(run: run, first: at, count: count), into: rows + offset * width, stride: width)
          }
          offsets.table(of: position, back: true, into: table)
          for index in members.indices {
            form(
              members[index], rows, width, row..<next, from: position, distances, table, turned, offsets,
              into: formed + index * m * blockRows + row - start)
          }
          row = next
        }
        for index in members.indices {
          let member = members[index]
          addBlock(
            member.work, start..<end, member.queries, member.partial, member.kept, member.keptOffset,
            formed: formed + index * m * blockRows)
        }
        start = end
      }
    }
  }

  /// Whether one kernel forms the logits of all members: tokens without gaps, the same ones for all heads, in rows that
  /// it takes.
  private func canForm(_ members: UnsafeMutableBufferPointer<JoinedMember>, _ range: Range<Int>) -> Bool {
    guard let joined = kernels.pointee.joined_logits, let first = members.first?.work,
      members.allSatisfy({ $0.work.positions == nil && $0.work.firstPosition == first.firstPosition })
    else { return false }
    var takes = true
    forEach(first.keys, range) { run, _, _, _ in
      run.withKernelMap { map in
        withUnsafePointer(to: run.kernelRun) {
          takes = takes && joined($0, map, 0, 0, nil, 0, UInt32(keyDim), 0, 0, 0, 0, nil, 0, nil)
        }
      }
    }
    return takes
  }

  /// Logits of all heads against rows `tile`, fewer than `RotaryOffsets.count`, with queries turned back by the first
  /// row's position (`table`).
  private func form(
    _ members: UnsafeMutableBufferPointer<JoinedMember>, _ tile: Range<Int>, _ table: UnsafePointer<Float>,
    _ turned: UnsafeMutablePointer<Float>, _ offsets: RotaryOffsets, into target: UnsafeMutablePointer<Float>,
    scratch: UnsafeMutablePointer<Float>
  ) {
    guard let joined = kernels.pointee.joined_logits, let first = members.first else { return }
    let m = first.queries.rows
    withUnsafeTemporaryAllocation(of: ckv_joined_head.self, capacity: members.count) { heads in
      for (index, member) in members.enumerated() {
        let queries = turned + index * m * keyDim
        queries.update(from: member.queries.base, count: m * keyDim)
        offsets.turn(queries, stride: keyDim, table: table, count: m, kernels)
        heads.initializeElement(
          at: index,
          to: ckv_joined_head(
            channel: UInt32(member.work.lowRank?.keyChannels?.lowerBound ?? 0), q: queries,
            out: target + index * m * blockRows))
      }
      offsets.withTurns { turns in
        forEach(first.work.keys, tile) { run, at, count, offset in
          run.withKernelMap { map in
            withUnsafePointer(to: run.kernelRun) {
              _ = joined(
                $0, map, UInt32(at), UInt32(count), heads.baseAddress, UInt32(members.count), UInt32(keyDim),
                UInt32(m), keyDim, scale, blockRows, turns, UInt32(offset), scratch)
            }
          }
          for index in heads.indices { heads[index].out += count }
        }
      }
    }
  }

  /// Logits of one head against a tile, whose channels are turned where they lie.
  private func form(
    _ member: JoinedMember, _ rows: UnsafeMutablePointer<Float>, _ width: Int, _ tile: Range<Int>,
    from position: Int, _ distances: UnsafePointer<UInt32>, _ table: UnsafePointer<Float>,
    _ turned: UnsafeMutablePointer<Float>, _ offsets: RotaryOffsets, into target: UnsafeMutablePointer<Float>
  ) {
    guard let channels = member.work.lowRank?.keyChannels else { return }
    let own = rows + channels.lowerBound
    let m = member.queries.rows
    turned.update(from: member.queries.base, count: m * keyDim)
    // Heads may hold their tokens at other positions than the first one.
    if members(member, holds: distances, from: position, tile) {
      offsets.turn(own, stride: width, offsets: distances, count: tile.count, back: false, kernels)
      offsets.turn(turned, stride: keyDim, table: table, count: m, kernels)
    } else {
      offsets.turn(own, stride: width, count: tile.count, back: false, kernels) {
        member.work.position(tile.lowerBound + $0)
      }
    }
    var run = RowRun(encoding: .dense(.f32), dim: keyDim, capacity: tile.count, base: own).kernelRun
    run.row_stride = Int64(width)
    kernels.pointee.logits!(
      &run, 0, UInt32(tile.count), turned, UInt32(m), keyDim, scale, target, blockRows, scratch)
  }

  private func members(
    _ member: JoinedMember, holds distances: UnsafePointer<UInt32>, from position: Int, _ tile: Range<Int>
  ) -> Bool {
    if member.work.positions == nil {
      return member.work.position(tile.lowerBound) == position && ascends(distances, tile.count)
    }
    return tile.indices.allSatisfy {
      member.work.position($0) - position == Int(distances[$0 - tile.lowerBound])
    }
  }

  private func ascends(_ distances: UnsafePointer<UInt32>, _ count: Int) -> Bool {
    count == 0 || Int(distances[count - 1]) == count - 1
  }
}

extension AttentionPlanView {
  /// Channels of the rows of some slices.
  func width(of slices: Range<Int>) -> Int? { slices.isEmpty ? nil : self.slices[slices.lowerBound].run.dim }
}

extension LatentSpace {
  /// Rows decoded at a time: those of all heads stay in the second-level cache. Kernels count on as many floats.
  static let joinedRows = 64

  /// Floats for keys side by side, of at most `members` heads at a time.
  static func joinedFloats(width: Int, rows m: Int, keyDim: Int, members: Int) -> Int {
    var layout = Layout()
    _ = layout.take(joinedRows * width)
    _ = layout.take(keyDim)
    _ = layout.take(members * m * keyDim)
    _ = layout.take(members * m * blockRows)
    return layout.total
  }
}
