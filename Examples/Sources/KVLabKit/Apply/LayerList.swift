package import KVCompression

/// Layers as a person writes them: `0,3,5-7`.
package struct LayerList: Sendable, Hashable {
  /// Ascending, each once.
  package let layers: [Int]

  /// - Throws: `syntax` with the byte where it stopped.
  package init(_ text: String) throws(KVError) {
    var layers: Set<Int> = []
    var offset = 0
    for piece in text.split(separator: ",", omittingEmptySubsequences: false) {
      let bounds = piece.split(separator: "-", maxSplits: 1, omittingEmptySubsequences: false)
        .map { Int(String($0).trimmed) }
      guard let first = bounds[0], let last = bounds.count == 1 ? first : bounds[1], first >= 0, last >= first,
        last < 1 << 16
      else {
        throw KVError(
          .syntax, "expected layers such as 0,3,5-7, found \"\(piece)\"", offset: offset)
      }
      layers.formUnion(first...last)
      offset += piece.utf8.count + 1
    }
    self.layers = layers.sorted()
  }
}
