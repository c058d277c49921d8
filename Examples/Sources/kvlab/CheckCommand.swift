import ArgumentParser
import KVCompression
import KVExperiments
import KVLabKit

struct CheckCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "check",
    abstract: "A backend against the portable kernels, with every registered method.",
    discussion: """
      Caches live on both, fed with the same numbers: outputs must agree to f32 rounding, latents that libraries of a \
      card made to f16 rounding, and the same rows must stay. \
      Exit code 1 when one does not.
      """)

  @Option(help: "Only policies whose text contains this.")
  var filter: String?
  @OptionGroup var threading: ThreadsOption
  @OptionGroup var placing: BackendOption

  func run() throws {
    try reportingErrors { () throws(KVError) in
      let backend = try placing.backend.backend(threads: threading.threads)
      print("\(backend.name); rows are factored by \(backend.linearAlgebra)")
      let reference = try Backend.cpu(level: "portable")
      let layer = LayerShape(queryHeads: 8, kvHeads: 2, keyDim: 64, valueDim: 64)
      let rotary = try RotaryEmbedding(headDim: 64)
      var failures: [String] = []
      for item in try Conformance.cases(of: .standard, layer: layer, rotary: rotary)
      where filter.map(item.text.contains) ?? true {
        let shape = ModelShape(layers: Array(repeating: layer, count: item.layers), rotary: rotary)
        var conformance = Conformance(backend, against: reference, shape: shape)
        conformance.prompt = [33, 1, 270]
        conformance.decoded = 12
        conformance.bound = 2e-5
        var complaint: String?
        do throws(KVError) {
          let outcome = try conformance.run(item.policy)
          complaint = outcome.complaint
          printNow("\(item.text): \(complaint ?? "agrees"), off by \(outcome.distance)\n")
        } catch {
          complaint = error.description
          printNow("\(item.text): \(error)\n")
        }
        if complaint != nil { failures.append(item.text) }
      }
      if !failures.isEmpty {
        throw KVError(.unsupported, "differs from the portable kernels: \(failures.joined(separator: ", "))")
      }
    }
  }
}
