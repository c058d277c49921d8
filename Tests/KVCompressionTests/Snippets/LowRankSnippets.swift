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

  @Test func calibrated() throws {
    let shape = try Geometry(2, 2, 8).shape(layers: 2, rotary: true)
    for method in [CalibrationMethod.principalComponents(), try .shrunkChannels()] {
      let path = FileManager.default.temporaryDirectory.appending(path: "bases-\(UUID()).safetensors").path()
      defer { try? FileManager.default.removeItem(atPath: path) }
      try Samples.calibration(method, shape).write(to: path)
      if method.keysBeforeRotation {
        let factors = try NamedCalibration(contentsOf: path)
        let shrunk = Policy(store: try .cskv(calibration: factors, keyRank: .share(0.5), valueRank: .share(0.5)))

        try check([shrunk])
      } else {
        let pca = try NamedCalibration(contentsOf: path)
        let matryoshka = Policy(store: try .matryoshka(calibration: pca, share: 0.5, step: 4, floor: 4))

        try check([matryoshka])
      }
    }
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
