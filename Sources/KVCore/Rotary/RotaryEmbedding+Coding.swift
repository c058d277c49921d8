/// A rotary embedding in a saved cache: the parameters, not the frequencies they give.
///
/// ```
/// head dim u32 · rotary dim u32 · theta f64 · layout u8 (0 halves, 1 pairs) · angle product u8 (0 f32, 1 f64)
/// scaling u8:  0 none
///              1 linear       factor f64
///              2 NTK          factor f64
///              3 dynamic NTK  factor f64 · original context count
///              4 YaRN         factor f64 · original context count · beta fast f64 · beta slow f64
///                             · maybe attention factor f64 · truncate flag
///              5 Llama 3      factor f64 · low factor f64 · high factor f64 · original context count
///              6 explicit     attention factor f32 · frequencies count · f32 each
/// maybe context length count
/// ```
extension RotaryEmbedding {
  func encode(to writer: inout ByteWriter) {
    writer.u32(UInt32(headDim))
    writer.u32(UInt32(rotaryDim))
    writer.f64(theta)
    writer.u8(layout == .halfSplit ? 0 : 1)
    writer.u8(angleProduct == .f32 ? 0 : 1)
    scaling.encode(to: &writer)
    writer.bool(contextLength != nil)
    if let contextLength { writer.count(contextLength) }
  }

  init(from reader: inout ByteReader) throws(KVError) {
    let headDim = Int(try reader.u32("the head size of the rotary embedding"))
    let rotaryDim = Int(try reader.u32("the rotary size"))
    let theta = try reader.f64("the rotary base")
    let layout = try reader.bool("the layout of pairs")
    let product = try reader.bool("the angle product")
    let scaling = try Scaling(from: &reader)
    var context: Int?
    if try reader.bool("whether there is a context length") {
      context = try reader.count("the context length", in: 1...Int.max)
    }
    let plain: RotaryEmbedding
    do throws(KVError) {
      plain = try RotaryEmbedding(
        headDim: headDim, rotaryDim: rotaryDim, theta: theta, layout: layout ? .interleaved : .halfSplit,
        scaling: scaling, angleProduct: product ? .f64 : .f32)
      self = try context.map { (length) throws(KVError) in try plain.resolved(contextLength: length) } ?? plain
    } catch {
      throw reader.corrupt(error.message)
    }
    guard contextLength == context else {
      throw reader.corrupt("expected no context length: this scaling does not depend on it")
    }
  }

  /// For messages. Scalings are told apart by their parameters.
  var summary: String {
    "a rotary embedding of \(rotaryDim) of \(headDim) channels, base \(theta), \(layout.kind), "
      + "scaling \(scaling.kind), product \(angleProduct.kind), context \(contextLength.map(String.init) ?? "any")"
  }
}

extension RotaryEmbedding.Scaling {
  fileprivate func encode(to writer: inout ByteWriter) {
    switch kind {
    case .none:
      writer.u8(0)
    case .linear(let factor):
      writer.u8(1)
      writer.f64(factor)
    case .ntk(let factor):
      writer.u8(2)
      writer.f64(factor)
    case .dynamicNTK(let factor, let original):
      writer.u8(3)
      writer.f64(factor)
      writer.count(original)
    case .yarn(let yarn):
      writer.u8(4)
      writer.f64(yarn.factor)
      writer.count(yarn.originalContext)
      writer.f64(yarn.betaFast)
      writer.f64(yarn.betaSlow)
      writer.bool(yarn.attentionFactor != nil)
      if let factor = yarn.attentionFactor { writer.f64(factor) }
      writer.bool(yarn.truncate)
    case .llama3(let llama):
      writer.u8(5)
      writer.f64(llama.factor)
      writer.f64(llama.lowFrequencyFactor)
      writer.f64(llama.highFrequencyFactor)
      writer.count(llama.originalContext)
    case .explicit(let frequencies, let factor):
      writer.u8(6)
      writer.f32(factor)
      writer.count(frequencies.count)
      writer.array(frequencies)
    }
  }

  fileprivate init(from reader: inout ByteReader) throws(KVError) {
    let number = try reader.u8("the rotary scaling")
    switch number {
    case 0: self = .none
    case 1: self = .linear(factor: try reader.f64("a scaling factor"))
    case 2: self = .ntk(factor: try reader.f64("a scaling factor"))
    case 3:
      self = .dynamicNTK(
        factor: try reader.f64("a scaling factor"), originalContext: try reader.count("the original context"))
    case 4:
      let factor = try reader.f64("a scaling factor")
      let original = try reader.count("the original context")
      let fast = try reader.f64("beta fast")
      let slow = try reader.f64("beta slow")
      let attention = try reader.bool("whether there is an attention factor") ? try reader.f64("it") : nil
      self = .yarn(
        factor: factor, originalContext: original, betaFast: fast, betaSlow: slow, attentionFactor: attention,
        truncate: try reader.bool("whether the ramp is truncated"))
    case 5:
      self = .llama3(
        factor: try reader.f64("a scaling factor"), lowFrequencyFactor: try reader.f64("a low frequency factor"),
        highFrequencyFactor: try reader.f64("a high frequency factor"),
        originalContext: try reader.count("the original context"))
    case 6:
      let factor = try reader.f32("the attention factor")
      let count = try reader.count("frequencies", of: 4)
      self = .explicit(
        inverseFrequencies: try reader.array(of: Float.self, count: count), attentionFactor: factor)
    default: throw reader.corrupt("expected a rotary scaling in 0...6; found \(number)")
    }
  }
}
