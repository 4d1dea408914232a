"""One file per protocol: what a client sends, and what it gets."""
