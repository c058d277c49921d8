import KVCompression
import KVExperiments
import Testing

@testable import KVCore

/// ZipCache's choice of tokens against the authors' attention class. What their codec makes of it is compared in
/// `GoldenZipCacheCodecTests`.
@Suite struct GoldenZipCacheTests {
  @Test(arguments: Goldens.names("zipcache.mixed"))
  func saliency(name: String) throws {
    let run = try GoldenRun(name)
    let input = try GoldenInput(run.entry)
    let given = try Goldens.reference(run.entry, "probes").numbers.map { Int($0) }
    let low = try #require(run.entry.parameters?["unimportant"]?.double)
    // Their draw is a given: probes that the engine names.
    let selection = try Selection.zipCache(salient: 1 - low, probes: ProbeQueries(.special))
    let cache = try KVCache(
      Policy(selection, tiers: [.dense(.f32), .dense(.f32)]), queryHeads: input.queries.heads,
      kvHeads: input.keys.heads, dim: input.keys.dim)
    cache.markProbes(given)
    try cache.append(input.keys, input.values)
    _ = try cache.attend(input.queries)
    try run.expect("saliency", cache.scores().flatMap { $0 })
    try cache.finishPrefill()
    try run.expect("lowPositions", positions: TierShareTests.tiers(cache).map { $0[1] })

    // Our own draw has as many, the newest being the same.
    let range = 0..<input.tokens
    let own = ProbeQueries().choose(of: range, from: Array(range), marked: [])
    #expect(own.count == given.count && own.suffix(15) == given.prefix(15))
  }
}
