package import KVCompression

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
  /// What latents lost of the prompts' rows.
  package var latents: RestoredRows
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
      .init("keyError", latents.keys.map { .number($0.error) } ?? .null),
      .init("bestKeyError", latents.keys.map { .number($0.best) } ?? .null),
      .init("valueError", latents.values.map { .number($0.error) } ?? .null),
      .init("bestValueError", latents.values.map { .number($0.best) } ?? .null),
    ])
  }

  package static func table(_ records: [CompareRecord]) -> String {
    // Columns of latents only where there are any.
    let restored = records.contains { $0.latents.keys != nil || $0.latents.values != nil }
    var table = TextTable(
      [
        "policy", "B/token", "ratio", "bits/el", "ppl", "change", "KL", "attn err", "needle", "aware", "1 needle",
        "1 aware", "prefill/s", "decode/s", "peak", "rows/head",
      ] + (restored ? ["keys/best", "values/best"] : []))
    for record in records {
      table.rows.append(
        [
          record.policy, Print.fixed(record.bytesPerToken, 0), Print.fixed(record.ratio, 2) + "x",
          Print.fixed(record.bitsPerElement, 2), Print.fixed(record.perplexity, 2),
          Print.percent(record.perplexityChange, sign: true),
          Print.fixed(record.klDivergence, 4), Print.fixed(record.attentionError, 4),
          Print.percent(record.needles.codeAccuracy, digits: 0),
          Print.percent(record.needlesQueryAware.codeAccuracy, digits: 0),
          Print.percent(record.oneNeedle.codeAccuracy, digits: 0),
          Print.percent(record.oneNeedleQueryAware.codeAccuracy, digits: 0),
          Print.fixed(record.prefillTokensPerSecond, 0), Print.fixed(record.decodeTokensPerSecond, 0),
          Print.bytes(record.peakCacheBytes), record.rowsPerHead.text,
        ] + (restored ? [record.latents.keys?.text ?? "", record.latents.values?.text ?? ""] : []))
    }
    return table.text
  }
}

/// Errors of restored rows, over all layers and samples: norm of the difference by norm of the rows, and the least that
/// as many latent channels could have had.
package struct RestoredRows: Sendable, Hashable {
  package struct Side: Sendable, Hashable {
    package var error: Double
    package var best: Double

    package var text: String { "\(Print.fixed(error, 3))/\(Print.fixed(best, 3))" }
  }

  private var sums: [Calibration.Side: (error: Double, best: Double, energy: Double)] = [:]

  package init() {}

  package mutating func add(_ errors: [LatentError]) {
    for error in errors {
      var sum = sums[error.side] ?? (0, 0, 0)
      sum.error += error.error
      sum.best += error.optimum
      sum.energy += error.energy
      sums[error.side] = sum
    }
  }

  /// Nil where no rows are latents.
  package var keys: Side? { side(.keys) }
  package var values: Side? { side(.values) }

  private func side(_ side: Calibration.Side) -> Side? {
    guard let sum = sums[side], sum.energy > 0 else { return nil }
    return Side(error: (sum.error / sum.energy).squareRoot(), best: (sum.best / sum.energy).squareRoot())
  }

  package static func == (a: RestoredRows, b: RestoredRows) -> Bool { a.keys == b.keys && a.values == b.values }
  package func hash(into hasher: inout Hasher) {
    hasher.combine(keys)
    hasher.combine(values)
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
