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
}
