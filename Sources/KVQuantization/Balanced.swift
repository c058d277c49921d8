public import KVCore

/// MiKV's outlier balancer: keys are divided by a factor per channel before they are encoded, and queries multiplied by
/// it. arXiv 2402.18096.
///
/// Needs: the queries of the prompt. Runs: factors at the end of the prompt, from all its keys and queries; later keys use
/// the same.
///
/// `factor = sqrt(max |k| / max |q|)` per KV head and channel, within 1e-4 and 1e4; 1 for a channel of zeros. A product
/// does not change, but a channel that is large in keys and small in queries no longer sets the range of a token's codes.
/// It stands behind the store whose keys it balances; where rows go to several stores, only that one is changed.
///
/// Differs from the paper: maxima of queries are over the query heads of a group; the clamp is ours; rows for which the
/// factors would overflow f16 get factors of their own, from their magnitudes alone.
extension Store {
  /// - Throws: `invalidOption` for stores whose keys are not encoded, are rotated or scaled per channel already.
  public func balanced() throws(KVError) -> Store {
    modified(by: StageSpec(name: "balanced"), factory: try factory.balanced())
  }

  /// `kivi(bits=2)+balanced`.
  public static let balancedMethod = MethodDescription(
    name: "balanced", role: .storeModifier,
    summary: "key outliers are moved into the queries by a factor per channel", paper: "arXiv 2402.18096", options: []
  ) { (_) throws(KVError) in
    .storeModifier { (store) throws(KVError) in try store.balanced() }
  }
}
