internal import Foundation
internal import KVBackendCPU
internal import KVCalibration
public import KVCompression
public import KVCore
internal import KVTensorFiles

extension Conformance {
  /// A policy made of one registered method.
  public struct Case: Sendable, CustomStringConvertible {
    public var method: String
    public var text: String
    public var policy: Policy
    /// Layers of a model that shows what the method does.
    public var layers: Int
    public var description: String { text }
  }

  /// Small values for the options that methods commonly have.
  private static let small = [
    "budget": "24", "window": "5", "kernel": "3", "sinks": "2", "residual": "32", "lag": "7", "queries": "6",
    "length": "4", "rank_k": "0.3", "rank_v": "0.6",
  ]

  /// One policy for every method of a registry, from the registry itself: a new method is compared the day it is
  /// registered. What methods must read from a calibration or a table is made for `layer`.
  ///
  /// - Throws: the error of a method for which no policy could be made.
  public static func cases(
    of registry: PolicyRegistry, layer: LayerShape, rotary: RotaryEmbedding
  ) throws(KVError) -> [Case] {
    let folder = FileManager.default.temporaryDirectory.appending(path: "conformance-\(UUID().uuidString)")
    defer { try? FileManager.default.removeItem(at: folder) }
    var cases: [Case] = []
    var files: [String]?
    for method in registry.methods {
      var error: KVError?
      var made = first(of: texts(method), registry, layer, rotary, &error)
      if made == nil {
        if files == nil { files = try calibrations(layer, rotary, in: folder) }
        made = first(
          of: (files ?? []).flatMap { texts(method, calibration: $0) }, registry, layer, rotary, &error)
      }
      guard let (text, policy) = made else {
        throw error ?? KVError(.unsupported, "no policy of \(method.name) was tried")
      }
      // The path of a file that is gone means nothing to a reader.
      let name = text.contains(folder.path()) ? "\(method.name), calibrated" : text
      cases.append(
        Case(
          method: method.name, text: name, policy: policy,
          layers: joinsLayers(policy, layer, rotary) ? 4 : 1))
    }
    return cases
  }

  /// Texts that a policy of this method may take, the simplest first.
  private static func texts(_ method: MethodDescription, calibration: String? = nil) -> [String] {
    var options = method.options.compactMap { option in
      if option.name == "table" { return "table=[[1,0]]" }
      if option.name == "window", method.role == .store { return nil }
      // Ranks in steps of 32 channels leave small heads no choice.
      if option.name == "step" || option.name == "floor" {
        return calibration == nil ? nil : "\(option.name)=4"
      }
      return small[option.name].map { "\(option.name)=\($0)" }
    }
    if let calibration { options.append("calibration=\"\(calibration)\"") }
    let own = options.isEmpty ? method.name : "\(method.name)(\(options.joined(separator: ",")))"
    // A selection of several tiers has as many stores.
    let tiers = ["", "+f16+kivi(residual=32)", "+f16+f16+kivi(residual=32)", "+f16+f16+f16+kivi(residual=32)"]
    switch method.role {
    case .selection: return tiers.map { own + $0 }
    case .modifier:
      return ["snapkv(budget=24,window=5,kernel=3)", "h2o(budget=24)"].flatMap { base in
        tiers.map { "\(base)+\(own)\($0)" }
      }
    case .storeModifier: return ["pertoken+\(own)"]
    case .layers: return ["kivi(residual=32)+\(method.name)(first=1,last=0)+f16"]
    case .store: return [own]
    }
  }

  private static func first(
    of texts: [String], _ registry: PolicyRegistry, _ layer: LayerShape, _ rotary: RotaryEmbedding,
    _ error: inout KVError?
  ) -> (text: String, policy: Policy)? {
    for text in texts {
      do throws(KVError) {
        let policy = try registry.policy(text)
        // Some refuse a model only.
        _ = try KVCache(
          shape: ModelShape(layers: [layer], rotary: rotary), policy: policy, backend: .cpu(threads: 1))
        return (text, policy)
      } catch let refusal {
        error = error ?? refusal
      }
    }
    return nil
  }

  private static func joinsLayers(_ policy: Policy, _ layer: LayerShape, _ rotary: RotaryEmbedding) -> Bool {
    let shape = ModelShape(layers: Array(repeating: layer, count: 4), rotary: rotary)
    return policy.tiers.contains { tier in
      let groups = try? (tier.factory as? any JointFactory)?.groups(of: shape)
      return groups?.contains { $0.count > 1 } ?? false
    }
  }

  /// A file of every kind of calibration, of numbers such as caches are fed with.
  private static func calibrations(
    _ layer: LayerShape, _ rotary: RotaryEmbedding, in folder: URL
  ) throws(KVError) -> [String] {
    do {
      try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    } catch {
      throw KVError(.inputOutput, "\(folder.path()): \(error.localizedDescription)")
    }
    let shape = ModelShape(layers: [layer], rotary: rotary)
    let tokens = 160
    var numbers = FedCache.Numbers(seed: 5)
    let keys = (0..<layer.kvHeads * tokens * layer.keyDim).map { _ in numbers.next() }
    let values = (0..<layer.kvHeads * tokens * layer.valueDim).map { _ in numbers.next() }
    var files: [String] = []
    for method in [CalibrationMethod.principalComponents(), try .shrunkChannels(), try .channelOrder()] {
      let calibrator = try Calibrator(method, shape: shape)
      try calibrator.add(
        layer: 0, keys: TensorView(keys.span, heads: layer.kvHeads, tokens: tokens, dim: layer.keyDim),
        values: TensorView(values.span, heads: layer.kvHeads, tokens: tokens, dim: layer.valueDim), firstPosition: 0)
      let path = folder.appending(path: "\(files.count).safetensors").path()
      try calibrator.finish().write(to: path)
      files.append(path)
    }
    return files
  }
}
