internal import KVBackendCPU

/// Sums over rows: of the rows less a fixed row, and of their products. In f64; the fixed row keeps a large mean from
/// eating the digits of a small variance.
struct Moments {
  let width: Int
  private(set) var count = 0
  private(set) var shift: [Float]
  private var sum: [Double]
  /// The upper triangle.
  private var gram: [Double]

  /// - Parameter shift: nil: the mean of the first rows.
  init(width: Int, shift: [Float]? = nil) {
    self.width = width
    self.shift = shift ?? []
    sum = Array(repeating: 0, count: width)
    gram = Array(repeating: 0, count: width * width)
  }

  /// - Parameter rows: [count][stride], the first `width` of each.
  mutating func add(_ rows: UnsafePointer<Float>, count added: Int, stride: Int) {
    if shift.isEmpty {
      var mean = [Double](repeating: 0, count: width)
      for row in 0..<added { for c in 0..<width { mean[c] += Double(rows[row * stride + c]) } }
      shift = mean.map { Float($0 / Double(max(added, 1))) }
    }
    let block = 1024
    for first in Swift.stride(from: 0, to: added, by: block) {
      let rowCount = min(block, added - first)
      var wide = [Double](repeating: 0, count: rowCount * width)
      for row in 0..<rowCount {
        let source = rows + (first + row) * stride
        for c in 0..<width {
          let value = Double(source[c]) - Double(shift[c])
          wide[row * width + c] = value
          sum[c] += value
        }
      }
      LinearAlgebra.addGram(wide, rows: rowCount, columns: width, to: &gram)
    }
    count += added
  }

  /// The mean of the rows.
  var mean: [Float] { (0..<width).map { Float(Double(shift[$0]) + sum[$0] / Double(max(count, 1))) } }

  /// E[(x - shift)(x - shift)ᵀ], or about the mean.
  func secondMoments(centred: Bool) -> [Double] {
    let n = Double(max(count, 1))
    var result = [Double](repeating: 0, count: width * width)
    for i in 0..<width {
      for j in i..<width {
        let value = gram[i * width + j] / n - (centred ? sum[i] / n * (sum[j] / n) : 0)
        result[i * width + j] = value
        result[j * width + i] = value
      }
    }
    return result
  }
}
