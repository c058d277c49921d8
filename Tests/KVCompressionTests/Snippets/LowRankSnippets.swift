import Foundation
import KVCompression
import Testing

/// The code of the low-rank pages, compiled and run.
@Suite struct LowRankSnippets {
  @Test func stores() throws {
    let svd = Policy(store: try .svd(keyRank: .share(0.25), valueRank: .share(0.25), latents: .int8))
    let xkv = Policy(store: try .xKV(layers: 4, keyRank: .share(0.125), valueRank: .share(0.1875)))

    try check([svd, xkv])
  }

  @Test func calibrationFiles() throws {
    let path = FileManager.default.temporaryDirectory.appending(path: "orders-\(UUID()).safetensors").path()
    defer { try? FileManager.default.removeItem(atPath: path) }
    let name = Calibration.Name(layer: 0, side: .keys, quantity: "order")
    let orders = try Calibration(
      [name: .init(shape: [2, 4], integers: [3, 1, 0, 2, 0, 1, 2, 3])],
      metadata: ["method": "channel-order", "rope": "pre"])
    try orders.write(to: path)
    let loaded = try Calibration(contentsOf: path)
    print(try loaded.channelOrders(of: .keys, layer: 0, units: 2, width: 4)[0])  // [3, 1, 0, 2]

    #expect(loaded == orders && loaded.checksum == orders.checksum)
  }

  /// Each prints as a text that makes it again.
  private func check(_ policies: [Policy]) throws {
    for policy in policies { #expect(try PolicyRegistry.standard.policy(policy.spec).spec == policy.spec) }
  }
}
