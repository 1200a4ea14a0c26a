"""What a phone is given and what it says: protocol, bundles, lowering and tokens."""
