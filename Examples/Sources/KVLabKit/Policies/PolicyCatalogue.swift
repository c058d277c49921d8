package import KVCompression

/// Every registered method with its options, as `kvlab policies` shows it.
package struct PolicyCatalogue: Sendable {
  package struct Entry: Sendable {
    package let method: MethodDescription
    /// Options with the defaults that apply when none is given; an option that replaces another has none.
    package let defaults: [SpecOption]
    package let inputs: RequiredInputs
  }

  package let entries: [Entry]

  /// - Throws: nothing in practice: every method makes a policy from its defaults.
  package init(_ registry: PolicyRegistry = .standard) throws(KVError) {
    var entries: [Entry] = []
    for method in registry.methods {
      // A modifier stands behind something: behind what needs nothing, its own needs show.
      let text =
        switch method.role {
        case .modifier: "random+\(method.name)"
        case .storeModifier: "pertoken+\(method.name)"
        default: method.name
        }
      entries.append(
        Entry(
          method: method, defaults: try method.defaults(),
          inputs: method.role == .layers ? .none : try Self.inputs(text, registry)))
    }
    self.entries = entries
  }

  /// What a text needs. Methods that send rows to several stores want them named: any will do.
  private static func inputs(_ text: String, _ registry: PolicyRegistry) throws(KVError) -> RequiredInputs {
    for stores in 0..<4 {
      let whole = ([text] + Array(repeating: "f16", count: stores)).joined(separator: "+")
      if let policy = try? registry.policy(whole) { return policy.inputs }
    }
    return try registry.policy(text).inputs
  }

  package var text: String {
    var lines = [
      "A policy is what chooses tokens, what modifies that choice, and what stores them, joined by +; each may be missing:",
      "  snapkv(budget=0.25,window=32)+kivi(bits=2)", "",
    ]
    let titles: [(MethodDescription.Role, String)] = [
      (.selection, "CHOOSING TOKENS (first)"), (.modifier, "MODIFYING THE CHOICE (behind it)"),
      (.store, "STORING THEM (last)"), (.storeModifier, "MODIFYING THE STORE (behind it)"),
      (.layers, "OTHER STORES FOR SOME LAYERS (between two stores)"),
    ]
    for (role, title) in titles where entries.contains(where: { $0.method.role == role }) {
      lines.append(title)
      for entry in entries where entry.method.role == role { lines += self.lines(entry) + [""] }
    }
    lines.append("f32, f16 and bf16 alone name dense stores of that element type.")
    return lines.joined(separator: "\n")
  }

  private func lines(_ entry: Entry) -> [String] {
    let method = entry.method
    var lines = ["", "\(method.name): \(method.summary)"]
    if !method.aliases.isEmpty { lines.append("  also called   \(method.aliases.joined(separator: ", "))") }
    lines.append("  paper         \(method.paper.isEmpty ? "none: a building block" : method.paper)")
    lines.append("  needs         \(entry.inputs)")
    let width = method.options.map { title($0, entry).count }.max() ?? 0
    for (index, option) in method.options.enumerated() {
      let name = title(option, entry)
      lines.append(
        (index == 0 ? "  options       " : "                ") + name
          + String(repeating: " ", count: width - name.count + 2) + option.summary)
    }
    return lines
  }

  private func title(_ option: MethodDescription.Option, _ entry: Entry) -> String {
    entry.defaults.first { $0.name == option.name }.map(\.description) ?? option.name
  }

  package var json: JSONText {
    .array(
      entries.map { entry in
        .object([
          .init("name", .string(entry.method.name)), .init("aliases", .array(entry.method.aliases.map { .string($0) })),
          .init("role", .string(entry.method.role.rawValue)), .init("summary", .string(entry.method.summary)),
          .init("paper", .string(entry.method.paper)),
          .init("windowQueries", .integer(entry.inputs.windowQueries)),
          .init("attentionWeights", .bool(entry.inputs.attentionWeights)),
          .init(
            "options",
            .array(
              entry.method.options.map { option in
                .object([
                  .init("name", .string(option.name)), .init("summary", .string(option.summary)),
                  .init(
                    "default",
                    entry.defaults.first { $0.name == option.name }.map { .string("\($0.value)") } ?? .null),
                ])
              })),
        ])
      })
  }
}
