import Foundation
import KVCompression
import Testing

/// Documentation that can rot is compared with what it documents.
@Suite struct DocumentationTests {
  static let root = URL(filePath: #filePath).deletingLastPathComponent()  // Snippets
    .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()

  static func files(in folder: String, suffix: String) throws -> [(name: String, text: String)] {
    let url = root.appending(path: folder)
    let names = try FileManager.default.contentsOfDirectory(atPath: url.path()).filter { $0.hasSuffix(suffix) }
    return try names.sorted().map { ($0, try String(contentsOf: url.appending(path: $0), encoding: .utf8)) }
  }

  static func pages() throws -> [(name: String, text: String)] {
    let readme = try String(contentsOf: root.appending(path: "README.md"), encoding: .utf8)
    return [("README.md", readme)] + (try files(in: "Docs/KVCompression.docc", suffix: ".md"))
  }

  /// The text with every run of white space as one space, so that indentation does not count.
  static func normalised(_ text: String) -> String {
    text.split(whereSeparator: \.isWhitespace).joined(separator: " ")
  }

  /// The Swift blocks of a page. A manifest line (`.package`) is the one thing that cannot be compiled here.
  static func swiftBlocks(of page: String) -> [String] {
    var blocks: [String] = []
    var open: [Substring]?
    for line in page.split(separator: "\n", omittingEmptySubsequences: false) {
      if line == "```swift" {
        open = []
      } else if line == "```", let lines = open {
        blocks.append(lines.joined(separator: "\n"))
        open = nil
      } else {
        open?.append(line)
      }
    }
    return blocks.filter { !$0.hasPrefix(".package(") }
  }

  @Test func everySwiftBlockIsCompiled() throws {
    let code = try Self.files(in: "Tests/KVCompressionTests/Snippets", suffix: "Snippets.swift")
      .map { Self.normalised($0.text) }
    var count = 0
    for page in try Self.pages() {
      for block in Self.swiftBlocks(of: page.text) {
        count += 1
        let wanted = Self.normalised(block)
        #expect(code.contains { $0.contains(wanted) }, "\(page.name) shows code that no snippet compiles:\n\(block)")
      }
    }
    #expect(count >= 20)
  }

  @Test(arguments: PolicyRegistry.standard.methods.map(\.name))
  func everyMethodHasAPage(name: String) throws {
    let method = try #require(PolicyRegistry.standard.method(named: name))
    let pages = try Self.pages().filter { $0.text.contains("**Name in policy texts:** `\(name)`") }
    #expect(pages.count == 1, "\(name) needs one page that names it")
    let page = try #require(pages.first)

    let defaults = try method.defaults()
    let expected = method.options.map { option in
      let value = defaults.first { $0.name == option.name }.map { "`\($0.value)`" } ?? "—"
      return "\(option.name) \(value)"
    }
    #expect(Self.options(of: page.text) == expected, "\(page.name)")
    for alias in method.aliases { #expect(page.text.contains("`\(alias)`"), "\(page.name) lacks \(alias)") }
    if !method.paper.isEmpty { #expect(page.text.contains(method.paper), "\(page.name) lacks \(method.paper)") }
  }

  /// Rows of the table under "Options", as "name default".
  static func options(of page: String) -> [String] {
    guard let section = page.range(of: "\n## Options\n") else { return [] }
    let rest = page[section.upperBound...]
    let table = rest[..<(rest.range(of: "\n## ")?.lowerBound ?? rest.endIndex)]
    return table.split(separator: "\n").filter { $0.hasPrefix("| `") }.map { row in
      let cells = row.split(separator: "|").map { $0.trimmingCharacters(in: .whitespaces) }
      return "\(cells[0].trimmingCharacters(in: ["`"])) \(cells[1])"
    }
  }

  /// The worked numbers of the method pages: one layer of 8 KV heads with 128 channels, a prompt of 4096 tokens.
  @Test(arguments: [
    ("f16", 16_777_216), ("streaming(recent=1020,positions=keep)", 4_227_072), ("h2o(budget=1024)", 4_259_840),
    ("snapkv(budget=1024)", 4_227_072), ("kivi", 3_358_720), ("cst", 4_331_520),
    ("snapkv(budget=1024)+kivi", 1_032_192), ("h2o(budget=1024)+kivi", 1_064_960),
    ("tiers(shares=[0.25,0.75])+f32+f16", 20_971_520),
  ])
  func workedBytes(text: String, bytes: Int) throws {
    let layer = ModelShape(layerCount: 1, queryHeads: 32, kvHeads: 8, headDim: 128)
    let policy = try PolicyRegistry.standard.policy(text)
    #expect(try policy.estimate(shape: layer, prompt: 4096).total == bytes)
    let number = bytes.formatted(.number.grouping(.automatic).locale(Locale(identifier: "en_US")))
      .replacing(",", with: " ")
    #expect(try Self.pages().contains { $0.text.contains(number) }, "no page says \(number)")
  }

  @Test func linksLeadSomewhere() throws {
    let pages = try Self.pages()
    let names = Set(pages.map { $0.name.replacing(".md", with: "") })
    for page in pages {
      for link in page.text.matches(of: /<doc:(\w+)>/) {
        #expect(names.contains(String(link.1)), "\(page.name) links to \(link.1)")
      }
      for link in page.text.matches(of: /\]\((?!https?:)([\w.\/-]+)\)/) {
        let exists = FileManager.default.fileExists(atPath: Self.root.appending(path: String(link.1)).path())
        #expect(exists, "\(page.name) links to \(link.1)")
      }
    }
  }
}
