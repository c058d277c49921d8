public import KVCore

/// Calibrations in safetensors files.
///
/// ```
/// tensors        layers.L.keys.NAME, layers.L.values.NAME     NAME: small letters, digits, _
///                F64, F32, F16, BF16: numbers                 I64, I32, U32, I16, U16, I8, U8: integers
/// __metadata__   format=kv-calibration · version=1 · method · rope=pre or post · tokens · further texts
/// ```
extension Calibration {
  private static let format = "kv-calibration"
  private static let version = "1"
  private static let reserved = ["format", "version"]
  /// Metadata of a file that is taken in.
  private static let longestMetadata = 1 << 20

  /// Reads a whole file.
  ///
  /// - Throws: `inputOutput`; `corruptFile` for anything that is no calibration of this version; `nonFinite`,
  ///   `unrepresentable` and `shapeMismatch` that name the tensor.
  /// - Complexity: O(bytes of the file).
  public init(contentsOf path: String) throws(KVError) {
    do throws(KVError) {
      try self.init(SafeTensorsFile(path: path))
    } catch {
      var error = error
      if error.code != .inputOutput { error.message = "\(path): \(error.message)" }
      throw error
    }
  }

  /// A calibration in an open file.
  ///
  /// - Throws: as ``init(contentsOf:)``.
  public init(_ file: SafeTensorsFile) throws(KVError) {
    guard file.metadata["format"] == Self.format else {
      throw KVError(
        .corruptFile,
        "expected a calibration, a safetensors file whose __metadata__ says format=\(Self.format); this one says "
          + (file.metadata["format"].map { "format=\(HeaderScanner.excerpt($0))" } ?? "no format"))
    }
    guard file.metadata["version"] == Self.version else {
      throw KVError(
        .corruptFile,
        "expected a calibration of version \(Self.version); found "
          + (file.metadata["version"].map { HeaderScanner.excerpt($0) } ?? "none"))
    }
    let texts = file.metadata.filter { !Self.reserved.contains($0.key) }
    guard texts.reduce(0, { $0 + $1.key.utf8.count + $1.value.utf8.count }) <= Self.longestMetadata else {
      throw KVError(.corruptFile, "expected at most \(Self.longestMetadata) bytes of texts in a calibration")
    }
    var tensors: [Name: Tensor] = [:]
    for (text, entry) in file.tensors {
      guard let name = Name(text) else {
        throw KVError(
          .corruptFile,
          "expected tensors called layers.L.keys.NAME or layers.L.values.NAME; found '\(HeaderScanner.excerpt(text))'",
          offset: entry.byteRange.lowerBound)
      }
      if [.f64, .f32, .f16, .bf16].contains(entry.type) {
        tensors[name] = Tensor(shape: entry.shape, numbers: try file.floats(named: text))
      } else {
        tensors[name] = Tensor(shape: entry.shape, integers: try file.int32s(named: text))
      }
    }
    try self.init(tensors, metadata: texts)
  }

  /// Writes a file that ``init(contentsOf:)`` reads; the same calibration gives the same bytes. The path holds what it
  /// held before or the complete new file.
  ///
  /// - Throws: `inputOutput`, `invalidOption` for metadata called `format` or `version`.
  public func write(to path: String) throws(KVError) { try writer().write(to: path) }

  /// The bytes of that file.
  ///
  /// - Throws: as ``write(to:)``.
  public func serialized() throws(KVError) -> [UInt8] { try writer().serialized() }

  private func writer() throws(KVError) -> SafeTensorsWriter {
    if let taken = Self.reserved.first(where: { metadata[$0] != nil }) {
      throw KVError(.invalidOption, "a calibration's own texts cannot be called \(taken)")
    }
    var writer = SafeTensorsWriter(metadata: metadata)
    writer.metadata["format"] = Self.format
    writer.metadata["version"] = Self.version
    for (name, tensor) in tensors {
      switch tensor.elements {
      case .numbers(let values): try writer.add(name.text, shape: tensor.shape, floats: values)
      case .integers(let values): try writer.add(name.text, shape: tensor.shape, int32s: values)
      }
    }
    return writer
  }
}

/// A calibration and what policy texts call it.
public struct NamedCalibration: Hashable, Sendable {
  public let calibration: Calibration
  /// The path as a text wrote it; empty for a calibration that was made in code.
  public let source: String

  public init(_ calibration: Calibration, source: String = "") {
    self.calibration = calibration
    self.source = source
  }

  /// The calibration in a file.
  ///
  /// - Throws: as ``Calibration/init(contentsOf:)``.
  public init(contentsOf path: String) throws(KVError) {
    self.init(try Calibration(contentsOf: path), source: path)
  }

  /// The two options of a text, `calibration` and `checksum`. Without a calibration, the empty path.
  package static func options(_ named: NamedCalibration?) -> [SpecOption] {
    [SpecOption("calibration", .text(named?.source ?? ""))]
      + (named.map { [SpecOption("checksum", .text($0.calibration.checksumText))] } ?? [])
  }

  /// Their descriptions.
  package static let descriptions: [MethodDescription.Option] = [
    .init("calibration", "path of a calibration file"),
    .init("checksum", "of the calibration; a file with another is refused"),
  ]

  /// What a policy says whose text named no calibration, when it is given a model.
  package static func missing(_ method: String) -> KVError {
    KVError(
      .missingInput,
      "\(method) needs a calibration: a path in its text, such as \(method)(calibration=\"file.safetensors\"), or a "
        + "value in code")
  }
}

extension OptionReader {
  /// The calibration that a text names by its path, and by its checksum when it gives one. Nil for the empty path.
  ///
  /// - Throws: as ``Calibration/init(contentsOf:)``; `invalidOption` when the checksum is none, or the file not
  ///   the one that the text means.
  package mutating func calibration() throws(KVError) -> NamedCalibration? {
    let path = try string("calibration", default: "")
    offer("checksum")
    let wanted = has("checksum") ? try string("checksum") : nil
    if let wanted, !Calibration.isChecksumText(wanted) {
      throw KVError(
        .invalidOption,
        "checksum of \(stage.name) must be xxh64- and 16 hexadecimal digits; got \"\(wanted)\"", offset: stage.offset)
    }
    if path.isEmpty {
      guard let wanted else { return nil }
      throw KVError(
        .missingInput,
        "\(stage.name) was made with a calibration in code, \(wanted), that no text can name; make the policy in code "
          + "and give it where a policy is asked for", offset: stage.offset)
    }
    let named: NamedCalibration
    do throws(KVError) {
      named = try NamedCalibration(contentsOf: path)
    } catch {
      throw KVError(error.code, "calibration of \(stage.name): \(error.message)", offset: stage.offset)
    }
    guard wanted == nil || wanted == named.calibration.checksumText else {
      throw KVError(
        .invalidOption,
        "\(path) holds the calibration \(named.calibration.checksumText); the text means \(wanted ?? "")",
        offset: stage.offset)
    }
    return named
  }
}
