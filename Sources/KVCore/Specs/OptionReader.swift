/// Reads the options of a stage by name, with types and ranges, and refuses what nobody asked for.
///
/// ```swift
/// var reader = OptionReader(stage)
/// let window = try reader.int("window", default: 32, in: 1...65_536)
/// let budget = try reader.budget("budget", default: .fraction(0.25))
/// try reader.finish()
/// print(reader.resolvedStage)       // snapkv(window=32,budget=0.25)
/// ```
///
/// Errors are `invalidOption` and name the stage, the option, what was expected, what was found and where. A number
/// given as a quoted string is a text, not a number.
public struct OptionReader: Sendable {
  public let stage: StageSpec
  /// Options asked for so far, in that order, with the value they have: given or default.
  public private(set) var resolved: [SpecOption] = []
  private var asked: [String] = []

  public init(_ stage: StageSpec) { self.stage = stage }

  /// The stage with every option written out, in the order asked.
  public var resolvedStage: StageSpec { StageSpec(name: stage.name, options: resolved, offset: stage.offset) }

  /// Whether the text gives that option. Does not count as asking for it.
  public func has(_ name: String) -> Bool { stage.options.contains { $0.name == name } }

  /// Names an option that is valid but stands in contrast to those given, so that error texts list it.
  public mutating func offer(_ name: String) { if !asked.contains(name) { asked.append(name) } }

  /// Nothing left unread.
  ///
  /// - Throws: `unknownName` for the first option that was never asked for, with the valid names and the nearest.
  public func finish() throws(KVError) {
    guard let stranger = stage.options.first(where: { !asked.contains($0.name) }) else { return }
    let hint = nearestName(to: stranger.name, among: asked).map { "; did you mean \"\($0)\"?" } ?? ""
    let valid = asked.isEmpty ? "it has no options" : "valid: \(asked.joined(separator: ", "))"
    throw KVError(
      .unknownName, "\(stage.name) has no option \"\(stranger.name)\"\(hint) (\(valid))", offset: stranger.offset)
  }

  // MARK: - Reading

  /// The given value converted, or the default; nil when neither is there.
  ///
  /// `expected` completes "expected ..."; `convert` returns nil for a value of the wrong kind or out of range.
  package mutating func read<Value>(
    _ name: String, default standard: Value?, expected: String, spec: (Value) -> SpecValue,
    convert: (SpecValue) throws(KVError) -> Value?
  ) throws(KVError) -> Value? {
    if !asked.contains(name) { asked.append(name) }
    guard let option = stage.options.first(where: { $0.name == name }) else {
      if let standard { record(SpecOption(name, spec(standard))) }
      return standard
    }
    let value: Value?
    do {
      value = try convert(option.value)
    } catch {
      throw KVError(
        .invalidOption, "option \"\(name)\" of \(stage.name): \(error.message)", offset: option.offset)
    }
    guard let value else {
      throw KVError(
        .invalidOption, "option \"\(name)\" of \(stage.name): expected \(expected), found \(option.value.found)",
        offset: option.offset)
    }
    record(SpecOption(name, spec(value), offset: option.offset))
    return value
  }

  private mutating func record(_ option: SpecOption) {
    if let index = resolved.firstIndex(where: { $0.name == option.name }) {
      resolved[index] = option
    } else {
      resolved.append(option)
    }
  }

  /// The value, or an error that says the option is required.
  private func required<Value>(_ value: Value?, _ name: String, _ expected: String) throws(KVError) -> Value {
    if let value { return value }
    throw KVError(
      .invalidOption, "option \"\(name)\" of \(stage.name) is required: expected \(expected), found nothing",
      offset: stage.offset)
  }
}

// MARK: - Types

extension OptionReader {
  /// An integer within `range`. Required when there is no default.
  public mutating func int(
    _ name: String, default standard: Int? = nil, in range: ClosedRange<Int> = Int.min...Int.max
  ) throws(KVError) -> Int {
    try required(
      optionalInt(name, default: standard, in: range), name, "an integer\(OptionReader.text(of: range))")
  }

  /// An integer within `range`, nil when the text does not give it.
  public mutating func optionalInt(
    _ name: String, default standard: Int? = nil, in range: ClosedRange<Int> = Int.min...Int.max
  ) throws(KVError) -> Int? {
    try read(
      name, default: standard, expected: "an integer\(OptionReader.text(of: range))", spec: SpecValue.integer
    ) { (value) throws(KVError) in
      guard case .integer(let number) = value.kind, range.contains(number) else { return nil }
      return number
    }
  }

  /// A number within `range`; integers and percentages count. Required when there is no default.
  public mutating func double(
    _ name: String, default standard: Double? = nil,
    in range: ClosedRange<Double> = -Double.greatestFiniteMagnitude...Double.greatestFiniteMagnitude
  ) throws(KVError) -> Double {
    try required(
      optionalDouble(name, default: standard, in: range), name, "a number\(OptionReader.text(of: range))")
  }

  /// A number within `range`, nil when the text does not give it.
  public mutating func optionalDouble(
    _ name: String, default standard: Double? = nil,
    in range: ClosedRange<Double> = -Double.greatestFiniteMagnitude...Double.greatestFiniteMagnitude
  ) throws(KVError) -> Double? {
    try read(
      name, default: standard, expected: "a number\(OptionReader.text(of: range))", spec: SpecValue.decimal
    ) { (value) throws(KVError) in
      guard let number = value.number, range.contains(number) else { return nil }
      return number
    }
  }

  /// `true` or `false`. Required when there is no default.
  public mutating func bool(_ name: String, default standard: Bool? = nil) throws(KVError) -> Bool {
    let value = try read(name, default: standard, expected: "true or false", spec: SpecValue.bool) {
      (value) throws(KVError) in
      guard case .bool(let flag) = value.kind else { return nil }
      return flag
    }
    return try required(value, name, "true or false")
  }

  /// One of the names of `choices`, in any case of letters. Required when there is no default.
  public mutating func name(
    _ name: String, default standard: String? = nil, among choices: [String]
  ) throws(KVError) -> String {
    let expected = "one of \(choices.joined(separator: ", "))"
    let value = try read(name, default: standard, expected: expected, spec: SpecValue.text) {
      (value) throws(KVError) in
      guard case .text(let text) = value.kind else { return nil }
      if choices.contains(text.lowercased()) { return text.lowercased() }
      guard let near = nearestName(to: text.lowercased(), among: choices) else { return nil }
      throw KVError(
        .invalidOption, "expected \(expected), found \(value.found); did you mean \"\(near)\"?")
    }
    return try required(value, name, expected)
  }

  /// Any text, a path say. Required when there is no default.
  public mutating func string(_ name: String, default standard: String? = nil) throws(KVError) -> String {
    let value = try read(name, default: standard, expected: "a text", spec: SpecValue.text) {
      (value) throws(KVError) in
      guard case .text(let text) = value.kind else { return nil }
      return text
    }
    return try required(value, name, "a text")
  }

  /// A size in bytes, `64MiB` or a bare integer. Required when there is no default.
  public mutating func bytes(
    _ name: String, default standard: Int? = nil, in range: ClosedRange<Int> = 0...Int.max
  ) throws(KVError) -> Int {
    let expected = "a byte size\(OptionReader.text(of: range))"
    let value = try read(name, default: standard, expected: expected, spec: SpecValue.bytes) {
      (value) throws(KVError) in
      switch value.kind {
      case .bytes(let size) where range.contains(size): return size
      case .integer(let size) where range.contains(size): return size
      default: return nil
      }
    }
    return try required(value, name, expected)
  }

  /// `f32`, `f16` or `bf16`, or those of them in `choices`. Required when there is no default.
  public mutating func elementType(
    _ name: String, default standard: ElementType? = nil, among choices: [ElementType] = ElementType.all
  ) throws(KVError) -> ElementType {
    let text = try self.name(name, default: standard?.name, among: choices.map(\.name))
    return try required(ElementType(name: text), name, "an element type")
  }

  /// A list of integers within `range`. Required when there is no default.
  public mutating func intList(
    _ name: String, default standard: [Int]? = nil, in range: ClosedRange<Int> = Int.min...Int.max,
    count: ClosedRange<Int> = 0...Int.max
  ) throws(KVError) -> [Int] {
    let expected = "a list\(OptionReader.countText(count)) of integers\(OptionReader.text(of: range))"
    let value = try read(name, default: standard, expected: expected, spec: { .list($0.map(SpecValue.integer)) }) {
      (value) throws(KVError) -> [Int]? in
      guard case .list(let items) = value.kind, count.contains(items.count) else { return nil }
      var numbers: [Int] = []
      for item in items {
        guard case .integer(let number) = item.kind, range.contains(number) else { return nil }
        numbers.append(number)
      }
      return numbers
    }
    return try required(value, name, expected)
  }

  /// A list of numbers within `range`. Required when there is no default.
  public mutating func doubleList(
    _ name: String, default standard: [Double]? = nil,
    in range: ClosedRange<Double> = -Double.greatestFiniteMagnitude...Double.greatestFiniteMagnitude,
    count: ClosedRange<Int> = 0...Int.max
  ) throws(KVError) -> [Double] {
    let expected = "a list\(OptionReader.countText(count)) of numbers\(OptionReader.text(of: range))"
    let value = try read(name, default: standard, expected: expected, spec: { .list($0.map(SpecValue.decimal)) }) {
      (value) throws(KVError) -> [Double]? in
      guard case .list(let items) = value.kind, count.contains(items.count) else { return nil }
      let numbers = items.compactMap(\.number)
      return numbers.count == items.count && numbers.allSatisfy(range.contains) ? numbers : nil
    }
    return try required(value, name, expected)
  }

  /// A budget: `1024` tokens, `0.25` or `25%` of the tokens, `64MiB`, `unlimited`, or a table of these. Required when
  /// there is no default.
  public mutating func budget(_ name: String, default standard: Budget? = nil) throws(KVError) -> Budget {
    let expected = "a budget (1024, 0.25, 25%, 64MiB, unlimited or a list of these)"
    let value = try read(name, default: standard, expected: expected, spec: \.specValue) {
      (value) throws(KVError) -> Budget? in
      let budget = try Budget(value)
      try budget.validate()
      return budget
    }
    return try required(value, name, expected)
  }

  // MARK: - Texts of ranges

  private static func text(of range: ClosedRange<Int>) -> String {
    switch (range.lowerBound, range.upperBound) {
    case (Int.min, Int.max): ""
    case (let low, Int.max): " of at least \(low)"
    case (Int.min, let high): " of at most \(high)"
    case (let low, let high): " in \(low)...\(high)"
    }
  }

  private static func text(of range: ClosedRange<Double>) -> String {
    let most = Double.greatestFiniteMagnitude
    return switch (range.lowerBound > -most, range.upperBound < most) {
    case (false, false): ""
    case (true, false): " of at least \(range.lowerBound)"
    case (false, true): " of at most \(range.upperBound)"
    case (true, true): " in \(range.lowerBound)...\(range.upperBound)"
    }
  }

  private static func countText(_ count: ClosedRange<Int>) -> String {
    if count == 0...Int.max { return "" }
    return count.lowerBound == count.upperBound ? " of \(count.lowerBound)" : "\(text(of: count)) items"
  }
}

extension SpecValue {
  /// The number an integer, a decimal or a percentage stands for.
  var number: Double? {
    switch kind {
    case .integer(let value): Double(value)
    case .decimal(let value): value
    case .percent(let value): value / 100
    default: nil
    }
  }
}
