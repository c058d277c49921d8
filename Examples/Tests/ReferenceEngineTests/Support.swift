import Foundation
import KVCompression
import KVExperiments
import ReferenceEngine
import Testing

/// Files of this package, found from this source file so that tests need no working directory.
enum Paths {
  static let examples = URL(fileURLWithPath: #filePath)
    .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent().path
  static let referenceModel = examples + "/Models/reference"
  static let goldens = examples + "/Tests/ReferenceEngineTests/Goldens"

  /// Runs `body` with a fresh directory and removes it.
  static func withTemporaryDirectory<Result>(_ body: (String) throws -> Result) throws -> Result {
    let url = FileManager.default.temporaryDirectory.appendingPathComponent("engine-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: url) }
    return try body(url.path)
  }

  static func bytes(_ path: String) throws -> [UInt8] { Array(try Data(contentsOf: URL(fileURLWithPath: path))) }
}

/// The reference model, loaded once for all tests.
enum Reference {
  private static let loaded = Result { try Engine(directory: Paths.referenceModel) }
  static var engine: Engine { get throws { try loaded.get() } }
}

enum Policies {
  /// Every token, in f32: full attention through the library.
  static var exact: any CompressionPolicy { get throws { try PolicyRegistry.standard.policy("f32") } }
}

/// Full attention in double precision over everything appended: the definition the engine is compared with.
final class FullAttention: AttentionProvider {
  private let shape: ModelShape
  private var keys: [[Float]]
  private var values: [[Float]]
  private(set) var prefillEnds = 0

  init(_ shape: ModelShape) {
    self.shape = shape
    keys = Array(repeating: [], count: shape.layers.count)
    values = keys
  }

  func tokensSeen(layer: Int) -> Int { keys[layer].count / (shape.layers[layer].kvHeads * shape.layers[layer].keyDim) }

  func finishPrefill() { prefillEnds += 1 }

  func attend(_ input: AttentionInput, into output: inout [Float]) throws(KVError) {
    let before = tokensSeen(layer: input.layer)
    keys[input.layer] += input.keys
    values[input.layer] += input.values
    let (k, v) = (keys[input.layer], values[input.layer])
    let (dim, kvHeads) = (input.headDim, input.kvHeads)
    let group = input.queryHeads / kvHeads
    let window = shape.layers[input.layer].slidingWindow ?? Int.max
    for token in 0..<input.tokens {
      let position = before + token
      let first = window > position ? 0 : position - window + 1
      for head in 0..<input.queryHeads {
        let q = (token * input.queryHeads + head) * dim
        var weights = (first...position).map { past -> Double in
          let row = (past * kvHeads + head / group) * dim
          var dot: Float = 0
          for c in 0..<dim { dot += input.queries[q + c] * k[row + c] }
          return Double(dot) / Double(dim).squareRoot()
        }
        let top = weights.max() ?? 0
        for i in weights.indices { weights[i] = exp(weights[i] - top) }
        let total = weights.reduce(0, +)
        var sums = [Double](repeating: 0, count: dim)
        for (i, weight) in weights.enumerated() {
          let row = ((first + i) * kvHeads + head / group) * dim
          for c in 0..<dim { sums[c] += weight / total * Double(v[row + c]) }
        }
        for c in 0..<dim { output[q + c] = Float(sums[c]) }
      }
    }
  }
}

/// Keeps everything it sees.
final class Recorder: ForwardObserver {
  var layers: [LayerActivations] = []
  var final: [Float] = []
  func layer(_ activations: LayerActivations) { layers.append(activations) }
  func finalHidden(_ hidden: [Float], firstPosition: Int, tokens: Int) { final += hidden }
}

/// norm(a - b) / norm(b).
func relativeError(_ a: some Sequence<Float>, _ b: some Sequence<Float>) -> Double {
  var difference = 0.0
  var norm = 0.0
  for (x, y) in zip(a, b) {
    difference += Double(x - y) * Double(x - y)
    norm += Double(y) * Double(y)
  }
  return difference == 0 ? 0 : (difference / norm).squareRoot()
}

/// The largest relative error of a row.
func rowError(_ a: [Float], _ b: [Float], width: Int) -> Double {
  guard a.count == b.count else { return .infinity }
  return stride(from: 0, to: a.count, by: width).map {
    relativeError(a[$0..<$0 + width], b[$0..<$0 + width])
  }.max() ?? 0
}

/// [tokens, heads, dim] to [heads, tokens, dim].
func headMajor(_ x: [Float], tokens: Int, heads: Int, dim: Int) -> [Float] {
  var result: [Float] = []
  for head in 0..<heads {
    for token in 0..<tokens {
      let start = (token * heads + head) * dim
      result += x[start..<start + dim]
    }
  }
  return result
}

struct SplitMix64: RandomNumberGenerator {
  var state: UInt64
  init(seed: UInt64) { state = seed }
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}
