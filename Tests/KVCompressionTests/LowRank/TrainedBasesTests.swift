import Foundation
import KVBackendCPU
import KVCompression
import KVExperiments
import Testing

/// Bases that were trained, not measured: orthonormal, in an order of their own, without variances or means, in a file
/// that another program wrote.
@Suite struct TrainedBasesTests {
  /// One of them per head: a product of reflections, nothing like principal components. Row i of `dim`.
  private static func rows(dim: Int, _ dice: inout Dice) -> [Double] {
    var rows = (0..<dim * dim).map { $0 / dim == $0 % dim ? 1.0 : 0 }
    for _ in 0..<dim {
      let normal = (0..<dim).map { _ in Double(dice.normals(1)[0]) }
      let square = normal.reduce(0) { $0 + $1 * $1 }
      for row in 0..<dim {
        let along = (0..<dim).reduce(0) { $0 + rows[row * dim + $1] * normal[$1] } * 2 / square
        for c in 0..<dim { rows[row * dim + c] -= along * normal[c] }
      }
    }
    return rows
  }

  /// A safetensors file by hand: F32 `layers.L.SIDE.basis` [heads, dim, dim] and what a trainer knows, nothing more.
  private static func file(_ bases: [(name: String, heads: Int, dim: Int, numbers: [Float])]) -> Data {
    var entries = ["\"__metadata__\":{\"format\":\"kv-calibration\",\"version\":\"1\",\"rope\":\"post\"}"]
    var payload = Data()
    for basis in bases {
      let start = payload.count
      basis.numbers.withUnsafeBytes { payload.append(contentsOf: $0) }
      entries.append(
        "\"\(basis.name)\":{\"dtype\":\"F32\",\"shape\":[\(basis.heads),\(basis.dim),\(basis.dim)],"
          + "\"data_offsets\":[\(start),\(payload.count)]}")
    }
    let header = Data("{\(entries.joined(separator: ","))}".utf8)
    return withUnsafeBytes(of: UInt64(header.count).littleEndian) { Data($0) } + header + payload
  }

  @Test(arguments: [Geometry(2, 2, 20), Geometry(4, 1, 24, 40), Geometry(6, 3, 8, 33)])
  func rowsAreProjectedOnTheFirstOfThem(_ geometry: Geometry) throws {
    let shape = try geometry.shape(layers: 2, rotary: true)
    var dice = Dice(77)
    var bases: [String: [Double]] = [:]
    var tensors: [(name: String, heads: Int, dim: Int, numbers: [Float])] = []
    for layer in 0..<2 {
      for (side, dim) in [("keys", geometry.keyDim), ("values", geometry.valueDim)] {
        let name = "layers.\(layer).\(side).basis"
        let rows = (0..<geometry.kvHeads).flatMap { _ in Self.rows(dim: dim, &dice) }
        bases[name] = rows
        tensors.append((name, geometry.kvHeads, dim, rows.map(Float.init)))
      }
    }
    let path = FileManager.default.temporaryDirectory.appending(path: "trained-\(UUID()).safetensors").path()
    defer { try? FileManager.default.removeItem(atPath: path) }
    try Self.file(tensors).write(to: URL(filePath: path))

    let policy = try PolicyRegistry.standard.policy(
      "matryoshka(calibration=\"\(path)\",share=0.5,rates=uniform,step=1,floor=1,latents=f32,basis=f32,window=f32)")
    let cache = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))
    let traffic = Traffic(shape, tokens: 70)
    for layer in 0..<2 { try traffic.append(cache, layer, 0..<70) }
    try cache.finishPrefill()
    for layer in 0..<2 {
      for head in 0..<geometry.kvHeads {
        let held = try cache.read(layer: layer, head: head)
        #expect(held.positions.count == 70)
        for (side, dim, read) in [("keys", geometry.keyDim, held.keys), ("values", geometry.valueDim, held.values)] {
          let basis = try #require(bases["layers.\(layer).\(side).basis"])[head * dim * dim..<(head + 1) * dim * dim]
          let first = basis.startIndex
          for token in 0..<70 {
            let row = Array(side == "keys" ? traffic.key(layer, head, token) : traffic.value(layer, head, token))
            var expected = [Double](repeating: 0, count: dim)
            for i in 0..<(dim + 1) / 2 {
              let u = basis[first + i * dim..<first + (i + 1) * dim]
              let latent = zip(row, u).reduce(0) { $0 + Double($1.0) * $1.1 }
              for (c, entry) in u.enumerated() { expected[c] += latent * entry }
            }
            let length = row.reduce(0) { $0 + Double($1) * Double($1) }.squareRoot()
            let off = zip(read[token * dim..<(token + 1) * dim], expected).map { abs(Double($0) - $1) }.max() ?? 0
            #expect(off < 1e-5 * length, "layer \(layer), head \(head), \(side) of token \(token): off by \(off)")
          }
        }
      }
    }

    // What principal components bring with them, a trainer does not: greedy rates are refused, and say what is missing.
    expectError(.missingInput, "variance", layer: 0) {
      _ = try PolicyRegistry.standard.policy("matryoshka(calibration=\"\(path)\",share=0.5,step=1,floor=1)")
    }
  }

  /// Rows that are no orthonormal basis would restore something else than was projected: refused with the place.
  @Test func rowsThatAreNotOrthonormalAreRefused() throws {
    let shape = try Geometry(2, 1, 8).shape(layers: 1, rotary: true)
    var dice = Dice(78)
    var keys = Self.rows(dim: 8, &dice).map(Float.init)
    let values = Self.rows(dim: 8, &dice).map(Float.init)
    for c in 0..<8 { keys[8 + c] += 0.5 * keys[c] }
    let path = FileManager.default.temporaryDirectory.appending(path: "trained-\(UUID()).safetensors").path()
    defer { try? FileManager.default.removeItem(atPath: path) }
    try Self.file([("layers.0.keys.basis", 1, 8, keys), ("layers.0.values.basis", 1, 8, values)])
      .write(to: URL(filePath: path))
    expectError(.invalidOption, "orthonormal", layer: 0) {
      let policy = try PolicyRegistry.standard.policy(
        "matryoshka(calibration=\"\(path)\",share=0.5,rates=uniform,step=1,floor=1)")
      _ = try KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))
    }
  }
}
