import KVLabKit
import Testing

@Suite struct JSONTextTests {
  @Test func printsKeysInOrderAndEscapes() {
    let value = JSONText.object([
      .init("b", .number(0.5)), .init("a", .array([.integer(1), .null, .bool(true)])),
      .init("text", .string("a\"\\\n\u{1}")), .init("nan", .number(.nan)),
    ])
    #expect(value.compact == #"{"b":0.5,"a":[1,null,true],"text":"a\"\\\n\u0001","nan":null}"#)
    #expect(value.pretty.hasPrefix("{\n  \"b\": 0.5,\n  \"a\": [1,null,true],"))
  }
}
