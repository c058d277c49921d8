import Foundation
import KVCompression
import ReferenceEngine
import Synchronization
import Testing

@Suite struct RepeatTests {
  /// OpenBLAS has one number of threads for the whole process, which every factorisation changes: what a model computes
  /// on another thread meanwhile must not see it. Long and short passes, one row of logits and all.
  @Test func aPassGivesTheSameBitsWhileOthersFactor() throws {
    let model = try Reference.engine.model
    let tokens = (0..<96).map { 40 + 7 * $0 }
    func pass() throws -> [Float] {
      let session = try InferenceSession(
        model, policy: Policies.exact, backend: .cpu(threads: 1))
      return try session.forward(Array(tokens[..<90]), logits: .all) + session.forward([tokens[90]])
        + session.forward(Array(tokens[91...]))
    }
    let first = try pass()
    let isOver = Atomic<Bool>(false)
    let others = DispatchGroup()
    DispatchQueue.global().async(group: others) {
      while !isOver.load(ordering: .relaxed) {
        withSerialBLAS { Thread.sleep(forTimeInterval: 0.0005) }
        Thread.sleep(forTimeInterval: 0.0005)
      }
    }
    for _ in 0..<20 { #expect(try pass() == first) }
    isOver.store(true, ordering: .relaxed)
    others.wait()
  }
}
