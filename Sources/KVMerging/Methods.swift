public import KVCore

/// The merging family: one file a method.
public enum MergingMethods {
  public static let all: [MethodDescription] = [
    Selection.mergeMethod, Selection.camMethod, Selection.d2oMethod, Selection.kvMergerMethod, Store.miniCacheMethod,
  ]
}
