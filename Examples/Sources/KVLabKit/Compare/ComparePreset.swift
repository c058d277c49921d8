package import KVCompression

/// A family's methods at comparable sizes, made from what is registered: a new method is compared the day it has a row.
package enum ComparePreset: String, Sendable, CaseIterable {
  case eviction, quantization, merging, lowrank, all

  /// Parts of the cache that selections keep.
  package static let defaultRatios = [0.5, 0.25, 0.125, 0.05]

  /// Policy texts, the ones a method refuses among them.
  ///
  /// - Parameters:
  ///   - sizes: of what is compared; low-rank methods get the ranks that make them so many times smaller. Nil: without
  ///     bases and windows.
  ///   - calibrations: a directory with `pca.safetensors` and `cskv.safetensors`.
  package func texts(
    ratios: [Double] = defaultRatios, sizes: PresetSizes? = nil, calibrations: String? = nil
  ) -> [String] {
    switch self {
    case .eviction: ["f16"] + EvictionMethods.all.flatMap { Self.selection($0, ratios) }
    case .quantization: ["f16"] + Self.stores
    case .merging: ["f16"] + MergingMethods.all.flatMap { Self.merging($0, ratios) }
    case .lowrank: ["f16"] + LowRankMethods.all.flatMap { Self.lowRank($0, sizes, calibrations) }
    case .all:
      // The full cache is measured once.
      ["f16"]
        + [Self.eviction, .quantization, .merging, .lowrank].flatMap {
          $0.texts(ratios: ratios, sizes: sizes, calibrations: calibrations).dropFirst()
        }
    }
  }

  /// Keep ratios separated by commas.
  ///
  /// - Throws: `invalidOption` for anything but numbers above 0 and up to 1.
  package static func ratios(_ text: String) throws(KVError) -> [Double] {
    let ratios = text.split(separator: ",", omittingEmptySubsequences: false).map { Double($0.trimmingBlanks) }
    guard ratios.allSatisfy({ $0.map { $0 > 0 && $0 <= 1 } ?? false }) else {
      throw KVError(.invalidOption, "--ratios takes numbers above 0 and up to 1, such as 0.5,0.25; got '\(text)'")
    }
    return ratios.compactMap { $0 }
  }

  // MARK: Families

  private static func selection(_ method: MethodDescription, _ ratios: [Double]) -> [String] {
    guard method.role == .selection else { return [] }
    // What bounds the rows is called after what it bounds: rows kept, or rows held before some leave.
    guard let bound = ["budget", "buffer"].first(where: method.has) else { return [method.name] }
    // Those that evict only while decoding, once a window has come, must do so before the last prediction.
    let more = decodingWindow[method.name].map { ",window=\($0)" } ?? ""
    return ratios.map { "\(method.name)(\(bound)=\($0)\(more))" }
  }

  private static let decodingWindow = ["lazy": 32]

  private static var stores: [String] {
    var texts: [String] = []
    for method in QuantizationMethods.all {
      switch method.role {
      case .store where method.has("bits"):
        let rest = Self.rest[method.name].map { "," + $0 } ?? ""
        texts += [8, 4, 3, 2].map { "\(method.name)(bits=\($0)\(rest))" }
      case .store: texts += Self.formats[method.name, default: [""]].map { method.name + $0 }
      // A transform in front of codes matters where they are coarse.
      case .storeModifier: texts += [8, 4, 3, 2].map { "pertoken(bits=\($0))+\(method.name)" }
      case .selection: texts += Self.tiers[method.name, default: [""]].map { method.name + $0 }
      case .modifier:
        texts += [4, 3, 2].map { "h2o(budget=1.0)+\(method.name)(shares=[0.2,0.8])+f16+kivi(bits=\($0))" }
      case .layers: break
      }
    }
    return texts
  }

  /// Formats of the stores whose bits follow from a name.
  private static let formats = [
    "int8": ["", "(format=int4)"], "fp8": ["", "(format=e5m2)"],
    "ggml": ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"].map { "(keys=\($0),values=\($0))" },
    // Widths apart, axes apart, and what the published orderings compare: each side per channel or per token.
    "quant": [
      "(keys=q8_0,values=q4_0)", "(keys=channel,key_bits=4,values=int4)",
      "(keys=channel,key_bits=4,values=token,value_bits=2)", "(keys=channel,key_bits=2,values=token,value_bits=4)",
      "(keys=channel,key_bits=2,key_residual=32,values=token,value_bits=2,value_residual=32)",
      "(keys=token,key_bits=2,key_residual=32,values=token,value_bits=2,value_residual=32)",
      "(keys=channel,key_bits=2,key_residual=32,values=channel,value_bits=2,value_residual=32)",
      "(keys=token,key_bits=2,key_residual=32,values=channel,value_bits=2,value_residual=32)",
    ],
  ]

  /// Options beside the bits: a group that fits heads of 64 channels.
  private static let rest = ["rotatekv": "group=64"]

  /// Stores of the selections: what is important in the first, the bits in question in the second.
  private static let tiers = [
    "mikv": [8, 4, 3, 2].map { "+f16+pertoken(bits=\($0))+balanced" },
    "zipcache": ["+cst(bits=8)+cst(bits=4)", "", "+cst(bits=4)+cst(bits=3)", "+cst(bits=3)+cst(bits=2)"],
  ]

  private static func merging(_ method: MethodDescription, _ ratios: [Double]) -> [String] {
    switch method.role {
    case .modifier:
      ratios.flatMap { ["h2o(budget=\($0))+\(method.name)", "snapkv(budget=\($0),kernel=13)+\(method.name)"] }
    case .selection where method.has("recent") && method.has("heavy") && !method.has("budget"):
      ratios.map { "\(method.name)(heavy=\($0 / 2),recent=\($0 / 2))" }
    case .selection where method.has("recent") && method.has("heavy"):
      // Rows that stay alone must leave room for runs.
      ratios.map { "\(method.name)(budget=\($0),heavy=\($0 / 4),recent=\($0 / 4))" }
    case .selection: selection(method, ratios)
    case .storeModifier: ["f16+\(method.name)", "kivi(bits=4)+\(method.name)"]
    default: []
    }
  }

  /// 2, 4 and 8 times smaller, in f16 and with codes of 4 bits. New tokens become latents too.
  private static func lowRank(
    _ method: MethodDescription, _ sizes: PresetSizes?, _ calibrations: String?
  ) -> [String] {
    guard method.role == .store else { return [] }
    let file = calibrations.map { "calibration=\"\($0)/\(method.has("share") ? "pca" : "cskv").safetensors\"," } ?? ""
    func text(_ share: Double, _ more: String) -> String {
      let ranks =
        if method.has("share") {
          "\(file)share=\(share),step=2,floor=2"
        } else if method.has("density_k") {
          "\(file)density_k=\(share),density_v=\(share)"
        } else {
          "rank_k=\(share),rank_v=\(share),new=project,keep=32"
        }
      return "\(method.name)(\(ranks)\(more))"
    }
    return [(2, 1, ""), (4, 1, ""), (8, 1, ""), (4, 3, ",latents=int4"), (8, 3, ",latents=int4")].map {
      ratio, gain, more in
      let fitting = sizes?.largestShare(ratio: ratio) { text($0, more) }
      return text(fitting ?? min(1, gain / ratio), more)
    }
  }
}

/// What a preset's policies are compared on.
package struct PresetSizes: Sendable {
  package let shape: ModelShape
  package let options: CompareOptions

  package init(shape: ModelShape, options: CompareOptions) {
    self.shape = shape
    self.options = options
  }

  /// The largest share of the channels with which the cache is `ratio` times smaller than f16 at the end, by the estimate;
  /// the least share when none is. Nil for texts that no cache of the model can have.
  func largestShare(ratio: Double, _ text: (Double) -> String) -> Double? {
    func fits(_ thousandths: Int) -> Bool? {
      let tokens = options.context + options.decode
      guard
        let policy = try? PolicyRegistry.standard.policy(text(Double(thousandths) / 1000)),
        (try? KVCache(shape: shape, policy: policy, backend: .cpu(threads: 1))) != nil,
        let bytes = try? policy.estimate(
          shape: shape, prompt: options.context, decoded: options.decode, chunk: options.chunk
        ).total
      else { return nil }
      return Double(2 * tokens * shape.elementsPerToken) >= ratio * Double(bytes)
    }
    var (low, high) = (8, 1000)
    guard fits(high) != nil else { return nil }
    while high - low > 1 {
      let middle = (low + high) / 2
      // A text that is refused for its size is too small.
      if fits(middle) ?? true { low = middle } else { high = middle }
    }
    return Double(low) / 1000
  }
}

extension MethodDescription {
  fileprivate func has(_ option: String) -> Bool { options.contains { $0.name == option } }
}

extension Substring {
  fileprivate var trimmingBlanks: String { String(self).trimmed }
}

/// A policy that was not measured, and why.
package struct PolicyFailure: Sendable, Hashable {
  package let policy: String
  package let error: KVError

  package init(policy: String, error: KVError) {
    self.policy = policy
    self.error = error
  }

  package var json: JSONText { .object([.init("policy", .string(policy)), .init("error", .string(line))]) }

  /// The error on one line.
  package var line: String {
    error.description.split(whereSeparator: \.isNewline).joined(separator: " ")
  }

  package static func list(_ failures: [PolicyFailure]) -> String {
    failures.map { "\($0.policy): \($0.line)" }.joined(separator: "\n")
  }
}

/// What a comparison found: a record for each policy that ran, an error for each other.
package struct ComparisonResult: Sendable {
  package var records: [CompareRecord]
  package var failures: [PolicyFailure]

  package var json: JSONText { .array(records.map(\.json) + failures.map(\.json)) }
}

extension NamedPolicy {
  /// Texts one by one: those that are no policy, with their errors, beside those that are.
  package static func attempt(_ texts: [String]) -> (policies: [NamedPolicy], failures: [PolicyFailure]) {
    var policies: [NamedPolicy] = []
    var failures: [PolicyFailure] = []
    for text in texts {
      do throws(KVError) {
        policies.append(try NamedPolicy(text))
      } catch {
        failures.append(PolicyFailure(policy: text, error: error))
      }
    }
    return (policies, failures)
  }
}
