import KVCore
import Testing

@Suite struct OptionReaderTests {
  private func reader(_ text: String) throws -> OptionReader {
    OptionReader(try PolicySpec(parsing: text).stages[0])
  }

  @Test func readsAndPrintsTheFullSpec() throws {
    var reader = try reader(
      "snapkv(window=64,scale=50%,on=true,pooling=MAX,budget=0.25,store=bf16,layers=[1,2],path=\"/X\",size=4KiB)")
    #expect(try reader.int("window", default: 32, in: 1...65_536) == 64)
    #expect(try reader.double("scale", in: 0...1) == 0.5)
    #expect(try reader.bool("on", default: false))
    #expect(try reader.name("pooling", default: "avg", among: ["avg", "max"]) == "max")
    #expect(try reader.budget("budget", default: .unlimited) == .fraction(0.25))
    #expect(try reader.elementType("store", default: .f16) == .bf16)
    #expect(try reader.intList("layers", default: [], in: 0...31) == [1, 2])
    #expect(try reader.string("path", default: "") == "/X")
    #expect(try reader.bytes("size", default: 0) == 4096)
    #expect(try reader.int("kernel", default: 7) == 7)
    #expect(try reader.optionalInt("seed") == nil)
    #expect(try reader.doubleList("weights", default: [0.5, 1]) == [0.5, 1])
    try reader.finish()
    let full =
      "snapkv(window=64,scale=0.5,on=true,pooling=max,budget=0.25,store=bf16,layers=[1,2],path=\"/X\",size=4KiB,"
      + "kernel=7,weights=[0.5,1.0])"
    #expect(reader.resolvedStage.description == full)
    // The full text resolves to itself.
    #expect(try PolicySpec(parsing: full).stages[0] == reader.resolvedStage)
  }

  private func refused(
    _ text: String, _ message: String, offset: Int, sourceLocation: SourceLocation = #_sourceLocation,
    _ read: (inout OptionReader) throws -> Void
  ) throws {
    var reader = try reader(text)
    let error = #expect(throws: KVError.self, sourceLocation: sourceLocation) { try read(&reader) }
    #expect(error?.code == .invalidOption, sourceLocation: sourceLocation)
    #expect(error?.message == message, sourceLocation: sourceLocation)
    #expect(error?.offset == offset, sourceLocation: sourceLocation)
  }

  @Test func errorsNameEverything() throws {
    try refused(
      "s(window=0.5)", "option \"window\" of s: expected an integer in 1...9, found the number 0.5", offset: 9
    ) { _ = try $0.int("window", default: 3, in: 1...9) }
    try refused(
      "s(window=10)", "option \"window\" of s: expected an integer in 1...9, found the integer 10", offset: 9
    ) { _ = try $0.int("window", default: 3, in: 1...9) }
    try refused("s", "option \"n\" of s is required: expected an integer of at least 1, found nothing", offset: 0) {
      _ = try $0.int("n", in: 1...Int.max)
    }
    try refused("s(x=abc)", "option \"x\" of s: expected a number, found the text abc", offset: 4) {
      _ = try $0.double("x", default: 1)
    }
    try refused("s(x=2)", "option \"x\" of s: expected a number in 0.0...1.0, found the integer 2", offset: 4) {
      _ = try $0.double("x", default: 1, in: 0...1)
    }
    try refused("s(x=1)", "option \"x\" of s: expected true or false, found the integer 1", offset: 4) {
      _ = try $0.bool("x", default: true)
    }
    try refused(
      "s(p=agv)", "option \"p\" of s: expected one of avg, max, found the text agv; did you mean \"avg\"?", offset: 4
    ) { _ = try $0.name("p", default: "avg", among: ["avg", "max"]) }
    try refused("s(t=f64)", "option \"t\" of s: expected one of f32, f16, bf16, found the text f64", offset: 4) {
      _ = try $0.elementType("t", default: .f32)
    }
    try refused(
      "s(l=[1,70])", "option \"l\" of s: expected a list of integers in 0...63, found the list [1,70]", offset: 4
    ) {
      _ = try $0.intList("l", default: [], in: 0...63)
    }
    try refused("s(b=0)", "option \"b\" of s: a budget must be at least 1 token; got 0", offset: 4) {
      _ = try $0.budget("b")
    }
    try refused(
      "s(b=150%)", "option \"b\" of s: a budget fraction must lie above 0 and at most at 1; got 1.5", offset: 4
    ) {
      _ = try $0.budget("b")
    }
    try refused(
      "s(z=5%)", "option \"z\" of s: expected a byte size of at least 0, found the percentage 5%", offset: 4
    ) {
      _ = try $0.bytes("z", default: 0)
    }
  }

  @Test func strangersAreNamedWithTheNearest() throws {
    var reader = try reader("snapkv(window=3,widnow=4)")
    _ = try reader.int("window", default: 1)
    _ = try reader.int("kernel", default: 7)
    let error = #expect(throws: KVError.self) { try reader.finish() }
    #expect(error?.code == .unknownName)
    #expect(
      error?.message == "snapkv has no option \"widnow\"; did you mean \"window\"? (valid: window, kernel)")
    #expect(error?.offset == 23)
    let none = #expect(throws: KVError.self) { try self.reader("s(a=1)").finish() }
    #expect(none?.message == "s has no option \"a\" (it has no options)")
  }

  @Test func nearestNames() {
    #expect(nearestName(to: "snapvk", among: ["h2o", "snapkv", "kivi"]) == "snapkv")
    #expect(nearestName(to: "kvi", among: ["h2o", "snapkv", "kivi"]) == "kivi")
    #expect(nearestName(to: "zzzzzz", among: ["h2o", "snapkv", "kivi"]) == nil)
    #expect(nearestName(to: "", among: []) == nil)
  }
}
