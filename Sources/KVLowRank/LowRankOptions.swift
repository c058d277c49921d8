package import KVCore

/// How latents are held: elements of a type, or codes with a scale and a minimum per group.
public struct LatentFormat: Hashable, Sendable {
  /// `f32`, `f16`, `bf16`, `int8`, `int4`, `int3` or `int2`.
  public let name: String

  private init(_ name: String) { self.name = name }

  public static let f32 = LatentFormat("f32")
  public static let f16 = LatentFormat("f16")
  public static let bf16 = LatentFormat("bf16")
  /// Codes: of keys per channel over 32 tokens, of values per token over 32 channels, as KIVI's and CSKV's.
  public static let int8 = LatentFormat("int8")
  public static let int4 = LatentFormat("int4")
  public static let int3 = LatentFormat("int3")
  public static let int2 = LatentFormat("int2")

  static let all = [f32, f16, bf16, int8, int4, int3, int2]

  private var bits: Int? { name.hasPrefix("int") ? Int(name.dropFirst(3)) : nil }
  var isCoded: Bool { bits != nil }

  /// - Parameter zero: codes have a clamped integer zero point instead of a minimum.
  func keys(zero: Bool = false) throws(KVError) -> SideFormat {
    guard let bits else { return .dense(ElementType(name: name) ?? .f16) }
    return try .blocks(
      of: 32, window: .f16,
      body: zero
        ? .affinePerChannel(bits: bits, group: 32, zero: .clamped) : .affinePerChannel(bits: bits, group: 32))
  }

  func values(zero: Bool = false) throws(KVError) -> SideFormat {
    guard let bits else { return .dense(ElementType(name: name) ?? .f16) }
    return try .newest(
      0, window: .f16,
      body: zero ? .affinePerToken(bits: bits, group: 32, zero: .clamped) : .affinePerToken(bits: bits, group: 32))
  }
}

/// What becomes of tokens that come after a basis was made.
public struct LatentTokens: Hashable, Sendable {
  package let continuation: LatentContinuation

  /// They stay dense: exact, and growing at the full rate.
  public static let raw = LatentTokens(continuation: .raw)
  /// All but the newest `keeping`, 32 at a time, become latents on the basis there is.
  public static func projected(keeping: Int) -> LatentTokens { .init(continuation: .project(keeping: keeping)) }
  /// Once `every` of them stand before the newest `keeping`, they and what the basis describes get a new basis together.
  public static func refreshed(keeping: Int, every: Int) -> LatentTokens {
    .init(continuation: .refresh(keeping: keeping, every: every))
  }

  var name: String {
    switch continuation {
    case .raw: "raw"
    case .project, .blocks: "project"
    case .refresh: "refresh"
    }
  }

  func validate(_ latents: LatentFormat) throws(KVError) {
    switch continuation {
    case .raw, .blocks: return
    case .project(let keeping):
      guard (0...1 << 20).contains(keeping) else {
        throw KVError(.invalidOption, "a window of 0...1048576 tokens expected; got \(keeping)")
      }
    case .refresh(let keeping, let every):
      guard (0...1 << 20).contains(keeping), (1...1 << 20).contains(every) else {
        throw KVError(
          .invalidOption,
          "a window of 0...1048576 tokens, refreshed every 1...1048576 of them, expected; got \(keeping) and \(every)")
      }
      guard !latents.isCoded else {
        throw KVError(
          .invalidOption, "codes are written once: a basis can be refreshed with latents in f32, f16 or bf16 only")
      }
    }
  }
}

extension Rank {
  var specValue: SpecValue {
    switch kind {
    case .channels(let count): .integer(count)
    case .share(let share): .decimal(share)
    case .full: .text("full")
    }
  }
}

extension OptionReader {
  mutating func rank(_ name: String, default standard: Rank) throws(KVError) -> Rank {
    let expected = "a rank (128 channels, 0.25 or 25% of them, or full)"
    let value = try read(name, default: standard, expected: expected, spec: \.specValue) {
      (value) throws(KVError) -> Rank? in
      switch value.kind {
      case .integer(let count) where (1...4096).contains(count): return .channels(count)
      case .decimal(let share) where share > 0 && share <= 1: return .share(share)
      case .percent(let share) where share > 0 && share <= 100: return .share(share / 100)
      case .text("full"): return .full
      default: return nil
      }
    }
    return value ?? standard
  }

  /// A share above 0 and up to 1.
  mutating func share(_ name: String, default standard: Double) throws(KVError) -> Double {
    let expected = "a share above 0 and up to 1 (0.5 or 50%)"
    let value = try read(name, default: standard, expected: expected, spec: SpecValue.decimal) {
      (value) throws(KVError) -> Double? in
      switch value.kind {
      case .decimal(let share) where share > 0 && share <= 1: return share
      case .percent(let share) where share > 0 && share <= 100: return share / 100
      default: return nil
      }
    }
    return value ?? standard
  }

  mutating func latents(default standard: LatentFormat) throws(KVError) -> LatentFormat {
    let name = try name("latents", default: standard.name, among: LatentFormat.all.map(\.name))
    return LatentFormat.all.first { $0.name == name } ?? standard
  }

  mutating func tokens(
    default standard: String, keep: Int, every: Int
  ) throws(KVError) -> LatentTokens {
    let name = try name("new", default: standard, among: ["raw", "project", "refresh"])
    let keeping = try int("keep", default: keep, in: 0...1_048_576)
    let interval = try int("every", default: every, in: 1...1_048_576)
    switch name {
    case "project": return .projected(keeping: keeping)
    case "refresh": return .refreshed(keeping: keeping, every: interval)
    default: return .raw
    }
  }
}

/// Options that all stores of this family have, as a text names them.
struct LowRankOptions {
  static let latents = MethodDescription.Option(
    "latents", "how latents are held: f32, f16, bf16, int8, int4, int3 or int2")
  static let basis = MethodDescription.Option("basis", "element type of the basis: f32, f16 or bf16")
  static let window = MethodDescription.Option("window", "element type of dense rows: f32, f16 or bf16")
  static let new = MethodDescription.Option(
    "new", "tokens after the prompt: raw stay dense, project become latents, refresh make a new basis")
  static let keep = MethodDescription.Option("keep", "newest tokens that stay dense (project, refresh)")
  static let every = MethodDescription.Option("every", "tokens before those that make a new basis (refresh)")

  static func tokens(_ tokens: LatentTokens, keep: Int, every: Int) -> [SpecOption] {
    var keeping = keep
    var interval = every
    switch tokens.continuation {
    case .raw, .blocks: break
    case .project(let count): keeping = count
    case .refresh(let count, let number): (keeping, interval) = (count, number)
    }
    return [
      SpecOption("new", .text(tokens.name)), SpecOption("keep", .integer(keeping)),
      SpecOption("every", .integer(interval)),
    ]
  }
}
