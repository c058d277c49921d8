import KVCompression

/// Cosines and sines of a chunk's positions, computed once and used for every head of every layer.
///
/// The library's rotary embedding turns one unit row per position, so the table holds exactly its angles, whatever the
/// scaling; only the plain multiply is repeated here.
struct RotaryRows {
  let headDim: Int
  let pairs: Int
  /// `[tokens, headDim]`: cosine of pair p at channel p, sine at channel `p + pairs`.
  private let table: [Float]

  init(_ rotary: RotaryEmbedding, firstPosition: Int, tokens: Int) throws(KVError) {
    headDim = rotary.headDim
    pairs = rotary.pairs
    var rows = [Float](repeating: 0, count: tokens * headDim)
    for token in 0..<tokens {
      for pair in 0..<pairs { rows[token * headDim + pair] = 1 }
    }
    let positions = (0..<tokens).map { Int32(clamping: firstPosition + $0) }
    var span = rows.mutableSpan
    try rotary.rotate(&span, stride: headDim, positions: positions.span)
    table = rows
  }

  /// Turns `x` `[tokens, heads, headDim]` in place.
  func rotate(_ x: inout [Float], tokens: Int, heads: Int) {
    precondition(x.count >= tokens * heads * headDim && table.count >= tokens * headDim, "\(x.count) elements")
    let (headDim, pairs) = (headDim, pairs)
    x.withUnsafeMutableBufferPointer { x in
      table.withUnsafeBufferPointer { table in
        for token in 0..<tokens {
          let angles = token * headDim
          for head in 0..<heads {
            let start = (token * heads + head) * headDim
            for pair in 0..<pairs {
              let cosine = table[angles + pair]
              let sine = table[angles + pairs + pair]
              let first = x[start + pair]
              let second = x[start + pairs + pair]
              x[start + pair] = first * cosine - second * sine
              x[start + pairs + pair] = second * cosine + first * sine
            }
          }
        }
      }
    }
  }
}
