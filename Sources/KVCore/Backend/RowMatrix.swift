/// Cached rows seen as a matrix, one row per token: what a backend factors and projects.
///
/// ```
///          ┌ column block ┬ column block ┬ …     a block is one side of one KV head
/// leading  │ f32 rows that stand before   │      of a refresh: the old basis, weighted
/// row 0    │ slices …     │ slices …      │
/// ```
/// Nothing is copied: a backend reads a block of rows at a time, as f32.
package struct RowMatrix {
  package struct Columns {
    /// The rows, in order. May be fewer than the matrix has: the rest are zeros.
    package var slices: [RunSlice]
    package var dim: Int
    /// Positions of the rows; nil: `firstPosition` and those after.
    package var positions: [Int32]?
    package var firstPosition: Int
    /// Turned back by the row's position when read. Nil: as cached.
    package var rotary: RotaryEmbedding?
    /// Multiplied into every element when read.
    package var scale: Float = 1

    package init(
      slices: [RunSlice], dim: Int, positions: [Int32]? = nil, firstPosition: Int = 0, rotary: RotaryEmbedding? = nil,
      scale: Float = 1
    ) {
      self.slices = slices
      self.dim = dim
      self.positions = positions
      self.firstPosition = firstPosition
      self.rotary = rotary
      self.scale = scale
    }
  }

  package var rows: Int
  package var columns: [Columns]
  /// [leadingRows][width].
  package var leading: [Float] = []

  package init(rows: Int, columns: [Columns], leading: [Float] = []) {
    self.rows = rows
    self.columns = columns
    self.leading = leading
  }

  package var width: Int { columns.reduce(0) { $0 + $1.dim } }
  package var leadingRows: Int { width == 0 ? 0 : leading.count / width }
  /// Leading rows and those of the columns.
  package var height: Int { leadingRows + rows }
}

/// How a backend factors a matrix.
package struct FactorOptions: Sendable {
  package enum Algorithm: String, Sendable, Hashable {
    /// By shape: the Gram matrix of the narrower side, randomised where that is too large.
    case automatic
    /// Eigenvectors of the Gram matrix of the columns, or of the rows where those are fewer.
    case gram
    /// Range finder: a sketch, power iterations on it, `passes` passes over the matrix.
    case randomised
  }

  package var algorithm = Algorithm.automatic
  /// Columns of the range finder beyond the rank; nil: half of it, at least 8, which brings slow spectra within 1 % of
  /// the best error in one pass.
  package var oversampling: Int?
  /// Multiplications by the Gram matrix of all rows in the range finder.
  package var passes = 1
  package var seed: UInt64 = 0
  /// Subtracts the mean of the rows first.
  package var centred = false
  /// Told the share of the work that is done, from the calling thread.
  package var progress: (@Sendable (Double) -> Void)?

  package init() {}
}

/// The best rows found to describe a matrix: x ≈ mean + ((x - mean)·basisᵀ)·basis.
package struct Factors: Sendable {
  package var rank: Int
  package var width: Int
  /// [rank][width], orthonormal rows, largest singular value first; the largest entry of each is positive. Where the
  /// matrix has fewer directions than `rank` the last rows are orthonormal to the others or zero.
  package var basis: [Float]
  /// [width]; empty when not centred.
  package var mean: [Float]
  /// Of the basis, estimated; [rank].
  package var singularValues: [Double]
  /// Sum of the squares of all elements, the mean subtracted.
  package var energy: Double

  package init(
    rank: Int, width: Int, basis: [Float], mean: [Float] = [], singularValues: [Double] = [], energy: Double = 0
  ) {
    self.rank = rank
    self.width = width
    self.basis = basis
    self.mean = mean
    self.singularValues = singularValues
    self.energy = energy
  }

  /// Norm of what the basis does not describe, over the norm of the matrix; 0 for a matrix of zeros.
  package var relativeError: Double {
    if energy <= 0 { return 0 }
    let kept = singularValues.reduce(0) { $0 + $1 * $1 }
    return (max(0, energy - kept) / energy).squareRoot()
  }
}

/// One product of rows with an encoder, on its way into a store.
package struct Projection {
  package var matrix: RowMatrix
  /// [rank][width]: the weights of each latent channel. Nil: the rows themselves are written.
  package var encoder: [Float]?
  /// [width], subtracted first; empty for none.
  package var mean: [Float]
  /// Dense rows of `rank` channels, as many as the matrix has.
  package var targets: [RunSlice]

  package init(matrix: RowMatrix, encoder: [Float]?, mean: [Float], targets: [RunSlice]) {
    self.matrix = matrix
    self.encoder = encoder
    self.mean = mean
    self.targets = targets
  }
}

/// What a projection measured.
package struct ProjectionResult: Sendable, Hashable {
  /// Largest magnitude of a latent, before it was rounded to its store.
  package var largest: Float = 0
  /// Sums of squares: of the rows, and of their latents. Their difference is the squared residual for an orthonormal
  /// basis.
  package var energy = 0.0
  package var kept = 0.0

  package init() {}
}

/// Rows of a basis that latents are multiplied by, as attention reads them.
package struct LowRankRows {
  /// `capacity` rows (the rank) of `dim` channels, dense. Nil: the slices hold the rows themselves.
  package var keyBasis: RowRun?
  package var valueBasis: RowRun?
  /// The slices of keys hold rows of several heads side by side, and these are the head's. No basis then.
  package var keyChannels: Range<Int>?
  /// Added to every restored row.
  package var keyMean: UnsafePointer<Float>?
  package var valueMean: UnsafePointer<Float>?
  /// Restored keys are turned by their position: the latents describe keys before the rotary embedding.
  package var rotary: RotaryEmbedding?

  package init(
    keyBasis: RowRun?, valueBasis: RowRun?, keyMean: UnsafePointer<Float>? = nil,
    valueMean: UnsafePointer<Float>? = nil, rotary: RotaryEmbedding? = nil
  ) {
    self.keyBasis = keyBasis
    self.valueBasis = valueBasis
    self.keyMean = keyMean
    self.valueMean = valueMean
    self.rotary = rotary
  }
}
