"""Early exits: heads, gates, thresholds, and the router that runs them."""
