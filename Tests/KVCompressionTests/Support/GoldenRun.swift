import Foundation
import KVCompression
import KVExperiments
import Testing

/// The comparison of one entry: outputs come in, rules are applied, and at the end none may have been forgotten.
///
/// `GOLDEN_TRACE=1` prints what every output measured.
final class GoldenRun {
  let entry: GoldenEntry
  private var compared: Set<String> = []
  private var verdicts: [String: Verdict] = [:]
  /// Decode steps of a head from which nothing is compared: its set differed by a tie.
  private var skippedFrom: [Int: Int] = [:]
  private var heads = 1

  init(_ name: String) throws { entry = try Goldens.entry(name) }

  // MARK: Comparing

  /// Numbers of an output, in the layout of its reference.
  func expect(
    _ output: String, _ actual: [Double], sourceLocation: SourceLocation = #_sourceLocation
  ) throws {
    let description = try #require(entry.outputs[output], "\(entry.name) has no output \(output)")
    let reference = try Goldens.reference(entry, output)
    let verdict: Verdict
    if description.rule == "words" {
      let scales = try #require(description.compare["scales"]?.string)
      verdict = GoldenRules.words(
        actual, reference, scales: try Goldens.reference(entry, scales), bits: description.compare["bits"]?.int ?? 0,
        description.number("maxOffByOneFraction") ?? 0)
    } else {
      verdict = GoldenRules.compare(description, withoutSkipped(actual, reference, output), reference)
    }
    record(output, description, verdict, sourceLocation)
  }

  func expect(
    _ output: String, _ actual: [Float], sourceLocation: SourceLocation = #_sourceLocation
  ) throws {
    try expect(output, actual.map { Double($0) }, sourceLocation: sourceLocation)
  }

  /// Words as the index holds them: 32 bits, signed.
  func expect(
    _ output: String, words: [UInt32], sourceLocation: SourceLocation = #_sourceLocation
  ) throws {
    try expect(output, words.map { Double(Int32(bitPattern: $0)) }, sourceLocation: sourceLocation)
  }

  /// Sets of positions, one per row of the reference's last axis (steps outermost).
  func expect(
    _ output: String, positions actual: [[Int]], sourceLocation: SourceLocation = #_sourceLocation
  ) throws {
    let description = try #require(entry.outputs[output], "\(entry.name) has no output \(output)")
    try #require(description.rule == "position-set")
    let shape = try Goldens.reference(entry, output).shape
    let sequential = description.compare["sequential"]?.flag == true
    heads = sequential ? shape.dropFirst().dropLast().reduce(1, *) : 1
    let verdict = GoldenRules.positionSets(
      actual, try Goldens.positions(entry, output),
      scores: try description.compare["scores"]?.string.map { try Goldens.reference(entry, $0) },
      tie: description.number("tie"), threshold: description.number("threshold"), sequential: sequential ? heads : nil)
    if sequential {
      for (row, equal) in verdict.equalRows.enumerated() where !equal {
        skippedFrom[row % heads] = min(skippedFrom[row % heads] ?? .max, row / heads)
      }
    }
    record(output, description, verdict, sourceLocation)
  }

  /// Whether the sets of an output were the reference's own. Otherwise its outputs are evaluated on the reference's.
  func isEqual(_ output: String) -> Bool { verdicts[output]?.equalRows.allSatisfy { $0 } ?? false }

  /// Every output of the entry was compared. Call it last.
  func finish(except: Set<String> = [], sourceLocation: SourceLocation = #_sourceLocation) {
    let wanted = Set(entry.outputs.filter { $0.value.rule != "given" }.keys).subtracting(except)
    #expect(compared == wanted, "\(entry.name): not compared", sourceLocation: sourceLocation)
  }

  // MARK: Reporting

  private func record(
    _ output: String, _ description: GoldenEntry.Output, _ verdict: Verdict, _ location: SourceLocation
  ) {
    compared.insert(output)
    verdicts[output] = verdict
    GoldenTrace.print(
      "\(verdict.passed ? "pass" : "FAIL") \(entry.name) \(output) \(description.rule): \(verdict.text)")
    if !verdict.passed {
      Issue.record(
        "\(entry.name) · \(output) · \(description.rule): \(verdict.text)", sourceLocation: location)
    }
  }

  /// Steps of decode outputs that are free get the reference's numbers.
  private func withoutSkipped(_ actual: [Double], _ reference: GoldenTensor, _ output: String) -> [Double] {
    guard !skippedFrom.isEmpty, output.contains("decode"), reference.shape.count >= 2,
      actual.count == reference.numbers.count
    else { return actual }
    var actual = actual
    // A reference without a head axis has one head; query heads follow their KV head.
    let own = heads == 1 ? 1 : reference.shape[1]
    let width = reference.stride / own
    for (head, first) in skippedFrom {
      for step in first..<max(reference.shape[0], first) {
        for index in 0..<own where index * heads / own == head {
          let start = (step * own + index) * width
          for i in start..<start + width { actual[i] = reference.numbers[i] }
        }
      }
    }
    return actual
  }
}
