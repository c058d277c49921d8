import KVCore
import KVExperiments
import Testing

@Suite struct CacheDumpTests {
  private func synthetic() throws -> SyntheticCache {
    var options = SyntheticOptions()
    (options.layers, options.tokens, options.queryTokens, options.probeQueries) = (2, 12, 5, 2)
    return try SyntheticCache(options)
  }

  /// A file with layer 4 whole and whatever `change` adds or leaves out.
  private func file(without: String? = nil, metadata: [String: String] = [:], _ extra: [(String, [Int])] = []) throws
    -> SafeTensorsFile
  {
    var writer = SafeTensorsWriter(metadata: metadata)
    let tensors = [
      ("layers.4.keys", [2, 3, 4]), ("layers.4.values", [2, 3, 6]), ("layers.4.queries", [4, 2, 4]),
    ]
    for (name, shape) in tensors.filter({ tensor in tensor.0 != without && !extra.contains { $0.0 == tensor.0 } })
      + extra
    {
      let count = shape.reduce(1, *)
      try writer.add(name, shape: shape, floats: (0..<count).map { Float($0) / 8 })
    }
    return try SafeTensorsFile(bytes: writer.serialized())
  }

  @Test func roundTrip() throws {
    let cache = try synthetic()
    let dump = try CacheDump(cache)
    try withTemporaryPath { path in
      try dump.save(to: path)
      let back = try CacheDump(path: path)
      #expect(back.layers == [0, 1] && back.shapes == dump.shapes)
      #expect(back.ropeTheta == 10_000 && back.scale == nil && back.ropeLayout == "half")
      for layer in back.layers { #expect(try back.layer(layer) == dump.layer(layer)) }
      #expect(back.shapes[1]?.queryPositions == Array(7..<12))
      #expect(try back.layer(1).probeQueries == cache.layers[1].probeQueries)
      try back.save(to: path + "2")
      #expect(try SafeTensorsFile(path: path).metadata == SafeTensorsFile(path: path + "2").metadata)
      try back.save(to: path, as: .bf16)
      let rounded = try CacheDump(path: path)
      let error = try FidelityMetrics.reconstruction(rounded.layer(0).keys, reference: dump.layer(0).keys)
      #expect(error.largestRowError > 0 && error.largestRowError < 0x1p-8)
    }
  }

  @Test func sparseLayersAndOptionalTensors() throws {
    let layer = try CacheDumpLayer(
      keys: HeadTensor(heads: 1, tokens: 2, dim: 2, elements: [1, 2, 3, 4]),
      values: HeadTensor(heads: 1, tokens: 2, dim: 1, elements: [1, 2]),
      queries: HeadTensor(heads: 3, tokens: 0, dim: 2, elements: []))
    let dump = try CacheDump(layers: [4: layer, 17: layer], ropeTheta: 1e6, scale: 0.125, ropeLayout: "interleaved")
    try withTemporaryPath { path in
      try dump.save(to: path)
      let back = try CacheDump(path: path)
      #expect(back.layers == [4, 17] && back.ropeTheta == 1e6 && back.scale == 0.125)
      #expect(back.ropeLayout == "interleaved")
      #expect(try back.layer(17) == layer)
      #expect(back.shapes[4]?.hasKeysBeforeRotation == false)
      let error = expectError(.missingInput, "[4, 17]") { try back.layer(5) }
      #expect(error?.layer == 5)
    }
  }

  /// Names as the captured golden inputs have them: what is not a dump's is left alone.
  @Test func otherTensorsAreLeftAlone() throws {
    let dump = try CacheDump(
      file: file(
        metadata: ["split": "public"],
        [
          ("layers.4.keys_pre_rope", [2, 3, 4]), ("layers.4.probe_queries", [4, 5, 4]), ("tokens", [9]),
          ("layers.4.column_sums", [4, 3]), ("layers.9.hidden_states", [3, 3]), ("layers.04.keys", [1]),
          ("layers.-1.keys", [1]), ("layers.x.keys", [1]), ("layers.5.keys.more", [1]),
          ("layers.99999999999999999999.keys", [1]),
        ]))
    #expect(dump.layers == [4])
    let layer = try dump.layer(4)
    #expect(layer.shape == dump.shapes[4])
    #expect(layer.shape.valueDim == 6 && layer.shape.probeQueries == 5 && layer.shape.hasKeysBeforeRotation)
    #expect(layer.keys[1, 2, 3] == 23.0 / 8)
    #expect(Array(layer.values.row(head: 1, token: 0)) == (18..<24).map { Float($0) / 8 })
  }

  @Test func shapesThatDoNotFitAreNamed() throws {
    for name in ["keys", "values", "queries"] {
      let error = expectError(.missingInput, "layers.4.\(name)") { [self] in
        try CacheDump(file: file(without: "layers.4.\(name)"))
      }
      #expect(error?.layer == 4)
    }
    let bad: [(String, [Int], String)] = [
      ("keys", [2, 3], "[kvHeads, T, d]"), ("keys", [2, 3, 0], "[kvHeads, T, d]"), ("values", [2, 4, 6], "[2, 3, 4]"),
      ("values", [1, 3, 6], "[2, 3, 4]"), ("queries", [4, 2, 5], "[queryHeads, Tq, 4]"),
      ("queries", [3, 2, 4], "multiple of the 2"), ("queries", [0, 2, 4], "multiple"),
      ("queries", [4, 4, 4], "at most the 3"),
      ("keys_pre_rope", [2, 3, 5], "[2, 3, 4]"), ("probe_queries", [2, 2, 4], "[4, P, 4]"),
    ]
    for (name, shape, part) in bad {
      let error = expectError(.shapeMismatch, "layers.4.\(name)", part) { [self] in
        try CacheDump(file: file([("layers.4.\(name)", shape)]))
      }
      #expect(error?.layer == 4)
    }
    expectError(.missingInput, "'layers.L.keys'") {
      try CacheDump(file: SafeTensorsFile(bytes: SafeTensorsWriter().serialized()))
    }
    expectError(.corruptFile, "rope_theta", "'ten'") { try CacheDump(file: file(metadata: ["rope_theta": "ten"])) }
    expectError(.corruptFile, "scale", "'nan'") { try CacheDump(file: file(metadata: ["scale": "nan"])) }
    expectError(.invalidOption, "scale") { try CacheDump(layers: [:], scale: -1) }
    expectError(.invalidOption, "-3") {
      try CacheDump(layers: [-3: CacheDump(file: file()).layer(4)])
    }
    var writer = SafeTensorsWriter()
    try writer.add("layers.0.keys", shape: [1, 1, 1], int32s: [1])
    expectError(.shapeMismatch, "layers.0.keys", "I32") {
      try CacheDump(file: SafeTensorsFile(bytes: writer.serialized()))
    }
  }

  @Test func numbersThatAreNotFiniteAreNamed() throws {
    for (tensor, heads, value) in [("keys", 2, Float.nan), ("values", 2, .infinity), ("queries", 4, -.infinity)] {
      var writer = SafeTensorsWriter()
      for (name, count) in [("keys", 2), ("values", 2), ("queries", 4)] {
        var floats = [Float](repeating: 1, count: count * 3 * 2)
        if name == tensor { floats[(heads - 1) * 6 + 2 * 2 + 1] = value }
        try writer.add("layers.7.\(name)", shape: [count, 3, 2], floats: floats)
      }
      let dump = try CacheDump(file: SafeTensorsFile(bytes: writer.serialized()))
      let error = expectError(.nonFinite, "layers.7.\(tensor)", "\(value)", "channel 1") { try dump.layer(7) }
      #expect(error?.layer == 7 && error?.head == heads - 1 && error?.position == 2)
    }
  }

  @Test func tensorsOfHeads() throws {
    var tensor = try HeadTensor(heads: 2, tokens: 2, dim: 2, elements: [0, 1, 2, 3, 4, 5, 6, 7])
    #expect(tensor[1, 0, 1] == 5)
    tensor[1, 0, 1] = 9
    #expect(try tensor.slice(tokens: 0..<1).elements == [0, 1, 4, 9])
    #expect(try tensor.slice(tokens: 1..<1).elements.isEmpty)
    expectError(.shapeMismatch, "0..<3") { try tensor.slice(tokens: 0..<3) }
    expectError(.shapeMismatch, "3 elements") { try HeadTensor(heads: 1, tokens: 2, dim: 2, elements: [1, 2, 3]) }
    expectError(.shapeMismatch) { try HeadTensor(heads: .max, tokens: 2, dim: 2, elements: []) }
    expectError(.shapeMismatch) { try HeadTensor(heads: 0, tokens: 0, dim: 0, elements: []) }
    expectError(.shapeMismatch) { try HeadTensor(heads: -1, tokens: -1, dim: 1, elements: [1]) }
  }
}
