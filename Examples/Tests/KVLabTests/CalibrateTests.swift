import Foundation
import KVCompression
import KVExperiments
import KVLabKit
import ReferenceEngine
import Testing

@Suite struct CalibrateTests {
  /// What comes out of the packaged model fits it, whatever the method.
  @Test func calibrationsOfTheModelFitIt() throws {
    let engine = try Engine(directory: PackagedFiles.model(or: nil))
    let texts = try PackagedFiles.readTexts(at: PackagedFiles.texts(or: nil))
    let shape = engine.model.config.shape
    for method in CalibrateOptions.methods {
      var options = CalibrateOptions(method: method)
      options.tokens = 300
      options.context = 128
      for start in method == "cskv" ? FactorStart.allCases : [.samples] {
        options.start = start
        options.refit = start != .samples
        let made = try CalibrationRun(options).run(engine, texts: texts, NoProgress())
        #expect(made.metadata["tokens"] == "300")
        switch method {
        case "rotatekv":
          for layer in shape.layers.indices {
            _ = try made.channelOrders(of: .keys, layer: layer, units: 1, width: 128)
          }
        case "pca":
          _ = try KVCache(
            shape: shape, policy: Policy(store: .matryoshka(calibration: NamedCalibration(made))),
            backend: .cpu(threads: 1))
        default:
          _ = try KVCache(
            shape: shape, policy: Policy(store: .cskv(calibration: NamedCalibration(made))), backend: .cpu(threads: 1))
        }
      }
    }
  }

  /// The model itself says which heads can do with half of their channels.
  @Test func ranksByRunningTheModel() throws {
    let engine = try Engine(directory: PackagedFiles.model(or: nil))
    let texts = try PackagedFiles.readTexts(at: PackagedFiles.texts(or: nil))
    var options = CalibrateOptions(method: "pca")
    options.tokens = 200
    options.context = 100
    var rates = RateOptions()
    rates.together = 8
    rates.share = 0.875
    rates.pieces = 1
    rates.context = 48
    options.rates = rates
    let made = try CalibrationRun(options).run(engine, texts: texts, NoProgress())
    func ranks(_ made: Calibration) throws -> [Int] {
      try engine.model.config.shape.layers.indices.flatMap { layer in
        try Calibration.Side.allCases.flatMap {
          try made.integers("ranks", of: $0, layer: layer, shape: [2], in: 1...64)
        }
      }
    }
    let found = try ranks(made)
    #expect(found.count { $0 == 32 } == 8 && found.count { $0 == 64 } == 24)
    // Eight others cost more.
    let pieces = try CalibrationRun.trialPieces(
      of: texts.map { engine.tokenizer.encode($0) }, prefix: engine.promptPrefix, rates)
    let trial = try RateTrial(engine.model, pieces: pieces, .cpu())
    var left = 8
    var tensors = made.tensors
    for layer in engine.model.config.shape.layers.indices {
      for side in Calibration.Side.allCases {
        let own = try made.integers("ranks", of: side, layer: layer, shape: [2], in: 1...64).map { rank -> Int32 in
          if rank == 64, left > 0 {
            left -= 1
            return 32
          }
          return 64
        }
        tensors[.init(layer: layer, side: side, quantity: "ranks")] = .init(shape: [2], integers: own)
      }
    }
    let chosen = try trial.divergence(made)
    #expect(chosen > 0)
    #expect(try chosen < trial.divergence(Calibration(tensors, metadata: made.metadata)))
    let path = FileManager.default.temporaryDirectory.appending(path: "ranks-\(UUID()).safetensors").path()
    defer { try? FileManager.default.removeItem(atPath: path) }
    try made.write(to: path)
    let policy = try PolicyRegistry.standard.policy("matryoshka(calibration=\"\(path)\",rates=file)")
    _ = try KVCache(shape: engine.model.config.shape, policy: policy, backend: .cpu(threads: 1))
    options.method = "cskv"
    #expect { try CalibrationRun(options) } throws: { ($0 as? KVError)?.code == .invalidOption }
    options.method = "pca"
    options.rates?.context = 1_000_000
    #expect { try CalibrationRun(options).run(engine, texts: texts, NoProgress()) } throws: {
      ($0 as? KVError)?.code == .missingInput
    }
  }

  @Test func piecesOfTexts() throws {
    var options = CalibrateOptions(method: "pca")
    options.context = 4
    options.tokens = 12
    let pieces = try CalibrationRun(options).pieces(of: [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10]], prefix: [0])
    #expect(pieces == [[0, 1, 2, 3], [0, 6], [0, 7, 8, 9], [0, 4]])
  }

  /// A dump gives what its layers give, and no more.
  @Test func dumps() throws {
    var synthetic = SyntheticOptions()
    synthetic.layers = 2
    synthetic.tokens = 64
    synthetic.dim = 32
    let dump = try CacheDump(SyntheticCache(synthetic))
    let made = try CalibrationRun(CalibrateOptions(method: "pca")).run(dump, NoProgress())
    #expect(made.layers(with: "basis", of: .keys) == [0, 1] && made.tensor("weight", of: .keys, layer: 1) != nil)
    var options = CalibrateOptions(method: "cskv")
    options.start = .weights
    #expect { try CalibrationRun(options).run(dump, NoProgress()) } throws: {
      ($0 as? KVError)?.code == .missingInput
    }
    #expect { try CalibrationRun(CalibrateOptions(method: "other")) } throws: {
      ($0 as? KVError)?.code == .unknownName
    }
  }
}
