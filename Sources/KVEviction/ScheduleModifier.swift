public import KVCore

/// When a selection acts, for any selection: methods published for the prompt alone run while decoding with it, and the
/// prompt can be compressed chunk by chunk.
extension Selection {
  /// The same selection with another schedule; what is nil stays as it is.
  ///
  /// - Parameters:
  ///   - afterPrefill: choose when the prompt is complete.
  ///   - chunks: choose after every chunk of the prompt, which bounds the cache while it fills.
  ///   - every: decoded tokens between selections; 0 for never after the prompt.
  ///   - over: act only when a head holds more than this, then go down to the budget.
  ///   - target: the budget, instead of the selection's own.
  public func rescheduled(
    afterPrefill: Bool? = nil, chunks: Bool? = nil, every: Int? = nil, over: Budget? = nil, target: Budget? = nil
  ) throws(KVError) -> Selection {
    if let every, every < 0 {
      throw KVError(.invalidOption, "selecting every \(every) tokens does not exist; at least 1, or 0 for never")
    }
    try over?.validate()
    try target?.validate()
    var options: [SpecOption] = []
    if let afterPrefill { options.append(SpecOption("prefill", .bool(afterPrefill))) }
    if let chunks { options.append(SpecOption("chunks", .bool(chunks))) }
    if let every { options.append(SpecOption("every", .integer(every))) }
    if let over { options.append(SpecOption("over", over.specValue)) }
    if let target { options.append(SpecOption("target", target.specValue)) }
    return modified(by: StageSpec(name: "schedule", options: options)) { selection in
      if let afterPrefill { selection.schedule.afterPrefill = afterPrefill }
      if let chunks { selection.schedule.afterPrefillChunks = chunks }
      if let every { selection.schedule.decodeInterval = every == 0 ? nil : every }
      if let over { selection.schedule.trigger = over }
      if let target { selection.budget = target }
    }
  }

  /// `snapkv(budget=2048)+schedule(every=64,chunks=true)`.
  public static let scheduleMethod = MethodDescription(
    name: "schedule", role: .modifier, summary: "when a selection acts: prompt, chunks, decoding, over a size",
    options: [
      .init("prefill", "whether to choose when the prompt is complete"),
      .init("chunks", "whether to choose after every chunk of the prompt"),
      .init("every", "decoded tokens between selections; 0 for never after the prompt"),
      .init("over", "tokens, share or bytes a head must exceed before anything is chosen"),
      .init("target", "tokens, share or bytes kept, instead of the selection's budget"),
    ]
  ) { (reader) throws(KVError) in
    let afterPrefill = reader.has("prefill") ? try reader.bool("prefill") : nil
    let chunks = reader.has("chunks") ? try reader.bool("chunks") : nil
    let every = reader.has("every") ? try reader.int("every", in: 0...1_048_576) : nil
    let over = reader.has("over") ? try reader.budget("over") : nil
    let target = reader.has("target") ? try reader.budget("target") : nil
    for name in ["prefill", "chunks", "every", "over", "target"] { reader.offer(name) }
    return .modifier { (selection) throws(KVError) in
      try selection.rescheduled(
        afterPrefill: afterPrefill, chunks: chunks, every: every, over: over, target: target)
    }
  }
}
