package import KVCompression

/// Sizes of a comparison.
package struct CompareOptions: Sendable, Hashable {
  /// Prompt tokens of each sample, read with full attention before the policy compresses.
  package var context = 1024
  /// Tokens read one by one after the prompt, while the policy acts: the part that is measured.
  package var decode = 256
  /// Pieces of text.
  package var samples = 3
  /// Prompt tokens in one forward pass.
  package var chunk = 512
  /// Needle sequences; 0 for no retrieval task.
  package var needles = 8
  /// Notes in each, all of them asked about.
  package var notes = 4
  /// Tokens of a needle sequence before its questions; nil: `context`.
  package var needleContext: Int?
  package var seed: UInt64 = 1
  /// Nil: as many as the backend takes.
  package var threads: Int?
  package var backend = BackendChoice.cpu

  package init() {}

  /// - Throws: `invalidOption` that names the option.
  package func validate() throws(KVError) {
    for (value, name, least) in [
      (context, "context", 16), (decode, "decode", 1), (samples, "samples", 1), (chunk, "chunk", 1),
      (needles, "needles", 0), (notes, "notes", 1), (needleContext ?? 16, "needle-context", 16),
    ] where value < least {
      throw KVError(.invalidOption, "--\(name) must be at least \(least); got \(value)")
    }
  }
}

extension CompareOptions {
  /// For continuous integration: seconds instead of minutes.
  package static var quick: CompareOptions {
    var options = CompareOptions()
    options.context = 384
    options.decode = 48
    options.samples = 1
    options.needles = 2
    return options
  }
}
