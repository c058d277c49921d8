import ArgumentParser
import KVCompression
import KVLabKit

struct PoliciesCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "policies", abstract: "What there is: options, defaults, needed inputs, papers.")

  @Flag(help: "As JSON.")
  var json = false

  func run() throws {
    try reportingErrors { () throws(KVError) in
      let catalogue = try PolicyCatalogue()
      if json { printNow(catalogue.json.pretty) } else { print(catalogue.text) }
    }
  }
}
