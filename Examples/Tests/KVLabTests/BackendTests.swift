import KVCompression
import KVLabKit
import Testing

@Suite struct BackendTests {
  /// With a card it opens; without one the error says what was looked for.
  @Test func cudaIsFoundOrMissedByName() throws {
    #expect(BackendChoice(rawValue: "cuda") == .cuda && BackendChoice(rawValue: "gpu") == nil)
    do throws(KVError) {
      let backend = try BackendChoice.cuda.backend()
      #expect(backend.name.hasPrefix("cuda ("))
    } catch {
      #expect(error.code == .unavailable && error.message.contains("CUDA"))
    }
  }

  @Test func everyMethodHasACheckThatParses() throws {
    let policies = Conformance.policies
    #expect(policies.count > 40)
    for text in policies { #expect(throws: Never.self) { try PolicyRegistry.standard.policy(text) } }
  }

  @Test func theCPUAgreesWithItself() throws {
    let conformance = try Conformance(.cpu(threads: 1))
    for text in ["f16", "kivi(residual=32)", "h2o(budget=48)"] {
      let outcome = conformance.run(text)
      #expect(outcome.complaint == nil && outcome.distance != nil, "\(outcome)")
    }
    #expect(conformance.run("nothing").complaint != nil)
  }
}
