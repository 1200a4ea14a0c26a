"""Writes what a run left in the forms that others serve: a model, an adapter, GGUF; or to a hub."""
