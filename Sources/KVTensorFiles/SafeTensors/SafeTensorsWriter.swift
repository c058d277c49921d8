public import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// Collects tensors and writes them as one safetensors file.
///
/// The same tensors and metadata give the same bytes, whatever the order of the calls: tensors lie widest element type
/// first and then by name, metadata by key. Spaces after the header put the data, and with it every tensor, on a
/// multiple of its element size.
///
/// ```swift
/// var writer = SafeTensorsWriter()
/// try writer.add("layers.0.keys", shape: [2, 4, 8], floats: keys, as: .bf16)
/// try writer.write(to: "dump.safetensors")
/// ```
public struct SafeTensorsWriter: Sendable {
  /// Texts for `__metadata__`.
  public var metadata: [String: String] = [:]
  private var tensors: [String: (type: SafeTensorsType, shape: [Int], bytes: [UInt8])] = [:]

  public init(metadata: [String: String] = [:]) {
    self.metadata = metadata
  }

  /// Names added so far, sorted.
  public var names: [String] { tensors.keys.sorted() }

  /// Adds a tensor by its bytes, row-major, little end first.
  ///
  /// - Throws: `shapeMismatch` when the bytes are not what type and shape take; `invalidOption` when the name is taken
  ///   or is `__metadata__`. A call that throws has added nothing.
  public mutating func add(
    _ name: String, type: SafeTensorsType, shape: [Int], bytes: [UInt8]
  ) throws(KVError) {
    try check(name)
    guard let expected = type.byteCount(shape: shape), expected == bytes.count else {
      let wanted = type.byteCount(shape: shape).map { "\($0) bytes" } ?? "a number of bytes that does not exist"
      throw KVError(
        .shapeMismatch, "tensor '\(name)': \(type) elements of shape \(shape) take \(wanted), found \(bytes.count)")
    }
    tensors[name] = (type, shape, bytes)
  }

  /// Adds f32 numbers, stored as `type`: F64, F32, F16 or BF16, rounded to nearest even.
  ///
  /// - Throws: as ``add(_:type:shape:bytes:)``; `unrepresentable` when a finite number overflows `type`;
  ///   `invalidOption` for another type.
  public mutating func add(
    _ name: String, shape: [Int], floats: [Float], as type: SafeTensorsType = .f32
  ) throws(KVError) {
    try checkCount(name, shape, floats.count)
    let bytes: [UInt8]
    switch type {
    case .f64: bytes = SafeTensorsWriter.bytes(floats) { Double($0).bitPattern }
    case .f32: bytes = SafeTensorsWriter.bytes(floats) { $0.bitPattern }
    case .f16, .bf16:
      var lost: Int?
      var index = 0
      bytes = SafeTensorsWriter.bytes(floats) { value -> UInt16 in
        defer { index += 1 }
        if let bits = type == .f16 ? HalfCoding.narrow(toHalf: value) : HalfCoding.narrow(toBfloat: value) {
          return bits
        }
        lost = lost ?? index
        return 0
      }
      if let lost {
        throw KVError(.unrepresentable, "tensor '\(name)': \(floats[lost]) at index \(lost) overflows \(type)")
      }
    default:
      throw KVError(.invalidOption, "tensor '\(name)': numbers can be stored as F64, F32, F16 or BF16, not as \(type)")
    }
    try add(name, type: type, shape: shape, bytes: bytes)
  }

  /// Adds an I32 tensor.
  ///
  /// - Throws: as ``add(_:type:shape:bytes:)``.
  public mutating func add(_ name: String, shape: [Int], int32s: [Int32]) throws(KVError) {
    try checkCount(name, shape, int32s.count)
    try add(name, type: .i32, shape: shape, bytes: SafeTensorsWriter.bytes(int32s) { UInt32(bitPattern: $0) })
  }

  /// Adds a U8 tensor.
  ///
  /// - Throws: as ``add(_:type:shape:bytes:)``.
  public mutating func add(_ name: String, shape: [Int], uint8s: [UInt8]) throws(KVError) {
    try add(name, type: .u8, shape: shape, bytes: uint8s)
  }

  /// The whole file in memory.
  ///
  /// - Throws: `unsupported` when the header would pass the format's 100 MB.
  public func serialized() throws(KVError) -> [UInt8] {
    let names = orderedNames
    var file = try header(names)
    for name in names { file += tensors[name]?.bytes ?? [] }
    return file
  }

  /// Writes the file beside `path` under a temporary name and then renames it, so that `path` holds either what it
  /// held before or the complete new file.
  ///
  /// - Throws: `inputOutput` when the directory or the disk refuses, `unsupported` as ``serialized()``. Nothing is left
  ///   behind then.
  public func write(to path: String) throws(KVError) {
    let names = orderedNames
    let header = try header(names)
    guard !path.isEmpty, !path.utf8.contains(0) else {
      throw KVError(.inputOutput, "a path must hold a name and no zero byte")
    }
    // Unique among the processes and threads that may write the same path.
    let temporary = "\(path).\(getpid()).\(UInt64.random(in: 0...UInt64.max)).tmp"
    let descriptor = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o644)
    guard descriptor >= 0 else {
      throw KVError(.inputOutput, "cannot create '\(temporary)': \(systemErrorText())")
    }
    var isOpen = true
    do throws(KVError) {
      try SafeTensorsWriter.writeAll(header, to: descriptor, path: temporary)
      for name in names {
        try SafeTensorsWriter.writeAll(tensors[name]?.bytes ?? [], to: descriptor, path: temporary)
      }
      let synced = fsync(descriptor) == 0
      isOpen = false
      guard close(descriptor) == 0, synced else {
        throw KVError(.inputOutput, "cannot finish '\(temporary)': \(systemErrorText())")
      }
      guard rename(temporary, path) == 0 else {
        throw KVError(.inputOutput, "cannot rename '\(temporary)' to '\(path)': \(systemErrorText())")
      }
    } catch {
      if isOpen { close(descriptor) }
      unlink(temporary)
      throw error
    }
  }

  private func check(_ name: String) throws(KVError) {
    guard name != "__metadata__" else {
      throw KVError(.invalidOption, "'__metadata__' is no name for a tensor; set `metadata` instead")
    }
    guard tensors[name] == nil else { throw KVError(.invalidOption, "tensor '\(name)' was added before") }
  }

  private func checkCount(_ name: String, _ shape: [Int], _ count: Int) throws(KVError) {
    try check(name)
    guard elementCount(of: shape) == count else {
      throw KVError(
        .shapeMismatch, "tensor '\(name)': shape \(shape) does not hold the \(count) elements that were given")
    }
  }

  /// Widest type first: every tensor then begins on a multiple of its element size.
  private var orderedNames: [String] {
    tensors.sorted { ($1.value.type.bits, $0.key) < ($0.value.type.bits, $1.key) }.map(\.key)
  }

  /// The 8 bytes of length and the JSON text, padded to a multiple of 8.
  private func header(_ names: [String]) throws(KVError) -> [UInt8] {
    var members: [String] = []
    if !metadata.isEmpty {
      let texts = metadata.sorted { $0.key < $1.key }.map { "\(quoted($0.key)):\(quoted($0.value))" }
      members.append("\"__metadata__\":{\(texts.joined(separator: ","))}")
    }
    var offset = 0
    for name in names {
      guard let tensor = tensors[name] else { continue }
      let end = offset + tensor.bytes.count
      let shape = tensor.shape.map(String.init).joined(separator: ",")
      members.append(
        "\(quoted(name)):{\"dtype\":\"\(tensor.type)\",\"shape\":[\(shape)],\"data_offsets\":[\(offset),\(end)]}")
      offset = end
    }
    var json = Array("{\(members.joined(separator: ","))}".utf8)
    json.append(contentsOf: repeatElement(0x20, count: -json.count & 7))
    guard json.count <= SafeTensorsHeader.longestHeader else {
      throw KVError(
        .unsupported, "the header would take \(json.count) bytes; the format allows \(SafeTensorsHeader.longestHeader)")
    }
    return (0..<8).map { UInt8(truncatingIfNeeded: json.count >> ($0 * 8)) } + json
  }

  private func quoted(_ text: String) -> String {
    var result = "\""
    for scalar in text.unicodeScalars {
      switch scalar {
      case "\"": result += "\\\""
      case "\\": result += "\\\\"
      case "\n": result += "\\n"
      case _ where scalar.value < 0x20:
        let digits = String(scalar.value, radix: 16)
        result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
      default: result.unicodeScalars.append(scalar)
      }
    }
    return result + "\""
  }

  private static func bytes<Element, Word: FixedWidthInteger>(
    _ elements: [Element], _ convert: (Element) -> Word
  ) -> [UInt8] {
    var result: [UInt8] = []
    result.reserveCapacity(elements.count * MemoryLayout<Word>.size)
    for element in elements {
      withUnsafeBytes(of: convert(element).littleEndian) { result.append(contentsOf: $0) }
    }
    return result
  }

  private static func writeAll(_ bytes: [UInt8], to descriptor: Int32, path: String) throws(KVError) {
    var done = 0
    while done < bytes.count {
      let result = bytes.withUnsafeBytes { raw in
        raw.baseAddress.map { systemWrite(descriptor, $0 + done, raw.count - done) } ?? 0
      }
      if result < 0, errno == EINTR { continue }
      guard result > 0 else { throw KVError(.inputOutput, "cannot write '\(path)': \(systemErrorText())") }
      done += result
    }
  }
}

/// `write(2)`, under a name that a method called `write` does not hide.
private func systemWrite(_ descriptor: Int32, _ base: UnsafeRawPointer, _ count: Int) -> Int {
  write(descriptor, base, count)
}
