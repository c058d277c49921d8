public import KVCore

/// The eviction family: one file a method.
public enum EvictionMethods {
  public static let all: [MethodDescription] = [
    Selection.streamingLLMMethod, Selection.h2oMethod, Selection.snapKVMethod,
    Selection.pyramidKVMethod, Selection.adaSnapKVMethod, Selection.adaPyramidKVMethod,
    Selection.prefixKVMethod, Selection.chunkKVMethod, Selection.duoAttentionMethod, Selection.prefixMethod,
    Selection.chunksMethod, Selection.evenMethod, Selection.sharedMethod, Selection.thresholdMethod,
    Selection.headsMethod, Selection.criticalKVMethod, Selection.knormMethod, Selection.keyDiffMethod,
    Selection.lagKVMethod,
    Selection.expectedAttentionMethod, Selection.randomMethod, Selection.criticalMethod,
    Selection.pyramidMethod, Selection.adaKVMethod,
    Selection.tovaMethod, Selection.lazyEvictionMethod,
    Selection.scissorhandsMethod, Selection.cakeMethod,
    Selection.positionsMethod, Selection.kvCrushMethod, Selection.crushMethod,
    Selection.scheduleMethod,
  ]
}
