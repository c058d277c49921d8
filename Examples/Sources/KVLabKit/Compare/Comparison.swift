internal import Foundation
package import KVCompression
internal import KVExperiments
package import ReferenceEngine

/// Several policies on the same texts and the same needle questions.
///
/// Each sample is a piece of text: the prompt is read with full attention and compressed, then the rest is read token by
/// token, so that every prediction that counts was made over the compressed cache. The full cache (dense f32) reads the
/// same tokens first and is what all are compared with.
package struct Comparison {
  private let engine: Engine
  private let policies: [NamedPolicy]
  private let options: CompareOptions
  private let samples: [[Int]]
  /// Several notes in each.
  private let needles: [NeedleSequence]
  /// One note in each.
  private let single: [NeedleSequence]
  /// Policies that no cache of this model can have.
  package let failures: [PolicyFailure]

  /// Prepares samples and needles, and makes one cache per policy: what does not fit the model is a failure before
  /// anything is computed.
  ///
  /// - Throws: `invalidOption`, `missingInput` when the texts are too short.
  package init(
    engine: Engine, policies: [NamedPolicy], texts: [String], names: NeedleNames, options: CompareOptions
  ) throws(KVError) {
    try options.validate()
    self.engine = engine
    self.options = options
    let tokens = texts.map { engine.tokenizer.encode($0) }
    samples = try Self.samples(tokens, prefix: engine.promptPrefix, options)
    var builder = NeedleBuilder(
      names: names, prefix: engine.promptPrefix, haystack: tokens.flatMap { $0 }, seed: options.seed,
      encode: { engine.tokenizer.encode($0) },
      holdsDigit: { engine.tokenizer.bytes(of: $0).contains { (48...57).contains($0) } })
    var needles: [NeedleSequence] = []
    var single: [NeedleSequence] = []
    let length = options.needleContext ?? options.context
    for _ in 0..<options.needles {
      needles.append(try builder.next(tokens: length, notes: options.notes, questions: options.notes))
    }
    // Behind the others, whose text does not depend on these.
    for _ in 0..<options.needles { single.append(try builder.next(tokens: length, notes: 1, questions: 1)) }
    self.needles = needles
    self.single = single
    let backend = try options.backend.backend(threads: options.threads)
    var fitting: [NamedPolicy] = []
    var failures: [PolicyFailure] = []
    for policy in policies {
      do throws(KVError) {
        _ = try KVCache(shape: engine.model.config.shape, policy: policy.policy, backend: backend)
        fitting.append(policy)
      } catch {
        failures.append(PolicyFailure(policy: policy.name, error: error))
      }
    }
    self.policies = fitting
    self.failures = failures
  }

  /// Pieces of context + decode + 1 tokens: the first of each text, then the second of each, as many as are wanted.
  static func samples(_ texts: [[Int]], prefix: [Int], _ options: CompareOptions) throws(KVError) -> [[Int]] {
    // One token more than is read: the last prediction needs a target.
    let own = options.context + options.decode + 1 - prefix.count
    var samples: [[Int]] = []
    var round = 0
    while samples.count < options.samples {
      let fitting = texts.filter { $0.count >= (round + 1) * own }
      if fitting.isEmpty { break }
      for text in fitting where samples.count < options.samples {
        samples.append(prefix + text[round * own..<(round + 1) * own])
      }
      round += 1
    }
    guard samples.count == options.samples else {
      throw KVError(
        .missingInput,
        "\(options.samples) pieces of \(own) tokens are wanted (--context \(options.context) and --decode "
          + "\(options.decode)); the texts, of up to \(texts.map(\.count).max() ?? 0) tokens, give \(samples.count)")
    }
    return samples
  }

  // MARK: Running

  /// Measures every policy; one that fails is left out from there on. O(policies · samples · tokens) model steps.
  ///
  /// - Throws: what the full cache throws.
  package func run(_ progress: any Progress) throws(KVError) -> ComparisonResult {
    progress.begin(steps: samples.count * (policies.count + 1) + (needles.isEmpty ? 0 : policies.count))
    defer { progress.end() }
    var tallies = policies.map { _ in Tally() }
    var errors: [KVError?] = policies.map { _ in nil }
    var full = Tally()
    for sample in samples {
      progress.advance("full cache")
      var reference: [Float] = []
      try read(sample, policy: Policy(store: .dense(.f32)), into: &full) { logits, _ in reference += logits }
      let vocabulary = engine.model.config.vocabularySize
      for (index, policy) in policies.enumerated() {
        progress.advance("text: \(policy.name)")
        if errors[index] != nil { continue }
        var divergence = MeanAccumulator()
        do throws(KVError) {
          try read(sample, policy: policy.policy, into: &tallies[index]) { (logits, step) throws(KVError) in
            let row = Array(reference[step * vocabulary..<(step + 1) * vocabulary])
            divergence.add(try FidelityMetrics.klDivergence(logits: logits, reference: row))
          }
        } catch {
          errors[index] = error
        }
        tallies[index].divergence.merge(divergence)
      }
    }
    let fullPerplexity = try FidelityMetrics.perplexity(negativeLogLikelihoods: full.losses)
    var records: [CompareRecord] = []
    for (index, policy) in policies.enumerated() {
      if !needles.isEmpty { progress.advance("needles: \(policy.name)") }
      if errors[index] != nil { continue }
      do throws(KVError) {
        let several = try retrieve(policy.policy, needles)
        let one = try retrieve(policy.policy, single)
        records.append(try record(policy, tallies[index], fullPerplexity: fullPerplexity, several: several, one: one))
      } catch {
        errors[index] = error
      }
    }
    let failed = zip(policies, errors).compactMap { policy, error in
      error.map { PolicyFailure(policy: policy.name, error: $0) }
    }
    return ComparisonResult(records: records, failures: failures + failed)
  }

  private func record(
    _ policy: NamedPolicy, _ tally: Tally, fullPerplexity: Double, several: Retrieval, one: Retrieval
  ) throws(KVError) -> CompareRecord {
    let perplexity = try FidelityMetrics.perplexity(negativeLogLikelihoods: tally.losses)
    return CompareRecord(
      policy: policy.name, spec: policy.spec, bytesPerToken: Double(tally.bytes) / Double(tally.tokens),
      ratio: try FidelityMetrics.compressionRatio(
        bytes: tally.bytes, elements: tally.tokens * engine.model.config.shape.elementsPerToken),
      perplexity: perplexity, perplexityChange: perplexity / fullPerplexity - 1, klDivergence: tally.divergence.mean,
      attentionError: tally.errors.relativeFrobenius, needles: several.agnostic,
      needlesQueryAware: several.aware, oneNeedle: one.agnostic, oneNeedleQueryAware: one.aware,
      rowsPerHead: tally.rows, latents: tally.latents,
      prefillTokensPerSecond: Double(tally.prefilled) / tally.prefillTime.seconds,
      decodeTokensPerSecond: Double(tally.decoded) / tally.decodeTime.seconds, peakCacheBytes: tally.peak,
      contextTokens: options.context, decodedTokens: tally.decoded)
  }

  /// What several samples add up to.
  private struct Tally {
    var losses: [Double] = []
    var divergence = MeanAccumulator()
    var errors = RowErrorAccumulator()
    var bytes = 0
    var tokens = 0
    var peak = 0
    var rows = RowsPerHead()
    var latents = RestoredRows()
    var prefilled = 0
    var decoded = 0
    var prefillTime = Duration.zero
    var decodeTime = Duration.zero
  }

  /// Reads a sample under a policy. `visit` gets the logits of every decoded step.
  private func read(
    _ sample: [Int], policy: Policy, into tally: inout Tally,
    visit: ([Float], Int) throws(KVError) -> Void
  ) throws(KVError) {
    let backend = try options.backend.backend(threads: options.threads)
    let cache = try KVCache(shape: engine.model.config.shape, policy: policy, backend: backend)
    let attention = try ShadowedAttention(cache)
    let session = try InferenceSession(engine.model, attention: attention)
    let clock = ContinuousClock()
    var start = clock.now
    _ = try session.prefill(Array(sample[..<options.context]), chunk: options.chunk)
    tally.prefillTime += start.duration(to: clock.now) - attention.shadowTime
    tally.prefilled += options.context

    tally.latents.add(try attention.latentErrors())
    attention.comparing = true
    for step in 0..<options.decode {
      let shadowBefore = attention.shadowTime
      start = clock.now
      let logits = try session.decode(sample[options.context + step])
      tally.decodeTime += start.duration(to: clock.now) - (attention.shadowTime - shadowBefore)
      tally.losses.append(Self.loss(logits, target: sample[options.context + step + 1]))
      try visit(logits, step)
    }
    tally.decoded += options.decode
    tally.errors.merge(attention.errors)
    tally.bytes += cache.bytes.total
    tally.tokens += cache.shape.layers.indices.map { cache.tokensSeen(layer: $0) }.max() ?? 0
    for layer in cache.shape.layers.indices {
      for head in 0..<cache.shape.layers[layer].kvHeads { tally.rows.add(cache.rowsHeld(layer: layer, head: head)) }
    }
    tally.peak = max(tally.peak, backend.memory.peakBytes)
  }

  /// −ln of the probability of a token, in f64.
  static func loss(_ logits: [Float], target: Int) -> Double {
    let top = logits.max() ?? 0
    var sum = 0.0
    for logit in logits { sum += exp(Double(logit - top)) }
    return log(sum) + Double(top - logits[target])
  }

  // MARK: Needles

  private typealias Retrieval = (agnostic: RetrievalScore, aware: RetrievalScore)

  /// Both ways of asking: the cache compressed before the question, and with the question in the prompt.
  private func retrieve(_ policy: Policy, _ sequences: [NeedleSequence]) throws(KVError) -> Retrieval {
    var agnostic = RetrievalScore()
    var aware = RetrievalScore()
    for needle in sequences {
      let backend = try options.backend.backend(threads: options.threads)
      let cache = try KVCache(shape: engine.model.config.shape, policy: policy, backend: backend)
      let session = try InferenceSession(engine.model, attention: CacheAttention(cache))
      _ = try session.prefill(needle.prompt, chunk: options.chunk, finish: false)
      // Forks share the text; each goes its own way with one question.
      for question in needle.questions {
        let fork = try InferenceSession(engine.model, attention: CacheAttention(cache.fork()))
        let logits = try fork.prefill(question.prompt, chunk: options.chunk)
        try answer(question, fork, logits, into: &aware)
      }
      try cache.finishPrefill()
      for question in needle.questions {
        let fork = try InferenceSession(engine.model, attention: CacheAttention(cache.fork()))
        let logits = try fork.forward(question.prompt)
        try answer(question, fork, logits, into: &agnostic)
      }
    }
    return (agnostic, aware)
  }

  private func answer(
    _ question: NeedleQuestion, _ session: InferenceSession, _ logits: [Float], into score: inout RetrievalScore
  ) throws(KVError) {
    var logits = logits
    var right = 0
    for (index, token) in question.answer.enumerated() {
      if question.scored.contains(index), try Sampler.argmax(logits) == token { right += 1 }
      if index + 1 < question.answer.count { logits = try session.decode(token) }
    }
    score.add(right: right, of: question.scored.count)
  }
}

extension ModelShape {
  /// Numbers that an uncompressed cache holds for one token.
  package var elementsPerToken: Int {
    layers.reduce(0) { $0 + ($1.cached ? $1.kvHeads * ($1.keyDim + $1.valueDim) : 0) }
  }
}
