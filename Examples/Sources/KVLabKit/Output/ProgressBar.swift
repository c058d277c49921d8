internal import Foundation

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// Steps of long work. `advance` is called before each step with what it does.
package protocol Progress: AnyObject {
  func begin(steps: Int)
  func advance(_ label: String)
  func end()
}

/// Says nothing.
package final class NoProgress: Progress {
  package init() {}
  package func begin(steps: Int) {}
  package func advance(_ label: String) {}
  package func end() {}
}

/// A bar on standard error, redrawn in place. Only where standard error is a terminal; elsewhere it prints nothing.
package final class ProgressBar: Progress {
  private let visible = isatty(STDERR_FILENO) == 1
  private var steps = 1
  private var done = -1

  package init() {}

  package func begin(steps: Int) {
    self.steps = max(steps, 1)
    done = -1
  }

  package func advance(_ label: String) {
    done += 1
    guard visible else { return }
    let width = 24
    let filled = min(width, width * done / steps)
    let bar = String(repeating: "█", count: filled) + String(repeating: "·", count: width - filled)
    write("\r\u{1B}[K\(bar) \(min(done + 1, steps))/\(steps) \(label.prefix(48))")
  }

  package func end() { if visible { write("\r\u{1B}[K") } }

  private func write(_ text: String) { FileHandle.standardError.write(Data(text.utf8)) }
}
