/// Some layers of a model: the first, the last, or by index.
public struct LayerChoice: Hashable, Sendable {
  public let first: Int
  public let last: Int
  /// Indices from 0.
  public let list: [Int]

  /// - Parameters:
  ///   - first: how many of the first layers.
  ///   - last: how many of the last layers.
  ///   - list: further layers by index; those the model does not have are nothing.
  /// - Throws: `invalidOption` for negative numbers.
  public init(first: Int = 0, last: Int = 0, list: [Int] = []) throws(KVError) {
    guard first >= 0, last >= 0, list.allSatisfy({ $0 >= 0 }) else {
      throw KVError(.invalidOption, "layers are counted from 0; got first \(first), last \(last), list \(list)")
    }
    self.first = first
    self.last = last
    self.list = list
  }

  /// Whether layer `index` of `count` is one of them.
  public func contains(_ index: Int, of count: Int) -> Bool {
    index < first || index >= count - last || list.contains(index)
  }

  package var spec: StageSpec {
    StageSpec(
      name: "layers",
      options: [
        SpecOption("first", .integer(first)), SpecOption("last", .integer(last)),
        SpecOption("list", .list(list.map(SpecValue.integer))),
      ])
  }

  /// `layers(first=2,last=2)`, between two stores.
  public static let method = MethodDescription(
    name: "layers", role: .layers, summary: "the store to its right takes some layers of the store to its left",
    options: [
      .init("first", "how many of the first layers"), .init("last", "how many of the last layers"),
      .init("list", "further layers by index, from 0"),
    ]
  ) { (reader) throws(KVError) in
    let first = try reader.int("first", default: 2, in: 0...65_536)
    let last = try reader.int("last", default: 2, in: 0...65_536)
    let list = try reader.intList("list", default: [], in: 0...65_535)
    return .layers(try LayerChoice(first: first, last: last, list: list))
  }
}
