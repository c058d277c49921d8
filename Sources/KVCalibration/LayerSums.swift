internal import KVBackendCPU
internal import KVCore

/// What is kept of a layer's samples.
struct LayerSums {
  private typealias Named = (Calibration.Side, String, Calibration.Tensor)

  let shape: LayerShape
  var tokens = 0
  /// Per KV head, and how many query rows each has.
  var queryEnergy: [Double]
  var queries = 0
  /// Sums of |x| of the projections' inputs.
  var inputs: [Double] = []
  var inputRows = 0

  private var moments: [Calibration.Side: [Moments]] = [:]
  private var projections: [Calibration.Side: (weight: [Float], bias: [Float]?)] = [:]
  private var absolute: [Double] = []
  private var signed: [Double] = []
  private let kind: CalibrationMethod.Kind

  init(_ method: CalibrationMethod, _ shape: LayerShape) {
    self.shape = shape
    kind = method.kind
    queryEnergy = Array(repeating: 0, count: shape.kvHeads)
    if case .order = kind {
      absolute = Array(repeating: 0, count: shape.kvHeads * shape.keyDim)
      signed = absolute
      return
    }
    for side in Calibration.Side.allCases { moments[side] = fresh(side, bias: nil) }
  }

  private func dim(_ side: Calibration.Side) -> Int { side == .keys ? shape.keyDim : shape.valueDim }

  private func fresh(_ side: Calibration.Side, bias: [Float]?) -> [Moments] {
    if case .shrunk = kind {
      let width = shape.kvHeads * dim(side)
      return [Moments(width: width, shift: bias ?? Array(repeating: 0, count: width))]
    }
    return (0..<shape.kvHeads).map { _ in Moments(width: dim(side)) }
  }

  mutating func set(_ side: Calibration.Side, weight: [Float], bias: [Float]?) {
    projections[side] = (weight, bias)
    if let bias, case .shrunk = kind { moments[side] = fresh(side, bias: bias) }
  }

  /// Rows [head][token][dim].
  mutating func add(_ side: Calibration.Side, _ rows: [Float], tokens: Int) {
    let dim = dim(side)
    let heads = shape.kvHeads
    switch kind {
    case .order(_, let rotated, _): addChannels(rows, tokens: tokens, rotatedHeads: rotated)
    case .shrunk:
      let merged = merged(rows, tokens: tokens, dim: dim)
      merged.withUnsafeBufferPointer {
        if let base = $0.baseAddress { moments[side]?[0].add(base, count: tokens, stride: heads * dim) }
      }
    case .principal:
      rows.withUnsafeBufferPointer {
        guard let base = $0.baseAddress else { return }
        for head in 0..<heads { moments[side]?[head].add(base + head * tokens * dim, count: tokens, stride: dim) }
      }
    }
  }

  /// [token][head · dim].
  private func merged(_ rows: [Float], tokens: Int, dim: Int) -> [Float] {
    let width = shape.kvHeads * dim
    return [Float](unsafeUninitializedCapacity: tokens * width) { buffer, filled in
      for head in 0..<shape.kvHeads {
        for token in 0..<tokens {
          let source = (head * tokens + token) * dim
          for c in 0..<dim { buffer[token * width + head * dim + c] = rows[source + c] }
        }
      }
      filled = tokens * width
    }
  }

  private mutating func addChannels(_ rows: [Float], tokens: Int, rotatedHeads: Int) {
    let dim = shape.keyDim
    let width = shape.kvHeads * dim
    var merged = merged(rows, tokens: tokens, dim: dim)
    // As many as a power of two divides the heads into.
    var heads = 1
    while 2 * heads <= rotatedHeads, shape.kvHeads % (2 * heads) == 0 { heads *= 2 }
    for token in 0..<tokens {
      if rotatedHeads > 0 {
        for first in stride(from: 0, to: width, by: heads * dim) {
          Self.hadamard(&merged, token * width + first, count: heads * dim)
        }
      }
      for c in 0..<width {
        let value = Double(merged[token * width + c])
        absolute[c] += abs(value)
        signed[c] += value
      }
    }
  }

  /// Orthonormal, in blocks of the largest power of two that divides the count.
  private static func hadamard(_ x: inout [Float], _ start: Int, count: Int) {
    let block = count & -count
    let factor = 1 / Float(block).squareRoot()
    for first in stride(from: start, to: start + count, by: block) {
      var half = 1
      while half < block {
        for base in stride(from: first, to: first + block, by: 2 * half) {
          for i in base..<base + half {
            let (a, b) = (x[i], x[i + half])
            x[i] = a + b
            x[i + half] = a - b
          }
        }
        half *= 2
      }
      for i in first..<first + block { x[i] *= factor }
    }
  }

  // MARK: Results

  func tensors(_ method: CalibrationMethod) throws(KVError) -> [(Calibration.Side, String, Calibration.Tensor)] {
    switch kind {
    case .order(let statistic, _, let perHead): return orders(statistic, perHead: perHead)
    case .principal(let centred): return try principal(centred: centred)
    case .shrunk(let start, let keys, let values, let refit):
      return try shrunk(.keys, start, share: refit ? keys : nil)
        + shrunk(.values, start, share: refit ? values : nil)
    }
  }

  private func orders(_ statistic: ChannelStatistic, perHead: Bool) -> [Named] {
    let width = perHead ? shape.keyDim : shape.kvHeads * shape.keyDim
    let units = absolute.count / width
    let values = statistic == .magnitude ? absolute : signed
    var order: [Int32] = []
    for unit in 0..<units {
      order += (0..<width).sorted {
        let (a, b) = (values[unit * width + $0], values[unit * width + $1])
        return a != b ? a < b : $0 < $1
      }.map { Int32($0) }
    }
    let magnitudes = absolute.map { Float($0 / Double(max(tokens, 1))) }
    return [
      (.keys, "order", .init(shape: [units, width], integers: order)),
      (.keys, "magnitude", .init(shape: [units, width], numbers: magnitudes)),
    ]
  }

  private func principal(centred: Bool) throws(KVError) -> [Named] {
    var result: [Named] = []
    for side in Calibration.Side.allCases {
      let dim = dim(side)
      var basis: [Float] = []
      var variance: [Float] = []
      var mean: [Float] = []
      for own in moments[side] ?? [] {
        // Not centred: about zero, whatever the rows were shifted by.
        let matrix = centred ? own.secondMoments(centred: true) : Self.aboutZero(own)
        let (values, vectors) = try LinearAlgebra.symmetricEigen(matrix, size: dim)
        basis += vectors.map(Float.init)
        variance += values.map { Float(max($0, 0)) }
        mean += own.mean
      }
      result.append((side, "basis", .init(shape: [shape.kvHeads, dim, dim], numbers: basis)))
      result.append((side, "variance", .init(shape: [shape.kvHeads, dim], numbers: variance)))
      if centred { result.append((side, "mean", .init(shape: [shape.kvHeads, dim], numbers: mean))) }
    }
    if queries > 0 {
      let weights = queryEnergy.map { Float($0 / Double(queries)) }
      result.append((.keys, "weight", .init(shape: [shape.kvHeads], numbers: weights)))
    }
    return result
  }

  private static func aboutZero(_ moments: Moments) -> [Double] {
    var matrix = moments.secondMoments(centred: true)
    let mean = moments.mean.map(Double.init)
    for i in 0..<moments.width { for j in 0..<moments.width { matrix[i * moments.width + j] += mean[i] * mean[j] } }
    return matrix
  }

  private func shrunk(_ side: Calibration.Side, _ start: FactorStart, share: Double?) throws(KVError) -> [Named] {
    guard let own = moments[side]?.first else { return [] }
    let width = own.width
    let samples = own.secondMoments(centred: false)
    let (_, vectors) = try LinearAlgebra.symmetricEigen(
      start == .samples ? samples : weightMoments(side, scaled: start == .scaledWeights), size: width)
    var result: [Named] = []
    if let share {
      // As CSKV counts: the share of a head, rounded down, times the heads.
      let rank = max(1, Int(share * Double(dim(side)))) * shape.kvHeads
      let encoder = Array(vectors[..<(rank * width)])
      let basis = try Self.leastSquares(encoder, rank: rank, samples, width: width)
      result.append((side, "encoder", .init(shape: [1, rank, width], numbers: encoder.map(Float.init))))
      result.append((side, "basis", .init(shape: [1, rank, width], numbers: basis.map(Float.init))))
    } else {
      result.append((side, "basis", .init(shape: [1, width, width], numbers: vectors.map(Float.init))))
    }
    if projections[side]?.bias != nil {
      result.append((side, "mean", .init(shape: [1, width], numbers: own.shift)))
    }
    return result
  }

  /// WᵀS²W, S the size of the inputs or one.
  private func weightMoments(_ side: Calibration.Side, scaled: Bool) throws(KVError) -> [Double] {
    guard let weight = projections[side]?.weight else {
      throw KVError(.missingInput, "factors that start with weights need the projection of the \(side.rawValue)")
    }
    let width = shape.kvHeads * dim(side)
    let count = weight.count / width
    var factors = [Float](repeating: 1, count: count)
    if scaled {
      guard inputs.count == count, inputRows > 0 else {
        throw KVError(
          .missingInput, "factors of scaled weights need the projections' inputs, rows of \(count) numbers")
      }
      factors = inputs.map { Float(($0 / Double(inputRows) + 1e-6).squareRoot()) }
    }
    // One row per input.
    let rows = [Float](unsafeUninitializedCapacity: weight.count) { buffer, filled in
      for o in 0..<width { for i in 0..<count { buffer[i * width + o] = weight[o * count + i] * factors[i] } }
      filled = weight.count
    }
    return LinearAlgebra.gram(rows, rows: count, columns: width)
  }

  /// The rows B that make encoder·x into x with the least mean square error: (E G Eᵀ)⁻¹ E G.
  private static func leastSquares(
    _ encoder: [Double], rank: Int, _ moments: [Double], width: Int
  ) throws(KVError) -> [Double] {
    let seen = LinearAlgebra.product64(encoder, moments, rows: rank, columns: width, width: width)
    let inner = LinearAlgebra.product64(seen, encoder, rows: rank, columns: width, width: rank, transposed: true)
    let (values, vectors) = try LinearAlgebra.symmetricEigen(inner, size: rank)
    // Directions the samples never took stay as the encoder has them: 0.
    var scaled = vectors
    for i in 0..<rank {
      let factor = values[i] > 1e-12 * max(values[0], 0) && values[i] > 0 ? 1 / values[i] : 0
      for c in 0..<rank { scaled[i * rank + c] *= factor }
    }
    let projected = LinearAlgebra.product64(vectors, seen, rows: rank, columns: rank, width: width)
    var inverse = [Double](repeating: 0, count: rank * rank)
    for i in 0..<rank { for c in 0..<rank { inverse[c * rank + i] = scaled[i * rank + c] } }
    return LinearAlgebra.product64(inverse, projected, rows: rank, columns: rank, width: width)
  }
}
