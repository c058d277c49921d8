/// What two rows can be measured by.
package enum RowMeasure: UInt32, Sendable {
  case dot = 0
  /// In -1...1; rows shorter than 1e-6 count as that long, so a zero row has cosine 0.
  case cosine = 1
  case squaredDistance = 2
  case squaredSum = 3
}

/// A measure of pairs of rows of one table.
package struct RowComparison {
  /// The rows, one after another: indices below count through them.
  package var rows: [RunSlice]
  package var dim: Int
  package var first: [UInt32]
  package var second: [UInt32]
  package var measure: RowMeasure

  package init(rows: [RunSlice], dim: Int, first: [UInt32], second: [UInt32], measure: RowMeasure) {
    self.rows = rows
    self.dim = dim
    self.first = first
    self.second = second
    self.measure = measure
  }
}

/// Rows to find partners for, and the rows they are found among.
package struct NearestRequest {
  package var sources: [RunSlice]
  package var targets: [RunSlice]
  package var dim: Int

  package init(sources: [RunSlice], targets: [RunSlice], dim: Int) {
    self.sources = sources
    self.targets = targets
    self.dim = dim
  }
}

/// The partner of every source, and how alike they are.
package struct NearestRows {
  package var targets: [Int] = []
  package var cosines: [Float] = []

  package init() {}

  package mutating func reset(count: Int) {
    targets = Array(repeating: 0, count: count)
    cosines = Array(repeating: 0, count: count)
  }
}

/// Weighted sums of rows of one table: sum j is over `index[starts[j] ..< starts[j + 1]]`, in that order, in f32, then
/// divided by `divisors[j]`.
package struct RowMix {
  package var rows: [RunSlice] = []
  package var dim: Int
  package var starts: [UInt32] = [0]
  package var index: [UInt32] = []
  package var weights: [Float] = []
  package var divisors: [Float] = []
  /// Rows of the table that are turned from one position to another first.
  package var turns: [(row: Int, from: Int, to: Int)] = []
  package var rotary: RotaryEmbedding?
  /// What will hold the sums.
  package var type: ElementType
  package var range: ElementRange

  package init(dim: Int, type: ElementType, range: ElementRange) {
    self.dim = dim
    self.type = type
    self.range = range
  }

  package var count: Int { divisors.count }
}

/// A number for every row: of the row alone, or of its products with other vectors.
package struct RowScan {
  package enum Quantity {
    /// Sum of squares of the channels.
    case squares
    /// Sum of their magnitudes.
    case absolutes
    /// Standard deviation over the channels of (x - low) · inverse, both of `dim` numbers.
    case spread(low: [Float], inverse: [Float])
    /// Products with `count` vectors, `stride` floats apart from `offset` on: their sum, the sum of their squares or of
    /// their magnitudes.
    case products(with: [Float], offset: Int, stride: Int, count: Int, fold: Fold)
  }

  package enum Fold: UInt32 { case squares = 0, absolutes = 1, plain = 3 }

  package var rows: [RunSlice]
  package var dim: Int
  package var quantity: Quantity

  package init(rows: [RunSlice], dim: Int, quantity: Quantity) {
    self.rows = rows
    self.dim = dim
    self.quantity = quantity
  }

  package var count: Int { rows.reduce(0) { $0 + $1.count } }
}

/// Pairs of rows of two layers that are to share a direction: the unit row between their directions, both lengths, and
/// how far they are apart.
package struct DirectionRequest {
  /// Rows of the lower and of the upper layer, as many of each.
  package var lower: [RunSlice]
  package var upper: [RunSlice]
  package var dim: Int
  /// Where between the two: 0 the direction of the lower row, 1 of the upper.
  package var weight: Double
  /// The largest length that can be held.
  package var largest: Float
  /// Dense rows for the results, lengths with one channel each; empty where only angles are wanted.
  package var directions: [RunSlice] = []
  package var lowerLengths: [RunSlice] = []
  package var upperLengths: [RunSlice] = []

  package init(lower: [RunSlice], upper: [RunSlice], dim: Int, weight: Double, largest: Float) {
    self.lower = lower
    self.upper = upper
    self.dim = dim
    self.weight = weight
    self.largest = largest
  }

  package var count: Int { lower.reduce(0) { $0 + $1.count } }
}

/// Keys that move by some positions.
package struct KeyTurn {
  /// Dense rows.
  package var slice: RunSlice
  /// Positions by which they become later.
  package var by: Int

  package init(slice: RunSlice, by: Int) {
    self.slice = slice
    self.by = by
  }
}

/// Scores of one head, of which some rows are chosen.
package struct RowChoice {
  package var scores: UnsafePointer<Float>
  package var count: Int
  /// 1...count.
  package var take: Int
  /// Is added to the rows that are chosen.
  package var offset: Int

  package init(scores: UnsafePointer<Float>, count: Int, take: Int, offset: Int) {
    self.scores = scores
    self.count = count
    self.take = take
    self.offset = offset
  }
}

/// How rows are chosen by the statistics of a window: pooled over neighbours, then the largest of each head.
package struct WindowChoice {
  package var kernel: Int
  package var pooling: Pooling
  /// Of each head: rows before the window, which are pooled; those after score 0.
  package var past: [Int]
  /// Of each head: the rows that are chosen from, and how many.
  package var candidates: [Range<Int>]
  package var take: [Int]
}

/// What was chosen, head after head, ascending; or the first score that is NaN.
package struct ChosenRows {
  package var rows: [UInt32]
  package var nan: (head: Int, row: Int)?

  package init(rows: [UInt32], nan: (head: Int, row: Int)? = nil) {
    self.rows = rows
    self.nan = nan
  }
}
