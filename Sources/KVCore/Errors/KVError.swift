/// What went wrong, where, what was expected and what came instead.
///
/// `code` is a struct over an integer so that new codes never break a `switch` in an engine. Match it with
/// `catch let error where error.code == .missingInput`.
///
/// Everything in this library throws exactly this type. An operation that throws has changed nothing.
public struct KVError: Error, Hashable, Sendable {
  public struct Code: Hashable, Sendable {
    public let rawValue: Int
    public init(rawValue: Int) { self.rawValue = rawValue }

    /// A tensor's heads, tokens, channels or element type do not fit the model shape.
    public static let shapeMismatch = Code(rawValue: 1)
    /// A key, value, query or weight is NaN or infinite.
    public static let nonFinite = Code(rawValue: 2)
    /// A policy declared an input that the engine did not supply.
    public static let missingInput = Code(rawValue: 3)
    /// A number is out of the range an option allows, or options contradict each other.
    public static let invalidOption = Code(rawValue: 4)
    /// No policy, store or option of that name is registered.
    public static let unknownName = Code(rawValue: 5)
    /// A policy or JSON text does not parse; `offset` is the byte where it stopped.
    public static let syntax = Code(rawValue: 6)
    /// A file is truncated, altered, of an unknown version or not what it claims to be.
    public static let corruptFile = Code(rawValue: 7)
    /// The operation cannot be undone this far back, or not at all, on this cache.
    public static let irreversible = Code(rawValue: 8)
    /// The call came at a time of the cache's life where it has no meaning.
    public static let wrongPhase = Code(rawValue: 9)
    /// Memory could not be allocated.
    public static let outOfMemory = Code(rawValue: 10)
    /// A backend, CPU level or device that was asked for is not there.
    public static let unavailable = Code(rawValue: 11)
    /// A file could not be opened, read or written.
    public static let inputOutput = Code(rawValue: 12)
    /// A value does not fit the element type it must be stored in (f16 beyond ±65504, say).
    public static let unrepresentable = Code(rawValue: 13)
    /// The combination is legal to write down but this layer, store or backend cannot do it.
    public static let unsupported = Code(rawValue: 14)
  }

  public var code: Code
  /// One sentence: what was expected, what came, and what to do about it.
  public var message: String
  public var layer: Int?
  public var head: Int?
  /// Token position (absolute) the error is about.
  public var position: Int?
  /// Byte offset in the file or text the error is about.
  public var offset: Int?

  public init(
    _ code: Code, _ message: String, layer: Int? = nil, head: Int? = nil, position: Int? = nil, offset: Int? = nil
  ) {
    self.code = code
    self.message = message
    self.layer = layer
    self.head = head
    self.position = position
    self.offset = offset
  }

  /// The same error with a place filled in where it is still empty.
  public func at(layer: Int? = nil, head: Int? = nil, offset: Int? = nil) -> KVError {
    var copy = self
    if copy.offset == nil { copy.offset = offset }
    if copy.layer == nil { copy.layer = layer }
    if copy.head == nil { copy.head = head }
    return copy
  }
}

extension KVError: CustomStringConvertible {
  public var description: String {
    var place: [String] = []
    if let layer { place.append("layer \(layer)") }
    if let head { place.append("head \(head)") }
    if let position { place.append("position \(position)") }
    if let offset { place.append("byte \(offset)") }
    let prefix = place.isEmpty ? "\(code)" : "\(code) at \(place.joined(separator: ", "))"
    return "\(prefix): \(message)"
  }
}

extension KVError.Code: CustomStringConvertible {
  public var description: String {
    switch self {
    case .shapeMismatch: "shape mismatch"
    case .nonFinite: "not finite"
    case .missingInput: "missing input"
    case .invalidOption: "invalid option"
    case .unknownName: "unknown name"
    case .syntax: "syntax error"
    case .corruptFile: "corrupt file"
    case .irreversible: "irreversible"
    case .wrongPhase: "wrong phase"
    case .outOfMemory: "out of memory"
    case .unavailable: "unavailable"
    case .inputOutput: "input/output"
    case .unrepresentable: "not representable"
    case .unsupported: "unsupported"
    default: "error \(rawValue)"
    }
  }
}
