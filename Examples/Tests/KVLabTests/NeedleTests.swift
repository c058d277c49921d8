import KVCompression
import KVLabKit
import ReferenceEngine
import Testing

@Suite struct NeedleTests {
  private func builder(seed: UInt64 = 1, haystack: Int = 4000) throws -> (NeedleBuilder, Engine) {
    let directory = try PackagedFiles.model(or: nil)
    let engine = try Engine(directory: directory)
    let text = try PackagedFiles.readTexts(at: PackagedFiles.texts(or: nil)).joined()
    let builder = NeedleBuilder(
      names: try PackagedFiles.names(model: directory), prefix: engine.promptPrefix,
      haystack: Array(engine.tokenizer.encode(text).prefix(haystack)), seed: seed,
      encode: { engine.tokenizer.encode($0) },
      holdsDigit: { engine.tokenizer.bytes(of: $0).contains { (48...57).contains($0) } })
    return (builder, engine)
  }

  @Test func sequencesHaveTheTrainedFormat() throws {
    var (builder, engine) = try builder()
    let sequence = try builder.next(tokens: 600, notes: 4, questions: 3)
    #expect(sequence.prompt.count == 600)
    #expect(sequence.prompt.first == 0, "every sequence starts with <|bos|>")
    #expect(sequence.questions.count == 3)
    #expect(Set(sequence.questions.map(\.name)).count == 3)
    let text = engine.tokenizer.decode(sequence.prompt)
    #expect(text.components(of: "\nNote: The secret code of ") == 5)
    for question in sequence.questions {
      #expect(text.contains("\nNote: The secret code of \(question.name) is \(question.code).\n"))
      #expect(question.code.count == 5 && question.code.allSatisfy(\.isNumber))
      #expect(
        engine.tokenizer.decode(question.prompt + question.answer)
          == "\nQuestion: What is the secret code of \(question.name)?\nAnswer: The secret code of \(question.name) is "
          + question.code)
      // Five digits, each a token; the blank before them is not asked for.
      #expect(question.scored == [1, 2, 3, 4, 5])
    }
  }

  @Test func theSeedDecides() throws {
    var (first, _) = try builder()
    var (same, _) = try builder()
    var (other, _) = try builder(seed: 2)
    let sequence = try first.next(tokens: 300, notes: 2, questions: 2)
    #expect(try same.next(tokens: 300, notes: 2, questions: 2) == sequence)
    #expect(try other.next(tokens: 300, notes: 2, questions: 2) != sequence)
    #expect(try first.next(tokens: 300, notes: 2, questions: 2) != sequence, "the next one differs")
  }

  @Test func refusesWhatDoesNotFit() throws {
    var (builder, _) = try builder(haystack: 200)
    #expect { try builder.next(tokens: 60, notes: 4, questions: 1) } throws: {
      ($0 as? KVError)?.code == .invalidOption
    }
    #expect { try builder.next(tokens: 100, notes: 1, questions: 2) } throws: {
      ($0 as? KVError)?.code == .invalidOption
    }
    #expect { try builder.next(tokens: 900, notes: 1, questions: 1) } throws: {
      ($0 as? KVError)?.code == .missingInput
    }
    #expect { try NeedleNames("one line", file: "names.txt") } throws: { ($0 as? KVError)?.code == .corruptFile }
  }

  @Test func scoresWholeCodesAndDigits() {
    var score = RetrievalScore()
    #expect(score.codeAccuracy.isNaN)
    score.add(right: 5, of: 5)
    score.add(right: 4, of: 5)
    #expect(score.codeAccuracy == 0.5)
    #expect(score.digitAccuracy == 0.9)
  }
}

extension String {
  /// Pieces that a separator cuts a text into.
  fileprivate func components(of separator: String) -> Int {
    split(separator: separator, omittingEmptySubsequences: false).count
  }
}
