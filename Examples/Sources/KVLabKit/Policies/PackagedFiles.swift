internal import Foundation
package import KVCompression

/// The model and the texts that come with this package.
package enum PackagedFiles {
  /// `Examples` of the checkout this program was built from, else the one the program is run in.
  private static var roots: [String] {
    let here = URL(fileURLWithPath: #filePath)
    var source = here
    for _ in 0..<4 { source.deleteLastPathComponent() }
    let current = FileManager.default.currentDirectoryPath
    return [source.path, current + "/Examples", current]
  }

  private static func find(_ name: String, flag: String) throws(KVError) -> String {
    for root in roots where FileManager.default.fileExists(atPath: root + "/" + name) { return root + "/" + name }
    throw KVError(
      .inputOutput, "the packaged \(name) was not found in \(roots.joined(separator: ", ")); say \(flag)")
  }

  /// The directory a flag names, or the reference model's.
  package static func model(or given: String?) throws(KVError) -> String {
    if let given { return given }
    return try find("Models/reference", flag: "--model DIR")
  }

  /// The text a flag names, or the directory of those written for this project.
  package static func texts(or given: String?) throws(KVError) -> String {
    if let given { return given }
    return try find("Texts", flag: "--text FILE")
  }

  /// The contents of a text file, or of every .txt file of a directory in order of their names.
  package static func readTexts(at path: String) throws(KVError) -> [String] {
    var isDirectory: ObjCBool = false
    guard FileManager.default.fileExists(atPath: path, isDirectory: &isDirectory) else {
      throw KVError(.inputOutput, "there is no file \(path)")
    }
    guard isDirectory.boolValue else { return [try TextFile.read(path)] }
    let names: [String]
    do {
      names = try FileManager.default.contentsOfDirectory(atPath: path).filter { $0.hasSuffix(".txt") }.sorted()
    } catch {
      throw KVError(.inputOutput, "could not list \(path): \(error.localizedDescription)")
    }
    guard !names.isEmpty else { throw KVError(.inputOutput, "the directory \(path) holds no .txt file") }
    var texts: [String] = []
    for name in names { texts.append(try TextFile.read(path + "/" + name)) }
    return texts
  }

  /// Adjectives and nouns of the needle names: the model's own `names.txt`, else the packaged one.
  package static func names(model: String) throws(KVError) -> NeedleNames {
    let own = model + "/names.txt"
    let path: String
    if FileManager.default.fileExists(atPath: own) { path = own } else { path = try self.model(or: nil) + "/names.txt" }
    return try NeedleNames(TextFile.read(path), file: path)
  }
}
