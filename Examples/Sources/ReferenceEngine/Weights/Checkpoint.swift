import Foundation
import KVCompression
import KVExperiments

/// The tensors of a checkpoint directory: one `model.safetensors`, or shards named by `model.safetensors.index.json`.
struct Checkpoint {
  /// Path and open file of each shard.
  private var shards: [(path: String, file: SafeTensorsFile)] = []
  private var shardOf: [String: Int] = [:]
  private let source: String

  init(directory: String) throws(KVError) {
    let single = directory + "/model.safetensors"
    let index = single + ".index.json"
    if FileReading.exists(single) {
      source = single
      shards = [(single, try Self.open(single))]
      for name in shards[0].file.tensors.keys { shardOf[name] = 0 }
    } else if FileReading.exists(index) {
      source = index
      try readShards(index: index, directory: directory)
    } else {
      throw KVError(
        .inputOutput, "\(directory) holds neither model.safetensors nor model.safetensors.index.json")
    }
  }

  private static func open(_ path: String) throws(KVError) -> SafeTensorsFile {
    do throws(KVError) {
      return try SafeTensorsFile(path: path)
    } catch {
      throw KVError(error.code, "\(path): \(error.message)", offset: error.offset)
    }
  }

  private mutating func readShards(index: String, directory: String) throws(KVError) {
    let map = try FileReading.json(at: index, atMost: 1 << 28).object("weight_map")
    var numberOf: [String: Int] = [:]
    for member in map.members {
      guard case .string(let name) = member.value else {
        throw map.failure(JSONValue.shortened(member.key), expected: "a file name", got: member.value)
      }
      // A shard lies in the checkpoint's own directory, whatever the index says.
      guard !name.isEmpty, name != "..", !name.utf8.contains(where: { $0 == UInt8(ascii: "/") || $0 == 0 }) else {
        throw map.failure(JSONValue.shortened(member.key), expected: "a plain file name", got: member.value)
      }
      let shard: Int
      if let known = numberOf[name] {
        shard = known
      } else {
        shard = shards.count
        numberOf[name] = shard
        shards.append((directory + "/" + name, try Self.open(directory + "/" + name)))
      }
      guard shards[shard].file.tensors[member.key] != nil else {
        throw KVError(
          .corruptFile, "\(index): tensor \(JSONValue.shortened(member.key)) should be in \(name) and is not")
      }
      guard shardOf.updateValue(shard, forKey: member.key) == nil else {
        throw KVError(.corruptFile, "\(index): tensor \(JSONValue.shortened(member.key)) stands twice")
      }
    }
  }

  func contains(_ name: String) -> Bool { shardOf[name] != nil }

  /// Checks presence, shape and element type without reading the elements.
  func check(_ name: String, shape: [Int]) throws(KVError) {
    let (path, file) = try shard(of: name, shape: shape)
    guard let entry = file.tensors[name], entry.shape == shape else {
      throw KVError(
        .corruptFile,
        "\(path): tensor \(name) must have shape \(shape) by the configuration; found "
          + "\(file.tensors[name]?.shape ?? [])")
    }
    guard [.f32, .f16, .bf16].contains(entry.type) else {
      throw KVError(.unsupported, "\(path): tensor \(name) is \(entry.type); this engine reads F32, F16 and BF16")
    }
  }

  /// The elements as f32, row-major.
  func floats(_ name: String, shape: [Int]) throws(KVError) -> [Float] {
    try check(name, shape: shape)
    let (path, file) = try shard(of: name, shape: shape)
    do throws(KVError) {
      return try file.floats(named: name, shape: shape)
    } catch {
      throw KVError(error.code, "\(path): \(error.message)", offset: error.offset)
    }
  }

  private func shard(of name: String, shape: [Int]) throws(KVError) -> (path: String, file: SafeTensorsFile) {
    guard let index = shardOf[name] else {
      throw KVError(.corruptFile, "\(source): tensor \(name) of shape \(shape) is missing")
    }
    return shards[index]
  }
}
