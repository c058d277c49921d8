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
    let result = try comparison.run(NoProgress())
    let records = result.records
    #expect(result.failures.isEmpty)
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
      Array(small.json.keys.prefix(13)) == [
        "policy", "spec", "bytesPerToken", "ratio", "bitsPerElement", "perplexity", "perplexityChange", "klDivergence",
        "attentionError", "needleAccuracy", "prefillTokensPerSecond", "decodeTokensPerSecond", "peakCacheBytes",
      ])
    #expect(full.oneNeedle.codes == 1 && full.oneNeedleQueryAware.codes == 1)
    #expect(full.rowsPerHead.least == 172 && full.rowsPerHead.most == 172 && full.rowsPerHead.text == "172")
    #expect(small.rowsPerHead.most < 172 && small.rowsPerHead.mean >= Double(small.rowsPerHead.least))
    for key in [
      "needleAccuracyQueryAware", "oneNeedleAccuracy", "oneNeedleAccuracyQueryAware", "rowsPerHeadMin",
      "rowsPerHeadMean", "rowsPerHeadMax",
    ] { #expect(small.json.keys.contains(key)) }
    #expect(CompareRecord.table(records).split(separator: "\n").count == 4)
  }

  /// A text that is no policy, one that the model cannot have, and one that runs.
  @Test func whatCannotRunIsListedAndTheRestRuns() throws {
    let directory = try PackagedFiles.model(or: nil)
    var options = CompareOptions()
    options.context = 64
    options.decode = 2
    options.samples = 1
    options.needles = 0
    options.threads = 1
    let wide = "ggml(keys=q8_0)+rotated(key_block=128)"
    let (policies, refused) = NamedPolicy.attempt(["nosuchmethod", wide, "f16"])
    #expect(refused.map(\.policy) == ["nosuchmethod"])
    #expect(policies.count == 2)
    let comparison = try Comparison(
      engine: Engine(directory: directory), policies: policies,
      texts: PackagedFiles.readTexts(at: PackagedFiles.texts(or: nil)), names: PackagedFiles.names(model: directory),
      options: options)
    let result = try comparison.run(NoProgress())
    #expect(result.records.map(\.policy) == ["f16"])
    #expect(result.failures.map(\.policy) == [wide])
    #expect(result.failures.allSatisfy { !$0.line.isEmpty && $0.json.keys == ["policy", "error"] })
    #expect(result.records[0].oneNeedle.codeAccuracy.isNaN)
  }

  @Test func presetsHoldWhatIsRegistered() throws {
    let eviction = ComparePreset.eviction.texts()
    for ratio in ["0.5", "0.25", "0.125", "0.05"] { #expect(eviction.contains("h2o(budget=\(ratio))")) }
    #expect(ComparePreset.eviction.texts(ratios: [0.3]).contains("snapkv(budget=0.3)"))
    let all = ComparePreset.all.texts()
    #expect(Set(all).count == all.count && all.first == "f16")
    let families = [EvictionMethods.all, QuantizationMethods.all, MergingMethods.all, LowRankMethods.all]
    for method in families.joined() where method.role == .selection || method.role == .store {
      let named = all.contains { $0.hasPrefix(method.name) }
      #expect(named, "\(method.name) is in no preset")
    }
    // Only methods that need a table of the model's heads or a calibration are no policy from a text alone.
    let (_, refused) = NamedPolicy.attempt(all)
    let files = ["duoattention", "cskv", "matryoshka"]
    #expect(
      refused.allSatisfy { failure in files.contains { failure.policy.hasPrefix($0) } },
      "\(PolicyFailure.list(refused))")
  }

  /// Ranks of the preset make caches as small as it says, where any rank does.
  @Test func lowRankPresetsHaveTheirSizes() throws {
    let engine = try Engine(directory: PackagedFiles.model(or: nil))
    var options = CompareOptions()
    options.context = 2048
    options.decode = 64
    let shape = engine.model.config.shape
    let texts = ComparePreset.lowrank.texts(sizes: PresetSizes(shape: shape, options: options))
    let svd = texts.filter { $0.hasPrefix("svd(") }
    #expect(svd.count == 5)
    for (text, ratio) in zip(svd, [2.0, 4, 8, 4, 8]) {
      let policy = try PolicyRegistry.standard.policy(text)
      let bytes = try policy.estimate(shape: shape, prompt: 2048, decoded: 64, chunk: options.chunk).total
      let found = Double(2 * 2112 * shape.elementsPerToken) / Double(bytes)
      #expect(found >= ratio && found < 1.06 * ratio, "\(text): \(found)")
    }
  }

  /// A basis of the prompt is the best there is; the columns appear only then.
  @Test func errorsOfRestoredRows() throws {
    let directory = try PackagedFiles.model(or: nil)
    var options = CompareOptions()
    options.context = 128
    options.decode = 4
    options.samples = 1
    options.needles = 0
    let comparison = try Comparison(
      engine: Engine(directory: directory),
      policies: NamedPolicy.list("f16,svd(rank_k=0.25,rank_v=full,latents=f32,basis=f32)"),
      texts: PackagedFiles.readTexts(at: PackagedFiles.texts(or: nil)), names: PackagedFiles.names(model: directory),
      options: options)
    let records = try comparison.run(NoProgress()).records
    #expect(records[0].latents.keys == nil && records[1].latents.values == nil)
    let keys = try #require(records[1].latents.keys)
    #expect(keys.error > 0 && keys.best > 0 && abs(keys.error / keys.best - 1) < 0.01)
    #expect(records[1].json.keys.contains("bestKeyError") && CompareRecord.table(records).contains("keys/best"))
  }

  @Test func ratiosAreParts() throws {
    #expect(try ComparePreset.ratios("0.5, 0.1") == [0.5, 0.1])
    for text in ["", "0", "1.5", "0.5,", "half", "nan"] {
      #expect { try ComparePreset.ratios(text) } throws: { ($0 as? KVError)?.code == .invalidOption }
    }
  }

  @Test func rowsPerHead() {
    var rows = RowsPerHead()
    #expect(rows.mean.isNaN)
    for count in [10, 4, 7] { rows.add(count) }
    #expect(rows.least == 4 && rows.mean == 7 && rows.most == 10 && rows.text == "4–7–10")
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
