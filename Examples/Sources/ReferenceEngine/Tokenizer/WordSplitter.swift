/// The splitting patterns that byte-level tokenizers ship, as scanners. Each walks the text once, O(scalars).
///
/// ```
/// gpt2    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
/// llama3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*
///         |\s*[\r\n]+|\s+(?!\S)|\s+                        (qwen2: the same with \p{N} one by one)
/// ```
struct WordSplitter: Sendable, Hashable {
  enum Pattern: Sendable, Hashable {
    case gpt2
    /// The newer pattern; numbers are cut after this many digits.
    case llama3(digits: Int)
  }

  let pattern: Pattern

  /// The pattern of a `Split` pre-tokenizer; nil for one that no scanner here implements.
  init?(regex: String) {
    let lower = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    let letters = #"|[^\r\n\p{L}\p{N}]?\p{L}+|"#
    let rest = #"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#
    switch regex {
    case lower + letters + #"\p{N}{1,3}"# + rest: pattern = .llama3(digits: 3)
    case lower + letters + #"\p{N}"# + rest: pattern = .llama3(digits: 1)
    case #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#: pattern = .gpt2
    default: return nil
    }
  }

  init(_ pattern: Pattern) { self.pattern = pattern }

  /// The end of the word that begins at `start`, within `start + 1 ... limit`. Lookahead stops at `limit`.
  func end(of text: ClassifiedText, from start: Int, limit: Int) -> Int {
    switch pattern {
    case .gpt2: gpt2(text, start, limit)
    case .llama3(let digits): llama3(text, start, limit, digits: digits)
    }
  }

  private func run(_ text: ClassifiedText, _ start: Int, _ limit: Int, of kind: CharacterClass) -> Int {
    var index = start
    while index < limit, text.classes[index] == kind { index += 1 }
    return index
  }

  private func gpt2(_ text: ClassifiedText, _ start: Int, _ limit: Int) -> Int {
    if let end = contraction(text, start, limit, folding: false) { return end }
    let afterSpace = text.scalars[start] == " " && start + 1 < limit ? start + 1 : start
    let kind = text.classes[afterSpace]
    if kind != .space { return run(text, afterSpace, limit, of: kind) }
    return whitespace(text, start, limit)
  }

  private func llama3(_ text: ClassifiedText, _ start: Int, _ limit: Int, digits: Int) -> Int {
    if let end = contraction(text, start, limit, folding: true) { return end }
    let scalar = text.scalars[start]
    let kind = text.classes[start]
    if kind == .letter { return run(text, start, limit, of: .letter) }
    let isLineBreak = scalar == "\r" || scalar == "\n"
    if kind != .number, !isLineBreak, start + 1 < limit, text.classes[start + 1] == .letter {
      return run(text, start + 1, limit, of: .letter)
    }
    if kind == .number { return run(text, start, min(limit, start + digits), of: .number) }
    let afterSpace = scalar == " " && start + 1 < limit ? start + 1 : start
    if text.classes[afterSpace] == .other {
      var end = run(text, afterSpace, limit, of: .other)
      while end < limit, text.scalars[end] == "\r" || text.scalars[end] == "\n" { end += 1 }
      return end
    }
    // All that is left is white space: up to its last line break, if it has one.
    var end = run(text, start, limit, of: .space)
    while end > start {
      if text.scalars[end - 1] == "\r" || text.scalars[end - 1] == "\n" { return end }
      end -= 1
    }
    return whitespace(text, start, limit)
  }

  /// `\s+(?!\S)|\s+`: white space, without its last character where a word follows.
  private func whitespace(_ text: ClassifiedText, _ start: Int, _ limit: Int) -> Int {
    let end = run(text, start, limit, of: .space)
    return end < limit && end - start > 1 ? end - 1 : end
  }

  private func contraction(_ text: ClassifiedText, _ start: Int, _ limit: Int, folding: Bool) -> Int? {
    guard text.scalars[start] == "'", start + 1 < limit else { return nil }
    let first = Self.folded(text.scalars[start + 1], folding)
    if first == "s" || first == "t" || first == "m" || first == "d" { return start + 2 }
    guard start + 2 < limit else { return nil }
    let second = Self.folded(text.scalars[start + 2], folding)
    switch (first, second) {
    case ("r", "e"), ("v", "e"), ("l", "l"): return start + 3
    default: return nil
    }
  }

  private static func folded(_ scalar: Unicode.Scalar, _ folding: Bool) -> Unicode.Scalar {
    guard folding else { return scalar }
    if (65...90).contains(scalar.value) { return Unicode.Scalar(scalar.value + 32) ?? scalar }
    // The long s folds to s.
    return scalar.value == 0x17F ? "s" : scalar
  }
}
