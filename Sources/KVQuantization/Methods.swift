public import KVCore

/// The quantization family: one file a method. Every entry is a row of choices over `RowEncoding` and `SideFormat`.
public enum QuantizationMethods {
  public static let all: [MethodDescription] = [
    Store.kiviMethod, Store.cstMethod, Store.rotatedMethod, Store.balancedMethod, Selection.tiersMethod,
  ]
}
