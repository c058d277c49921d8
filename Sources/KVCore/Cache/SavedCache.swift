/// What the sections of a saved cache hold. ``Container`` is the file around them: magic, table, checksums.
///
/// ```
/// count     u64                         text      UTF-8 bytes behind their number (varuint)
/// flag      u8, 0 or 1                  maybe x   flag, and x behind it when the flag is 1
///
/// CACH 0                  format u32 = 2 · policy text · tokens seen (the most of any layer) count · tiers count
///                         attention: maybe scale f32 · maybe softcap f32 · causal flag · commits flag
///                         engine inputs u32
/// SHAP 0                  layers count · maybe rotary embedding (drawn at its coding) · per layer:
///                         cached flag · KV heads, query heads, key dim, value dim u32 · maybe sliding window count
/// LAYR layer              cached layers only
///                         tokens seen · observed tokens · observed queries · settled tokens
///                         · decoded since compression · frozen below · prompt start · decoded tokens: counts
///                         phase u8 · outcome u8 and its numbers
///                         maybe query window: capacity count · captured count
///                         · f32 [query heads][min(captured, capacity)][key dim], oldest first
///                         router's memory: count, f32 x count
///                         maybe allocation: tokens seen · per KV head rows kept, budget: counts
///                         tokens of the last choice count
///                         maybe probe queries: first token · probes · capacity: counts · i32 x probes
///                         · f32 [probes][query heads][key dim]
///                         named probes: count · i32 x count, ascending
/// JOIN layer * 64 + tier  only for joined groups, under their first layer: what the tier's joint storage writes
/// SEGM layer * 64 + tier  what the tier's representation writes. Row segments: heads count · per head:
///   head                  slots count · dead slots count
///                         positions: u8 · 0: first count · 1: capacity count, i32 x slots, ascending
///                         · 2: the same, in the order in which tiers sent the rows
///                         log biases: maybe capacity count, f32 x slots
///                         observed attention: maybe columns count · capacity count, f32 x slots x columns
///                         keys · values
///                         tokens per slot: maybe capacity count, u32 x slots
///   keys, values          body extents count · extents count · per extent:
///                         ┌ kind ┬ type ┬ bits ┬ code ┬ group u32 ┬ rows ┬ capacity ┬ first ┐   u8 each, then counts
///                         0      1      2      3   4           8      16         24      32
///                         ┌ u8 whose numbers per channel, and they ┐   encoded rows of formats that rotate or scale
///                         ┌ elements or codes of the rows ┬ scales ┬ minima ┐   as they are, not encoded again
/// ```
///
/// Capacities are there so that a loaded cache grows, and counts its bytes, as the saved one would have. Three things
/// are not: room that a cut or a failed call left in a column beyond what growth would give, empty extents between
/// others (a fork can leave them), and which buffers were shared with forks. A loaded cache owns all of its memory: it
/// has room where a fork must open new memory. Attention sums then run over rows cut elsewhere, which kernels that
/// round a run as a whole (per-token codes on avx512) show in the last bits.
///
/// Elements and codes are those of a little endian machine. The rotary embedding is kept as its parameters:
/// frequencies come from the mathematical library of the machine that loads.
package enum SavedCache {
  package static let format: UInt32 = 2
  package static let header = Container.Tag("CACH")
  package static let shape = Container.Tag("SHAP")
  package static let layer = Container.Tag("LAYR")
  package static let segment = Container.Tag("SEGM")
  package static let joint = Container.Tag("JOIN")

  static func segmentIndex(layer: Int, tier: Int) -> Int { layer * 64 + tier }

  // Beyond any model there is; they keep sizes computed from a file far from overflow.
  static let maximumLayers = 1 << 16
  static let maximumHeads = 1 << 16
  static let maximumTokens = Int(Int32.max)
  /// Numbers a router remembers per layer.
  static let maximumRemembered = 1 << 16
  /// Of counters that only ever grow.
  static let maximumCounter = 1 << 48

  /// The section CACH.
  struct Header {
    var policy: String
    var tokensSeen: Int
    var tiers: Int
    var attention: AttentionOptions
    var inputs: EngineInputs

    init(policy: String, tokensSeen: Int, tiers: Int, attention: AttentionOptions, inputs: EngineInputs) {
      self.policy = policy
      self.tokensSeen = tokensSeen
      self.tiers = tiers
      self.attention = attention
      self.inputs = inputs
    }

    func encode(to writer: inout ByteWriter) {
      writer.u32(SavedCache.format)
      writer.string(policy)
      writer.count(tokensSeen)
      writer.count(tiers)
      for number in [attention.scale, attention.softcap] {
        writer.bool(number != nil)
        if let number { writer.f32(number) }
      }
      writer.bool(attention.causal)
      writer.bool(attention.commits)
      // Bits without a meaning say nothing about an engine.
      writer.u32(UInt32(inputs.intersection(.attendThrough).rawValue))
    }

    init(_ container: ContainerReader) throws(KVError) {
      guard container.flags == 0 else {
        throw KVError(.corruptFile, "header: expected flags 0; found \(container.flags)", offset: 12)
      }
      var reader = try container.section(SavedCache.header)
      let format = try reader.u32("the format of a saved cache")
      guard format == SavedCache.format else {
        throw reader.corrupt(
          "expected a saved cache of format \(SavedCache.format); found \(format), written by another version of this "
            + "library")
      }
      policy = try reader.string("the policy text")
      tokensSeen = try reader.count("the tokens seen", in: 0...SavedCache.maximumTokens)
      tiers = try reader.count("the tiers of the policy", in: 1...64)
      attention = AttentionOptions()
      if try reader.bool("whether there is a scale") { attention.scale = try reader.f32("the attention scale") }
      if try reader.bool("whether there is a softcap") { attention.softcap = try reader.f32("the softcap") }
      attention.causal = try reader.bool("whether attention is causal")
      attention.commits = try reader.bool("whether attention commits")
      do throws(KVError) { try attention.validate(layer: 0) } catch { throw reader.corrupt(error.message) }
      let bits = try reader.u32("the engine's inputs")
      guard bits & ~UInt32(EngineInputs.attendThrough.rawValue) == 0 else {
        throw reader.corrupt("expected engine inputs this version knows; found the bits \(bits)")
      }
      inputs = EngineInputs(rawValue: Int(bits))
      try reader.finish()
    }
  }
}

/// What a saved cache says about itself, enough to make the policy and the model shape it is loaded with.
public struct SavedCacheDescription: Hashable, Sendable {
  /// The policy as text, every option by name.
  public let policy: String
  public let shape: ModelShape
  /// Tokens seen by the layer that saw most.
  public let tokensSeen: Int
  public let attention: AttentionOptions
  public let inputs: EngineInputs

  init(_ container: ContainerReader) throws(KVError) {
    let header = try SavedCache.Header(container)
    policy = header.policy
    tokensSeen = header.tokensSeen
    attention = header.attention
    inputs = header.inputs
    var reader = try container.section(SavedCache.shape)
    shape = try ModelShape(from: &reader)
    try reader.finish()
  }
}
