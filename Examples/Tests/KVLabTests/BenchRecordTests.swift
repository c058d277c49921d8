import KVLabKit
import Testing

@Suite struct BenchRecordTests {
  @Test func printsTheDocumentedKeys() {
    let record = BenchRecord(
      name: "attend", store: "kivi(bits=2)", tokens: 4096, queries: 1, threads: 2, seconds: [0.004, 0.001, 0.002],
      bytes: 2_000_000, readBandwidth: 10e9, ratioToF16: 0.5, checked: true)
    #expect(record.median == 0.002)
    #expect(record.label == "attend/kivi(bits=2)/T4096/q1/t2")
    #expect(
      Array(record.json.keys.prefix(10)) == [
        "case", "store", "tokens", "queries", "threads", "medianMilliseconds", "bytes", "gigabytesPerSecond",
        "fractionOfReadBandwidth", "checked",
      ])
    #expect(record.json["gigabytesPerSecond"] == .number(1))
    #expect(record.json["fractionOfReadBandwidth"] == .number(0.1))
    #expect(!record.json.compact.contains("\n"))
  }

  @Test func theMedianOfAnEvenCountIsTheMean() {
    let record = BenchRecord(
      name: "a", store: "s", tokens: 1, queries: 1, threads: 1, seconds: [4, 1, 2, 3], bytes: 1, readBandwidth: 1,
      ratioToF16: nil, checked: false)
    #expect(record.median == 2.5)
    #expect(record.line.hasSuffix("NO"))
  }
}
