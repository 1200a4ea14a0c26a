"""Files that others serve: merged weights, GGUF, adapters of a rank, model cards, kept updates."""
