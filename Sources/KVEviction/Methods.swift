public import KVCore

/// The eviction family: one file a method.
public enum EvictionMethods {
  public static let all: [MethodDescription] = [
    Selection.streamingLLMMethod, Selection.h2oMethod, Selection.snapKVMethod,
    Selection.pyramidKVMethod, Selection.adaSnapKVMethod, Selection.adaPyramidKVMethod,
    Selection.pyramidMethod, Selection.adaKVMethod,
    Selection.tovaMethod, Selection.lazyEvictionMethod,
    Selection.scheduleMethod,
  ]
}
