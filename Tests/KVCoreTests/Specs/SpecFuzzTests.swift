import KVCore
import Testing

/// SplitMix64: the same texts on every machine.
private struct Random: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
    return z ^ z >> 31
  }
}

/// Random texts: no crash, no hang, and what parses prints to something that parses to the same.
@Suite struct SpecFuzzTests {
  private static let seeds = [
    "snapkv(budget=0.25,window=32)+kivi(bits=2)", "a(x=\"q\\u00e9\\n\",y=[[1,2.5e3],[64MiB,25%]],z=true)+b-c_d()",
    #"{"stages":[{"name":"snapkv","options":{"budget":"25%","l":[[1],[-2.5e-3]],"t":"\ud83d\ude00"}},{"name":"k"}]}"#,
    #"[{"name":"a","options":{"x":true,"y":[null,{}]}}]"#, #""a(x=1)+b""#,
  ]
  private static let alphabet =
    Array("abz019.,()[]{}+-=%\"\\:eEuB \nMiKG\u{00e9}\u{0}truefalsn".utf8) + [0xFF, 0xC3, 0x80]

  private static func mutate(_ seed: [UInt8], with random: inout Random) -> [UInt8] {
    var bytes = seed
    for _ in 0..<Int.random(in: 1...4, using: &random) {
      let at = Int.random(in: 0...bytes.count, using: &random)
      switch Int.random(in: 0..<4, using: &random) {
      case 0: bytes.insert(alphabet.randomElement(using: &random)!, at: at)
      case 1: if at < bytes.count { bytes[at] = alphabet.randomElement(using: &random)! }
      case 2: if at < bytes.count { bytes.remove(at: at) }
      default:
        let end = Int.random(in: at...bytes.count, using: &random)
        bytes.insert(contentsOf: bytes[at..<end], at: at)
      }
    }
    return bytes
  }

  @Test func mutatedTexts() throws {
    var random = Random(state: 20_240_517)
    let clock = ContinuousClock()
    let end = clock.now + .seconds(2)
    var parsed = 0
    var rounds = 0
    while rounds < 60_000, clock.now < end {
      rounds += 1
      let seed = Array(SpecFuzzTests.seeds.randomElement(using: &random)!.utf8)
      let bytes = SpecFuzzTests.mutate(seed, with: &random)
      let text = String(decoding: bytes, as: UTF8.self)
      do {
        let spec = try PolicySpec(configuration: text)
        parsed += 1
        #expect(try PolicySpec(parsing: spec.description) == spec, "\(text)")
        #expect(try PolicySpec(json: spec.json()) == spec, "\(text)")
      } catch {
        #expect(error.code == .syntax, "\(text)")
        #expect(error.offset.map { $0 <= text.utf8.count } ?? true, "\(text)")
      }
      do {
        let json = try JSONValue(parsing: bytes)
        #expect(try JSONValue(parsing: json.text()) == json, "\(text)")
      } catch {
        #expect(error.code == .syntax && error.offset != nil && error.offset! <= bytes.count, "\(text)")
      }
      _ = try? Budget(parsing: text)
    }
    #expect(parsed > 100, "\(parsed) of \(rounds) texts parsed")
  }
}
