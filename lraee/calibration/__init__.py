"""How early exits are learned: features, heads, gates, thresholds, time."""
