"""What others serve: merged weights, GGUF files, adapters cut to a rank, model cards; kept updates."""
