/// Some tokens of one layer, for every KV head, in one representation.
///
/// Heads are ragged: they may hold different tokens and different counts. Slots of a head are in the order their rows
/// arrived: in position order until another tier sends a row that is older than one here.
/// A slot may be dead: its log bias is minus infinity, it takes part in nothing, and its memory is reclaimed later.
package protocol Segment: AnyObject {
  var kvHeads: Int { get }
  /// Slots of a head, dead ones included.
  func slotCount(head: Int) -> Int
  func liveCount(head: Int) -> Int
  func position(head: Int, slot: Int) -> Int
  func isLive(head: Int, slot: Int) -> Bool
  /// From this slot on, positions are larger than all before them. 0: the whole head is in position order.
  func sortedFrom(head: Int) -> Int

  /// Appends the tokens of two views to every head; positions `first ...`. `observed`: what the columns of a row start
  /// with, empty when no attention is observed.
  func append(
    keys: borrowing TensorView, values: borrowing TensorView, firstPosition: Int, observed: [Float]
  ) throws(KVError)

  /// Moves rows to where the representation wants them (out of the dense window, say).
  func settle() throws(KVError)

  /// The same when a prompt is complete or the policy has chosen: rows that wait for others to be encoded with have all
  /// they will get.
  ///
  /// - Parameter interval: tokens between two choices of the policy; nil: the prompt is complete.
  func settleBatch(interval: Int?) throws(KVError)

  /// Takes what the formats need to know of a whole prompt (numbers per channel) from the rows of all tiers, unless it is
  /// known. Whether something was taken.
  ///
  /// - Parameter queries: per KV head, the largest magnitude of every channel of the prompt's queries.
  func calibrate(over segments: [any Segment], queries: [[Float]]?) throws(KVError) -> Bool
  /// Whether `calibrate` will want queries.
  var wantsQueries: Bool { get }

  /// Makes sure that `drop` of these slots cannot fail.
  func prepareDrop(_ slots: [[Int]]) throws(KVError)
  /// Marks slots dead, in any order.
  func drop(_ slots: [[Int]]) throws(KVError)

  /// Whether single slots can be dropped without allocating, by `prepareDrop` and then `drop(head:slot:)`.
  var dropsInPlace: Bool { get }
  /// Makes sure that dropping cannot fail.
  func prepareDrop() throws(KVError)
  /// Marks one live slot dead. Only after `prepareDrop`.
  func drop(head: Int, slot: Int)

  /// Gives memory of dead slots back: all of it when `eager`, else when enough has gathered to be worth it.
  func reclaim(eager: Bool) throws(KVError)
  /// Closes the gaps of dead slots without asking for memory, where the representation can: it will be needed again.
  func reclaimInPlace() throws(KVError)

  /// Cuts off every slot at or after `position`.
  func truncate(to position: Int) throws(KVError)
  /// The earliest position `truncate` accepts.
  var minimumTruncation: Int { get }

  /// Describes the slots of a head in `range` to an attention plan.
  func describe(head: Int, range: Range<Int>, shift: Int, in plan: AttentionPlan)
  /// Brings the description of all slots of every head, which an earlier call made of this segment, up to date: that of head
  /// h is `plan.rows[first + h * stride]`. False where that is not enough; the plan is of no account then.
  func describeAgain(first: Int, stride: Int, in plan: AttentionPlan) -> Bool

  /// What was observed of a head's slots: where the columns are. They may be written after `prepareObserved`.
  func observed(head: Int) -> ObservedColumns
  /// Appends the live slots of a head, ascending.
  func appendLiveSlots(head: Int, to slots: inout ContiguousArray<Int32>)
  /// Enters the live slots of a head at their positions in a table of all tokens seen.
  func enterLiveSlots(
    head: Int, as segment: Int32, in table: UnsafeMutableBufferPointer<LayerView.RowReference>)
  /// Frees the observed columns of every slot: the policy no longer needs them.
  func forgetObserved()
  /// Makes the observed columns exclusive before anything writes to them.
  func prepareObserved() throws(KVError)

  /// Rows as f32, rows `dim` floats apart.
  func readKeys(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>)
  func readValues(head: Int, range: Range<Int>, into destination: UnsafeMutablePointer<Float>)
  /// The rows of a head without a copy, when they are dense, contiguous and in position order.
  func denseRun(head: Int, keys: Bool) -> RunSlice?

  func logBias(head: Int, slot: Int) -> Float
  /// Tokens a slot stands for; more than 1 after merging.
  func count(head: Int, slot: Int) -> Int

  /// Rows replaced by weighted sums of rows. Everything is computed, and checked against what will hold it; the rows
  /// change when what is returned is called, which cannot fail and comes before anything else happens to the segment.
  ///
  /// - Throws: `unrepresentable` for a sum beyond what holds the row, `outOfMemory`; `unsupported` where
  ///   `SegmentFactory.merging` is nil.
  func merge(_ heads: [HeadMerges], head numbers: [Int]) throws(KVError) -> () -> Void

  /// Turns the keys of some slots of every head by positions. Everything is computed, and checked against what will hold
  /// it, before the first key changes.
  ///
  /// - Throws: `unsupported` for keys that are encoded, `unrepresentable`, `outOfMemory`.
  func turnKeys(_ heads: [[SlotTurn]], rotary: RotaryEmbedding) throws(KVError)

  func tally(into tally: inout ByteTally)
  /// A segment with the same rows that shares what is frozen.
  func fork() -> any Segment
  func checkInvariants()

  /// Appends rows of another segment to this one's dense windows, in the order of `slots[h]`. They may be older than
  /// rows that are here. `observed`: columns of a row.
  /// Changes nothing when memory runs out.
  func absorb(from other: any Segment, slots: [[Int]], observed: Int) throws(KVError)
  /// The largest magnitudes of elements of keys and values that `absorb` may be given.
  var largestTaken: (keys: Float, values: Float) { get }
  /// No element of a row here is larger.
  var largestHeld: (keys: Float, values: Float) { get }
  /// Takes back the last `counts[h]` rows that `absorb` appended, before anything else happened.
  func retract(_ counts: [Int])
  /// The slices of single slots, for `absorb`.
  func slices(head: Int, slots: [Int]) -> (keys: [RunSlice], values: [RunSlice])

  /// Writes every head, dead slots included, so that `SegmentFactory.decodeSegment` makes the same segment again.
  func encode(to writer: inout ByteWriter)
}

extension Segment {
  package var largestTaken: (keys: Float, values: Float) { (.greatestFiniteMagnitude, .greatestFiniteMagnitude) }
  package var largestHeld: (keys: Float, values: Float) { (.greatestFiniteMagnitude, .greatestFiniteMagnitude) }
  package func describeAgain(first: Int, stride: Int, in plan: AttentionPlan) -> Bool { false }
  package func reclaimInPlace() throws(KVError) { try reclaim(eager: true) }
  package var dropsInPlace: Bool { false }
  package func prepareDrop() throws(KVError) {}
  package func drop(head: Int, slot: Int) { preconditionFailure("this representation drops by lists") }
  package func count(head: Int, slot: Int) -> Int { 1 }

  package func turnKeys(_ heads: [[SlotTurn]], rotary: RotaryEmbedding) throws(KVError) {
    throw KVError(.unsupported, "keys of this store cannot be turned")
  }

  package func merge(_ heads: [HeadMerges], head numbers: [Int]) throws(KVError) -> () -> Void {
    throw KVError(.unsupported, "rows of this store cannot take others in")
  }
}

/// Neighbouring slots of a head whose keys move later by as many positions.
package struct SlotTurn: Hashable {
  package var slots: Range<Int>
  package var by: Int

  package init(slots: Range<Int>, by: Int) {
    self.slots = slots
    self.by = by
  }
}

/// When a representation can turn the keys it holds.
package enum KeyTurning {
  case never
  /// Until they are encoded, when a prompt is complete.
  case whileDense
  case always
}

/// Slots of one head that take other rows in.
package struct HeadMerges {
  package struct Slot {
    package var slot: Int
    package var logBias: Float
    package var count: Int
    package var observed: [Float]

    package init(slot: Int, logBias: Float, count: Int, observed: [Float]) {
      self.slot = slot
      self.logBias = logBias
      self.count = count
      self.observed = observed
    }
  }

  /// Every slot whose bias, count or observed numbers change.
  package var slots: [Slot] = []
  /// Slots that get new keys, ascending, and the sums they get: sum j for slot j.
  package var keySlots: [Int] = []
  package var keys: RowMix
  package var valueSlots: [Int] = []
  package var values: RowMix

  package init(keys: RowMix, values: RowMix) {
    self.keys = keys
    self.values = values
  }
}

/// Makes the segments of one tier. The representation of a `Store`.
package protocol SegmentFactory: Sendable {
  func makeSegment(layer: LayerShape, backend: any ComputeBackend) -> any Segment
  /// What will hold rows that are replaced by weighted sums; nil: they cannot be.
  var merging: MergingSides? { get }
  /// When keys can be turned.
  var keyTurning: KeyTurning { get }
  /// Refuses shapes the representation cannot hold.
  func validate(layer: LayerShape) throws(KVError)
  /// The same representation of rotated keys and values (nil: that side as it is).
  ///
  /// - Throws: `invalidOption` where that side is not encoded, `unsupported` by representations that cannot rotate.
  func rotated(keys: Rotation?, values: Rotation?) throws(KVError) -> any SegmentFactory
  /// The same representation of keys that were balanced against the queries.
  ///
  /// - Throws: `invalidOption` where keys are not encoded, `unsupported` by representations that cannot scale.
  func balanced() throws(KVError) -> any SegmentFactory
  /// Whether its segments want the prompt's queries.
  var wantsQueries: Bool { get }
  /// Refuses backends without kernels for the representation.
  func validate(backend: any ComputeBackend) throws(KVError)
  /// The most bytes one KV head needs for this many rows, with positions, dead slots that wait to be reclaimed, and
  /// `observed` columns. Holes in frozen groups are not foreseen.
  func bytes(rows: Int, layer: LayerShape, observed: Int) -> Int
  /// A segment from what `Segment.encode` wrote: nothing in the bytes is trusted, every position is below `tokensSeen`.
  ///
  /// - Throws: `corruptFile`, `outOfMemory`.
  func decodeSegment(
    from reader: inout ByteReader, layer: LayerShape, tokensSeen: Int, backend: any ComputeBackend
  ) throws(KVError) -> any Segment
}

extension Segment {
  package func settleBatch(interval: Int?) throws(KVError) { try settle() }
  package func calibrate(over segments: [any Segment], queries: [[Float]]?) throws(KVError) -> Bool { false }
  package var wantsQueries: Bool { false }
}

extension SegmentFactory {
  package var merging: MergingSides? { nil }
  package var keyTurning: KeyTurning { .never }

  package func rotated(keys: Rotation?, values: Rotation?) throws(KVError) -> any SegmentFactory {
    throw KVError(.unsupported, "this store does not hold rows that could be rotated")
  }

  package func balanced() throws(KVError) -> any SegmentFactory {
    throw KVError(.unsupported, "this store does not hold keys that could be balanced")
  }

  package var wantsQueries: Bool { false }
}

/// What holds the rows of each side.
package struct MergingSides {
  package var keys: SideFormat
  package var values: SideFormat
}
