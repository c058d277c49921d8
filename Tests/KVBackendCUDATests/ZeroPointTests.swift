import CCUDAEmulation
import KVBackendCPU
import KVCore
import KVExperiments
import Testing

@testable import KVBackendCUDA

extension CUDATests {
  /// Codes around zero points, bit for bit.
  @Suite struct ZeroPointTests {
    /// Groups of every kind: of both signs, of one, equal, closer than a scale can tell, and near the end of what is held.
    static func rows(_ count: Int, _ dim: Int) -> [Float] {
      var numbers = FedCache.Numbers(seed: 3)
      var rows = (0..<count * dim).map { _ in numbers.next() }
      for row in 0..<count {
        for c in 0..<dim {
          let index = row * dim + c
          switch (row / 32 * 5 + row % 5 + c / 8) % 6 {
          case 0: break
          case 1: rows[index] = abs(rows[index]) + 3
          case 2: rows[index] = -abs(rows[index]) * 1e-3 - 1
          case 3: rows[index] = c % 2 == 0 ? 0 : -0.0
          case 4: rows[index] *= 1e-7
          default: rows[index] *= 30_000
          }
        }
      }
      return rows
    }

    static let zeros: [ZeroPoint] = [.clamped, try! ZeroPoint(), try! ZeroPoint(clip: 0.9)]

    @Test(arguments: [2, 3, 4, 8], [ElementType.f16, .bf16, .f32])
    func codesAreTheProcessors(bits: Int, metadata: ElementType) throws {
      for dim in [1, 40, 64, 130] {
        var encodings: [RowEncoding] = [
          try .affinePerChannel(bits: bits, group: 32, zero: .clamped, metadata: metadata)
        ]
        for zero in Self.zeros {
          encodings.append(try .affinePerToken(bits: bits, group: 32, zero: zero, metadata: metadata))
        }
        for encoding in encodings { try compare(encoding, dim: dim) }
      }
    }

    private func compare(_ encoding: RowEncoding, dim: Int) throws {
      let count = 64
      var rows = Self.rows(count, dim)
      let size = encoding.bytes(rows: count, dim: dim)
      func encoded(_ backend: any ComputeBackend) throws -> (bytes: [UInt8], rows: [Float]) {
        let buffer = try backend.allocate(byteCount: size, hostVisible: false)
        let run = RowRun(encoding: encoding, dim: dim, capacity: count, base: buffer.base)
        rows.withUnsafeMutableBytes { raw in
          let source = RowRun(encoding: .dense(.f32), dim: dim, capacity: count, base: raw.baseAddress!)
          // In two pieces: the second begins behind rows that are there.
          for first in [0, 32] {
            withUnsafePointer(to: RunSlice(run: source, first: first, count: 32)) {
              backend.transcode(UnsafeBufferPointer(start: $0, count: 1), to: run, row: first)
            }
          }
        }
        var bytes = [UInt8](repeating: 0, count: size)
        bytes.withUnsafeMutableBytes { backend.copy(from: buffer.base, toHost: $0.baseAddress!, byteCount: size) }
        var back = [Float](repeating: 0, count: count * dim)
        back.withUnsafeMutableBufferPointer {
          backend.read(RunSlice(run: run, first: 0, count: count), into: $0.baseAddress!, stride: dim)
        }
        return (bytes, back)
      }
      let own = try encoded(emulated().operations)
      let other = try encoded(CPUBackend(threads: 1, level: "portable"))
      let wrong = zip(own.bytes, other.bytes).enumerated().filter { $0.element.0 != $0.element.1 }
      #expect(wrong.isEmpty, "\(encoding), \(dim) channels: \(wrong.count) of \(size) bytes from \(wrong.first!) on")
      #expect(own.rows == other.rows, "\(encoding), \(dim) channels")
    }
  }
}
