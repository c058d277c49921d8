internal import CKVCUDA
internal import KVCore

/// An attention plan as the kernels read it, in arrays that keep their capacity from call to call.
///
/// A turn is some tokens of one sequence: intermediate results stay small when a prompt is attended. The turns of all
/// sequences that can run at once are a wave: one launch of each kernel. Work is cut by the shapes of one sequence only:
/// the same bits come out alone or in a batch.
///
/// Addresses are those of the memory there is. Where it turns out too small the caller makes it larger and describes
/// again.
struct CUDADescriptions {
  /// Tokens of a turn when rows gather statistics (their logits are kept then), and when they do not.
  private static let scoredTokens = 64
  private static let plainTokens = 256
  /// The kernel that takes any rows, then those for dense rows and for codes of one length.
  static let attentionKernels: [CUDAKernel] = [
    .attend, .decodeHalf64, .decodeHalf128, .decodeBfloat64, .decodeBfloat128, .decodeCodes2, .decodeCodes4,
    .decodeCodes8,
  ]

  struct Wave {
    var phases = 0..<0
    /// Pieces from here on, and how many of them each kernel of `attentionKernels` takes, in their order.
    var firstPiece = 0
    var pieces = SIMD8<Int>()
    var restores = 0..<0
    var merges = 0..<0
    var statistics = 0..<0
    /// The most query rows of a turn, and the most rows of a statistic.
    var queryRows = 0
    var longestStatistic = 0
  }

  /// Keys that are turned to their positions after they are read: rows of f32 in device memory, before anything else.
  struct RestoredRows {
    /// Rows as they are encoded, and where they go as f32, `width` channels each; restored once for all that share them.
    var slices: Range<Int>
    var rows: Int
    var width: Int
    var table: UInt64
    var isFirst: Bool
    /// Rows behind a map each, in order.
    var maps: [(rows: Range<Int>, map: kv_map)]
    /// What latents are multiplied by; nil: the channels from `channel` on are the keys.
    var basis: kv_basis?
    var channel: Int
    var dim: Int
    var positions: UInt64
    var firstPosition: Int64
    var rotary: kv_rotary
    var target: UInt64
  }

  /// Rows that lie as directions with a length each: made into rows of f32 in device memory, before anything else.
  struct ScaledRows {
    var directions: Range<Int>
    var maps: [(rows: Range<Int>, map: kv_map)]
    var rows: Int
    var dim: Int
    var lengths: Range<Int>
    var target: UInt64
    /// Rows that take the place of some of them, and where those go as f32 first.
    var exact: Range<Int>
    var exactMaps: [(rows: Range<Int>, map: kv_map)]
    var exactRows: Int
    var exactTable: UInt64
    var slots: UInt64
    var offset: Int32
  }

  /// What the caller knows of memory: which addresses kernels can reach.
  struct Staging: Equatable {
    /// Queries of the sequence are copied behind the descriptions.
    var queries = false
    var output = false
    var scores = false
  }

  var slices: [kv_slice] = []
  var works: [kv_work] = []
  var sequences: [kv_sequence] = []
  var queries: [kv_queries] = []
  var phases: [kv_phase] = []
  var pieces: [kv_piece] = []
  var restores: [kv_restore] = []
  var merges: [kv_merge] = []
  var statistics: [kv_statistic] = []
  var partials: [UInt64] = []
  /// Maps, bases, rotary embeddings and their numbers; they lie behind the staged queries, before everything else.
  var tables = CUDATables()
  var waves: [Wave] = []
  var restored: [RestoredRows] = []
  var scaled: [ScaledRows] = []
  /// Floats of device memory: what all waves share, and the largest wave behind it.
  var sharedFloats = 0
  var floats = 0
  /// Bytes of queries that are copied with the descriptions, and where those of each sequence begin.
  var queryBytes = 0
  var stagedQueries: [Int] = []
  /// Where each sequence's staged output and log sums lie in the shared floats; -1: not staged.
  var outputs: [Int] = []
  var logSums: [Int] = []
  /// (work, float offset) of staged scores.
  var scores: [(work: Int, offset: Int)] = []
  /// The part of the shared floats that goes back to the host.
  var results = 0..<0

  /// Elements of queries and outputs of the sequences before each.
  var places: [(queries: Int, outputs: Int)] = []
  var staging: [Staging] = []
  var memory: UInt64 = 0
  var region: UInt64 = 0
  var ranges: [RowRange] = []
  /// Where the ranges of the last work item begin that may change with the next token.
  var walk = RangeWalk()
  /// The kernel of every piece of the wave that is being described, and room to sort them.
  var kernelOfPiece: [UInt8] = []
  private var sorted: [kv_piece] = []
  /// The first token of each sequence that is not described yet.
  private var first: [Int] = []
  /// Queries of the current head that were prepared: for the map, the basis and the shift of some rows.
  var prepared: [(map: UInt64, basis: UInt64, shift: Int, queries: Int)] = []
  var waveFloats = 0

  /// Whether the next token can be described by changing these: one token a sequence, over rows that are read as they lie.
  private(set) var isRepeatable = false
  /// What it takes to change them: by work item, and all their ranges of rows.
  var keptWorks: [KeptWork] = []
  var keptRanges: [KeptRange] = []
  /// Where the pieces went that were sorted by kernel; empty: nowhere.
  private(set) var placeOfPiece: [UInt32] = []

  private mutating func clear() {
    slices.removeAll(keepingCapacity: true)
    works.removeAll(keepingCapacity: true)
    sequences.removeAll(keepingCapacity: true)
    queries.removeAll(keepingCapacity: true)
    phases.removeAll(keepingCapacity: true)
    pieces.removeAll(keepingCapacity: true)
    restores.removeAll(keepingCapacity: true)
    merges.removeAll(keepingCapacity: true)
    statistics.removeAll(keepingCapacity: true)
    partials.removeAll(keepingCapacity: true)
    stagedQueries.removeAll(keepingCapacity: true)
    waves.removeAll(keepingCapacity: true)
    restored.removeAll(keepingCapacity: true)
    scaled.removeAll(keepingCapacity: true)
    outputs.removeAll(keepingCapacity: true)
    logSums.removeAll(keepingCapacity: true)
    scores.removeAll(keepingCapacity: true)
    places.removeAll(keepingCapacity: true)
    keptWorks.removeAll(keepingCapacity: true)
    keptRanges.removeAll(keepingCapacity: true)
    placeOfPiece.removeAll(keepingCapacity: true)
    queryBytes = 0
    sharedFloats = 0
    waveFloats = 0
    floats = 0
  }

  /// - Parameters:
  ///   - memory: the device memory that offsets of floats count in.
  ///   - region: the device memory these descriptions will be copied to.
  ///   - whole: one turn a sequence, whatever its length.
  mutating func describe(
    _ plan: AttentionPlan, staging: [Staging], memory: UnsafeMutableRawPointer, region: UnsafeMutableRawPointer,
    whole: Bool = false
  ) {
    clear()
    self.staging = staging
    self.memory = UInt64(UInt(bitPattern: memory))
    self.region = UInt64(UInt(bitPattern: region))
    var place = (queries: 0, outputs: 0)
    for index in plan.sequences.indices {
      stage(index, plan)
      places.append(place)
      let sequence = plan.sequences[index]
      place.queries += sequence.kvHeads * sequence.group * sequence.tokens * sequence.keyDim
      place.outputs += sequence.kvHeads * sequence.group * sequence.tokens * sequence.valueDim
    }
    results = 0..<sharedFloats
    tables.begin(at: self.region + UInt64(queryBytes))
    for index in plan.sequences.indices {
      for work in plan.sequences[index].work { addWork(work, of: index, plan) }
    }
    // The turns of a sequence add to the same statistics: only those of different sequences run at once.
    first.removeAll(keepingCapacity: true)
    first.append(contentsOf: repeatElement(0, count: plan.sequences.count))
    while true {
      waveFloats = sharedFloats
      let before = (phases.count, restores.count, merges.count, statistics.count)
      var wave = Wave()
      wave.firstPiece = pieces.count
      kernelOfPiece.removeAll(keepingCapacity: true)
      var any = false
      for index in plan.sequences.indices where first[index] < plan.sequences[index].tokens {
        let sequence = plan.sequences[index]
        let scored = sequence.work.contains { plan.rows[$0].score != nil }
        let most = whole ? sequence.tokens : scored ? CUDADescriptions.scoredTokens : CUDADescriptions.plainTokens
        let end = min(first[index] + most, sequence.tokens)
        addTurn(first[index]..<end, of: index, plan, to: &wave)
        first[index] = end
        any = true
      }
      if !any { break }
      floats = max(floats, waveFloats)
      wave.phases = before.0..<phases.count
      wave.restores = before.1..<restores.count
      wave.merges = before.2..<merges.count
      wave.statistics = before.3..<statistics.count
      sortPieces(of: &wave)
      waves.append(wave)
    }
    floats = max(floats, sharedFloats)
    isRepeatable =
      !whole && waves.count == 1 && phases.isEmpty && restores.isEmpty && restored.isEmpty && scaled.isEmpty
      && scores.isEmpty && tables.words.isEmpty
  }

  /// Pieces of each kernel together, in their order. Most waves have one kernel.
  private mutating func sortPieces(of wave: inout Wave) {
    var used = 0
    for kernel in kernelOfPiece { wave.pieces[Int(kernel)] += 1 }
    for kernel in CUDADescriptions.attentionKernels.indices where wave.pieces[kernel] > 0 { used += 1 }
    if used < 2 { return }
    sorted.removeAll(keepingCapacity: true)
    placeOfPiece.append(contentsOf: repeatElement(0, count: pieces.count - placeOfPiece.count))
    for kernel in CUDADescriptions.attentionKernels.indices where wave.pieces[kernel] > 0 {
      for (index, own) in kernelOfPiece.enumerated() where Int(own) == kernel {
        placeOfPiece[wave.firstPiece + index] = UInt32(wave.firstPiece + sorted.count)
        sorted.append(pieces[wave.firstPiece + index])
      }
    }
    pieces.replaceSubrange(wave.firstPiece..., with: sorted)
  }

  mutating func share(_ count: Int) -> Int {
    let offset = sharedFloats
    sharedFloats += (count + 63) / 64 * 64
    return offset
  }

  mutating func take(_ count: Int) -> Int {
    let offset = waveFloats
    waveFloats += (count + 63) / 64 * 64
    return offset
  }

  func address(_ offset: Int) -> UInt64 { memory + UInt64(offset * 4) }

  private mutating func stage(_ index: Int, _ plan: AttentionPlan) {
    let sequence = plan.sequences[index]
    let heads = sequence.kvHeads * sequence.group
    stagedQueries.append(staging[index].queries ? queryBytes : -1)
    if staging[index].queries {
      queryBytes += (heads * sequence.tokens * sequence.keyDim * sequence.queryType.byteCount + 255) / 256 * 256
    }
    outputs.append(staging[index].output ? share(heads * sequence.tokens * sequence.valueDim) : -1)
    logSums.append(sequence.logSumExp == nil ? -1 : share(heads * sequence.tokens))
    if !staging[index].scores { return }
    for work in sequence.work where plan.rows[work].score != nil && plan.rows[work].count > 0 {
      scores.append((work, share(plan.rows[work].count)))
    }
  }

  /// Elements of queries of the sequences before this one.
  func queryPlace(_ index: Int) -> UInt64 { UInt64(places[index].queries) }

  /// The element that a kernel put on record, counted through all sequences.
  func fault(_ place: UInt64, isQuery: Bool, _ plan: AttentionPlan) -> AttentionFault? {
    if place == .max { return nil }
    let place = Int(place)
    func first(_ index: Int) -> Int { isQuery ? places[index].queries : places[index].outputs }
    guard let index = places.indices.last(where: { first($0) <= place }) else { return nil }
    let sequence = plan.sequences[index]
    let dim = isQuery ? sequence.keyDim : sequence.valueDim
    let row = (place - first(index)) / dim
    return AttentionFault(
      sequence: index, isQuery: isQuery,
      place: ElementPlace(
        head: row / sequence.tokens, token: row % sequence.tokens, channel: (place - first(index)) % dim))
  }

  /// Windows: what of a statistic lies behind the descriptions.
  mutating func setWindow(_ index: Int, shares: UInt64, entropy: UInt64, variance: UInt64, past: Int) {
    statistics[index].shares = shares
    statistics[index].entropy = entropy
    statistics[index].variance = variance
    statistics[index].past = UInt32(past)
  }
}
