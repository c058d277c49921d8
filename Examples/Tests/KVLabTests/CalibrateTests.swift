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
