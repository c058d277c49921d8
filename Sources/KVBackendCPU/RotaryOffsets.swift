internal import CKVKernels
internal import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// Cosines and sines of the first positions, by which rows are turned in two steps: from their position to the first of
/// a run of rows, and from there to 0.
///
/// Angles are products in f64, whatever the engine used: so turning back and turning again meet exactly, and angles of
/// sums are sums of angles. What an engine rounded differently stays in the keys as a rotation by as much.
final class RotaryOffsets: Sendable {
  /// Rows of the table: the most by which positions of one run may differ, plus one.
  static let count = 512

  let pairs: Int
  let step: Int
  let partner: Int
  private let inverseFrequencies: [Float]
  let cosines: [Float]
  let sines: [Float]
  let negativeSines: [Float]
  /// The same by pair, `columnStride` apart: the positions that many rows at once need lie side by side. The stride is no
  /// power of two, for pairs not to compete for one set of the cache.
  static let columnStride = count + 16
  private let cosineColumns: [Float]
  private let sineColumns: [Float]

  init(_ rotary: RotaryEmbedding) {
    pairs = rotary.pairs
    step = rotary.layout == .halfSplit ? 1 : 2
    partner = rotary.layout == .halfSplit ? pairs : 1
    inverseFrequencies = rotary.inverseFrequencies
    var cosines: [Float] = []
    var sines: [Float] = []
    cosines.reserveCapacity(Self.count * pairs)
    sines.reserveCapacity(Self.count * pairs)
    for offset in 0..<Self.count {
      for pair in 0..<pairs {
        let angle = Double(offset) * Double(inverseFrequencies[pair])
        cosines.append(Float(cos(angle)))
        sines.append(Float(sin(angle)))
      }
    }
    self.cosines = cosines
    self.sines = sines
    negativeSines = sines.map { -$0 }
    let pairs = pairs
    func columns(_ table: [Float]) -> [Float] {
      (0..<pairs).flatMap { pair in
        (0..<Self.columnStride).map { $0 < Self.count ? table[$0 * pairs + pair] : 0 }
      }
    }
    cosineColumns = columns(cosines)
    sineColumns = columns(sines)
  }

  /// The turns by the first `count` positions as kernels take them that turn many rows at once.
  func withTurns(_ body: (UnsafePointer<ckv_turns>) -> Void) {
    cosineColumns.withUnsafeBufferPointer { cosines in
      sineColumns.withUnsafeBufferPointer { sines in
        let turns = ckv_turns(
          pairs: UInt32(pairs), step: step, partner: partner, stride: Self.columnStride, cosines: cosines.baseAddress,
          sines: sines.baseAddress)
        withUnsafePointer(to: turns, body)
      }
    }
  }

  /// Turns rows by their offsets, or back. Offsets lie below `count`.
  func turn(
    _ rows: UnsafeMutablePointer<Float>, stride: Int, offsets: UnsafePointer<UInt32>, count: Int, back: Bool,
    _ kernels: UnsafePointer<ckv_kernels>
  ) {
    kernels.pointee.turn!(
      rows, stride, UInt32(count), UInt32(pairs), step, partner, cosines, back ? negativeSines : sines, offsets)
  }

  /// Cosines and sines of one position, or those that turn back, for `turn(_:stride:table:count:_:)`: one angle a pair,
  /// `2 * pairs` numbers.
  func table(of position: Int, back: Bool, into base: UnsafeMutablePointer<Float>) {
    for pair in 0..<pairs {
      let angle = Double(position) * Double(inverseFrequencies[pair])
      base[pair] = Float(cos(angle))
      base[pairs + pair] = back ? -Float(sin(angle)) : Float(sin(angle))
    }
  }

  /// Turns rows by the position of a table.
  func turn(
    _ rows: UnsafeMutablePointer<Float>, stride: Int, table: UnsafePointer<Float>, count: Int,
    _ kernels: UnsafePointer<ckv_kernels>
  ) {
    var zero: UInt32 = 0
    for row in 0..<count {
      kernels.pointee.turn!(
        rows + row * stride, stride, 1, UInt32(pairs), step, partner, table, table + pairs, &zero)
    }
  }

  /// Turns rows by one position, the same for all, or back.
  func turn(
    _ rows: UnsafeMutablePointer<Float>, stride: Int, by position: Int, count: Int, back: Bool,
    _ kernels: UnsafePointer<ckv_kernels>
  ) {
    if position == 0 { return }
    withUnsafeTemporaryAllocation(of: Float.self, capacity: 2 * pairs) { table in
      guard let base = table.baseAddress else { return }
      self.table(of: position, back: back, into: base)
      turn(rows, stride: stride, table: base, count: count, kernels)
    }
  }

  /// Turns rows by positions that ascend, or back.
  func turn(
    _ rows: UnsafeMutablePointer<Float>, stride: Int, count: Int, back: Bool, _ kernels: UnsafePointer<ckv_kernels>,
    position: (Int) -> Int
  ) {
    withUnsafeTemporaryAllocation(of: UInt32.self, capacity: Self.count) { offsets in
      guard let base = offsets.baseAddress else { return }
      var start = 0
      while start < count {
        let first = position(start)
        var end = start
        while end < count, end - start < Self.count, (0..<Self.count).contains(position(end) - first) {
          base[end - start] = UInt32(position(end) - first)
          end += 1
        }
        let run = rows + start * stride
        turn(run, stride: stride, offsets: base, count: end - start, back: back, kernels)
        turn(run, stride: stride, by: first, count: end - start, back: back, kernels)
        start = end
      }
    }
  }
}
