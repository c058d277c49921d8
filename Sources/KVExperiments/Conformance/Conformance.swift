public import KVCore

/// A backend against another over whole lives of caches: a prompt in chunks, its end, decoding.
///
/// ```swift
/// let conformance = Conformance(try .cuda(), against: try .cpu(level: "portable"), shape: shape)
/// let outcome = try conformance.run(policy)
/// ```
public struct Conformance: Sendable {
  /// What one policy came to.
  public struct Outcome: Sendable {
    /// Largest difference of an attention output.
    public var distance: Float
    /// What is wrong; nil: nothing.
    public var complaint: String?
  }

  public let subject: Backend
  public let reference: Backend
  public let shape: ModelShape
  /// Tokens of each chunk of the prompt, and how many come one by one.
  public var prompt = [33, 1, 38]
  public var decoded = 5
  /// By how much outputs may differ: sums of some hundred products of numbers below 2, in another order.
  public var bound: Float = 1e-5
  /// By how much rows that are read back may differ.
  public var rowBound: Float = 1e-4
  /// By how much either may differ where other libraries made the latents: a latent or an element of a basis that lies
  /// between two numbers of f16 may become the other one, half of 2^-10 of a row of length 6 at most.
  public var latentBound: Float = 3e-3

  public init(_ subject: Backend, against reference: Backend, shape: ModelShape) {
    self.subject = subject
    self.reference = reference
    self.shape = shape
  }

  /// Every layer of two caches, fed alike. Nothing else may allocate on the subject meanwhile: its bytes are compared with
  /// those of the cache.
  public func run(_ policy: Policy) throws(KVError) -> Outcome {
    let own = try FedCache(policy, shape, subject)
    let other = try FedCache(policy, shape, reference)
    let isRounded = policy.tiers.contains { $0.factory is LowRankFormat } && !areFactoredAlike
    let bound = isRounded ? max(bound, latentBound) : bound
    let rowBound = isRounded ? max(rowBound, latentBound) : rowBound
    var outcome = Outcome(distance: 0, complaint: nil)
    for (turn, tokens) in (prompt + Array(repeating: 1, count: decoded)).enumerated() {
      if turn == prompt.count {
        try own.cache.finishPrefill()
        try other.cache.finishPrefill()
      }
      for layer in shape.layers.indices {
        let seed = UInt64(turn * 64 + layer)
        let distance = FedCache.distance(
          try own.step(tokens, seed: seed, layer: layer), try other.step(tokens, seed: seed, layer: layer))
        outcome.distance = distance <= outcome.distance ? outcome.distance : distance
        if !(distance <= bound), outcome.complaint == nil {
          outcome.complaint = "the output of layer \(layer) in turn \(turn) is off by \(distance)"
        }
      }
    }
    if outcome.complaint == nil { outcome.complaint = try compareRows(own.cache, other.cache, rowBound) }
    let (held, counted) = (subject.memory.liveBytes, own.cache.bytes.total)
    if held != counted, outcome.complaint == nil { outcome.complaint = "\(counted) bytes are \(held)" }
    return outcome
  }

  /// A card without libraries of its own factors with those of the processor, and says why.
  private var areFactoredAlike: Bool { subject.linearAlgebra.hasPrefix(reference.linearAlgebra) }

  private func compareRows(_ own: KVCache, _ other: KVCache, _ rowBound: Float) throws(KVError) -> String? {
    for (layer, layerShape) in shape.layers.enumerated() {
      for head in 0..<layerShape.kvHeads {
        let (a, b) = (try own.read(layer: layer, head: head), try other.read(layer: layer, head: head))
        if a.positions != b.positions { return "other rows of head \(head) of layer \(layer) stay" }
        let distance = max(FedCache.distance(a.keys, b.keys), FedCache.distance(a.values, b.values))
        if !(distance <= rowBound) { return "rows of head \(head) of layer \(layer) are off by \(distance)" }
      }
    }
    return nil
  }
}
