// swift-tools-version: 6.2
import PackageDescription

let settings: [SwiftSetting] = [
  .enableExperimentalFeature("Lifetimes"),
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("InternalImportsByDefault"),
  .enableUpcomingFeature("MemberImportVisibility"),
]

let testSettings = settings

let package = Package(
  name: "swift-kv-compression",
  platforms: [.macOS(.v15), .iOS(.v18)],
  products: [
    .library(name: "KVCompression", targets: ["KVCompression"]),
    .library(name: "KVExperiments", targets: ["KVExperiments"]),
  ],
  targets: [
    // C: kernels with run-time dispatch, and the BLAS/LAPACK the system provides.
    .target(name: "CKVKernels"),
    .systemLibrary(
      name: "COpenBLAS", pkgConfig: "openblas",
      providers: [.apt(["libopenblas-dev", "liblapacke-dev"])]),

    // The core knows no family and no backend.
    .target(
      name: "KVCore",
      // Debug builds, and so the tests, check the invariants of every segment after every change.
      swiftSettings: settings + [.define("KV_INTERNAL_CHECKS", .when(configuration: .debug))]),
    .target(
      name: "KVBackendCPU",
      dependencies: [
        "KVCore", "CKVKernels",
        .target(name: "COpenBLAS", condition: .when(platforms: [.linux])),
      ],
      swiftSettings: settings,
      linkerSettings: [.linkedFramework("Accelerate", .when(platforms: [.macOS, .iOS]))]),

    // CUDA, loaded at run time: no part of it is needed to build. Kernels are compiled to PTX by `make ptx`.
    .target(name: "CKVCUDA", exclude: ["kernels", "ptx"]),
    .target(
      name: "KVBackendCUDA", dependencies: ["KVCore", "KVBackendCPU", "CKVCUDA"], swiftSettings: settings),

    // One module a family of methods.
    .target(name: "KVEviction", dependencies: ["KVCore"], swiftSettings: settings),
    .target(name: "KVQuantization", dependencies: ["KVCore", "KVTensorFiles"], swiftSettings: settings),
    .target(name: "KVMerging", dependencies: ["KVCore"], swiftSettings: settings),

    .target(name: "KVLowRank", dependencies: ["KVCore", "KVTensorFiles"], swiftSettings: settings),

    // Safetensors, and calibrations in them. No Foundation: policies that name a file are read through it.
    .target(name: "KVTensorFiles", dependencies: ["KVCore"], swiftSettings: settings),

    // Calibrations made of sample texts.
    .target(
      name: "KVCalibration", dependencies: ["KVCore", "KVBackendCPU", "KVTensorFiles"], swiftSettings: settings),

    // The umbrella: registry of policies by name, and everything re-exported.
    .target(
      name: "KVCompression",
      dependencies: [
        "KVCore", "KVBackendCPU", "KVBackendCUDA", "KVEviction", "KVQuantization", "KVMerging", "KVLowRank",
        "KVTensorFiles", "KVCalibration",
      ],
      swiftSettings: settings),

    // For experiments and tests: synthetic caches, dumps, metrics. Uses Foundation; the library above does not.
    .target(
      name: "KVExperiments",
      dependencies: ["KVCore", "KVBackendCPU", "KVTensorFiles", "KVCalibration", "KVCompression"],
      swiftSettings: settings),

    .testTarget(
      name: "KVCoreTests", dependencies: ["KVCore"], swiftSettings: testSettings),
    .testTarget(
      name: "KVExperimentsTests", dependencies: ["KVExperiments", "KVTensorFiles", "KVCore"],
      swiftSettings: testSettings),
    .target(name: "CAllocationCounter", path: "Tests/CAllocationCounter"),
    .testTarget(
      name: "KVCompressionTests",
      dependencies: [
        "CAllocationCounter",
        "KVCompression", "KVCore", "KVBackendCPU", "KVEviction", "KVQuantization", "KVLowRank", "KVMerging",
        "KVExperiments", "KVTensorFiles", "KVCalibration",
        "CKVKernels",
      ],
      exclude: ["Goldens"], swiftSettings: testSettings),
    // The CUDA kernels as C++ on the CPU, and the whole backend on top of them.
    .target(name: "CCUDAEmulation", path: "Tests/CCUDAEmulation"),
    .testTarget(
      name: "KVBackendCUDATests",
      dependencies: [
        "KVBackendCUDA", "KVCompression", "KVExperiments", "KVCore", "KVBackendCPU", "CCUDAEmulation", "CKVCUDA",
      ],
      swiftSettings: testSettings),
  ],
  swiftLanguageModes: [.v6],
  cLanguageStandard: .c17,
  cxxLanguageStandard: .cxx20
)
