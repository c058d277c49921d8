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
  package var prefillTokensPerSecond: Double
  package var decodeTokensPerSecond: Double
  package var peakCacheBytes: Int
  package var contextTokens: Int
  package var decodedTokens: Int

  package var json: JSONText {
    .object([
      .init("policy", .string(policy)), .init("spec", .string(spec)), .init("bytesPerToken", .number(bytesPerToken)),
      .init("ratio", .number(ratio)), .init("perplexity", .number(perplexity)),
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
    ])
  }

  package static func table(_ records: [CompareRecord]) -> String {
    var table = TextTable([
      "policy", "B/token", "ratio", "ppl", "change", "KL", "attn err", "needle", "aware", "prefill/s", "decode/s",
      "peak",
    ])
    for record in records {
      table.rows.append([
        record.policy, Print.fixed(record.bytesPerToken, 0), Print.fixed(record.ratio, 2) + "x",
        Print.fixed(record.perplexity, 2), Print.percent(record.perplexityChange, sign: true),
        Print.fixed(record.klDivergence, 4), Print.fixed(record.attentionError, 4),
        Print.percent(record.needles.codeAccuracy, digits: 0),
        Print.percent(record.needlesQueryAware.codeAccuracy, digits: 0),
        Print.fixed(record.prefillTokensPerSecond, 0), Print.fixed(record.decodeTokensPerSecond, 0),
        Print.bytes(record.peakCacheBytes),
      ])
    }
    return table.text
  }
}
