import Foundation
import KVCompression

/// Reads whole small files (configuration, tokenizer, shard index) with errors that name the file.
enum FileReading {
  static func bytes(of path: String, atMost limit: Int) throws(KVError) -> [UInt8] {
    do {
      let attributes = try FileManager.default.attributesOfItem(atPath: path)
      let size = (attributes[.size] as? NSNumber)?.intValue ?? 0
      guard size <= limit else {
        throw KVError(.corruptFile, "\(path) has \(size) bytes; at most \(limit) are read of such a file")
      }
      return Array(try Data(contentsOf: URL(fileURLWithPath: path)))
    } catch let error as KVError {
      throw error
    } catch {
      throw KVError(.inputOutput, "\(path) cannot be read: \(error.localizedDescription)")
    }
  }

  static func json(at path: String, atMost limit: Int) throws(KVError) -> JSONObject {
    try JSONObject(JSONParser.parse(bytes(of: path, atMost: limit), file: path), file: path)
  }

  static func exists(_ path: String) -> Bool { FileManager.default.fileExists(atPath: path) }
}
