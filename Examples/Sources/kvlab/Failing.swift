import ArgumentParser
import Foundation
import KVCompression
import KVLabKit

/// Runs a command; what the library or the engine throws becomes one line on standard error and exit code 1.
func reportingErrors(_ body: () throws(KVError) -> Void) throws {
  do throws(KVError) {
    try body()
  } catch {
    let line = error.description.split(whereSeparator: \.isNewline).joined(separator: " ")
    FileHandle.standardError.write(Data("kvlab: \(line)\n".utf8))
    throw ExitCode(1)
  }
}

/// Prints without waiting for the end of a line or of the program.
func printNow(_ text: String) { FileHandle.standardOutput.write(Data(text.utf8)) }

/// Thread counts as a flag gives them: `1,2`.
func threadList(_ text: String) throws -> [Int] {
  let counts = text.split(separator: ",", omittingEmptySubsequences: false).map { Int($0) }
  guard !counts.isEmpty, counts.allSatisfy({ (1...1024).contains($0 ?? 0) }) else {
    throw ValidationError("expected thread counts of 1 to 1024 such as 1,2; got '\(text)'")
  }
  return counts.compactMap { $0 }
}

extension BackendChoice: ExpressibleByArgument {}

struct BackendOption: ParsableArguments {
  @Option(help: "Where caches live: cpu, or cuda for the first NVIDIA card.")
  var backend = BackendChoice.cpu
}

struct ThreadsOption: ParsableArguments {
  @Option(help: "Threads the cache's backend may use. Default: the cores there are, or KV_THREADS.")
  var threads: Int?

  func validate() throws {
    if let threads, !(1...1024).contains(threads) {
      throw ValidationError("--threads must lie in 1...1024; got \(threads)")
    }
  }
}

/// A line on standard error.
func printError(_ text: String) { FileHandle.standardError.write(Data((text + "\n").utf8)) }
