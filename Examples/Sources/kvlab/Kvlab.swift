import ArgumentParser
import KVCompression
import KVLabKit

/// Compare, run, apply, calibrate and measure KV cache compression.
@main
struct Kvlab: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "kvlab",
    abstract: "Compare, run, apply, calibrate and measure KV cache compression.",
    discussion: """
      A policy is a text: what chooses tokens, a plus, what stores them, such as
      "snapkv(budget=0.25,window=32)+kivi(bits=2)". 'kvlab policies' lists all names and options.
      """,
    subcommands: [
      CompareCommand.self, GenerateCommand.self, ApplyCommand.self, CalibrateCommand.self, PoliciesCommand.self,
      BenchCommand.self, CheckCommand.self,
    ])
}
