"""Files that phones are given and messages they send: protocol, bundles, lowering and tokens."""
