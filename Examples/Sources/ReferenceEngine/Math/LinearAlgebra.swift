import Foundation
import KVCompression

#if canImport(Accelerate)
  import Accelerate
#else
  import CExampleBLAS
#endif

func naturalLogarithm(_ x: Double) -> Double { log(x) }

/// A weight matrix `[rows, columns]`, row-major: `rows` outputs, `columns` inputs.
struct Matrix: Sendable {
  let rows: Int
  let columns: Int
  let values: [Float]
}

/// y = x Wᵀ, or y += x Wᵀ: the one matrix product of a forward pass.
enum LinearAlgebra {
  /// - Parameters:
  ///   - x: `[n, columns]`, at least; only the first n rows are read.
  ///   - y: `[n, rows]`, at least.
  ///   - adding: adds to y (residual connections) instead of replacing it.
  static func multiply(
    _ x: [Float], rows n: Int, by weight: Matrix, into y: inout [Float], adding: Bool = false
  ) {
    precondition(
      x.count >= n * weight.columns && y.count >= n * weight.rows
        && weight.values.count == weight.rows * weight.columns,
      "x \(x.count), y \(y.count) for \(n) rows of \(weight.columns) -> \(weight.rows)")
    if n == 0 { return }
    let outputs = Int32(weight.rows)
    let inputs = Int32(weight.columns)
    let beta: Float = adding ? 1 : 0
    x.withUnsafeBufferPointer { x in
      weight.values.withUnsafeBufferPointer { w in
        y.withUnsafeMutableBufferPointer { y in
          if n == 1 {
            cblas_sgemv(
              CblasRowMajor, CblasNoTrans, outputs, inputs, 1, w.baseAddress, inputs, x.baseAddress, 1, beta,
              y.baseAddress, 1)
          } else {
            cblas_sgemm(
              CblasRowMajor, CblasNoTrans, CblasTrans, Int32(n), outputs, inputs, 1, x.baseAddress, inputs,
              w.baseAddress, inputs, beta, y.baseAddress, outputs)
          }
        }
      }
    }
  }

  /// Adds `bias` to each of the first n rows of y.
  static func add(_ bias: [Float], toRows n: Int, of y: inout [Float]) {
    let width = bias.count
    for row in 0..<n {
      for column in 0..<width { y[row * width + column] += bias[column] }
    }
  }
}
