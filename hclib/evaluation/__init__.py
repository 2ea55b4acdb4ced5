"""Numbers from scores: exact metrics, thresholds, label scenarios, Records, published tables."""
