public import KVCore

/// A safetensors file, open for reading.
///
/// Opening reads and checks the header alone, O(header). A tensor's bytes are read when asked for, into the result and
/// nothing else. Nothing in a file can trap the process: every disagreement is a `corruptFile` error that says what was
/// expected, what came, in which tensor and at which byte.
///
/// The checks are those of the format: header within the file and at most 100 MB, valid UTF-8 and JSON, no duplicate
/// names, known element types, shapes that agree with byte lengths, and tensors that cover the data without overlap or
/// gap. A field of a tensor that the format does not have is read over.
///
/// Safe to share between threads.
public struct SafeTensorsFile: Sendable {
  /// Every tensor by name.
  public let tensors: [String: SafeTensorsEntry]
  /// The texts under `__metadata__`; empty without any.
  public let metadata: [String: String]
  private let source: ByteSource

  /// Opens the file at `path`.
  ///
  /// - Throws: `inputOutput` when the file cannot be opened or read, `corruptFile` when it is not valid safetensors.
  public init(path: String) throws(KVError) {
    try self.init(source: ByteSource(path: path))
  }

  /// Reads a file that is in memory already.
  ///
  /// - Throws: `corruptFile` when the bytes are not valid safetensors.
  public init(bytes: [UInt8]) throws(KVError) {
    try self.init(source: ByteSource(bytes))
  }

  private init(source: ByteSource) throws(KVError) {
    let prefix = try source.bytes(0..<min(8, source.count))
    let length = try SafeTensorsHeader.length(prefix: prefix, fileSize: source.count)
    let header = try SafeTensorsHeader(source.bytes(8..<8 + length), fileSize: source.count)
    self.tensors = header.tensors
    self.metadata = header.metadata
    self.source = source
  }

  /// The entry of a tensor that must be there.
  ///
  /// - Throws: `missingInput` when the file has no such tensor, `shapeMismatch` when `shape` is given and differs.
  public func entry(named name: String, shape: [Int]? = nil) throws(KVError) -> SafeTensorsEntry {
    guard let entry = tensors[name] else {
      let near = tensors.keys.sorted().prefix(6).map { HeaderScanner.excerpt($0) }.joined(separator: ", ")
      throw KVError(
        .missingInput,
        "no tensor '\(name)' in a file of \(tensors.count) tensors"
          + (near.isEmpty ? "" : " (\(near)\(tensors.count > 6 ? ", …" : ""))"))
    }
    if let shape, shape != entry.shape {
      throw KVError(
        .shapeMismatch, "tensor '\(name)': expected shape \(shape), found \(entry.shape)",
        offset: entry.byteRange.lowerBound)
    }
    return entry
  }

  /// The elements of an F64, F32, F16 or BF16 tensor as f32, row-major. F64 is rounded to nearest.
  ///
  /// - Parameter shape: when given, the shape the tensor must have.
  /// - Throws: `missingInput`, `shapeMismatch` (also for other element types), `inputOutput`.
  /// - Complexity: O(elements) time, one allocation of 4 bytes an element.
  public func floats(named name: String, shape: [Int]? = nil) throws(KVError) -> [Float] {
    let entry = try entry(named: name, shape: shape)
    switch entry.type {
    case .f64:
      return try source.convert(entry.byteRange, as: UInt64.self) { Float(Double(bitPattern: $0)) }
    case .f32: return try source.convert(entry.byteRange, as: UInt32.self) { Float(bitPattern: $0) }
    case .f16: return try source.convert(entry.byteRange, as: UInt16.self) { HalfCoding.widen(half: $0) }
    case .bf16: return try source.convert(entry.byteRange, as: UInt16.self) { HalfCoding.widen(bfloat: $0) }
    default: throw mismatch(name, entry, "F64, F32, F16 or BF16")
    }
  }

  /// The elements of an I32, I16, I8, U16, U8 or BOOL tensor, or of an I64, U64 or U32 tensor whose values fit.
  ///
  /// - Throws: `missingInput`, `shapeMismatch` (also for other element types), `unrepresentable` for a value beyond
  ///   32 bits, `inputOutput`.
  public func int32s(named name: String, shape: [Int]? = nil) throws(KVError) -> [Int32] {
    let entry = try entry(named: name, shape: shape)
    switch entry.type {
    case .i32: return try source.convert(entry.byteRange, as: Int32.self) { $0 }
    case .i16: return try source.convert(entry.byteRange, as: Int16.self) { Int32($0) }
    case .u16: return try source.convert(entry.byteRange, as: UInt16.self) { Int32($0) }
    case .i8: return try source.convert(entry.byteRange, as: Int8.self) { Int32($0) }
    case .u8, .bool: return try source.convert(entry.byteRange, as: UInt8.self) { Int32($0) }
    case .i64: return try narrowed(name, entry, Int64.self)
    case .u64: return try narrowed(name, entry, UInt64.self)
    case .u32: return try narrowed(name, entry, UInt32.self)
    default: throw mismatch(name, entry, "an integer type")
    }
  }

  /// The elements of a U8 or BOOL tensor.
  ///
  /// - Throws: `missingInput`, `shapeMismatch` (also for other element types), `inputOutput`.
  public func uint8s(named name: String, shape: [Int]? = nil) throws(KVError) -> [UInt8] {
    let entry = try entry(named: name, shape: shape)
    guard entry.type == .u8 || entry.type == .bool else { throw mismatch(name, entry, "U8 or BOOL") }
    return try source.bytes(entry.byteRange)
  }

  /// The bytes of a tensor of any type as they lie in the file.
  ///
  /// - Throws: `missingInput`, `inputOutput`.
  public func bytes(named name: String) throws(KVError) -> [UInt8] {
    try source.bytes(entry(named: name).byteRange)
  }

  private func narrowed<Word: FixedWidthInteger>(
    _ name: String, _ entry: SafeTensorsEntry, _ word: Word.Type
  ) throws(KVError) -> [Int32] {
    var lost: Word?
    let values = try source.convert(entry.byteRange, as: word) { value -> Int32 in
      if Int32(exactly: value) == nil, lost == nil { lost = value }
      return Int32(truncatingIfNeeded: value)
    }
    if let lost {
      throw KVError(
        .unrepresentable, "tensor '\(name)' holds \(lost), which does not fit 32 bits",
        offset: entry.byteRange.lowerBound)
    }
    return values
  }

  private func mismatch(_ name: String, _ entry: SafeTensorsEntry, _ wanted: String) -> KVError {
    KVError(
      .shapeMismatch, "tensor '\(name)': expected elements of \(wanted), found \(entry.type)",
      offset: entry.byteRange.lowerBound)
  }
}
