import Foundation

/// How far one output is from its reference, in the terms of its rule.
struct Verdict {
  var passed = true
  /// What was measured and what is allowed.
  var text = ""
  /// Position sets: per row of the last axis, whether the sets are equal.
  var equalRows: [Bool] = []

  static func shape(_ actual: Int, _ wanted: Int) -> Verdict {
    Verdict(passed: false, text: "\(actual) numbers, the reference has \(wanted)")
  }
}

/// The compare rules of the index, each exactly as its text there says.
enum GoldenRules {
  /// Rules this file knows. `given` is no comparison.
  static let known: Set<String> = [
    "allclose", "allclose-except", "relative-frobenius", "row-relative", "exact", "codes", "words", "packed-halves",
    "packed-quarters", "bits", "integers", "position-set", "at-most", "sum-within", "exact-while-margin", "given",
  ]

  /// Compares everything but position sets and words, which need other outputs of their entry.
  static func compare(_ output: GoldenEntry.Output, _ actual: [Double], _ reference: GoldenTensor) -> Verdict {
    var actual = actual
    if let step = output.compare["rowStride"]?.int { actual = everyRow(step, actual, reference.shape) }
    guard actual.count == reference.numbers.count else { return .shape(actual.count, reference.numbers.count) }
    let wanted = reference.numbers
    switch output.rule {
    case "allclose", "allclose-except":
      return close(
        actual, reference, atol: output.number("atol") ?? 0, rtol: output.number("rtol") ?? 0,
        allowed: output.number("maxMismatch") ?? 0)
    case "relative-frobenius": return norms(actual, reference, rows: 1, output.number("max") ?? 0)
    case "row-relative":
      return norms(actual, reference, rows: wanted.count / max(reference.shape.last ?? 1, 1), output.number("max") ?? 0)
    case "exact": return mismatches(actual, reference, allowed: 0)
    case "integers": return mismatches(actual, reference, allowed: output.number("maxMismatch") ?? 0)
    case "codes": return codes(actual, reference, output.number("maxOffByOneFraction") ?? 0)
    case "packed-halves", "packed-quarters":
      let bits = output.rule == "packed-halves" ? 4 : 2
      let unpacked = unpackColumns(wanted, reference.shape, bits: bits)
      return codes(
        unpackColumns(actual, reference.shape, bits: bits).numbers, unpacked, output.number("maxOffByOneFraction") ?? 0)
    case "bits":
      let wrong = zip(actual, wanted).reduce(0) { $0 + (UInt8($1.0) ^ UInt8($1.1)).nonzeroBitCount }
      return fraction(wrong, of: wanted.count * 8, output.number("maxMismatch") ?? 0, what: "bits")
    case "at-most":
      let slack = output.number("slack") ?? 1
      let worst = zip(actual, wanted).map { $0 / $1 }.max() ?? 0
      return Verdict(passed: worst <= slack, text: "ratio \(worst), at most \(slack)")
    case "sum-within":
      let off = abs(actual.reduce(0, +) - (output.number("of") ?? 0))
      return Verdict(passed: off <= output.number("slack") ?? 0, text: "sum off by \(off)")
    case "exact-while-margin":
      let margins = output.compare["margins"]?.numbers ?? []
      let end = margins.firstIndex { $0 < output.number("margin") ?? 0 } ?? wanted.count
      let first = (0..<end).first { actual[$0] != wanted[$0] }
      return Verdict(passed: first == nil, text: "first difference \(first.map { "\($0)" } ?? "none") below \(end)")
    default: return Verdict(passed: false, text: "rule \(output.rule) is not known")
    }
  }

  // MARK: Numbers

  private static func close(
    _ actual: [Double], _ reference: GoldenTensor, atol: Double, rtol: Double, allowed: Double
  ) -> Verdict {
    var worst = (ratio: -1.0, index: 0)
    var wrong = 0
    for (index, (x, ref)) in zip(actual, reference.numbers).enumerated() {
      let ratio = x == ref ? 0 : abs(x - ref) / (atol + rtol * abs(ref))
      if !(ratio <= 1) { wrong += 1 }
      if ratio > worst.ratio || ratio.isNaN { worst = (ratio.isNaN ? .infinity : ratio, index) }
    }
    let share = Double(wrong) / Double(max(actual.count, 1))
    return Verdict(
      passed: share <= allowed,
      text: "\(wrong) of \(actual.count) off; worst \(String(format: "%.3g", worst.ratio)) times the tolerance at "
        + describe(worst.index, actual, reference))
  }

  private static func norms(_ actual: [Double], _ reference: GoldenTensor, rows: Int, _ limit: Double) -> Verdict {
    let width = actual.count / max(rows, 1)
    var worst = (error: -1.0, row: 0)
    for row in 0..<rows {
      var difference = 0.0
      var size = 0.0
      for index in row * width..<(row + 1) * width {
        difference += (actual[index] - reference.numbers[index]) * (actual[index] - reference.numbers[index])
        size += reference.numbers[index] * reference.numbers[index]
      }
      let error = difference == 0 ? 0 : difference.squareRoot() / size.squareRoot()
      if !(error <= worst.error) { worst = (error.isNaN ? .infinity : error, row) }
    }
    let range = worst.row * width..<min((worst.row + 1) * width, actual.count)
    let element = range.max { abs(actual[$0] - reference.numbers[$0]) < abs(actual[$1] - reference.numbers[$1]) } ?? 0
    return Verdict(
      passed: worst.error <= limit,
      text: "relative norm \(String(format: "%.3g", worst.error)), at most \(limit)"
        + (rows > 1 ? ", row \(worst.row)" : "") + "; worst " + describe(element, actual, reference))
  }

  // MARK: Integers

  private static func mismatches(_ actual: [Double], _ reference: GoldenTensor, allowed: Double) -> Verdict {
    let wrong = actual.indices.filter { actual[$0] != reference.numbers[$0] }
    var verdict = fraction(wrong.count, of: actual.count, allowed, what: "elements")
    if let first = wrong.first { verdict.text += "; first " + describe(first, actual, reference) }
    return verdict
  }

  static func codes(_ actual: [Double], _ reference: GoldenTensor, _ allowed: Double, free: [Bool]? = nil) -> Verdict {
    guard actual.count == reference.numbers.count else { return .shape(actual.count, reference.numbers.count) }
    var offByOne = 0
    for (index, (x, ref)) in zip(actual, reference.numbers).enumerated() where free?[index] != true {
      if abs(x - ref) > 1 {
        return Verdict(passed: false, text: "more than one apart: " + describe(index, actual, reference))
      }
      if x != ref { offByOne += 1 }
    }
    return fraction(offByOne, of: actual.count, allowed, what: "codes off by one")
  }

  private static func fraction(_ wrong: Int, of count: Int, _ allowed: Double, what: String) -> Verdict {
    let share = Double(wrong) / Double(max(count, 1))
    return Verdict(passed: share <= allowed, text: "\(wrong) of \(count) \(what) differ, share \(share) of \(allowed)")
  }

  /// Rule `words`: both are unpacked, little end first; codes of groups of scale 0 are free.
  static func words(
    _ actual: [Double], _ reference: GoldenTensor, scales: GoldenTensor, bits: Int, _ allowed: Double
  ) -> Verdict {
    guard actual.count == reference.numbers.count else { return .shape(actual.count, reference.numbers.count) }
    // The packed axis is the one on which words and scales differ.
    let packed = reference.shape.indices.first { reference.shape[$0] != scales.shape[$0] } ?? 0
    let inner = reference.shape[(packed + 1)...].reduce(1, *)
    let outer = reference.shape[..<packed].reduce(1, *)
    let (words, groups) = (reference.shape[packed], scales.shape[packed])
    let per = 32 / bits
    let group = words * per / groups
    var shape = reference.shape
    shape[packed] = words * per
    var free = [Bool](repeating: false, count: outer * words * per * inner)
    for o in 0..<outer {
      for code in 0..<words * per {
        for i in 0..<inner where scales.numbers[(o * groups + code / group) * inner + i] == 0 {
          free[(o * words * per + code) * inner + i] = true
        }
      }
    }
    func unpack(_ numbers: [Double]) -> [Double] {
      var codes = [Double](repeating: 0, count: free.count)
      for o in 0..<outer {
        for word in 0..<words {
          for i in 0..<inner {
            let bitsOfWord = UInt32(truncatingIfNeeded: Int64(numbers[(o * words + word) * inner + i]))
            for k in 0..<per {
              let code = bitsOfWord >> UInt32(k * bits) & (1 << UInt32(bits) - 1)
              codes[(o * words * per + word * per + k) * inner + i] = Double(code)
            }
          }
        }
      }
      return codes
    }
    return codes(
      unpack(actual), GoldenTensor(shape: shape, numbers: unpack(reference.numbers)), allowed, free: free)
  }

  /// Bytes whose bit fields are columns j, j + C/2 (or quarters).
  private static func unpackColumns(_ bytes: [Double], _ shape: [Int], bits: Int) -> GoldenTensor {
    let width = shape.last ?? 1
    let parts = 8 / bits
    var numbers: [Double] = []
    for row in stride(from: 0, to: bytes.count, by: width) {
      for part in 0..<parts {
        for byte in bytes[row..<row + width] {
          numbers.append(Double(UInt8(byte) >> UInt8(part * bits) & (1 << UInt8(bits) - 1)))
        }
      }
    }
    return GoldenTensor(shape: shape.dropLast() + [width * parts], numbers: numbers)
  }

  // MARK: Position sets

  /// Rows of sets against rows of sets. Where they differ, the reference scores of the tokens on either side must agree.
  static func positionSets(
    _ actual: [[Int]], _ wanted: [[Int]], scores: GoldenTensor?, tie: Double?, threshold: Double?,
    sequential heads: Int?
  ) -> Verdict {
    guard actual.count == wanted.count else { return .shape(actual.count, wanted.count) }
    var verdict = Verdict(equalRows: Array(repeating: true, count: wanted.count))
    var diverged: Set<Int> = []
    var ties = 0
    for row in wanted.indices {
      let head = heads.map { row % $0 } ?? row
      if heads != nil, diverged.contains(head) {
        verdict.equalRows[row] = false
        continue
      }
      let (ours, theirs) = (Set(actual[row]), Set(wanted[row]))
      if ours == theirs, actual[row].count == ours.count { continue }
      verdict.equalRows[row] = false
      diverged.insert(head)
      ties += 1
      let extra = ours.subtracting(theirs).sorted()
      let missing = theirs.subtracting(ours).sorted()
      guard
        isTie(extra, missing, row: row, rows: wanted.count, scores: scores, tie: tie, threshold: threshold),
        actual[row].count == ours.count
      else {
        verdict.passed = false
        verdict.text = "row \(row): \(extra) instead of \(missing) (\(actual[row].count) of \(wanted[row].count))"
        return verdict
      }
    }
    verdict.text = ties == 0 ? "\(wanted.count) sets equal" : "\(ties) of \(wanted.count) sets differ by ties"
    return verdict
  }

  private static func isTie(
    _ extra: [Int], _ missing: [Int], row: Int, rows: Int, scores: GoldenTensor?, tie: Double?, threshold: Double?
  ) -> Bool {
    guard let scores, let tie else { return false }
    let width = scores.numbers.count / rows
    let own = Array(scores.numbers[row * width..<(row + 1) * width])
    guard (extra + missing).allSatisfy({ $0 >= 0 && $0 < width }) else { return false }
    let slack = 1e-12 * (own.filter(\.isFinite).max { abs($0) < abs($1) }.map { abs($0) } ?? 0)
    if let threshold {
      return (extra + missing).allSatisfy { abs(own[$0] - threshold) <= tie * abs(threshold) + slack }
    }
    guard extra.count == missing.count else { return false }
    return zip(extra.map { own[$0] }.sorted(), missing.map { own[$0] }.sorted()).allSatisfy {
      abs($0 - $1) <= tie * max(abs($0), abs($1)) + slack
    }
  }

  // MARK: Places

  /// Rows 0, step, 2 step … of axis 1 of [heads, tokens, d]; the reference holds those only.
  private static func everyRow(_ step: Int, _ actual: [Double], _ shape: [Int]) -> [Double] {
    guard shape.count == 3, step > 1 else { return actual }
    let (heads, dim) = (shape[0], shape[2])
    let tokens = actual.count / max(heads * dim, 1)
    var kept: [Double] = []
    for head in 0..<heads {
      for token in stride(from: 0, to: tokens, by: step) {
        let start = (head * tokens + token) * dim
        kept += actual[start..<start + dim]
      }
    }
    return kept
  }

  static func describe(_ index: Int, _ actual: [Double], _ reference: GoldenTensor) -> String {
    guard actual.indices.contains(index), reference.numbers.indices.contains(index) else { return "nothing" }
    var place: [Int] = []
    var rest = index
    for size in reference.shape.reversed() {
      place.insert(rest % max(size, 1), at: 0)
      rest /= max(size, 1)
    }
    return "element \(place): \(actual[index]) instead of \(reference.numbers[index])"
  }
}
