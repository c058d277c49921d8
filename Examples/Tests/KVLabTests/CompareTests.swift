import KVCompression
import KVLabKit
import ReferenceEngine
import Testing

@Suite struct CompareTests {
  @Test func measuresTheFullCacheAsItself() throws {
    let directory = try PackagedFiles.model(or: nil)
    var options = CompareOptions()
    options.context = 160
    options.decode = 12
    options.samples = 1
    options.needles = 1
    options.notes = 1
    options.threads = 1
    let comparison = try Comparison(
      engine: Engine(directory: directory), policies: NamedPolicy.list("f32, streaming(budget=0.5)+kivi(residual=32)"),
      texts: PackagedFiles.readTexts(at: PackagedFiles.texts(or: nil)), names: PackagedFiles.names(model: directory),
      options: options)
    let records = try comparison.run(NoProgress())
    #expect(records.map(\.policy) == ["f32", "streaming(budget=0.5)+kivi(residual=32)"])
    let full = records[0]
    #expect(full.klDivergence == 0 && full.attentionError == 0 && full.perplexityChange == 0)
    #expect(full.needles.codes == 1 && full.needlesQueryAware.codes == 1)
    #expect(full.peakCacheBytes >= 172 * 8 * 2 * 64 * 2 * 4, "8 layers of 2 heads, keys and values in f32")
    let small = records[1]
    #expect(small.klDivergence > 0 && small.attentionError > 0 && small.attentionError < 1)
    #expect(small.bytesPerToken < full.bytesPerToken / 2)
    #expect(small.spec.contains("sinks=4") && small.spec.contains("bits=2"))
    #expect(
      Array(small.json.keys.prefix(12)) == [
        "policy", "spec", "bytesPerToken", "ratio", "perplexity", "perplexityChange", "klDivergence", "attentionError",
        "needleAccuracy", "prefillTokensPerSecond", "decodeTokensPerSecond", "peakCacheBytes",
      ])
    #expect(CompareRecord.table(records).split(separator: "\n").count == 4)
  }

  @Test func saysWhatDoesNotFit() throws {
    let directory = try PackagedFiles.model(or: nil)
    let engine = try Engine(directory: directory)
    let names = try PackagedFiles.names(model: directory)
    #expect {
      try Comparison(
        engine: engine, policies: NamedPolicy.list("f16"), texts: ["too short"], names: names, options: .init())
    } throws: { ($0 as? KVError)?.code == .missingInput }
    var options = CompareOptions()
    options.decode = 0
    #expect {
      try Comparison(engine: engine, policies: NamedPolicy.list("f16"), texts: [], names: names, options: options)
    } throws: { "\($0)".contains("--decode must be at least 1; got 0") }
  }
}
