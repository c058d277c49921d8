import KVCore
import Testing

@Suite struct PolicySpecTests {
  @Test func example() throws {
    let spec = try PolicySpec(parsing: "snapkv(budget=0.25,window=32)+kivi(bits=2)")
    #expect(
      spec
        == PolicySpec(stages: [
          StageSpec(name: "snapkv", options: [SpecOption("budget", 0.25), SpecOption("window", 32)]),
          StageSpec(name: "kivi", options: [SpecOption("bits", 2)]),
        ]))
    #expect(spec.stages[1].offset == 30)
    #expect(spec.stages[0].options[1].offset == 26)
    #expect(spec.description == "snapkv(budget=0.25,window=32)+kivi(bits=2)")
    #expect(
      try spec.json()
        == #"{"stages":[{"name":"snapkv","options":{"budget":0.25,"window":32}},{"name":"kivi","options":{"bits":2}}]}"#
    )
  }

  @Test(arguments: [
    ("h2o", "h2o"), ("H2O()", "h2o"), (" a ( x = 1 , y = [ ] ) + b ", "a(x=1,y=[])+b"),
    ("a(x=-3,y=1.5e3,z=25%)", "a(x=-3,y=1500.0,z=25%)"), ("a(x=64mib,y=1.5GB,z=0B)", "a(x=64MiB,y=1500MB,z=0B)"),
    ("a(x=true,y=FALSE,z=Avg)", "a(x=true,y=false,z=avg)"),
    ("a(x=\"true\",y=\"Avg\",z=\"avg\")", #"a(x="true",y="Avg",z=avg)"#),
    ("a(x=\"25%\")", "a(x=25%)"), (#"a(x="é\n\"\\\u00e9\ud83d\ude00")"#, "a(x=\"é\\n\\\"\\\\é😀\")"),
    ("a(x=[1,2,[3,4.5]],y=[[],[\"\"]])", "a(x=[1,2,[3,4.5]],y=[[],[\"\"]])"), ("a-b_c(x-1=2)", "a-b_c(x-1=2)"),
    ("a(x=12.5%,y=-0.0%,z=1e-300%)", "a(x=12.5%,y=-0.0%,z=1e-300%)"), ("a\n+\tb\r\n", "a+b"),
  ])
  func canonical(text: String, canonical: String) throws {
    let spec = try PolicySpec(parsing: text)
    #expect(spec.description == canonical)
    #expect(try PolicySpec(parsing: spec.description) == spec)
    #expect(try PolicySpec(json: spec.json()) == spec)
    #expect(try PolicySpec(configuration: spec.json()) == spec)
    #expect(try PolicySpec(configuration: text) == spec)
  }

  @Test(arguments: [
    ("", 0), ("  ", 2), ("1a", 0), ("a+", 2), ("a b", 2), ("a(", 2), ("a(x", 3), ("a(x=", 4), ("a(x=1", 5),
    ("a(x=1,)", 6), ("a(x=1,x=2)", 6), ("a(x=1,X=2)", 6), ("a(x=[1,])", 7), ("a(x=[1 2])", 7), ("a(x=[[[[1]]]])", 7),
    ("a(x=01)", 4), ("a(x=1.)", 6), ("a(x=.5)", 4), ("a(x=+5)", 4), ("a(x=-)", 5), ("a(x=1e)", 6), ("a(x=1e999)", 4),
    ("a(x=99999999999999999999)", 4), ("a(x=5xb)", 5), ("a(x=-5B)", 4), ("a(x=0.3B)", 4), ("a(x=\"abc)", 4),
    ("a(x=\"\\q\")", 6), ("a(x=\"\\ud800\")", 6), ("a(x=\"\\u12g4\")", 9), ("a(x=1.2.3)", 7), ("a(x=1)(", 6),
    ("a(=1)", 2), ("a(x:1)", 3), ("a(x=é)", 4), ("a;b", 1), ("a(x=\"\u{1}\")", 5), ("a(x=$)", 4), ("a++b", 2),
  ])
  func errorsNameTheByte(text: String, offset: Int) {
    let error = #expect(throws: KVError.self, "\(text)") { try PolicySpec(parsing: text) }
    #expect(error?.code == .syntax)
    #expect(error?.offset == offset, "\(text): \(error.map(String.init(describing:)) ?? "")")
  }

  @Test func errorsSayWhatWasExpected() {
    let error = #expect(throws: KVError.self) { try PolicySpec(parsing: "snapkv(window=32;") }
    #expect(error?.message == "expected ',' or ')' after an option of snapkv, found ';'")
    let end = #expect(throws: KVError.self) { try PolicySpec(parsing: "snapkv(window") }
    #expect(end?.message == "expected '=' after the option name \"window\", found the end of the text")
  }

  @Test func longTextsAreRefused() throws {
    let name = String(repeating: "a", count: 65_536)
    #expect(try PolicySpec(parsing: name).stages[0].name == name)
    #expect(throws: KVError.self) { try PolicySpec(parsing: name + "a") }
    #expect(throws: KVError.self) { try PolicySpec(json: "\"" + name + "\"") }
    #expect(throws: KVError.self) { try PolicySpec(configuration: String(repeating: " ", count: 70_000)) }
    #expect(throws: KVError.self) { try PolicySpec(parsing: "a(x=" + String(repeating: "[", count: 60_000)) }
  }

  @Test func jsonForms() throws {
    let spec = try PolicySpec(parsing: "snapkv(budget=25%,layers=[[1],[2]],path=\"/tmp/X\")+kivi")
    for json in [
      #"{"stages":[{"name":"SnapKV","options":{"budget":"25%","layers":[[1],[2]],"path":"/tmp/X"}},{"name":"kivi"}]}"#,
      #"[{"options":{"budget":"25%","layers":[[1],[2]],"path":"/tmp/X"},"name":"snapkv"},{"name":"kivi","options":{}}]"#,
      #""snapkv(budget=25%,layers=[[1],[2]],path=\"/tmp/X\")+kivi""#,
    ] {
      #expect(try PolicySpec(json: json) == spec)
      #expect(try PolicySpec(configuration: " \n" + json) == spec)
    }
    for bad in [
      "3", "null", "{}", "[]", "[3]", #"{"stages":3}"#, #"{"stages":[]}"#, #"{"stages":[],"x":1}"#, #"[{}]"#,
      #"[{"name":3}]"#, #"[{"name":"a b"}]"#, #"[{"name":""}]"#, #"[{"name":"a","x":1}]"#,
      #"[{"name":"a","options":[]}]"#, #"[{"name":"a","options":{"x":null}}]"#, #"[{"name":"a","options":{"x":{}}}]"#,
      #"[{"name":"a","options":{"x":[[[[1]]]]}}]"#, #"[{"name":"a","options":{"x":1,"X":2}}]"#,
      #"[{"name":"a","options":{"x":1,"x":2}}]"#, #"[{"name":"a","options":{"1":1}}]"#, #""a(""#, "{",
      "[{\"name\":\"\u{212A}\"}]",
    ] {
      let error = #expect(throws: KVError.self, "\(bad)") { try PolicySpec(json: bad) }
      #expect(error?.code == .syntax)
    }
    let bad = PolicySpec(stages: [StageSpec(name: "a", options: [SpecOption("x", .decimal(.nan))])])
    #expect(throws: KVError.self) { try bad.json() }
  }
}
