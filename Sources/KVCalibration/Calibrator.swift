internal import KVBackendCPU
public import KVCore

/// Collects keys and values of sample texts, layer by layer, and makes a ``Calibration`` of them.
///
/// ```swift
/// let calibrator = Calibrator(.principalComponents(), shape: shape)
/// // for every chunk of every text and every layer, what attention gets:
/// try calibrator.add(layer: layer, keys: keys, values: values, firstPosition: position)
/// try calibrator.finish().write(to: "pca.safetensors")
/// ```
/// Samples are not kept, only sums over them: for each layer and side a square of the channels that share a basis, in f64.
public final class Calibrator {
  public let method: CalibrationMethod
  public let shape: ModelShape
  /// Joins the metadata of what is made.
  public var notes: [String: String] = [:]

  private var layers: [Int: LayerSums] = [:]
  private let backend: CPUBackend
  private var scratch: [Float] = []

  /// - Parameter shape: with the rotary embedding, for methods that look at keys before it.
  /// - Throws: `missingInput` when that lacks, `unsupported` for dynamic scaling.
  public init(_ method: CalibrationMethod, shape: ModelShape) throws(KVError) {
    try shape.validate()
    self.method = method
    self.shape = shape
    backend = try CPUBackend()
    if method.keysBeforeRotation {
      guard let rotary = shape.rotary else {
        throw KVError(
          .missingInput, "\(method.name) looks at keys before their rotary embedding; give ModelShape the embedding")
      }
      try rotary.requireStatic()
      for (index, layer) in shape.layers.enumerated() where layer.cached && layer.keyDim != rotary.headDim {
        throw KVError(
          .shapeMismatch, "rotary embedding of \(rotary.headDim) channels for keys of \(layer.keyDim)", layer: index)
      }
    }
  }

  /// Tokens that a layer has been given.
  public func tokens(layer: Int) -> Int { layers[layer]?.tokens ?? 0 }

  // MARK: Taking samples in

  /// Keys and values of consecutive tokens of one text, as a cache gets them.
  ///
  /// - Parameters:
  ///   - keys: [kvHeads, tokens, keyDim], after the rotary embedding.
  ///   - firstPosition: of the first token.
  /// - Throws: `shapeMismatch`, `nonFinite`; nothing has been taken in then.
  public func add(
    layer: Int, keys: borrowing TensorView, values: borrowing TensorView, firstPosition: Int
  ) throws(KVError) {
    let own = try layerShape(layer)
    try check(keys, "keys", heads: own.kvHeads, dim: own.keyDim, layer)
    try check(values, "values", heads: own.kvHeads, dim: own.valueDim, layer)
    guard keys.tokens == values.tokens, firstPosition >= 0, firstPosition <= Int(Int32.max) - keys.tokens else {
      throw KVError(
        .shapeMismatch,
        "as many keys as values, from a position of 0 or more on, expected; got \(keys.tokens) and \(values.tokens) at "
          + "\(firstPosition)", layer: layer)
    }
    if keys.tokens == 0 { return }
    var sums = layers.removeValue(forKey: layer) ?? LayerSums(method, own)
    defer { layers[layer] = sums }
    if method.usesValues {
      load(values)
      sums.add(.values, scratch, tokens: values.tokens)
    }
    load(keys)
    if method.keysBeforeRotation, let rotary = shape.rotary {
      let positions = (0..<own.kvHeads).flatMap { _ in
        (0..<keys.tokens).map { Int32(firstPosition + $0) }
      }
      // The stride between rows of the scratch is that of the layer.
      var span = scratch.mutableSpan
      try rotary.unrotate(&span, stride: own.keyDim, positions: positions.span)
    }
    sums.add(.keys, scratch, tokens: keys.tokens)
    sums.tokens += keys.tokens
  }

  /// Queries of some tokens, [queryHeads, tokens, keyDim] after their rotary embedding: they say how much an error of a
  /// head's keys counts.
  ///
  /// - Throws: `shapeMismatch`, `nonFinite`.
  public func add(layer: Int, queries: borrowing TensorView) throws(KVError) {
    let own = try layerShape(layer)
    try check(queries, "queries", heads: own.queryHeads, dim: own.keyDim, layer)
    var sums = layers.removeValue(forKey: layer) ?? LayerSums(method, own)
    defer { layers[layer] = sums }
    load(queries)
    let group = own.queryHeads / own.kvHeads
    let size = queries.tokens * own.keyDim
    for head in 0..<own.queryHeads {
      var sum = 0.0
      for value in scratch[head * size..<(head + 1) * size] { sum += Double(value) * Double(value) }
      sums.queryEnergy[head / group] += sum
    }
    sums.queries += queries.tokens * group
  }

  /// What the projections of a layer are applied to, [tokens, channels], one text or part of one: for
  /// ``FactorStart/scaledWeights``.
  ///
  /// - Throws: `shapeMismatch`, `nonFinite`.
  public func add(layer: Int, inputs: [Float], channels: Int) throws(KVError) {
    let own = try layerShape(layer)
    guard channels > 0, inputs.count % channels == 0 else {
      throw KVError(.shapeMismatch, "rows of \(channels) channels expected; got \(inputs.count) numbers", layer: layer)
    }
    guard inputs.allSatisfy(\.isFinite) else {
      throw KVError(.nonFinite, "inputs of a projection hold NaN or infinity", layer: layer)
    }
    var sums = layers.removeValue(forKey: layer) ?? LayerSums(method, own)
    defer { layers[layer] = sums }
    if sums.inputs.isEmpty { sums.inputs = Array(repeating: 0, count: channels) }
    guard sums.inputs.count == channels else {
      throw KVError(
        .shapeMismatch, "inputs of \(sums.inputs.count) channels, as before, expected; got \(channels)", layer: layer)
    }
    for (index, value) in inputs.enumerated() { sums.inputs[index % channels] += Double(abs(value)) }
    sums.inputRows += inputs.count / channels
  }

  /// The weights that make keys or values, [heads · dim][inputs] as checkpoints hold them, and their bias. Before the
  /// first samples of the layer where there is a bias.
  ///
  /// - Throws: `shapeMismatch`, `nonFinite`; `wrongPhase` for a bias after samples.
  public func setProjection(
    layer: Int, _ side: Calibration.Side, weight: [Float], bias: [Float]? = nil
  ) throws(KVError) {
    let own = try layerShape(layer)
    let width = own.kvHeads * (side == .keys ? own.keyDim : own.valueDim)
    guard !weight.isEmpty, weight.count % width == 0, bias.map({ $0.count == width }) ?? true else {
      throw KVError(
        .shapeMismatch,
        "a projection of \(width) rows, and as many numbers of a bias, expected; got \(weight.count) numbers and "
          + "\(bias?.count ?? 0)", layer: layer)
    }
    guard weight.allSatisfy(\.isFinite), bias?.allSatisfy(\.isFinite) ?? true else {
      throw KVError(.nonFinite, "a projection holds NaN or infinity", layer: layer)
    }
    var sums = layers.removeValue(forKey: layer) ?? LayerSums(method, own)
    defer { layers[layer] = sums }
    guard bias == nil || sums.tokens == 0 else {
      throw KVError(.wrongPhase, "the bias of a projection comes before the samples of its layer", layer: layer)
    }
    sums.set(side, weight: weight, bias: bias)
  }

  private func layerShape(_ layer: Int) throws(KVError) -> LayerShape {
    guard shape.layers.indices.contains(layer), shape.layers[layer].cached else {
      throw KVError(
        .shapeMismatch, "a layer with a cache, of \(shape.layers.count), expected; got \(layer)", layer: layer)
    }
    return shape.layers[layer]
  }

  private func check(
    _ view: borrowing TensorView, _ name: String, heads: Int, dim: Int, _ layer: Int
  ) throws(KVError) {
    guard view.heads == heads, view.dim == dim else {
      throw KVError(
        .shapeMismatch, "\(name) of \(heads) heads x \(dim) channels expected; got \(view.heads) x \(view.dim)",
        layer: layer)
    }
    if let place = backend.firstNonfinite(view) {
      throw KVError(
        .nonFinite, "channel \(place.channel) of the \(name) is NaN or infinite", layer: layer, head: place.head,
        position: place.token)
    }
  }

  /// A view as f32 [head][token][dim] in the scratch.
  private func load(_ view: borrowing TensorView) {
    let count = view.heads * view.tokens * view.dim
    if scratch.count != count { scratch = Array(repeating: 0, count: count) }
    scratch.withUnsafeMutableBytes { raw in
      guard let base = raw.baseAddress else { return }
      let size = view.tokens * view.dim * 4
      let targets = (0..<view.heads).map { head in
        WriteTarget(
          head: head, token: 0,
          slice: RunSlice(
            run: RowRun(encoding: .dense(.f32), dim: view.dim, capacity: view.tokens, base: base + head * size),
            first: 0, count: view.tokens), range: .window)
      }
      _ = backend.write(view, to: targets)
    }
  }

  // MARK: Making a calibration

  /// The calibration of everything taken in so far.
  ///
  /// - Parameter progress: told the share that is done, after each layer.
  /// - Throws: `missingInput` for a model without samples, or without the projections the method wants; `nonFinite`
  ///   when an eigenvalue iteration does not converge.
  /// - Complexity: O(width³) for each basis.
  public func finish(progress: ((Double) -> Void)? = nil) throws(KVError) -> Calibration {
    var tensors: [Calibration.Name: Calibration.Tensor] = [:]
    let wanted = shape.layers.indices.filter { layers[$0].map { $0.tokens > 0 } ?? false }
    guard !wanted.isEmpty else { throw KVError(.missingInput, "a calibration needs samples; none were given") }
    for (done, layer) in wanted.enumerated() {
      guard let sums = layers[layer] else { continue }
      do throws(KVError) {
        for (side, quantity, tensor) in try sums.tensors(method) {
          tensors[Calibration.Name(layer: layer, side: side, quantity: quantity)] = tensor
        }
      } catch {
        throw error.at(layer: layer)
      }
      progress?(Double(done + 1) / Double(wanted.count))
    }
    var metadata = notes
    metadata["method"] = method.name
    metadata["rope"] = method.keysBeforeRotation ? "pre" : "post"
    metadata["tokens"] = String(layers.values.map(\.tokens).max() ?? 0)
    return try Calibration(tensors, metadata: metadata)
  }
}

extension CalibrationMethod {
  var usesValues: Bool {
    if case .order = kind { return false }
    return true
  }
}
