internal import KVCore

#if canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#else
  internal import Darwin
#endif

/// The bytes of a file, in memory or on disk. Reads on disk are positioned, so that threads may share one source;
/// a file that shrinks after opening gives an error, where a mapping would kill the process.
final class ByteSource: Sendable {
  private enum Storage: Sendable {
    case memory([UInt8])
    case file(descriptor: Int32, path: String)
  }

  private let storage: Storage
  let count: Int

  init(_ bytes: [UInt8]) {
    storage = .memory(bytes)
    count = bytes.count
  }

  init(path: String) throws(KVError) {
    guard !path.utf8.contains(0) else { throw KVError(.inputOutput, "a path must not hold a zero byte") }
    let descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    guard descriptor >= 0 else {
      throw KVError(.inputOutput, "cannot open '\(path)' for reading: \(systemErrorText())")
    }
    var status = stat()
    guard fstat(descriptor, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
      close(descriptor)
      throw KVError(.inputOutput, "'\(path)' is not a regular file")
    }
    storage = .file(descriptor: descriptor, path: path)
    count = Int(status.st_size)
  }

  deinit {
    if case .file(let descriptor, _) = storage { close(descriptor) }
  }

  /// Copies `range`, which must lie in `0..<count`, to `target`, which must hold as many bytes.
  func read(_ range: Range<Int>, into target: UnsafeMutableRawBufferPointer) throws(KVError) {
    precondition(range.lowerBound >= 0 && range.upperBound <= count && target.count == range.count)
    switch storage {
    case .memory(let bytes):
      bytes[range].withUnsafeBytes { target.copyMemory(from: $0) }
    case .file(let descriptor, let path):
      guard let base = target.baseAddress else { return }
      var done = 0
      while done < range.count {
        let result = pread(descriptor, base + done, range.count - done, off_t(range.lowerBound + done))
        if result < 0, errno == EINTR { continue }
        guard result > 0 else {
          let reason = result == 0 ? "the file became shorter while it was open" : systemErrorText()
          throw KVError(
            .inputOutput, "cannot read \(range.count - done) bytes of '\(path)': \(reason)",
            offset: range.lowerBound + done)
        }
        done += result
      }
    }
  }

  /// One copy of `range`.
  func bytes(_ range: Range<Int>) throws(KVError) -> [UInt8] {
    var result = [UInt8](repeating: 0, count: range.count)
    var failure: KVError?
    result.withUnsafeMutableBytes { target in
      do throws(KVError) { try read(range, into: target) } catch { failure = error }
    }
    if let failure { throw failure }
    return result
  }

  /// Elements of `Word`, little end first, each converted by `convert`. Reads through one small buffer, so that the
  /// result is the only large allocation.
  func convert<Word: FixedWidthInteger, Element>(
    _ range: Range<Int>, as word: Word.Type, _ convert: (Word) -> Element
  ) throws(KVError) -> [Element] {
    let size = MemoryLayout<Word>.size
    var result: [Element] = []
    result.reserveCapacity(range.count / size)
    var start = range.lowerBound
    while start < range.upperBound {
      let piece = try bytes(start..<min(start + 65536, range.upperBound))
      piece.withUnsafeBytes { raw in
        for at in stride(from: 0, to: raw.count, by: size) {
          result.append(convert(Word(littleEndian: raw.loadUnaligned(fromByteOffset: at, as: Word.self))))
        }
      }
      start += piece.count
    }
    return result
  }
}

/// What the last failed system call says.
func systemErrorText() -> String { String(cString: strerror(errno)) }
