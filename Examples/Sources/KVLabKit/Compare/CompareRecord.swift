/// What `kvlab compare` measured of one policy.
package struct CompareRecord: Sendable {
  /// As it was written.
  package var policy: String
  /// With every option.
  package var spec: String
  /// Bytes the cache holds after the last token, by the tokens it has seen.
  package var bytesPerToken: Double
  /// How many times smaller than two bytes a number.
  package var ratio: Double
  /// What those bytes are for each element of the tokens seen, metadata and window included.
  package var bitsPerElement: Double { 16 / ratio }
  package var perplexity: Double
  /// Perplexity over the full cache's, minus 1: 0.05 is 5 % worse.
  package var perplexityChange: Double
  /// Mean KL(full ‖ policy) of the next-token distributions, in nats.
  package var klDivergence: Double
  /// ‖output − full output‖ / ‖full output‖ of the attention of all decoded tokens.
  package var attentionError: Double
  /// The cache was compressed before the question was known.
  package var needles: RetrievalScore
  /// The question was part of the prompt that the policy saw.
  package var needlesQueryAware: RetrievalScore
  /// The same with one note in each text.
  package var oneNeedle: RetrievalScore
  package var oneNeedleQueryAware: RetrievalScore
  /// Of all layers and samples, after the last token.
  package var rowsPerHead: RowsPerHead
  package var prefillTokensPerSecond: Double
  package var decodeTokensPerSecond: Double
  package var peakCacheBytes: Int
  package var contextTokens: Int
  package var decodedTokens: Int

  package var json: JSONText {
    .object([
      .init("policy", .string(policy)), .init("spec", .string(spec)), .init("bytesPerToken", .number(bytesPerToken)),
      .init("ratio", .number(ratio)), .init("bitsPerElement", .number(bitsPerElement)),
      .init("perplexity", .number(perplexity)),
      .init("perplexityChange", .number(perplexityChange)), .init("klDivergence", .number(klDivergence)),
      .init("attentionError", .number(attentionError)), .init("needleAccuracy", .number(needles.codeAccuracy)),
      .init("prefillTokensPerSecond", .number(prefillTokensPerSecond)),
      .init("decodeTokensPerSecond", .number(decodeTokensPerSecond)),
      .init("peakCacheBytes", .integer(peakCacheBytes)),
      .init("needleDigitAccuracy", .number(needles.digitAccuracy)),
      .init("needleAccuracyQueryAware", .number(needlesQueryAware.codeAccuracy)),
      .init("needleDigitAccuracyQueryAware", .number(needlesQueryAware.digitAccuracy)),
      .init("needleQuestions", .integer(needles.codes)), .init("contextTokens", .integer(contextTokens)),
      .init("decodedTokens", .integer(decodedTokens)),
      .init("oneNeedleAccuracy", .number(oneNeedle.codeAccuracy)),
      .init("oneNeedleDigitAccuracy", .number(oneNeedle.digitAccuracy)),
      .init("oneNeedleAccuracyQueryAware", .number(oneNeedleQueryAware.codeAccuracy)),
      .init("oneNeedleDigitAccuracyQueryAware", .number(oneNeedleQueryAware.digitAccuracy)),
      .init("oneNeedleQuestions", .integer(oneNeedle.codes)),
      .init("rowsPerHeadMin", .integer(rowsPerHead.least)), .init("rowsPerHeadMean", .number(rowsPerHead.mean)),
      .init("rowsPerHeadMax", .integer(rowsPerHead.most)),
    ])
  }

  package static func table(_ records: [CompareRecord]) -> String {
    var table = TextTable([
      "policy", "B/token", "ratio", "bits/el", "ppl", "change", "KL", "attn err", "needle", "aware", "1 needle",
      "1 aware",
      "prefill/s", "decode/s", "peak", "rows/head",
    ])
    for record in records {
      table.rows.append([
        record.policy, Print.fixed(record.bytesPerToken, 0), Print.fixed(record.ratio, 2) + "x",
        Print.fixed(record.bitsPerElement, 2),
        Print.fixed(record.perplexity, 2), Print.percent(record.perplexityChange, sign: true),
        Print.fixed(record.klDivergence, 4), Print.fixed(record.attentionError, 4),
        Print.percent(record.needles.codeAccuracy, digits: 0),
        Print.percent(record.needlesQueryAware.codeAccuracy, digits: 0),
        Print.percent(record.oneNeedle.codeAccuracy, digits: 0),
        Print.percent(record.oneNeedleQueryAware.codeAccuracy, digits: 0),
        Print.fixed(record.prefillTokensPerSecond, 0), Print.fixed(record.decodeTokensPerSecond, 0),
        Print.bytes(record.peakCacheBytes), record.rowsPerHead.text,
      ])
    }
    return table.text
  }
}

/// How many rows heads hold.
package struct RowsPerHead: Sendable, Hashable {
  private var heads = 0
  private var sum = 0
  package private(set) var least = 0
  package private(set) var most = 0

  package init() {}

  package mutating func add(_ rows: Int) {
    least = heads == 0 ? rows : min(least, rows)
    most = max(most, rows)
    sum += rows
    heads += 1
  }

  /// NaN without heads.
  package var mean: Double { heads == 0 ? .nan : Double(sum) / Double(heads) }

  /// `320`, or `96–320–1280` where heads differ: least, mean, most.
  package var text: String { least == most ? "\(least)" : "\(least)–\(Print.fixed(mean, 0))–\(most)" }
}
