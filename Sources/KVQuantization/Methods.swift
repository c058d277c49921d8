public import KVCore

/// The quantization family: one file a method. Every entry is a row of choices over `RowEncoding` and `SideFormat`.
public enum QuantizationMethods {
  public static let all: [MethodDescription] = [
    Store.kiviMethod, Store.cstMethod, Store.perTokenMethod, Store.int8Method, Store.fp8Method, Store.ggmlMethod,
    Store.quantMethod, Store.rotateKVMethod, Store.rotatedMethod, Store.balancedMethod, Selection.tiersMethod,
    Selection.zipCacheMethod,
    Selection.miKVMethod,
  ]
}
