import Dispatch
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
///
/// BLAS stays on the thread that calls it: its own threads would share out the work by how many there happen to be, and
/// the sums with it. A forward pass is a `withSerialBLAS` of its own, and the pieces here depend on the shape alone, so it
/// gives the same bits every time.
enum LinearAlgebra {
  /// Rows of x in a piece of a product of many, and outputs in one of a single row.
  private static let rowsAtATime = 64
  private static let outputsAtATime = 1024

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
    if n == 0 || weight.rows == 0 { return }
    let inputs = Int32(weight.columns)
    let beta: Float = adding ? 1 : 0
    let (total, size) = n == 1 ? (weight.rows, outputsAtATime) : (n, rowsAtATime)
    x.withUnsafeBufferPointer { x in
      weight.values.withUnsafeBufferPointer { weights in
        y.withUnsafeMutableBufferPointer { y in
          // Each piece writes rows or outputs of its own, and the call waits for all of them.
          nonisolated(unsafe) let (x, w, y) = (x.baseAddress!, weights.baseAddress!, y.baseAddress!)
          pieces((total + size - 1) / size) { piece in
            let first = piece * size
            let count = Int32(min(size, total - first))
            if n == 1 {
              cblas_sgemv(
                CblasRowMajor, CblasNoTrans, count, inputs, 1, w + first * weight.columns, inputs, x, 1, beta,
                y + first, 1)
            } else {
              cblas_sgemm(
                CblasRowMajor, CblasNoTrans, CblasTrans, count, Int32(weight.rows), inputs, 1,
                x + first * weight.columns, inputs, w, inputs, beta, y + first * weight.rows, Int32(weight.rows))
            }
          }
        }
      }
    }
  }

  private static func pieces(_ count: Int, _ body: @Sendable (Int) -> Void) {
    if count == 1 { body(0) } else { DispatchQueue.concurrentPerform(iterations: count, execute: body) }
  }

  /// Adds `bias` to each of the first n rows of y.
  static func add(_ bias: [Float], toRows n: Int, of y: inout [Float]) {
    let width = bias.count
    for row in 0..<n {
      for column in 0..<width { y[row * width + column] += bias[column] }
    }
  }
}
