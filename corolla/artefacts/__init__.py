"""What others serve: merged weights, GGUF files, adapters cut to a rank, their model cards."""
