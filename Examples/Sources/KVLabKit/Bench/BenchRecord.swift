internal import Foundation

/// What one case of the benchmark took.
package struct BenchRecord: Sendable {
  package var name: String
  package var store: String
  package var tokens: Int
  package var queries: Int
  package var threads: Int
  /// Seconds of every repeat, in the order they ran.
  package var seconds: [Double]
  /// What one repeat must read (for `append`: the f32 it takes in).
  package var bytes: Int
  /// Bytes a second this machine reads with as many threads, or a card copies, measured between the repeats.
  package var readBandwidth: Double
  /// Its median by that of dense f16 of the same shape, where that was measured too.
  package var ratioToF16: Double?
  /// Its median by that of the plain store of the same width, of rotated, divided and tiered ones.
  package var ratioToPlain: Double?
  /// Whether the result agreed with the portable kernels', or was as good as it must be.
  package var checked: Bool
  /// Of all threads together, where that was measured: what a shared machine does not disturb.
  package var processorSeconds: Double?
  /// Of a factorisation, over the least there is.
  package var errorOverBest: Double?
  /// Of decoding on a driver that does nothing: the share of steps in which nothing came from the heap.
  package var stepsWithoutAllocation: Double?
  /// Likewise, calls for one layer and token: launches, copies, waits, questions after an address, allocations.
  package var driverCalls: [Double]?

  package init(
    name: String, store: String, tokens: Int, queries: Int, threads: Int, seconds: [Double], bytes: Int,
    readBandwidth: Double, ratioToF16: Double? = nil, ratioToPlain: Double? = nil, checked: Bool
  ) {
    self.name = name
    self.store = store
    self.tokens = tokens
    self.queries = queries
    self.threads = threads
    self.seconds = seconds
    self.bytes = bytes
    self.readBandwidth = readBandwidth
    self.ratioToF16 = ratioToF16
    self.ratioToPlain = ratioToPlain
    self.checked = checked
  }

  /// What `--filter` is compared with.
  package var label: String { Self.label(name, store, tokens, queries, threads) }

  package static func label(_ name: String, _ store: String, _ tokens: Int, _ queries: Int, _ threads: Int) -> String {
    "\(name)/\(store)/T\(tokens)/q\(queries)/t\(threads)"
  }

  package var median: Double { Self.median(seconds) }
  package var bandwidth: Double { Double(bytes) / median }

  static func median(_ values: [Double]) -> Double {
    let sorted = values.sorted()
    if sorted.isEmpty { return .nan }
    let middle = sorted.count / 2
    return sorted.count % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
  }

  package var json: JSONText {
    .object([
      .init("case", .string(name)), .init("store", .string(store)), .init("tokens", .integer(tokens)),
      .init("queries", .integer(queries)), .init("threads", .integer(threads)),
      .init("medianMilliseconds", .number(median * 1e3)), .init("bytes", .integer(bytes)),
      .init("gigabytesPerSecond", .number(bandwidth / 1e9)),
      .init("fractionOfReadBandwidth", .number(bandwidth / readBandwidth)), .init("checked", .bool(checked)),
      .init("ratioToF16", ratioToF16.map { .number($0) } ?? .null),
      .init("ratioToPlain", ratioToPlain.map { .number($0) } ?? .null),
      .init("readGigabytesPerSecond", .number(readBandwidth / 1e9)),
      .init("minimumMilliseconds", .number((seconds.min() ?? .nan) * 1e3)),
      .init("meanMilliseconds", .number(seconds.reduce(0, +) / Double(seconds.count) * 1e3)),
      .init("repeats", .integer(seconds.count)),
      .init("processorMilliseconds", processorSeconds.map { .number($0 * 1e3) } ?? .null),
      .init("errorOverBest", errorOverBest.map { .number($0) } ?? .null),
      .init("stepsWithoutAllocation", stepsWithoutAllocation.map { .number($0) } ?? .null),
      .init("driverCalls", driverCalls.map { .array($0.map { .number($0) }) } ?? .null),
    ])
  }

  package static let heading = row("case", "median ms", "GB/s", "of read", "vs f16", "vs plain", "checked")

  package var line: String {
    Self.row(
      label, Print.fixed(median * 1e3, 3), Print.fixed(bandwidth / 1e9, 2),
      Print.percent(bandwidth / readBandwidth, digits: 0), ratioToF16.map { Print.fixed($0, 2) } ?? "",
      ratioToPlain.map { Print.fixed($0, 2) } ?? "",
      checked ? "yes" : "NO")
  }

  private static func row(_ cells: String...) -> String {
    cells.enumerated().map { index, cell in
      let space = String(repeating: " ", count: max(0, (index == 0 ? 44 : 10) - cell.count))
      return index == 0 ? cell + space : space + cell
    }.joined(separator: " ")
  }
}
