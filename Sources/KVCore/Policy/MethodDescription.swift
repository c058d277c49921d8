/// A published method, or a building block, that a policy text can name.
public struct MethodDescription: Sendable {
  /// Which half of a policy the method is.
  public enum Role: String, Sendable, Hashable {
    /// Chooses tokens: stands first.
    case selection
    /// Replaces stages of the selection left of it: another allocator, router or schedule, or a scorer around its own.
    case modifier
    /// Changes the store left of it.
    case storeModifier = "store modifier"
    /// Stores them: stands last. Several stores are the tiers of one policy, in order.
    case store
    /// Stands between two stores: the right one takes some layers of the left one.
    case layers
  }

  /// What a method's options make.
  public enum Part: Sendable {
    case selection(Selection)
    case modifier(@Sendable (Selection) throws(KVError) -> Selection)
    case store(Store)
    case storeModifier(@Sendable (Store) throws(KVError) -> Store)
    case layers(LayerChoice)
  }

  /// One documented option.
  public struct Option: Sendable, Hashable {
    public let name: String
    public let summary: String

    public init(_ name: String, _ summary: String) {
      self.name = name
      self.summary = summary
    }
  }

  public let name: String
  public let aliases: [String]
  public let role: Role
  public let summary: String
  /// Where it was published, such as `arXiv 2404.14469`. Empty for building blocks.
  public let paper: String
  public let options: [Option]
  /// Makes the part from the options of a text. Reads every option through the reader, which refuses the rest.
  public let make: @Sendable (inout OptionReader) throws(KVError) -> Part

  public init(
    name: String, aliases: [String] = [], role: Role, summary: String, paper: String = "", options: [Option],
    make: @escaping @Sendable (inout OptionReader) throws(KVError) -> Part
  ) {
    self.name = name
    self.aliases = aliases
    self.role = role
    self.summary = summary
    self.paper = paper
    self.options = options
    self.make = make
  }

  /// The part for a stage of a text; every option not given has its documented default.
  public func part(for stage: StageSpec) throws(KVError) -> Part {
    var reader = OptionReader(stage)
    let part = try make(&reader)
    try reader.finish()
    return part
  }

  /// The options and their defaults, as the method reads them.
  public func defaults() throws(KVError) -> [SpecOption] {
    var reader = OptionReader(StageSpec(name: name))
    _ = try make(&reader)
    return reader.resolved
  }
}
