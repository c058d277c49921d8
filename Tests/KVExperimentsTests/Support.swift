import Foundation
import KVCore
import KVExperiments
import Testing

/// Runs `body` for every value; a failure inside prints the label and the value.
func withEvery<Values: Sequence>(
  _ label: String, in values: Values, _ body: (Values.Element) throws -> Void
) rethrows {
  for value in values {
    do { try body(value) } catch {
      Issue.record("at \(label) = \(value)")
      throw error
    }
  }
}

/// Calls `body` with a path in a fresh directory, which goes away afterwards.
func withTemporaryPath(_ body: (String) throws -> Void) throws {
  let directory = FileManager.default.temporaryDirectory.appendingPathComponent("kvexperiments-\(UUID().uuidString)")
  try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
  defer { try? FileManager.default.removeItem(at: directory) }
  try body(directory.appendingPathComponent("file.safetensors").path)
}

/// Expects a `KVError` of `code` whose text holds every one of `parts`; returns it for further checks.
@discardableResult
func expectError<Result>(
  _ code: KVError.Code, _ parts: String..., sourceLocation: SourceLocation = #_sourceLocation,
  _ body: () throws -> Result
) -> KVError? {
  do {
    _ = try body()
    Issue.record("expected an error of code '\(code)'", sourceLocation: sourceLocation)
  } catch let error as KVError {
    #expect(error.code == code, "\(error)", sourceLocation: sourceLocation)
    for part in parts {
      #expect(error.message.contains(part), "'\(part)' is not in: \(error)", sourceLocation: sourceLocation)
    }
    return error
  } catch {
    Issue.record("expected a KVError, got \(error)", sourceLocation: sourceLocation)
  }
  return nil
}

/// A safetensors file of a literal header and data.
func file(_ header: String, data: Int = 0) -> [UInt8] { file(Array(header.utf8), data: data) }

func file(_ header: [UInt8], data: Int = 0) -> [UInt8] {
  (0..<8).map { UInt8(truncatingIfNeeded: header.count >> ($0 * 8)) } + header
    + (0..<data).map { UInt8(truncatingIfNeeded: $0) }
}
