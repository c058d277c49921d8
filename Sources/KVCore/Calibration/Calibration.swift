/// What was measured on samples of a model before any cache was made: bases, channel orders, ranks. Policies are made
/// with it.
///
/// Tensors are named by layer, side and quantity, such as the keys' `order` of layer 3; where heads have numbers of their
/// own, the first dimension counts KV heads. Which quantities there are depends on the method that wants them; what no
/// method asks for is carried along.
public struct Calibration: Hashable, Sendable {
  /// Keys or values.
  public enum Side: String, Hashable, Sendable, CaseIterable {
    case keys, values
  }

  /// Which tensor.
  public struct Name: Hashable, Sendable {
    public let layer: Int
    public let side: Side
    /// Letters, digits and `_`.
    public let quantity: String

    public init(layer: Int, side: Side, quantity: String) {
      self.layer = layer
      self.side = side
      self.quantity = quantity
    }
  }

  /// Numbers in rows, the last dimension innermost.
  public struct Tensor: Hashable, Sendable {
    public enum Elements: Hashable, Sendable {
      case numbers([Float])
      case integers([Int32])
    }

    public let shape: [Int]
    public let elements: Elements

    public init(shape: [Int], numbers: [Float]) {
      self.shape = shape
      elements = .numbers(numbers)
    }

    public init(shape: [Int], integers: [Int32]) {
      self.shape = shape
      elements = .integers(integers)
    }

    public var count: Int {
      switch elements {
      case .numbers(let values): values.count
      case .integers(let values): values.count
      }
    }
  }

  public let tensors: [Name: Tensor]
  /// What else is known: `method`, `rope` (`pre` or `post`: keys were seen before or after their rotary embedding),
  /// `tokens`, and whatever the maker added.
  public let metadata: [String: String]
  /// Of all tensors and texts. It names the calibration in policy texts and saved caches.
  public let checksum: UInt64

  static let maximumLayers = 1 << 16

  /// - Throws: `invalidOption` without a tensor, for negative layers and for names that are not one word;
  ///   `shapeMismatch` where shape and count differ; `nonFinite`. Each names the tensor.
  public init(_ tensors: [Name: Tensor], metadata: [String: String] = [:]) throws(KVError) {
    guard !tensors.isEmpty else { throw KVError(.invalidOption, "a calibration holds at least one tensor; got none") }
    for (name, tensor) in tensors { try Self.check(name, tensor) }
    self.tensors = tensors
    self.metadata = metadata
    checksum = Self.checksum(tensors, metadata)
  }

  private static func check(_ name: Name, _ tensor: Tensor) throws(KVError) {
    guard (0..<maximumLayers).contains(name.layer) else {
      throw KVError(.invalidOption, "layers of a calibration lie in 0..<\(maximumLayers); got \(name.layer)")
    }
    let letters = name.quantity.utf8
    guard (1...64).contains(letters.count),
      letters.allSatisfy({ (0x61...0x7A).contains($0) || (0x30...0x39).contains($0) || $0 == 0x5F })
    else {
      throw KVError(
        .invalidOption,
        "a quantity of a calibration is called by 1...64 small letters, digits and _; got \"\(name.quantity.prefix(80))\"",
        layer: name.layer)
    }
    var count = 1
    for dimension in tensor.shape {
      let (product, overflow) = count.multipliedReportingOverflow(by: dimension)
      count = overflow || dimension < 1 ? -1 : product
      if count < 0 { break }
    }
    guard count == tensor.count, !tensor.shape.isEmpty else {
      throw KVError(
        .shapeMismatch, "\(name): \(tensor.count) elements do not have the shape \(tensor.shape.prefix(8))",
        layer: name.layer)
    }
    if case .numbers(let values) = tensor.elements, let place = values.firstIndex(where: { !$0.isFinite }) {
      throw KVError(.nonFinite, "\(name): element \(place) is NaN or infinite", layer: name.layer)
    }
  }

  private static func checksum(_ tensors: [Name: Tensor], _ metadata: [String: String]) -> UInt64 {
    var hash: UInt64 = 0
    func add(_ bytes: UnsafeRawBufferPointer) { hash = unsafe XXHash64.hash(bytes, seed: hash) }
    for name in tensors.keys.sorted(by: { $0.text < $1.text }) {
      guard let tensor = tensors[name] else { continue }
      hash = XXHash64.hash(Array("\(name) \(tensor.shape)".utf8), seed: hash)
      switch tensor.elements {
      case .numbers(let values): unsafe values.withUnsafeBytes { unsafe add($0) }
      case .integers(let values): unsafe values.withUnsafeBytes { unsafe add($0) }
      }
    }
    for (key, value) in metadata.sorted(by: { $0.key < $1.key }) {
      hash = XXHash64.hash(Array("\(key.utf8.count) \(key) \(value)".utf8), seed: hash)
    }
    return hash
  }

  /// The checksum as policy texts write it.
  public var checksumText: String {
    let digits = String(checksum, radix: 16)
    return "xxh64-" + String(repeating: "0", count: 16 - digits.count) + digits
  }

  /// Whether `text` has the form of ``checksumText``.
  package static func isChecksumText(_ text: String) -> Bool {
    text.hasPrefix("xxh64-") && text.utf8.count == 22
      && text.utf8.dropFirst(6).allSatisfy { (48...57).contains($0) || (97...102).contains($0) }
  }

  // MARK: Asking for tensors

  public func tensor(_ quantity: String, of side: Side, layer: Int) -> Tensor? {
    tensors[Name(layer: layer, side: side, quantity: quantity)]
  }

  /// Layers of which there is that quantity, ascending.
  public func layers(with quantity: String, of side: Side) -> [Int] {
    tensors.keys.filter { $0.side == side && $0.quantity == quantity }.map(\.layer).sorted()
  }

  /// Numbers that must be there, in a shape; nil dimensions may have any size.
  ///
  /// - Throws: `missingInput`, `shapeMismatch`, with the layer.
  public func numbers(
    _ quantity: String, of side: Side, layer: Int, shape: [Int?]
  ) throws(KVError) -> Tensor {
    let tensor = try required(quantity, side, layer, shape)
    guard case .numbers = tensor.elements else {
      throw KVError(
        .shapeMismatch, "\(Name(layer: layer, side: side, quantity: quantity)): numbers expected; these are integers",
        layer: layer)
    }
    return tensor
  }

  /// Integers that must be there, each within a range.
  ///
  /// - Throws: `missingInput`, `shapeMismatch`, `invalidOption`, with the layer.
  public func integers(
    _ quantity: String, of side: Side, layer: Int, shape: [Int?], in range: ClosedRange<Int>
  ) throws(KVError) -> [Int] {
    let name = Name(layer: layer, side: side, quantity: quantity)
    guard case .integers(let values) = try required(quantity, side, layer, shape).elements else {
      throw KVError(.shapeMismatch, "\(name): integers expected; these are numbers with fractions", layer: layer)
    }
    if let stranger = values.first(where: { !range.contains(Int($0)) }) {
      throw KVError(
        .invalidOption, "\(name): integers in \(range.lowerBound)...\(range.upperBound) expected; found \(stranger)",
        layer: layer)
    }
    return values.map { Int($0) }
  }

  /// Orders of channels, each channel once: the keys' or values' `order`, of every KV head (`units` heads of `width`
  /// channels) or of a layer's heads side by side (1 unit of all channels).
  ///
  /// - Throws: as ``integers(_:of:layer:shape:in:)``, and `invalidOption` with the unit, as head, whose order names a
  ///   channel twice.
  public func channelOrders(
    of side: Side, layer: Int, units: Int, width: Int
  ) throws(KVError) -> [[Int]] {
    let all = try integers("order", of: side, layer: layer, shape: [units, width], in: 0...max(0, width - 1))
    var orders: [[Int]] = []
    for unit in 0..<units {
      let order = Array(all[unit * width..<(unit + 1) * width])
      guard Set(order).count == width else {
        throw KVError(
          .invalidOption,
          "\(Name(layer: layer, side: side, quantity: "order")): each of \(width) channels once expected; some are named "
            + "twice", layer: layer, head: unit)
      }
      orders.append(order)
    }
    return orders
  }

  private func required(
    _ quantity: String, _ side: Side, _ layer: Int, _ shape: [Int?]
  ) throws(KVError) -> Tensor {
    let name = Name(layer: layer, side: side, quantity: quantity)
    guard let tensor = tensors[name] else {
      let there = tensors.keys.filter { $0.layer == layer }.map { "\($0)" }.sorted()
      throw KVError(
        .missingInput,
        "the calibration has no \(name); of this layer it has "
          + (there.isEmpty ? "nothing" : there.prefix(8).joined(separator: ", ")), layer: layer)
    }
    guard tensor.shape.count == shape.count, zip(tensor.shape, shape).allSatisfy({ $1 == nil || $0 == $1 }) else {
      let wanted = shape.map { $0.map(String.init) ?? "any" }.joined(separator: ", ")
      throw KVError(.shapeMismatch, "\(name): the shape [\(wanted)] expected; found \(tensor.shape)", layer: layer)
    }
    return tensor
  }

  // MARK: Where keys were seen

  /// Refuses a calibration of keys before their rotary embedding where those after are wanted, and the other way round.
  /// One that does not say is taken.
  ///
  /// - Throws: `invalidOption`.
  public func require(keysBeforeRotation: Bool) throws(KVError) {
    guard let rope = metadata["rope"], rope != (keysBeforeRotation ? "pre" : "post") else { return }
    throw KVError(
      .invalidOption,
      "a calibration of keys \(keysBeforeRotation ? "before" : "after") their rotary embedding (rope="
        + "\(keysBeforeRotation ? "pre" : "post")) expected; this one says rope=\(rope.prefix(16))")
  }
}

extension Calibration.Name: CustomStringConvertible {
  /// As a file names it: `layers.3.keys.order`.
  package var text: String { "layers.\(layer).\(side.rawValue).\(quantity)" }
  public var description: String { text }

  /// The tensor that a file calls `text`; nil for a name of another form.
  package init?(_ text: String) {
    let parts = text.split(separator: ".", omittingEmptySubsequences: false)
    guard parts.count == 4, parts[0] == "layers", let layer = Int(parts[1]), layer >= 0, String(layer) == parts[1],
      let side = Calibration.Side(rawValue: String(parts[2]))
    else { return nil }
    self.init(layer: layer, side: side, quantity: String(parts[3]))
  }
}
