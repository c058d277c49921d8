/// Where a cache keeps its rows and who computes on them.
///
/// Opaque on purpose: engines choose one from a factory (`Backend.cpu()`), policies never see it, and the operations
/// behind it can grow without breaking either.
public struct Backend: Sendable {
  package let operations: any ComputeBackend

  package init(_ operations: any ComputeBackend) { self.operations = operations }

  /// Such as `cpu (avx512, 2 threads)`.
  public var name: String { operations.name }
  /// What factors rows, and where: such as `libcublas.so.12 and libcusolver.so.11, on the card`. Where the libraries of a
  /// card are not installed, what was looked for.
  public var linearAlgebra: String { operations.linearAlgebra }
  /// Bytes this backend has allocated for all caches built with it.
  public var memory: MemoryMeter { operations.meter }
}

/// Everything segments and policies ask of a processor. Implemented by the CPU backend, and by the dry run that
/// predicts bytes.
///
/// Operations are shaped for a device: whole layers at a time where it matters (append, attend, score), memory named
/// by descriptions (`RowRun`) and never dereferenced by the core, no callbacks into Swift.
package protocol ComputeBackend: AnyObject, Sendable {
  var name: String { get }
  var meter: MemoryMeter { get }
  /// What factors rows, and where, in words.
  var linearAlgebra: String { get }

  /// Refuses formats that the backend has no kernels for.
  func require(_ format: SideFormat) throws(KVError)

  /// At least 64-byte aligned, contents unspecified. Throws `outOfMemory`. Memory that is not `hostVisible` is only
  /// ever handed back to this backend.
  func allocate(byteCount: Int, hostVisible: Bool) throws(KVError) -> Buffer

  /// The first NaN or infinite element in head, token, channel order, or nil.
  func firstNonfinite(_ view: borrowing TensorView) -> ElementPlace?

  /// Converts rows of a view into dense runs: for each slice, `count` tokens of `head` from `token` on go to rows
  /// `first ...` of its run. Returns the first element that is finite in the view and beyond its target's range.
  func write(_ view: borrowing TensorView, to targets: [WriteTarget]) -> ElementPlace?

  /// Writes the keys and values of some tokens, which must be finite: ``firstNonfinite(_:)`` and ``write(_:to:)`` of both
  /// views at once, so that a device is waited for once. Returns the first element that is refused; what was written then
  /// is of no account.
  ///
  /// - Throws: `unavailable` when a device was lost.
  func append(
    keys: borrowing TensorView, to keyTargets: [WriteTarget], values: borrowing TensorView,
    to valueTargets: [WriteTarget]
  ) throws(KVError) -> AppendFault?

  /// Reads the rows of `sources` one after another and writes them from `row` on, converting, encoding or copying
  /// verbatim (same encoding, whole units) as the encodings ask. Per-channel targets get whole groups.
  func transcode(_ sources: UnsafeBufferPointer<RunSlice>, to target: RowRun, row: Int)

  /// The smallest and the largest value of every channel of some rows, behind the fixed part of `map`. `low` and `high`
  /// hold a range already, infinities at first; a backend without rows leaves it.
  func channelRange(
    _ sources: UnsafeBufferPointer<RunSlice>, map: UnsafePointer<MapDescriptor>?, low: UnsafeMutablePointer<Float>,
    high: UnsafeMutablePointer<Float>)

  /// Refuses observers whose weights this backend cannot give.
  func require(_ observer: any AttentionObserver) throws(KVError)

  /// Whether there is `moveRows`.
  var movesOverlappingRows: Bool { get }
  /// Copies rows within memory of one dense encoding, down to `row` of `target`; source and target may overlap.
  func moveRows(_ source: RunSlice, to target: RowRun, row: Int)

  /// Index of the smallest number whose bias (if any) is not minus infinity, of equal ones the last; -1 when there is
  /// none, -2 when one of them is NaN. Host memory.
  func lowest(_ values: UnsafePointer<Float>, bias: UnsafePointer<Float>?, count: Int) -> Int
  /// How many of some log biases are minus infinity. Host memory.
  func hidden(_ bias: UnsafePointer<Float>, count: Int) -> Int

  /// Rows as f32, `stride` floats apart, in host memory.
  func read(_ slice: RunSlice, into destination: UnsafeMutablePointer<Float>, stride: Int)

  /// Copies host memory into a run's buffer and back, for saving and loading and for columns.
  func copy(from host: UnsafeRawPointer, to device: UnsafeMutableRawPointer, byteCount: Int)
  func copy(from device: UnsafeRawPointer, toHost host: UnsafeMutableRawPointer, byteCount: Int)

  /// Attention of every sequence of the plan over all its rows. Outputs are written, statistics added.
  ///
  /// - Throws: `outOfMemory` for intermediate results, `unavailable` when a device was lost.
  func attend(_ plan: AttentionPlan) throws(KVError)

  /// Whether it keeps what it makes of a plan, so that every layer has its own and describes only what has changed.
  var keepsPlans: Bool { get }
  /// Whether `attendFinite` looks at queries and outputs itself.
  var checksAttention: Bool { get }
  /// Attention that says which query or output is not finite, so that a device is waited for once. No statistics were
  /// added then. Nil where `checksAttention` is false.
  func attendFinite(_ plan: AttentionPlan) throws(KVError) -> AttentionFault?

  /// A measure of every pair of rows; see ``RowComparison``.
  func compare(_ request: RowComparison, into result: UnsafeMutablePointer<Float>)

  /// For every source row the target row with the largest cosine, the first of equal ones, and that cosine. Zero rows
  /// have cosine 0 with everything. Both lists hold rows.
  func nearest(_ request: NearestRequest, into result: inout NearestRows)

  /// Weighted sums of rows into rows of f32; see ``RowMix``. Returns the first sum with an element beyond what the
  /// request says will hold it.
  func mix(_ request: RowMix, into target: RowRun) -> Int?

  /// Whether it turns keys where they lie.
  var turnsKeys: Bool { get }
  /// Turns keys by positions where they lie. Returns the first, counted over all slices, with an element that would
  /// come to lie beyond ±`limit`; with `writes` nothing is checked, and without nothing changes.
  func turn(_ turns: [KeyTurn], rotary: RotaryEmbedding, limit: Float, writes: Bool) -> Int?

  /// A number for every row of a list, in tiles; see ``RowScan``.
  func scan(_ request: RowScan, into result: UnsafeMutablePointer<Float>)

  /// Adds to `sums` the rows of a list, each times its weight.
  func addRows(_ rows: [RunSlice], dim: Int, weights: UnsafePointer<Float>, to sums: UnsafeMutablePointer<Float>)

  /// Whether window scores can be more than sums.
  var hasWindowStatistics: Bool { get }
  /// Statistics of softmax(window queries x all rows) per KV head; see ``WindowScoreRequest``.
  func windowScores(_ request: WindowScoreRequest, into scores: inout ScoreTable)

  /// Whether `selectLargest` is worth its call for so many scores: else they are looked at on the host.
  func selectsRows(of scores: Int) -> Bool
  /// Of every list the rows with the largest scores, of equal ones the earliest, ascending, list after list. None is NaN.
  /// Nil where memory is short.
  func selectLargest(_ choices: [RowChoice]) -> [UInt32]?
  /// The same where scores are made and pooled by `choice`; see ``WindowChoice``. Nil where the host has to do it.
  func selectByWindow(_ request: WindowScoreRequest, _ choice: WindowChoice) -> ChosenRows?

  /// Whether the backend factors rows and attends over latents: the three operations below.
  var holdsLatents: Bool { get }

  /// A basis of at most `ranks[i]` rows for each matrix; none has more than its matrix has rows or columns. Reproducible:
  /// the same bits at any thread count.
  ///
  /// - Throws: `nonFinite` when the factorisation does not converge.
  func factor(_ matrices: [RowMatrix], ranks: [Int], options: FactorOptions) throws(KVError) -> [Factors]

  /// Writes the latents of every row of each projection to its targets.
  ///
  /// - Throws: `outOfMemory`, and the errors of a card.
  func project(_ projections: [Projection]) throws(KVError) -> [ProjectionResult]

  /// Rows from their latents, f32, `dim` floats apart: latents times basis, plus the mean, turned to the positions.
  ///
  /// - Parameter positions: of the rows, where keys are turned; nil: not turned.
  func restore(
    _ latents: [RunSlice], basis: RowRun, mean: UnsafePointer<Float>?, positions: [Int32]?,
    rotary: RotaryEmbedding?, into destination: UnsafeMutablePointer<Float>)

  /// Some channels of rows, f32, close together, turned to the positions.
  func restore(
    _ rows: [RunSlice], channels: Range<Int>, positions: [Int32], rotary: RotaryEmbedding,
    into destination: UnsafeMutablePointer<Float>)

  /// Whether rows may be directions times a length each, in attention and in the two operations below.
  var holdsDirections: Bool { get }

  /// Writes directions and lengths of pairs of rows. `angles`, one a pair: radians, -1 where a row is zero, infinity where
  /// the pair has no direction between them or a length that cannot be held.
  func shareDirections(_ request: DirectionRequest, into angles: UnsafeMutablePointer<Float>)

  /// Multiplies rows of f32, `dim` floats each, by a factor of their own.
  func scaleRows(_ rows: UnsafeMutablePointer<Float>, dim: Int, factors: UnsafePointer<Float>, count: Int)
}

extension ComputeBackend {
  package func append(
    keys: borrowing TensorView, to keyTargets: [WriteTarget], values: borrowing TensorView,
    to valueTargets: [WriteTarget]
  ) throws(KVError) -> AppendFault? {
    if let place = firstNonfinite(keys) { return AppendFault(isKey: true, isFinite: false, place: place) }
    if let place = firstNonfinite(values) { return AppendFault(isKey: false, isFinite: false, place: place) }
    if let place = write(keys, to: keyTargets) { return AppendFault(isKey: true, isFinite: true, place: place) }
    if let place = write(values, to: valueTargets) { return AppendFault(isKey: false, isFinite: true, place: place) }
    return nil
  }

  /// The smallest and the largest value of every channel of some rows; infinities where there are none.
  func channelRange(
    _ sources: [RunSlice], map: UnsafePointer<MapDescriptor>? = nil, dim: Int
  ) -> (low: [Float], high: [Float]) {
    var low = [Float](repeating: .infinity, count: dim)
    var high = [Float](repeating: -.infinity, count: dim)
    sources.withUnsafeBufferPointer { sources in
      low.withUnsafeMutableBufferPointer { low in
        high.withUnsafeMutableBufferPointer { high in
          guard let low = low.baseAddress, let high = high.baseAddress else { return }
          channelRange(sources, map: map, low: low, high: high)
        }
      }
    }
    return (low, high)
  }

  package var keepsPlans: Bool { false }
  package var checksAttention: Bool { false }
  package func attendFinite(_ plan: AttentionPlan) throws(KVError) -> AttentionFault? {
    try attend(plan)
    return nil
  }

  package func require(_ observer: any AttentionObserver) throws(KVError) {}
  package var movesOverlappingRows: Bool { true }
  package var hasWindowStatistics: Bool { true }

  package func selectsRows(of scores: Int) -> Bool { false }
  package func selectLargest(_ choices: [RowChoice]) -> [UInt32]? { nil }
  package func selectByWindow(_ request: WindowScoreRequest, _ choice: WindowChoice) -> ChosenRows? { nil }

  package var turnsKeys: Bool { false }

  package func turn(_ turns: [KeyTurn], rotary: RotaryEmbedding, limit: Float, writes: Bool) -> Int? {
    preconditionFailure("\(name) does not turn keys")
  }

  package var linearAlgebra: String { "none" }

  package var holdsLatents: Bool { false }

  package func factor(
    _ matrices: [RowMatrix], ranks: [Int], options: FactorOptions
  ) throws(KVError) -> [Factors] {
    throw KVError(.unsupported, "\(name) does not factor rows")
  }

  package func project(_ projections: [Projection]) throws(KVError) -> [ProjectionResult] {
    preconditionFailure("\(name) holds no latents")
  }

  package func restore(
    _ latents: [RunSlice], basis: RowRun, mean: UnsafePointer<Float>?, positions: [Int32]?,
    rotary: RotaryEmbedding?, into destination: UnsafeMutablePointer<Float>
  ) {
    preconditionFailure("\(name) holds no latents")
  }

  package func restore(
    _ rows: [RunSlice], channels: Range<Int>, positions: [Int32], rotary: RotaryEmbedding,
    into destination: UnsafeMutablePointer<Float>
  ) {
    preconditionFailure("\(name) holds no keys side by side")
  }

  package var holdsDirections: Bool { false }

  package func shareDirections(_ request: DirectionRequest, into angles: UnsafeMutablePointer<Float>) {
    preconditionFailure("\(name) holds no directions")
  }

  package func scaleRows(_ rows: UnsafeMutablePointer<Float>, dim: Int, factors: UnsafePointer<Float>, count: Int) {
    preconditionFailure("\(name) holds no directions")
  }
}

extension ComputeBackend {
  package func require(_ format: SideFormat) throws(KVError) {}

  func transcode(_ sources: [RunSlice], to target: RowRun, row: Int) {
    sources.withUnsafeBufferPointer { transcode($0, to: target, row: row) }
  }
}

/// Magnitudes that a side format can hold.
package enum ElementRange: Hashable, Sendable {
  /// What is finite in the type of the dense rows.
  case window
  /// What rounds to a finite f16: rows or minima are f16.
  case half
  /// Half of what f32 holds: a group's range, the difference of two values, must be finite too.
  case halfOfFloat
  /// At most that: rows grow before they are encoded.
  case magnitude(Float)

  /// For error texts.
  package var largest: Float {
    switch self {
    case .window: .greatestFiniteMagnitude
    case .half: 65504
    case .halfOfFloat: .greatestFiniteMagnitude / 2
    case .magnitude(let limit): limit
    }
  }
}

/// Where an element of a [head, token, dim] tensor is.
package struct ElementPlace: Hashable, Sendable {
  package var head: Int
  package var token: Int
  package var channel: Int

  package init(head: Int, token: Int, channel: Int) {
    self.head = head
    self.token = token
    self.channel = channel
  }
}

/// Why rows cannot be appended.
package struct AppendFault: Hashable, Sendable {
  package var isKey: Bool
  /// A finite element beyond what holds it; else NaN or infinite.
  package var isFinite: Bool
  package var place: ElementPlace

  package init(isKey: Bool, isFinite: Bool, place: ElementPlace) {
    self.isKey = isKey
    self.isFinite = isFinite
    self.place = place
  }
}

/// What of an attention call is NaN or infinite.
package struct AttentionFault: Hashable, Sendable {
  /// Of the plan.
  package var sequence: Int
  /// An element of a query; else of an output.
  package var isQuery: Bool
  /// In its sequence, heads being query heads.
  package var place: ElementPlace

  package init(sequence: Int, isQuery: Bool, place: ElementPlace) {
    self.sequence = sequence
    self.isQuery = isQuery
    self.place = place
  }
}

package struct WriteTarget {
  package var head: Int
  package var token: Int
  package var slice: RunSlice
  /// What these rows will be held in, later forms included: elements beyond its range are refused at once.
  package var range: ElementRange

  package init(head: Int, token: Int, slice: RunSlice, range: ElementRange) {
    self.head = head
    self.token = token
    self.slice = slice
    self.range = range
  }
}
