import ArgumentParser
import KVCompression
import KVLabKit
import ReferenceEngine

struct GenerateCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "generate",
    abstract: "Text from a model under a policy, with bytes and speed.",
    discussion: "The text goes to standard output, the numbers to standard error.")

  @Option(help: "What compresses the cache.")
  var policy = "f16"
  @Option(help: "The beginning of the text.")
  var prompt: String?
  @Option(help: "Or a file that holds it.")
  var promptFile: String?
  @Option(help: "Directory of a HuggingFace checkpoint. Default: the packaged model.")
  var model: String?
  @Option(help: "Tokens to generate at most.")
  var maxTokens = 128
  @Option(help: "0 takes the most likely token.")
  var temperature: Float = 0
  @Option(help: "Draws from the most likely tokens that reach this probability together.")
  var topP: Float = 1
  @Option(help: "Of the sampling.")
  var seed: UInt64 = 0
  @Option(help: "Writes text, bytes and speed as JSON.")
  var json: String?
  @OptionGroup var threading: ThreadsOption

  func validate() throws {
    guard (prompt == nil) != (promptFile == nil) else {
      throw ValidationError("say either --prompt TEXT or --prompt-file FILE")
    }
  }

  func run() throws {
    try reportingErrors { () throws(KVError) in
      let named = try NamedPolicy(policy)
      let text: String
      if let promptFile { text = try TextFile.read(promptFile) } else { text = prompt ?? "" }
      var generation = Generation(
        policy: named, prompt: text,
        options: GenerationOptions(
          maximumTokens: maxTokens,
          sampling: SamplingOptions(temperature: temperature, topP: topP, seed: seed)))
      generation.threads = threading.threads
      let result = try generation.run(Engine(directory: PackagedFiles.model(or: model))) { printNow($0) }
      printNow("\n")
      printError(result.summary)
      if let json { try TextFile.write(result.json.pretty, to: json) }
    }
  }
}
