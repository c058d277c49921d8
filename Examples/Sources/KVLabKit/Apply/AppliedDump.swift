package import KVCompression
internal import KVExperiments

/// One layer after a policy has acted.
package struct AppliedLayer: Sendable {
  package let layer: Int
  package let status: LayerStatus
  package let shape: LayerShape
  /// Per KV head.
  package var heads: [HeadContents] = []
  /// [queryHeads, probes, valueDim]; empty without probe queries.
  package var attention: [Float] = []
  package var probes = 0
  /// Of the probe queries, against the same cache before the policy acted.
  package var attentionError: Double?

  /// Two bytes a number, all tokens.
  package var denseBytes: Int { status.tokensSeen * shape.kvHeads * (shape.keyDim + shape.valueDim) * 2 }
}

/// A dump after a policy has acted.
package struct AppliedDump: Sendable {
  package let policy: NamedPolicy
  package var layers: [AppliedLayer] = []
  private let metadata: [String: String]

  init(policy: NamedPolicy, metadata: [String: String]) {
    self.policy = policy
    self.metadata = metadata
  }

  package var bytes: ByteCount { layers.reduce(ByteCount()) { $0 + $1.status.bytes } }
  package var denseBytes: Int { layers.reduce(0) { $0 + $1.denseBytes } }

  /// `layers.L.positions.h`, `.keys.h`, `.values.h`, where rows carry one `.log_bias.h`, and `layers.L.attention`.
  ///
  /// - Throws: `inputOutput`.
  package func write(to path: String) throws(KVError) {
    var metadata = metadata
    metadata["policy"] = policy.spec
    var writer = SafeTensorsWriter(metadata: metadata)
    for layer in layers {
      let prefix = "layers.\(layer.layer)."
      for (head, rows) in layer.heads.enumerated() {
        let count = rows.positions.count
        try writer.add("\(prefix)positions.\(head)", shape: [count], int32s: rows.positions.map { Int32($0) })
        try writer.add("\(prefix)keys.\(head)", shape: [count, layer.shape.keyDim], floats: rows.keys)
        try writer.add("\(prefix)values.\(head)", shape: [count, layer.shape.valueDim], floats: rows.values)
        if rows.logBias.contains(where: { $0 != 0 }) {
          try writer.add("\(prefix)log_bias.\(head)", shape: [count], floats: rows.logBias)
        }
      }
      if layer.probes > 0 {
        try writer.add(
          "\(prefix)attention", shape: [layer.shape.queryHeads, layer.probes, layer.shape.valueDim],
          floats: layer.attention)
      }
    }
    try writer.write(to: path)
  }

  /// - Throws: nothing in practice: options are finite.
  package func json() throws(KVError) -> JSONText {
    .object(
      [.init("policy", .string(policy.name)), .init("spec", .string(policy.spec))]
        + Self.members(bytes, dense: denseBytes) + [
          .init("layers", .array(layers.map(Self.json))),
          .init("options", .raw(try policy.policy.spec.json())),
        ])
  }

  private static func json(_ layer: AppliedLayer) -> JSONText {
    .object(
      [
        .init("layer", .integer(layer.layer)), .init("tokens", .integer(layer.status.tokensSeen)),
        .init("rows", .array(layer.status.rowsHeld.map { .integer($0) })),
      ] + members(layer.status.bytes, dense: layer.denseBytes) + [
        .init("attentionError", layer.attentionError.map { .number($0) } ?? .null),
        .init("state", .string("\(layer.status.state)")), .init("reason", .string(layer.status.reason)),
      ])
  }

  private static func members(_ bytes: ByteCount, dense: Int) -> [JSONText.Member] {
    [
      .init("payloadBytes", .integer(bytes.payload)), .init("metadataBytes", .integer(bytes.metadata)),
      .init("indexBytes", .integer(bytes.index)), .init("stateBytes", .integer(bytes.state)),
      .init("bytes", .integer(bytes.total)), .init("f16Bytes", .integer(dense)),
      .init("ratio", .number(Double(dense) / Double(bytes.total))),
    ]
  }

  package var table: String {
    var table = TextTable(["layer", "tokens", "rows", "payload", "metadata", "index", "state", "ratio", "attn err"])
    for layer in layers {
      let bytes = layer.status.bytes
      let (least, most) = (layer.status.rowsHeld.min() ?? 0, layer.status.rowsHeld.max() ?? 0)
      table.rows.append([
        String(layer.layer), String(layer.status.tokensSeen), least == most ? "\(least)" : "\(least)…\(most)",
        Print.bytes(bytes.payload), Print.bytes(bytes.metadata), Print.bytes(bytes.index), Print.bytes(bytes.state),
        Print.fixed(Double(layer.denseBytes) / Double(bytes.total), 2) + "x",
        layer.attentionError.map { Print.fixed($0, 5) } ?? "–",
      ])
    }
    table.rows.append([
      "all", "", "", Print.bytes(bytes.payload), Print.bytes(bytes.metadata), Print.bytes(bytes.index),
      Print.bytes(bytes.state), Print.fixed(Double(denseBytes) / Double(bytes.total), 2) + "x", "",
    ])
    return table.text
  }
}
