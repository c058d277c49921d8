/// Cuts a text into the words that BPE merges within: an ordered list of steps, each cutting the pieces of the last.
struct PreTokenizer: Sendable, Hashable {
  enum Step: Sendable, Hashable {
    /// Every numeric character is a word of its own.
    case singleDigits
    /// Runs of numeric characters are words of their own.
    case digitRuns
    case words(WordSplitter)
  }

  var steps: [Step]
  /// A piece that does not begin with a space gets one before it is cut into words.
  var addsPrefixSpace: Bool

  /// Calls `body` with the UTF-8 bytes of each word in order.
  func forEachWord(of text: String, _ body: (ArraySlice<UInt8>) -> Void) {
    guard !text.isEmpty else { return }
    let classified = ClassifiedText(text)
    var pieces = [0..<classified.count]
    for (index, step) in steps.enumerated() {
      if addsPrefixSpace, index == steps.count - 1 {
        return prefixed(pieces, of: classified, step, body)
      }
      pieces = cut(pieces, of: classified, step)
    }
    for piece in pieces {
      body(classified.utf8[classified.offsets[piece.lowerBound]..<classified.offsets[piece.upperBound]])
    }
  }

  /// The last step on texts that had to be changed first: rare, so each piece is simply a text of its own.
  private func prefixed(
    _ pieces: [Range<Int>], of text: ClassifiedText, _ step: Step, _ body: (ArraySlice<UInt8>) -> Void
  ) {
    for piece in pieces {
      var view = String.UnicodeScalarView(text.scalars[piece])
      if view.first != " " { view.insert(" ", at: view.startIndex) }
      PreTokenizer(steps: [step], addsPrefixSpace: false).forEachWord(of: String(view), body)
    }
  }

  private func cut(_ pieces: [Range<Int>], of text: ClassifiedText, _ step: Step) -> [Range<Int>] {
    var result: [Range<Int>] = []
    for piece in pieces {
      var start = piece.lowerBound
      while start < piece.upperBound {
        let end = self.end(of: text, from: start, limit: piece.upperBound, step)
        result.append(start..<end)
        start = end
      }
    }
    return result
  }

  private func end(of text: ClassifiedText, from start: Int, limit: Int, _ step: Step) -> Int {
    if case .words(let splitter) = step { return splitter.end(of: text, from: start, limit: limit) }
    let isNumber = text.classes[start] == .number
    if isNumber, step == .singleDigits { return start + 1 }
    var end = start + 1
    while end < limit, (text.classes[end] == .number) == isNumber { end += 1 }
    return end
  }
}
