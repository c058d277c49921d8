public import KVCore
public import KVTensorFiles

/// A dump of a cache: some attention layers' keys, values and queries, as `kvlab apply` reads them.
///
/// A dump is a safetensors file. `layers.L.keys` and `layers.L.values` [kvHeads, T, d] and `layers.L.queries`
/// [queryHeads, Tq, d] (the last Tq positions) are required for every layer L in the file; `layers.L.keys_pre_rope`
/// [kvHeads, T, d] and `layers.L.probe_queries` [queryHeads, P, d] (at position T) are optional, and so are layers: a
/// dump may hold 4 and 5 only. Elements may be F64, F32, F16 or BF16. `__metadata__` may carry `rope_theta`, `scale`
/// and `rope_layout`. Other tensors and texts are left alone.
///
/// Opening checks names, element types and shapes; numbers are read and checked layer by layer when asked for.
public struct CacheDump: Sendable {
  private enum Storage: Sendable {
    case file(SafeTensorsFile)
    case memory([Int: CacheDumpLayer])
  }

  private let storage: Storage
  /// Sizes of every layer in the dump, by its index in the model.
  public let shapes: [Int: CacheDumpLayerShape]
  /// Base of the rotary embedding, if the dump says.
  public let ropeTheta: Double?
  /// What attention multiplies q·k by, if the dump says; 1/√d otherwise.
  public let scale: Double?
  /// `half` (channel c turns with c + d/2) or `interleaved` (2c with 2c + 1), if the dump says.
  public let ropeLayout: String?
  /// All texts of the file's `__metadata__`; the three above, for a dump made in memory.
  public let metadata: [String: String]

  /// Layers of the dump, ascending.
  public var layers: [Int] { shapes.keys.sorted() }

  /// Opens the dump at `path`.
  ///
  /// - Throws: `inputOutput` or `corruptFile` as ``SafeTensorsFile/init(path:)``; `missingInput` when a layer lacks a
  ///   required tensor or the file has no layer; `shapeMismatch` that names the tensor that does not fit.
  public init(path: String) throws(KVError) {
    try self.init(file: SafeTensorsFile(path: path))
  }

  /// A dump in an open file. Throws as ``init(path:)`` does, but for opening.
  public init(file: SafeTensorsFile) throws(KVError) {
    var shapes: [Int: CacheDumpLayerShape] = [:]
    for layer in Set(file.tensors.keys.compactMap(CacheDump.layer(of:))).sorted() {
      shapes[layer] = try CacheDump.shape(of: layer, in: file)
    }
    guard !shapes.isEmpty else {
      throw KVError(
        .missingInput,
        "a dump holds tensors 'layers.L.keys', 'layers.L.values' and 'layers.L.queries'; none of the "
          + "\(file.tensors.count) tensors of this file is one")
    }
    storage = .file(file)
    self.shapes = shapes
    metadata = file.metadata
    ropeTheta = try CacheDump.number("rope_theta", file.metadata)
    scale = try CacheDump.number("scale", file.metadata)
    ropeLayout = file.metadata["rope_layout"]
  }

  /// A dump made in memory, to be saved or used as it is.
  ///
  /// - Throws: `invalidOption` for a negative layer index, or a base or scale that is not a positive finite number.
  public init(
    layers: [Int: CacheDumpLayer], ropeTheta: Double? = nil, scale: Double? = nil, ropeLayout: String? = nil
  ) throws(KVError) {
    if let negative = layers.keys.first(where: { $0 < 0 }) {
      throw KVError(.invalidOption, "layers are counted from 0; got layer \(negative)")
    }
    var metadata: [String: String] = [:]
    for (name, value) in [("rope_theta", ropeTheta), ("scale", scale)] {
      guard let value else { continue }
      guard value.isFinite, value > 0 else {
        throw KVError(.invalidOption, "\(name) must be a positive finite number; got \(value)")
      }
      metadata[name] = "\(value)"
    }
    metadata["rope_layout"] = ropeLayout
    storage = .memory(layers)
    shapes = layers.mapValues(\.shape)
    self.metadata = metadata
    self.ropeTheta = ropeTheta
    self.scale = scale
    self.ropeLayout = ropeLayout
  }

  /// Every layer of a synthetic cache, with its rotary base.
  ///
  /// - Throws: nothing in practice.
  public init(_ cache: SyntheticCache) throws(KVError) {
    var layers: [Int: CacheDumpLayer] = [:]
    for (index, layer) in cache.layers.enumerated() { layers[index] = try CacheDumpLayer(layer) }
    let theta = cache.options.ropeTheta
    try self.init(layers: layers, ropeTheta: theta, ropeLayout: theta == nil ? nil : "half")
  }

  /// Reads one layer, O(its elements); nothing is kept.
  ///
  /// - Throws: `missingInput` when the dump has no such layer, `nonFinite` that names tensor, layer, head and token,
  ///   `inputOutput`.
  public func layer(_ layer: Int) throws(KVError) -> CacheDumpLayer {
    guard shapes[layer] != nil else {
      throw KVError(.missingInput, "the dump holds layers \(layers), not layer \(layer)", layer: layer)
    }
    switch storage {
    case .memory(let layers):
      guard let found = layers[layer] else { throw KVError(.missingInput, "no such layer", layer: layer) }
      return found
    case .file(let file):
      do throws(KVError) {
        guard let keys = try CacheDump.load(.keys, layer, file), let values = try CacheDump.load(.values, layer, file),
          let queries = try CacheDump.load(.queries, layer, file)
        else { throw KVError(.missingInput, "a required tensor is missing") }
        return try CacheDumpLayer(
          keys: keys, values: values, queries: queries,
          keysBeforeRotation: CacheDump.load(.keysBeforeRotation, layer, file),
          probeQueries: CacheDump.load(.probeQueries, layer, file), prefix: "layers.\(layer).")
      } catch {
        throw error.at(layer: layer)
      }
    }
  }

  /// Writes all layers to one file, replacing what was there only when the new file is complete.
  ///
  /// - Parameter type: F32 by default; F16 or BF16 for half the size, rounded to nearest even.
  /// - Throws: `inputOutput`; `unrepresentable` that names the tensor when a number overflows F16; what ``layer(_:)``
  ///   throws.
  /// - Complexity: O(elements) time, and memory for the whole file.
  public func save(to path: String, as type: SafeTensorsType = .f32) throws(KVError) {
    var writer = SafeTensorsWriter(metadata: metadata)
    for index in layers {
      for (tensor, data) in try layer(index).named {
        try writer.add(tensor.name(layer: index), shape: data.shape, floats: data.elements, as: type)
      }
    }
    try writer.write(to: path)
  }

  private static func load(
    _ tensor: CacheDumpTensor, _ layer: Int, _ file: SafeTensorsFile
  ) throws(KVError) -> HeadTensor? {
    let name = tensor.name(layer: layer)
    guard let shape = file.tensors[name]?.shape else { return nil }
    return HeadTensor(
      unchecked: try file.floats(named: name), heads: shape[0], tokens: shape[1], dim: shape[2])
  }

  /// The layer a tensor of a dump belongs to; nil for other names.
  private static func layer(of name: String) -> Int? {
    let parts = name.split(separator: ".", omittingEmptySubsequences: false)
    guard parts.count == 3, parts[0] == "layers", CacheDumpTensor(rawValue: String(parts[2])) != nil,
      let layer = Int(parts[1]), layer >= 0, String(layer) == parts[1]
    else { return nil }
    return layer
  }

  private static func shape(of layer: Int, in file: SafeTensorsFile) throws(KVError) -> CacheDumpLayerShape {
    var shapes: [CacheDumpTensor: [Int]] = [:]
    for tensor in CacheDumpTensor.allCases {
      let name = tensor.name(layer: layer)
      guard let entry = file.tensors[name] else { continue }
      guard [.f64, .f32, .f16, .bf16].contains(entry.type) else {
        throw KVError(
          .shapeMismatch, "tensor '\(name)': expected elements of F64, F32, F16 or BF16, found \(entry.type)",
          layer: layer, offset: entry.byteRange.lowerBound)
      }
      shapes[tensor] = entry.shape
    }
    guard let keys = shapes[.keys], let values = shapes[.values], let queries = shapes[.queries] else {
      let missing = [CacheDumpTensor.keys, .values, .queries].filter { shapes[$0] == nil }.map { $0.name(layer: layer) }
      throw KVError(
        .missingInput, "layer \(layer) needs keys, values and queries; missing: \(missing.joined(separator: ", "))",
        layer: layer)
    }
    do throws(KVError) {
      try CacheDumpShapes(
        keys: keys, values: values, queries: queries, keysBeforeRotation: shapes[.keysBeforeRotation],
        probeQueries: shapes[.probeQueries]
      ).validate(prefix: "layers.\(layer).")
    } catch {
      throw error.at(layer: layer)
    }
    return CacheDumpLayerShape(
      queryHeads: queries[0], kvHeads: keys[0], tokens: keys[1], queryTokens: queries[1], keyDim: keys[2],
      valueDim: values[2], probeQueries: shapes[.probeQueries]?[1] ?? 0,
      hasKeysBeforeRotation: shapes[.keysBeforeRotation] != nil)
  }

  private static func number(_ key: String, _ metadata: [String: String]) throws(KVError) -> Double? {
    guard let text = metadata[key] else { return nil }
    guard let value = Double(text), value.isFinite, value > 0 else {
      throw KVError(
        .corruptFile,
        "__metadata__ '\(key)': expected a positive finite number, found '\(HeaderScanner.excerpt(text))'")
    }
    return value
  }
}
