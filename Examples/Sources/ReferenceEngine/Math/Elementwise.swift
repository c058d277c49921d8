import Foundation

/// The operations of a transformer block that are not matrix products.
enum Elementwise {
  /// Root-mean-square normalisation of rows of `width` channels: y = x / rms(x) * weight. In place is allowed through
  /// ``normalize(rows:width:weight:epsilon:of:)``.
  static func rmsNorm(
    _ x: [Float], rows: Int, weight: [Float], epsilon: Float, into y: inout [Float]
  ) {
    let width = weight.count
    precondition(x.count >= rows * width && y.count >= rows * width, "\(x.count), \(y.count) for \(rows) rows")
    x.withUnsafeBufferPointer { x in
      y.withUnsafeMutableBufferPointer { y in
        weight.withUnsafeBufferPointer { weight in
          for row in 0..<rows {
            let start = row * width
            let scale = inverseRMS(UnsafeBufferPointer(rebasing: x[start..<start + width]), epsilon: epsilon)
            for i in 0..<width { y[start + i] = x[start + i] * scale * weight[i] }
          }
        }
      }
    }
  }

  /// The same in place; the heads of queries and keys in Qwen3 (rows = tokens * heads, width = headDim).
  static func normalize(rows: Int, weight: [Float], epsilon: Float, of x: inout [Float]) {
    let width = weight.count
    precondition(x.count >= rows * width, "\(x.count) for \(rows) rows")
    x.withUnsafeMutableBufferPointer { x in
      for row in 0..<rows {
        let start = row * width
        let scale = inverseRMS(UnsafeBufferPointer(rebasing: x[start..<start + width]), epsilon: epsilon)
        for i in 0..<width { x[start + i] *= scale * weight[i] }
      }
    }
  }

  /// Eight partial sums: as fast as the compiler can make it without reordering a single sum.
  private static func inverseRMS(_ row: UnsafeBufferPointer<Float>, epsilon: Float) -> Float {
    var sums = SIMD8<Float>.zero
    var i = 0
    while i + 8 <= row.count {
      var lane = SIMD8<Float>.zero
      for j in 0..<8 { lane[j] = row[i + j] }
      sums += lane * lane
      i += 8
    }
    var sum = sums.sum()
    while i < row.count {
      sum += row[i] * row[i]
      i += 1
    }
    return 1 / (sum / Float(row.count) + epsilon).squareRoot()
  }

  /// gate = silu(gate) * up, the middle of a SwiGLU MLP, over the first `count` values.
  static func gatedSiLU(gate: inout [Float], up: [Float], count: Int) {
    precondition(gate.count >= count && up.count >= count, "\(gate.count), \(up.count) for \(count) values")
    gate.withUnsafeMutableBufferPointer { gate in
      up.withUnsafeBufferPointer { up in
        for i in 0..<count {
          let x = gate[i]
          gate[i] = x / (1 + expf(-x)) * up[i]
        }
      }
    }
  }

  /// -log softmax(row)[target], accumulated in double precision.
  static func negativeLogLikelihood(_ row: UnsafeBufferPointer<Float>, target: Int) -> Float {
    var top = -Float.infinity
    for value in row { top = max(top, value) }
    var sum = 0.0
    for value in row { sum += Double(expf(value - top)) }
    return Float(log(sum) - Double(row[target] - top))
  }
}
