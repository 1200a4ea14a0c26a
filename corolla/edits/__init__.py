"""Edits finished adapters: products of factors in fp64, a module at a time; a file a step."""
