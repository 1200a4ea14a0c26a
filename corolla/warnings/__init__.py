"""What a run warns of: settings that it does not read, and results that are harmful."""
