internal import KVCore
internal import KVTensorFiles

/// Bases of a calibration, for the stores that are made of them.
struct CalibratedBases {
  typealias Layers = [Int: (keys: CalibratedBasis?, values: CalibratedBasis?)]

  let calibration: Calibration

  /// Layers that have bases of both sides.
  ///
  /// - Throws: `missingInput` when there is none, or a layer has one side only.
  func layers() throws(KVError) -> [Int] {
    let keys = calibration.layers(with: "basis", of: .keys)
    let values = calibration.layers(with: "basis", of: .values)
    guard !keys.isEmpty else {
      throw KVError(
        .missingInput, "a calibration with a basis of every layer's keys and values expected; this one has none")
    }
    guard keys == values else {
      let alone = Set(keys).symmetricDifference(values).min()
      throw KVError(.missingInput, "a calibration with bases of keys and values expected; one is missing", layer: alone)
    }
    return keys
  }

  /// The shape of a basis: units, rank, width.
  func shape(_ side: Calibration.Side, layer: Int) throws(KVError) -> [Int] {
    try calibration.numbers("basis", of: side, layer: layer, shape: [nil, nil, nil]).shape
  }

  /// The first `ranks[unit]` rows of each unit's basis, with encoder and mean where there are such.
  ///
  /// - Throws: `invalidOption` for rows that are not orthonormal and have no encoder, `shapeMismatch` for tensors of
  ///   other shapes.
  func basis(_ side: Calibration.Side, layer: Int, ranks: [Int]) throws(KVError) -> CalibratedBasis {
    let shape = try shape(side, layer: layer)
    let (units, rows, width) = (shape[0], shape[1], shape[2])
    precondition(ranks.count == units, "\(ranks.count) ranks for \(units) units")
    let decoders = try elements("basis", side, layer, [units, rows, width])
    var result = CalibratedBasis(decoders: Self.cut(decoders, rows: rows, width: width, ranks: ranks))
    if calibration.tensor("encoder", of: side, layer: layer) != nil {
      let encoders = try elements("encoder", side, layer, [units, rows, width])
      guard ranks.allSatisfy({ $0 == rows }) else {
        throw KVError(
          .invalidOption,
          "factors with an encoder of their own are used whole: \(rows) channels of \(side.rawValue) expected; got "
            + "\(ranks.first { $0 != rows } ?? rows)", layer: layer)
      }
      result.encoders = Self.cut(encoders, rows: rows, width: width, ranks: ranks)
    } else {
      for (unit, rows) in result.decoders.enumerated() {
        try Self.requireOrthonormal(rows, width: width, "\(side.rawValue) of unit \(unit)", layer: layer)
      }
    }
    if calibration.tensor("mean", of: side, layer: layer) != nil {
      let means = try elements("mean", side, layer, [units, width])
      result.means = (0..<units).map { Array(means[$0 * width..<($0 + 1) * width]) }
    }
    return result
  }

  func elements(
    _ quantity: String, _ side: Calibration.Side, _ layer: Int, _ shape: [Int]
  ) throws(KVError) -> [Float] {
    guard case .numbers(let values) = try calibration.numbers(quantity, of: side, layer: layer, shape: shape).elements
    else { return [] }
    return values
  }

  /// A row that is a sum of basis rows must come back from its products with them. A sum with weights without a pattern
  /// tells, in O(rank · width), where a rounded basis (of bf16, say) is still one.
  private static func requireOrthonormal(
    _ rows: [Float], width: Int, _ place: String, layer: Int
  ) throws(KVError) {
    let rank = rows.count / max(width, 1)
    var sum = [Double](repeating: 0, count: width)
    // Multiples of the golden ratio are spread evenly over 0...1 and repeat nowhere.
    let weights = (0..<rank).map { row in
      let multiple = Double(row + 1) * 0.618_033_988_749_895
      return multiple - multiple.rounded(.down) - 0.5
    }
    for row in 0..<rank {
      for c in 0..<width { sum[c] += weights[row] * Double(rows[row * width + c]) }
    }
    var (off, all) = (0.0, 0.0)
    for row in 0..<rank {
      var product = 0.0
      for c in 0..<width { product += sum[c] * Double(rows[row * width + c]) }
      off += (product - weights[row]) * (product - weights[row])
      all += weights[row] * weights[row]
    }
    guard (off / max(all, .leastNormalMagnitude)).squareRoot() <= 0.02 else {
      throw KVError(
        .invalidOption,
        "\(rank) orthonormal rows, or an encoder beside them, expected as the basis of \(place); a sum of these comes "
          + "back from its products with them off by \((100 * (off / all).squareRoot()).rounded()) %", layer: layer)
    }
  }

  private static func cut(_ rows: [Float], rows count: Int, width: Int, ranks: [Int]) -> [[Float]] {
    ranks.indices.map { unit in
      Array(rows[unit * count * width..<(unit * count + ranks[unit]) * width])
    }
  }
}
