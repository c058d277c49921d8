#if canImport(Darwin)
  internal import Darwin
#elseif canImport(Glibc)
  internal import Glibc
#elseif canImport(Musl)
  internal import Musl
#endif

/// An error of the system about a file, from `errno`.
func systemError(_ action: String, _ path: String) -> KVError {
  let code = errno
  let text = unsafe strerror(code).map { unsafe String(cString: $0) } ?? "unknown error"
  return KVError(.inputOutput, "cannot \(action) \(path): \(text) (errno \(code))")
}

/// Repeats a call that a signal interrupted.
private func retrying<Result: SignedInteger>(_ call: () -> Result) -> Result {
  while true {
    let result = call()
    if result != -1 || errno != EINTR { return result }
  }
}

/// Largest request to read or write: some systems refuse 2 GiB and more in one call.
private let largestRequest = 1 << 30

/// A file open for reading at any offset, closed when the last reader goes.
final class FileSource: ByteSource {
  let count: Int
  private let path: String
  private let descriptor: Int32

  init(path: String) throws(KVError) {
    // Not blocking, so that a named pipe is refused below instead of waited for.
    let descriptor = retrying { unsafe open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK) }
    guard descriptor >= 0 else { throw systemError("open", path) }
    var status = stat()
    guard unsafe fstat(descriptor, &status) == 0 else {
      let error = systemError("examine", path)
      close(descriptor)
      throw error
    }
    guard status.st_mode & S_IFMT == S_IFREG else {
      close(descriptor)
      throw KVError(.inputOutput, "cannot read \(path): it is not a regular file")
    }
    self.path = path
    self.descriptor = descriptor
    count = Int(status.st_size)
  }

  deinit { close(descriptor) }

  func read(_ range: Range<Int>) throws(KVError) -> [UInt8] {
    var failure: KVError?
    let bytes = unsafe [UInt8](unsafeUninitializedCapacity: range.count) { buffer, filled in
      while filled < range.count {
        let rest = min(range.count - filled, largestRequest)
        let taken = retrying {
          unsafe pread(descriptor, buffer.baseAddress! + filled, rest, off_t(range.lowerBound + filled))
        }
        guard taken > 0 else {
          failure =
            taken < 0
            ? systemError("read", path)
            : KVError(.corruptFile, "\(path) became shorter while it was read", offset: range.lowerBound + filled)
          return
        }
        filled += taken
      }
    }
    if let failure { throw failure }
    return bytes
  }
}

/// A text file as it is; bytes that are not UTF-8 become replacement characters.
///
/// - Throws: `inputOutput`, also for a file of more than `limit` bytes.
package func readText(_ path: String, atMost limit: Int) throws(KVError) -> String {
  guard !path.utf8.contains(0) else { throw KVError(.inputOutput, "a path holds no NUL") }
  let source = try FileSource(path: path)
  guard source.count <= limit else {
    throw KVError(.inputOutput, "cannot read \(path): \(source.count) bytes, at most \(limit) expected")
  }
  return String(decoding: try source.read(0..<source.count), as: UTF8.self)
}

/// A file that appears under its name only when it is complete.
final class AtomicFile {
  private let path: String
  private let temporary: String
  private var descriptor: Int32

  init(replacing path: String) throws(KVError) {
    self.path = path
    var attempt = 0
    while true {
      let suffix = String(UInt64.random(in: 0...UInt64.max), radix: 36)
      let name = "\(path).\(suffix).tmp"
      let opened = retrying { unsafe open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o666) }
      if opened >= 0 {
        temporary = name
        descriptor = opened
        return
      }
      attempt += 1
      if errno != EEXIST || attempt == 8 { throw systemError("create", name) }
    }
  }

  func write(_ bytes: [UInt8]) throws(KVError) {
    var done = 0
    while done < bytes.count {
      let rest = min(bytes.count - done, largestRequest)
      let written = unsafe bytes.withUnsafeBytes { raw in
        retrying { unsafe Self.systemWrite(descriptor, raw.baseAddress! + done, rest) }
      }
      guard written > 0 else { throw systemError("write", temporary) }
      done += written
    }
  }

  /// Durable under the final name, or an error and the old file still there.
  func commit() throws(KVError) {
    guard retrying({ fsync(descriptor) }) == 0 else { throw systemError("sync", temporary) }
    let closed = close(descriptor)
    descriptor = -1
    guard closed == 0 else { throw systemError("close", temporary) }
    guard unsafe rename(temporary, path) == 0 else { throw systemError("rename to", path) }
    // The rename is done; a folder that cannot be synced (some network file systems) is no reason to report failure.
    let folder = path.utf8.lastIndex(of: 0x2F).map { $0 == path.startIndex ? "/" : String(path[..<$0]) } ?? "."
    let directory = unsafe open(folder, O_RDONLY | O_CLOEXEC)
    if directory >= 0 {
      _ = fsync(directory)
      close(directory)
    }
  }

  /// Removes what was written so far.
  func abandon() {
    if descriptor >= 0 { close(descriptor) }
    descriptor = -1
    unsafe unlink(temporary)
  }

  private static func systemWrite(_ descriptor: Int32, _ bytes: UnsafeRawPointer, _ count: Int) -> Int {
    #if canImport(Darwin)
      unsafe Darwin.write(descriptor, bytes, count)
    #elseif canImport(Glibc)
      unsafe Glibc.write(descriptor, bytes, count)
    #elseif canImport(Musl)
      unsafe Musl.write(descriptor, bytes, count)
    #endif
  }
}
