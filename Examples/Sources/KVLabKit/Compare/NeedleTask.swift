package import KVCompression
internal import KVExperiments

/// The two lists that names of notes are made from.
package struct NeedleNames: Sendable, Hashable {
  package var adjectives: [String]
  package var nouns: [String]

  package init(adjectives: [String], nouns: [String]) {
    self.adjectives = adjectives
    self.nouns = nouns
  }

  /// Adjectives in the first line, nouns in the second.
  ///
  /// - Throws: `corruptFile` for anything else.
  package init(_ text: String, file: String) throws(KVError) {
    let lines = text.split(whereSeparator: \.isNewline).map { $0.split(separator: " ").map(String.init) }
    guard lines.count == 2, lines.allSatisfy({ !$0.isEmpty }) else {
      throw KVError(
        .corruptFile, "\(file): expected a line of adjectives and a line of nouns, found \(lines.count) lines")
    }
    adjectives = lines[0]
    nouns = lines[1]
  }
}

/// One question about a note.
package struct NeedleQuestion: Sendable, Hashable {
  package let name: String
  package let code: String
  /// `\nQuestion: …?\nAnswer: The secret code of … is`.
  package let prompt: [Int]
  /// ` 52071`.
  package let answer: [Int]
  /// Tokens of the answer that carry digits: those are scored.
  package let scored: [Int]
}

/// A text with notes hidden in it, and questions about them.
package struct NeedleSequence: Sendable, Hashable {
  /// Text and notes, the tokenizer's prefix included; the questions come after.
  package let prompt: [Int]
  package let questions: [NeedleQuestion]
}

/// Makes needle sequences in the format the packaged model was trained on: notes at random places of a text, one per
/// line, each encoded on its own.
///
/// ```
/// Note: The secret code of amber falcon is 52071.
///
/// Question: What is the secret code of amber falcon?
/// Answer: The secret code of amber falcon is 52071.
/// ```
///
/// The same seed gives the same sequences.
package struct NeedleBuilder {
  private let encode: (String) -> [Int]
  private let holdsDigit: (Int) -> Bool
  private let names: NeedleNames
  private let prefix: [Int]
  private let haystack: [Int]
  private var random: SeededGenerator

  /// - Parameters:
  ///   - prefix: tokens before every sequence.
  ///   - haystack: tokens that text is cut from.
  ///   - holdsDigit: whether the text of a token holds a digit.
  package init(
    names: NeedleNames, prefix: [Int], haystack: [Int], seed: UInt64, encode: @escaping (String) -> [Int],
    holdsDigit: @escaping (Int) -> Bool
  ) {
    self.names = names
    self.prefix = prefix
    self.haystack = haystack
    self.encode = encode
    self.holdsDigit = holdsDigit
    random = SeededGenerator(seed: seed, streams: 0x6E65)
  }

  /// The next sequence: exactly `tokens` tokens before the questions.
  ///
  /// - Parameters:
  ///   - notes: notes in the text.
  ///   - questions: notes asked about, at most `notes`.
  /// - Throws: `invalidOption` when there are not as many names, or the notes leave less than 16 tokens of text;
  ///   `missingInput` when the haystack is shorter than the text wanted.
  package mutating func next(tokens: Int, notes: Int, questions: Int) throws(KVError) -> NeedleSequence {
    guard notes >= 1, (0...notes).contains(questions), notes <= names.adjectives.count * names.nouns.count / 2 else {
      throw KVError(
        .invalidOption,
        "a needle sequence has 1 or more notes, as many names, and no more questions than notes; got "
          + "\(notes) notes and \(questions) questions")
    }
    var pairs: [(name: String, code: String)] = []
    while pairs.count < notes {
      let name = pick(names.adjectives) + " " + pick(names.nouns)
      if pairs.contains(where: { $0.name == name }) { continue }
      pairs.append((name, (0..<5).map { _ in String(random.integer(below: 10)) }.joined()))
    }
    let notes = pairs.map { encode("\nNote: The secret code of \($0.name) is \($0.code).\n") }
    let room = tokens - prefix.count - notes.reduce(0) { $0 + $1.count }
    guard room >= 16 else {
      throw KVError(
        .invalidOption, "\(tokens) tokens leave \(room) for text beside \(notes.count) notes; at least 16 are needed")
    }
    guard haystack.count >= room else {
      throw KVError(
        .missingInput, "needles of \(tokens) tokens need \(room) tokens of text; the text has \(haystack.count)")
    }
    let start = random.integer(below: haystack.count - room + 1)
    let text = haystack[start..<start + room]
    let cuts = notes.map { _ in start + random.integer(below: room) }.sorted()
    var prompt = prefix
    var last = start
    for (cut, note) in zip(cuts, notes) {
      prompt += text[last..<cut] + note
      last = cut
    }
    prompt += text[last...]
    return NeedleSequence(prompt: prompt, questions: sample(pairs, questions).map(question))
  }

  private func question(_ pair: (name: String, code: String)) -> NeedleQuestion {
    let answer = encode(" \(pair.code)")
    return NeedleQuestion(
      name: pair.name, code: pair.code,
      prompt: encode(
        "\nQuestion: What is the secret code of \(pair.name)?\nAnswer: The secret code of \(pair.name) is"),
      answer: answer, scored: answer.indices.filter { holdsDigit(answer[$0]) })
  }

  private mutating func pick(_ list: [String]) -> String { list[random.integer(below: list.count)] }

  private mutating func sample<Item>(_ items: [Item], _ count: Int) -> [Item] {
    var items = items
    for index in 0..<count { items.swapAt(index, index + random.integer(below: items.count - index)) }
    return Array(items[..<count])
  }
}

/// Right answers of needle questions.
package struct RetrievalScore: Sendable, Hashable {
  package var codes = 0
  package var rightCodes = 0
  package var digits = 0
  package var rightDigits = 0

  package init() {}

  /// Adds an answer of which `right` of `total` scored tokens were predicted.
  package mutating func add(right: Int, of total: Int) {
    codes += 1
    rightCodes += right == total ? 1 : 0
    digits += total
    rightDigits += right
  }

  /// Share of the codes with every digit right; NaN without questions.
  package var codeAccuracy: Double { codes == 0 ? .nan : Double(rightCodes) / Double(codes) }
  /// Share of the digits that are right; NaN without questions.
  package var digitAccuracy: Double { digits == 0 ? .nan : Double(rightDigits) / Double(digits) }
}
