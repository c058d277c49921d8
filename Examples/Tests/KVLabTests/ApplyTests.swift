import Foundation
import KVCompression
import KVExperiments
import KVLabKit
import Testing

@Suite struct ApplyTests {
  private func dump(tokens: Int = 96, queryTokens: Int? = nil, probes: Int = 5) throws -> CacheDump {
    var options = SyntheticOptions()
    options.layers = 4
    options.tokens = tokens
    options.dim = 64
    options.queryTokens = queryTokens
    options.probeQueries = probes
    return try CacheDump(SyntheticCache(options))
  }

  private func file(_ name: String) -> String {
    FileManager.default.temporaryDirectory.appending(path: "kvlab-\(UUID().uuidString)-\(name)").path
  }

  @Test(arguments: [
    "f32", "f16", "kivi(bits=4)", "kivi(bits=2,residual=32)", "streaming(sinks=2,recent=30)", "h2o(budget=0.5)",
    "snapkv(budget=40,window=8)", "snapkv(budget=70,window=8)+kivi(residual=32)", "h2o(budget=0.5)+kivi(residual=32)",
  ])
  func writesWhatIsLeft(text: String) throws {
    let dump = try dump()
    let policy = try NamedPolicy(text)
    let result = try Application(dump: dump, policy: policy, layers: LayerList("1,3")).run()
    #expect(result.layers.map(\.layer) == [1, 3])
    let path = file("out.safetensors")
    defer { try? FileManager.default.removeItem(atPath: path) }
    try result.write(to: path)
    let output = try SafeTensorsFile(path: path)
    for layer in result.layers {
      let source = try dump.layer(layer.layer)
      for head in 0..<2 {
        let prefix = "layers.\(layer.layer)."
        let positions = try output.int32s(named: "\(prefix)positions.\(head)").map { Int($0) }
        #expect(zip(positions, positions.dropFirst()).allSatisfy { $0 < $1 }, "positions ascend")
        #expect(positions.allSatisfy { (0..<96).contains($0) })
        #expect(positions.count == layer.status.rowsHeld[head])
        let keys = try output.floats(named: "\(prefix)keys.\(head)", shape: [positions.count, 64])
        _ = try output.floats(named: "\(prefix)values.\(head)", shape: [positions.count, 64])
        for (row, position) in positions.enumerated() where policy.policy.tiers[0].spec.name == "dense" {
          let exact = source.keys.row(head: head, token: position)
          let got = keys[row * 64..<(row + 1) * 64]
          #expect(zip(exact, got).allSatisfy { abs($0 - $1) <= abs($0) / 1024 + 1e-6 })
        }
      }
      #expect(output.tensors["layers.\(layer.layer).attention"]?.shape == [8, 5, 64])
      #expect(try #require(layer.attentionError) < 0.9)
      #expect(layer.status.bytes.total > 0)
    }
    #expect(output.tensors["layers.0.keys.0"] == nil)
    let json = try result.json()
    #expect(json.compact.contains(#""layers":[{"layer":1,"tokens":96,"rows":["#))
    for key in ["policy", "spec", "payloadBytes", "metadataBytes", "indexBytes", "ratio", "options"] {
      #expect(json[key] != nil, "\(key)")
    }
    #expect(try JSONSerialization.jsonObject(with: Data(json.pretty.utf8)) is [String: Any])
  }

  @Test func attentionOfAFullCacheIsTheReference() throws {
    let dump = try dump(tokens: 70, probes: 100)  // more probes than tokens: several calls
    let result = try Application(dump: dump, policy: NamedPolicy("f32")).run()
    for layer in result.layers {
      let source = try dump.layer(layer.layer)
      let probes = try #require(source.probeQueries)
      let reference = try AttentionReference().attend(
        queries: probes, keys: source.keys, values: source.values,
        queryPositions: Array(repeating: 70, count: probes.tokens))
      let error = try FidelityMetrics.relativeFrobenius(layer.attention, reference: reference.outputs)
      #expect(error < 1e-5)
      #expect(layer.attentionError == 0)
    }
  }

  @Test func attentionOverSurvivorsIsTheReferenceOverThem() throws {
    let dump = try dump()
    let result = try Application(dump: dump, policy: NamedPolicy("h2o(budget=0.5)+f32")).run()
    let layer = result.layers[2]
    let probes = try #require(try dump.layer(2).probeQueries)
    let rows = layer.heads.map(\.positions.count)
    #expect(rows == [48, 48])
    let reference = try AttentionReference(causal: false).attend(
      queries: probes, keys: HeadTensor(heads: 2, tokens: 48, dim: 64, elements: layer.heads.flatMap(\.keys)),
      values: HeadTensor(heads: 2, tokens: 48, dim: 64, elements: layer.heads.flatMap(\.values)),
      queryPositions: Array(repeating: 96, count: probes.tokens), keyPositions: layer.heads.map(\.positions))
    #expect(try FidelityMetrics.relativeFrobenius(layer.attention, reference: reference.outputs) < 1e-5)
  }

  @Test func missingInputsAreErrorsBeforeAnythingRuns() throws {
    let short = try dump(queryTokens: 16)
    #expect { try Application(dump: short, policy: NamedPolicy("h2o(budget=0.5)")) } throws: {
      let error = $0 as? KVError
      return error?.code == .missingInput && error?.layer == 0 && "\($0)".contains("all 96 tokens")
    }
    #expect { try Application(dump: short, policy: NamedPolicy("snapkv(budget=64,window=32)")) } throws: {
      ($0 as? KVError)?.code == .missingInput
    }
    #expect { try Application(dump: short, policy: NamedPolicy("f16"), layers: LayerList("2-5")) } throws: {
      ($0 as? KVError)?.code == .missingInput && ($0 as? KVError)?.layer == 4
    }
    _ = try Application(dump: short, policy: NamedPolicy("snapkv(budget=64,window=16)")).run()
    let layer = try short.layer(0)
    let bare = try CacheDump(layers: [0: layer])
    #expect { try Application(dump: bare, policy: NamedPolicy("streaming(recent=32)")) } throws: {
      "\($0)".contains("rope_theta")
    }
  }

  @Test func layerListsParse() throws {
    #expect(try LayerList("0,3,5-7").layers == [0, 3, 5, 6, 7])
    #expect(try LayerList(" 7 , 2-2,2").layers == [2, 7])
    for text in ["", "a", "3-1", "1,,2", "-1", "1-"] {
      #expect(throws: KVError.self, "\(text)") { try LayerList(text) }
    }
  }
}
