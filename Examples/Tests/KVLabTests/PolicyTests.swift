import KVCompression
import KVLabKit
import Testing

@Suite struct PolicyTests {
  @Test func listsAreCutAtOuterCommas() throws {
    let list = try NamedPolicy.list(
      #"f16, kivi(bits=2,group=64,residual=64),snapkv(budget=[64,128])+kivi,[{"name":"h2o","options":{"budget":0.5,"every":2}}]"#
    )
    #expect(list.map(\.name).prefix(3) == ["f16", "kivi(bits=2,group=64,residual=64)", "snapkv(budget=[64,128])+kivi"])
    #expect(list[3].spec.hasPrefix("h2o(budget=0.5"))
    #expect(list[1].spec.contains("group=64"))
  }

  @Test func errorsNameTheByteOfTheWholeList() {
    #expect { try NamedPolicy.list("f16,snapvk(budget=64)") } throws: {
      let error = $0 as? KVError
      return error?.code == .unknownName && error?.offset == 4 && "\($0)".contains("did you mean \"snapkv\"")
    }
    #expect { try NamedPolicy.list("f16,,f32") } throws: { ($0 as? KVError)?.code == .syntax }
    #expect { try NamedPolicy.list("kivi(bits=5)") } throws: { ($0 as? KVError)?.code == .invalidOption }
  }

  @Test func defaultListsAreValid() throws {
    for text in NamedPolicy.defaults + NamedPolicy.quickDefaults { _ = try NamedPolicy(text) }
  }

  @Test func catalogueHasEveryMethodAndOption() throws {
    let catalogue = try PolicyCatalogue()
    #expect(catalogue.entries.map(\.method.name) == PolicyRegistry.standard.methods.map(\.name))
    let text = catalogue.text
    for method in PolicyRegistry.standard.methods {
      #expect(text.contains(method.paper) && text.contains(method.summary))
      for option in method.options { #expect(text.contains(option.summary)) }
    }
    let snapKV = try #require(catalogue.entries.first { $0.method.name == "snapkv" })
    #expect(snapKV.inputs.windowQueries == 32)
    #expect(snapKV.defaults.contains { $0.name == "kernel" && "\($0.value)" == "5" })
  }
}
