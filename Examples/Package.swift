// swift-tools-version: 6.2
import PackageDescription

// A package of its own, so that users of the library never resolve what only examples need.

let settings: [SwiftSetting] = [
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("InternalImportsByDefault"),
  .enableUpcomingFeature("MemberImportVisibility"),
]

let package = Package(
  name: "kv-compression-examples",
  platforms: [.macOS(.v15), .iOS(.v18)],
  products: [
    .library(name: "ReferenceEngine", targets: ["ReferenceEngine"]),
    .executable(name: "kvlab", targets: ["kvlab"]),
  ],
  dependencies: [
    .package(name: "swift-kv-compression", path: ".."),
    .package(url: "https://github.com/apple/swift-argument-parser.git", from: "1.8.0"),
  ],
  targets: [
    // The BLAS of the system; Accelerate takes its place on Apple platforms.
    .systemLibrary(name: "CExampleBLAS", pkgConfig: "openblas", providers: [.apt(["libopenblas-dev"])]),
    // A CPU inference engine for Llama, Mistral, Qwen2 and Qwen3 checkpoints that attends through the library.
    .target(
      name: "ReferenceEngine",
      dependencies: [
        .product(name: "KVCompression", package: "swift-kv-compression"),
        .product(name: "KVExperiments", package: "swift-kv-compression"),
        .target(name: "CExampleBLAS", condition: .when(platforms: [.linux])),
      ],
      swiftSettings: settings,
      linkerSettings: [.linkedFramework("Accelerate", .when(platforms: [.macOS, .iOS]))]),
    .testTarget(
      name: "ReferenceEngineTests",
      dependencies: [
        "ReferenceEngine",
        .product(name: "KVCompression", package: "swift-kv-compression"),
        .product(name: "KVExperiments", package: "swift-kv-compression"),
      ],
      exclude: ["Goldens"],
      swiftSettings: settings),
    // kvlab: the program, and what it does apart from reading flags.
    .target(
      name: "KVLabKit",
      dependencies: [
        "ReferenceEngine",
        .product(name: "KVCompression", package: "swift-kv-compression"),
        .product(name: "KVExperiments", package: "swift-kv-compression"),
      ],
      swiftSettings: settings),
    .executableTarget(
      name: "kvlab",
      dependencies: [
        "KVLabKit", "ReferenceEngine",
        .product(name: "KVCompression", package: "swift-kv-compression"),
        .product(name: "KVExperiments", package: "swift-kv-compression"),
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
      ],
      swiftSettings: settings),
    .testTarget(
      name: "KVLabTests",
      dependencies: [
        "KVLabKit", "ReferenceEngine",
        .product(name: "KVCompression", package: "swift-kv-compression"),
        .product(name: "KVExperiments", package: "swift-kv-compression"),
      ],
      swiftSettings: settings),
  ],
  swiftLanguageModes: [.v6],
  cLanguageStandard: .c17
)
