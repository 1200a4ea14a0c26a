"""What others serve: merged weights, GGUF files, adapters of a rank, model cards, kept updates."""
