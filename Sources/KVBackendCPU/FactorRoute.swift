package import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// How a matrix is factored, by its shape: the same wherever that is done.
package enum FactorRoute: Sendable {
  case gramOfRows, gramOfColumns, randomised

  package init(height: Int, width: Int, rank: Int, _ algorithm: FactorOptions.Algorithm) {
    let byRows = height < width && height <= 1024
    self =
      switch algorithm {
      case .gram: byRows ? .gramOfRows : .gramOfColumns
      case .randomised: .randomised
      case .automatic: byRows ? .gramOfRows : width <= 1024 || rank * 4 > width ? .gramOfColumns : .randomised
      }
  }

  /// Rows read at a time: eight megabytes of f32, but no more than a sixteenth of all where those are many.
  package static func blockRows(height: Int, width: Int) -> Int {
    max(256, min(2048, (2 << 20) / max(width, 1), height / 16))
  }
}

/// Sizes and random numbers of the range finder.
package struct RangeFinder: Sendable {
  /// Directions it works with, and rows of its sketch.
  package let vectors: Int
  package let sketchRows: Int
  private let seed: UInt64

  package init(height: Int, width: Int, rank: Int, _ options: FactorOptions) {
    vectors = min(rank + (options.oversampling ?? max(8, rank / 2)), width, height)
    sketchRows = min(height, max(4 * vectors, 64))
    seed = options.seed
  }

  /// The row of the sketch that a row is added to, and its sign.
  package func place(row: Int) -> (row: Int, sign: Float) {
    let hash = RangeFinder.mix(seed &+ UInt64(row) &* 0x9E37_79B9_7F4A_7C15)
    return (Int(hash % UInt64(sketchRows)), hash >> 63 == 0 ? 1 : -1)
  }

  /// Numbers of the standard normal distribution.
  package func normals(_ count: Int) -> [Float] {
    var state = seed
    func uniform() -> Double {
      state &+= 0x9E37_79B9_7F4A_7C15
      return (Double(RangeFinder.mix(state) >> 11) + 0.5) * 0x1p-53
    }
    return (0..<count).map { _ in Float((-2 * log(uniform())).squareRoot() * cos(2 * Double.pi * uniform())) }
  }

  private static func mix(_ value: UInt64) -> UInt64 {
    var z = value
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}

extension Factors {
  /// `squares`: of all singular values, largest first; rounding may have left some below 0.
  package init(rank: Int, width: Int, basis: [Float], mean: [Float], squares: [Double]) {
    self.init(
      rank: rank, width: width, basis: basis, mean: mean,
      singularValues: squares[..<rank].map { max($0, 0).squareRoot() }, energy: squares.reduce(0) { $0 + max($1, 0) })
  }

  /// Makes the largest entry of every row positive.
  package mutating func fixSigns() {
    let (rank, width) = (rank, width)
    basis.withUnsafeMutableBufferPointer { basis in
      for i in 0..<rank {
        var largest = i * width
        for c in i * width..<(i + 1) * width where abs(basis[c]) > abs(basis[largest]) { largest = c }
        if basis[largest] < 0 { for c in i * width..<(i + 1) * width { basis[c] = -basis[c] } }
      }
    }
  }
}
