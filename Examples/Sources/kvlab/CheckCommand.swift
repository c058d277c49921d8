import ArgumentParser
import KVCompression
import KVLabKit

struct CheckCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "check",
    abstract: "A backend against the portable kernels, with every registered method.",
    discussion: """
      Caches live on both, fed with the same numbers: outputs must agree to f32 rounding and the same rows must stay. \
      Exit code 1 when one does not.
      """)

  @Option(help: "Only policies whose text contains this.")
  var filter: String?
  @OptionGroup var threading: ThreadsOption
  @OptionGroup var placing: BackendOption

  func run() throws {
    try reportingErrors { () throws(KVError) in
      let backend = try placing.backend.backend(threads: threading.threads)
      print(backend.name)
      let conformance = try Conformance(backend)
      var failures: [String] = []
      for text in Conformance.policies where filter.map(text.contains) ?? true {
        let outcome = conformance.run(text)
        printNow("\(text): \(outcome.complaint ?? "agrees")\(outcome.distance.map { ", off by \($0)" } ?? "")\n")
        if outcome.complaint != nil { failures.append(text) }
      }
      if !failures.isEmpty {
        throw KVError(.unsupported, "differs from the portable kernels: \(failures.joined(separator: ", "))")
      }
    }
  }
}
