public import KVCore

/// The low-rank family: one file a method. Every entry is a row of choices over `LowRankFormat`.
public enum LowRankMethods {
  public static let all: [MethodDescription] = [
    Store.svdMethod, Store.xKVMethod, Store.matryoshkaMethod, Store.cskvMethod,
  ]
}
