/// The section SHAP of a saved cache, drawn in ``SavedCache``.
extension ModelShape {
  func encode(to writer: inout ByteWriter) {
    writer.count(layers.count)
    writer.bool(rotary != nil)
    rotary?.encode(to: &writer)
    for layer in layers { layer.encode(to: &writer) }
  }

  init(from reader: inout ByteReader) throws(KVError) {
    let count = try reader.count("layers", of: LayerShape.smallestEncoding)
    guard count <= SavedCache.maximumLayers else {
      throw reader.corrupt("expected at most \(SavedCache.maximumLayers) layers; found \(count)")
    }
    var rotary: RotaryEmbedding?
    if try reader.bool("whether there is a rotary embedding") { rotary = try RotaryEmbedding(from: &reader) }
    var layers: [LayerShape] = []
    for index in 0..<count {
      let layer = try LayerShape(from: &reader)
      do throws(KVError) { try layer.validate(layer: index) } catch { throw reader.corrupt("\(error)") }
      layers.append(layer)
    }
    self.init(layers: layers, rotary: rotary)
  }

  /// The first thing in which this shape, read from a file, differs from the one a caller expects; nil when they are
  /// equal.
  func difference(from expected: ModelShape) -> String? {
    if self == expected { return nil }
    if layers.count != expected.layers.count {
      return "\(layers.count) layers in the file, \(expected.layers.count) were given"
    }
    for (index, (own, other)) in zip(layers, expected.layers).enumerated() where own != other {
      return "layer \(index) has \(own.summary) in the file, \(other.summary) were given"
    }
    func text(_ rotary: RotaryEmbedding?) -> String { rotary.map { "\($0.summary)" } ?? "no rotary embedding" }
    return "\(text(rotary)) in the file, \(text(expected.rotary)) was given"
  }
}

extension LayerShape {
  fileprivate static let smallestEncoding = 18

  /// Whether a file can hold it. Shapes of cached layers are checked by a cache; others may say anything.
  var isSavable: Bool {
    (0...SavedCache.maximumHeads).contains(kvHeads) && (0...SavedCache.maximumHeads).contains(queryHeads)
      && (0...4096).contains(keyDim) && (0...4096).contains(valueDim) && slidingWindow ?? 1 >= 1
  }

  fileprivate func encode(to writer: inout ByteWriter) {
    writer.bool(cached)
    for number in [kvHeads, queryHeads, keyDim, valueDim] { writer.u32(UInt32(number)) }
    writer.bool(slidingWindow != nil)
    if let slidingWindow { writer.count(slidingWindow) }
  }

  fileprivate init(from reader: inout ByteReader) throws(KVError) {
    let cached = try reader.bool("whether a layer is cached")
    self.init(
      queryHeads: 0, kvHeads: Int(try reader.u32("KV heads")), keyDim: 0, valueDim: 0, slidingWindow: nil)
    queryHeads = Int(try reader.u32("query heads"))
    keyDim = Int(try reader.u32("channels of a key"))
    valueDim = Int(try reader.u32("channels of a value"))
    self.cached = cached
    if try reader.bool("whether there is a sliding window") {
      slidingWindow = try reader.count("a sliding window", in: 1...Int.max)
    }
    guard isSavable else { throw reader.corrupt("expected heads and channels of a model; found \(summary)") }
  }

  fileprivate var summary: String {
    let window = slidingWindow.map { ", a sliding window of \($0)" } ?? ""
    return (cached ? "" : "no cache, ")
      + "\(kvHeads) KV and \(queryHeads) query heads, \(keyDim) key and \(valueDim) value channels" + window
  }
}
